"""Single-pass adaptation of SmolLM2-135M with LoRA through domains: Kalman against tuned gradient methods.

    python benchmarks/kalman_streaming.py MODEL --corpus FOLDER

FOLDER holds shakespeare.txt.gz, wikipedia_articles.txt.gz and brown.txt.gz. The stream is Shakespeare, Wikipedia,
Brown, and Shakespeare again (further on), each token predicted before it is learned from, every method in the stock
Trainer with the same adapters. A method's one hyper-parameter (learning rate; step size) is the best of a grid on
streams from the first third of every text; what is reported are other streams, from the rest, one for each seed.

Besides: a map of the Kalman filter's loss over prior variance and noise (`--map`).
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from healing_text import clean
from record import RESULTS, continued, environment, write
from torch.utils.data import IterableDataset

DOMAINS = {"shakespeare": "shakespeare.txt.gz", "wikipedia": "wikipedia_articles.txt.gz", "brown": "brown.txt.gz"}
ORDER = ("shakespeare", "wikipedia", "brown", "shakespeare")
WINDOW, HELD_OUT = 512, 12
# The adapters of the LoRA paper (arXiv 2106.09685).
TARGETS = ["q_proj", "v_proj"]
# Windows of a segment, for each batch size.
SEGMENT = {1: 32, 8: 96}
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# Step sizes; the prior variance follows from them.
SCALES = (2e-4, 4e-4, 7e-4, 1e-3, 2e-3, 4e-3)
GRIDS = {
    "frozen": (0.0,),
    "sgd": (3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
    "adamw": RATES,
    "rmsprop": RATES,
    "kalman diagonal": SCALES,
    "kalman block": SCALES,
    "kalman low_rank": SCALES,
}
# (prior variance or None, other arguments): over the noise with the prior that follows from it, and with fixed ones.
MAP = (
    *((None, {"process_noise": q**2}) for q in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    *((None, {"process_noise": q**2, "decay": d}) for q in (4e-3, 8e-3, 1.6e-2) for d in (0.0, 1e-2, 1e-1)),
    *((v, {"process_noise": q**2}) for v in (1e-3, 1e-2, 1e-1) for q in (0.0, 1e-4, 1e-3)),
    *((None, {"process_noise": q**2 * t / 32, "temper": t}) for q in (8e-3,) for t in (1.0, 8.0, 128.0)),
)


def texts(folder, tokenizer, count):
    """{domain: (windows (N, WINDOW), bytes of each)}, in the text's own order; `count` of them at most."""
    found = {}
    for name, file in DOMAINS.items():
        with gzip.open(Path(folder) / file, "rt", encoding="utf-8") as handle:
            text = clean(handle.read(9 * count * WINDOW))
        ids = tokenizer(text, verbose=False)["input_ids"]
        windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:count]
        # What a window is scored on: all but its first token.
        sizes = [len(tokenizer.decode(row[1:]).encode()) for row in windows]
        found[name] = (windows, torch.tensor(sizes))
    return found


def stream(domains, seed, segment, search):
    """[(domain, window, bytes)]: contiguous windows of each segment, from a place that the seed says."""
    generator, found, after = random.Random(f"{seed} {search}"), [], {}
    for name in ORDER:
        windows, sizes = domains[name]
        usable = len(windows) - HELD_OUT
        low, high = (0, usable // 3) if search else (usable // 3, usable)
        need = ORDER.count(name) * segment
        start = after.get(name, generator.randint(low, high - need))
        after[name] = start + segment
        found += [(name, windows[i], int(sizes[i])) for i in range(start, start + segment)]
    return found


class Rows(IterableDataset):
    """Columns of windows, or rows that have their columns already, in their order."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(row if isinstance(row, dict) else {"input_ids": row, "labels": row} for row in self.rows)


def adapted(model, seed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))


def run(model, windows, batch, method, value, seed, more=None):
    """Losses (nats per token) of every batch before it was learned from; alarms; the adapted model."""
    peft_model = adapted(model, seed)
    return *one_pass(peft_model, windows, batch, method, value, seed, more), peft_model


def one_pass(model, rows, batch, method, value, seed, more=None):
    """Losses of every batch before it was learned from, and steps with an alarm, in the stock Trainer.

    A Kalman method's value is its step size, or its prior variance where there are more arguments; without a value
    it is the callback as it comes.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from hf_kalman.training import KalmanCallback

    kalman = method.startswith("kalman")
    trained = [p for p in model.parameters() if p.requires_grad]
    callbacks, optimizers = [], (None, None)
    if kalman:
        options = {"structure": method.split()[1]} if " " in method else {}
        if more is not None:
            options |= {"variance": value, **more}
        elif value is not None:
            options |= {"step_size": value}
        callbacks = [KalmanCallback(**options)]
    else:
        optimizer = {
            "frozen": lambda: torch.optim.SGD(trained, lr=0.0),
            "sgd": lambda: torch.optim.SGD(trained, lr=value),
            "adamw": lambda: torch.optim.AdamW(trained, lr=value, weight_decay=0.0),
            "rmsprop": lambda: torch.optim.RMSprop(trained, lr=value),
        }[method]()
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    device = next(model.parameters()).device.type
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=len(rows) // batch,
            max_grad_norm=0.0 if kalman or method == "frozen" else 1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            accelerator_config={"dispatch_batches": False},
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(rows), callbacks=callbacks, optimizers=optimizers)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    alarms = [e["step"] for a, e in itertools.pairwise(trainer.state.log_history) if _alarms(e) > _alarms(a)]
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return losses, alarms


