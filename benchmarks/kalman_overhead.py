"""What a step of Kalman fine-tuning costs beside plain AdamW: LoRA on SmolLM2-135M in the stock Trainer.

python benchmarks/kalman_overhead.py MODEL
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from kalman_streaming import Rows, adapted
from record import RESULTS, environment, write
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_kalman.training import KalmanCallback
from kalman_conversion import load_model

CASES = {
    "AdamW": None,
    "Kalman, diagonal": {"structure": "diagonal"},
    "Kalman, diagonal, a factor every 8 steps": {"structure": "diagonal", "fisher_every": 8},
    "Kalman, diagonal, empirical factor": {"structure": "diagonal", "fisher": "empirical"},
    "Kalman, block": {"structure": "block"},
    "Kalman, low rank of 10": {"structure": "low_rank"},
    "Kalman, Kronecker": {"structure": "kronecker"},
}


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if len(self.times) == 3:
                torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)


def measured(model, options, batch, length, steps):
    peft_model, clock = adapted(model, 0), Clock()
    cuda = model.device.type == "cuda"
    windows = list(torch.randint(1000, 40000, ((steps + 3) * batch, length)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps + 3,
            max_grad_norm=0.0,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=cuda,
            use_cpu=not cuda,
            dataloader_pin_memory=False,
            accelerator_config={"dispatch_batches": False},
        )
        callbacks = [clock] if options is None else [KalmanCallback(**options), clock]
        trainer = Trainer(peft_model, arguments, train_dataset=Rows(windows), callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.accelerator.unwrap_model(peft_model, keep_fp32_wrapper=False)
    peft_model.unload()
    times = clock.times[3:]
    cuts = statistics.quantiles(times, n=5)
    row = {"seconds": statistics.median(times), "p20": cuts[0], "p80": cuts[-1]}
    return {**row, **({"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if cuda else {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, torch.float32, device)
    result = {"adapters": "LoRA, rank 8, queries and values", "environment": environment(device), "rows": []}
    for batch, length, steps in ((1, 512, 20), (8, 512, 20)) if device == "cuda" else ((1, 128, 6),):
        for name in options.cases:
            row = {"case": name, "batch": batch, "length": length, **measured(model, CASES[name], batch, length, steps)}
            row["seconds_per_1k_tokens"] = 1000 * row["seconds"] / (batch * length)
            result["rows"].append(row)
            first = next(r for r in result["rows"] if r["batch"] == batch)
            row["times_adamw"] = row["seconds"] / first["seconds"]
            print(json.dumps(row), flush=True)
            write(f"kalman_overhead_{device}", result, options.output)


if __name__ == "__main__":
    main()
