"""Single-pass Kalman fine-tuning of a language model on a text, with the stock Trainer; LoRA, or everything.

    python examples/kalman_finetuning.py MODEL TEXT --output adapted

MODEL is a folder or Hub id with tokenizer, TEXT a file. Every window is predicted before it is learned from; that loss
is printed along the way, with how sure the filter is and whether it has seen the text change.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_kalman  # noqa: F401 - registers the architectures
from hf_kalman.training import KalmanCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most so many")
    parser.add_argument("--everything", action="store_true", help="all weights instead of LoRA adapters")
    parser.add_argument("--structure", default="diagonal")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // options.window * options.window].view(-1, options.window)[: options.windows]
    if not options.everything:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        str(options.output / "work"),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        max_grad_norm=0.0,  # The filter bounds its own steps.
        train_sampling_strategy="sequential",
        logging_steps=8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=[KalmanCallback(structure=options.structure)]).train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