def _alarms(entry):
    return entry.get("kalman_drift_alarms", 0)


@torch.no_grad()
def held_out(model, domains):
    """Bits per byte on the last windows of each domain, which no stream holds."""
    from hf_kalman.training.optimizer import widen

    model.eval()
    found = {}
    for name, (windows, sizes) in domains.items():
        ids = windows[-HELD_OUT:].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = torch.cat([model(input_ids=part).logits for part in ids.split(4)])
        nats = torch.nn.functional.cross_entropy(
            widen(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        found[name] = nats.item() / math.log(2) / int(sizes[-HELD_OUT:].sum())
    return found


def recovery(losses, segment, tokens):
    """Tokens after each switch until the loss is within 2 % of the median of the segment's second half."""
    found = []
    for start in range(segment, len(losses), segment):
        part = losses[start : start + segment]
        level = 1.02 * statistics.median(part[segment // 2 :])
        smooth = [sum(part[max(0, i - 2) : i + 1]) / len(part[max(0, i - 2) : i + 1]) for i in range(len(part))]
        found.append(next((i for i, value in enumerate(smooth) if value <= level), segment) * tokens)
    return found


WORKER = {}


def start(model, corpus, devices, counter):
    from transformers import AutoTokenizer

    from kalman_conversion import load_model

    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if devices:
        # Before CUDA is touched: the Trainer would spread over all the devices that it sees.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number % devices]
    device = "cuda" if devices else "cpu"
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    WORKER["domains"] = texts(corpus, tokenizer, WORKER_WINDOWS)
    WORKER["model"] = load_model(model, torch.float32, device)


# Enough for two segments of the largest kind in the first third.
WORKER_WINDOWS = 3 * 2 * max(SEGMENT.values()) + 3 * 64 + HELD_OUT


def job(task):
    """One run as figures."""
    batch, method, value, seed, search, more, segment = task
    started = time.perf_counter()
    model, domains = WORKER["model"], WORKER["domains"]
    rows = stream(domains, seed, segment, search)
    losses, alarms, adapted_model = run(model, [w for _, w, _ in rows], batch, method, value, seed, more)
    nats = [loss * batch * (WINDOW - 1) for loss in losses]
    sizes = [sum(s for _, _, s in rows[i : i + batch]) for i in range(0, len(rows), batch)]
    result = {
        "batch": batch,
        "method": method,
        "value": value,
        "seed": seed,
        "search": search,
        **({"more": more} if more else {}),
        **figures(nats, sizes, batch, segment // batch),
        "alarms_at_steps": alarms,
    }
    if not search:
        result["held_out"] = held_out(adapted_model, domains)
    adapted_model.unload()
    print(
        json.dumps({k: result[k] for k in ("batch", "method", "value", "seed", "search", "bits_per_byte")}),
        round(time.perf_counter() - started, 1),
        flush=True,
    )
    return result


def figures(nats, sizes, batch, segment):
    """Bits per byte of a stream and of its segments, and how soon each was learned; of the batches' nats and bytes."""

    def bits(rows):
        return sum(nats[rows]) / math.log(2) / sum(sizes[rows])

    losses = [n / (batch * (WINDOW - 1)) for n in nats]
    return {
        "bits_per_byte": bits(slice(None)) if all(map(math.isfinite, nats)) else None,
        "segments": [bits(slice(start, start + segment)) for start in range(0, len(nats), segment)],
        "recovery_tokens": recovery(losses, segment, batch * WINDOW),
    }


def key(task):
    """What tells a run from another; of a task or of its row."""
    if isinstance(task, dict):
        task = (task["batch"], task["method"], task["value"], task["seed"])
    return tuple(task[:4])


def best_of(rows):
    usable = [row for row in rows if row["bits_per_byte"] is not None]
    return min(usable, key=lambda row: row["bits_per_byte"])["value"]


def summary(rows):
    """Mean and standard deviation over seeds, by method."""
    found = []
    for batch, method in dict.fromkeys((row["batch"], row["method"]) for row in rows):
        own = [row for row in rows if (row["batch"], row["method"]) == (batch, method)]
        values = [row["bits_per_byte"] for row in own]
        mean = functools.partial(map, statistics.mean)
        row = {
            "batch": batch,
            "method": method,
            "value": own[0]["value"],
            "seeds": len(own),
            "bits_per_byte": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "segments": list(mean(zip(*(r["segments"] for r in own), strict=True))),
            "recovery_tokens": list(mean(zip(*(r["recovery_tokens"] for r in own), strict=True))),
            "held_out": {n: statistics.mean(r["held_out"][n] for r in own) for n in own[0]["held_out"]},
        }
        found.append({**row, **({"more": own[0]["more"]} if "more" in own[0] else {})})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--segment", type=int, help="windows of a segment, for a short run")
    parser.add_argument("--map", action="store_true", help="only the map over variance and noise")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing new is begun")
    parser.add_argument("--resume", action="store_true", help="go on with what the file in --output has")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    devices, context = torch.cuda.device_count(), multiprocessing.get_context("spawn")
    counter, started = context.Value("i", 0), time.perf_counter()
    result = {
        "model": "SmolLM2-135M-Instruct (de-quantised Q4_1), LoRA of rank 8 on queries and values",
        "environment": environment("cuda" if devices else "cpu"),
        "order": ORDER,
        "window": WINDOW,
        "segments": {b: options.segment or SEGMENT[b] for b in options.batches},
    }
    kept = continued("kalman_streaming", {"window": WINDOW}, options.output) if options.resume else {}
    kept = {name: {key(row): row for row in kept.get(name, [])} for name in ("search", "runs")}
    result["segments"] |= {b: SEGMENT[b] for rows in kept.values() for b, *_ in rows}
    with context.Pool(options.jobs, start, (options.model, options.corpus, devices, counter)) as pool:

        def rows(tasks, done=None):
            """Those of the tasks that are not done, and all that is done."""
            done = {} if done is None else done
            for row in pool.imap_unordered(job, [t for t in tasks if key(t) not in done]):
                done[key(row)] = row
                if time.perf_counter() - started > options.limit:
                    break
            return list(done.values())

        def length(batch):
            return options.segment or SEGMENT[batch]

        if options.map:
            tasks = [(1, "kalman diagonal", v, 0, True, m, length(1)) for v, m in MAP]
            result["rows"] = rows(tasks)
            write("kalman_map", result, options.output)
            return
        # The slowest first, for the processes to end together.
        order = sorted(options.methods, key=lambda m: "low_rank" not in m)
        result["search"] = rows(
            [(b, m, v, 0, True, None, length(b)) for b in options.batches for m in order for v in GRIDS[m]],
            kept["search"],
        )
        searched = {
            (b, m): [r for r in result["search"] if (r["batch"], r["method"]) == (b, m)]
            for b in options.batches
            for m in options.methods
        }
        # A search that the limit cut short counts only where it was finished.
        chosen = {case: best_of(tried) for case, tried in searched.items() if len(tried) == len(GRIDS[case[1]])}
        write("kalman_streaming", result, options.output)
        result["runs"] = rows(
            [
                (b, m, chosen[b, m], s, False, None, length(b))
                for b in options.batches
                for m in order
                if (b, m) in chosen
                for s in range(1, options.seeds + 1)
            ],
            kept["runs"],
        )
        result["summary"] = summary(result["runs"])
        write("kalman_streaming", result, options.output)
    for row in result["summary"]:
        print(json.dumps({k: row[k] for k in ("batch", "method", "value", "bits_per_byte", "deviation")}))


if __name__ == "__main__":
    main()
