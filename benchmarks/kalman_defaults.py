"""The callback as it comes, without a search, on three tasks learned from scratch in one pass; and its sensitivity.

    python benchmarks/kalman_defaults.py --corpus FOLDER          # needs scikit-learn

FOLDER holds shakespeare.txt.gz, wikipedia_articles.txt.gz and brown.txt.gz. Tasks, all in the stock Trainer: bytes of
Shakespeare with a small GKA model; the digits of scikit-learn with an MLP; which of the three texts 48 bytes come
from, with a small BERT. AdamW and RMSprop get the best learning rate of a grid on a stream of its own (seed 0), the
filter its defaults ("kalman"), and for comparison the best of a grid over its step size ("kalman diagonal", "kalman
block"). `map` has the loss over prior variance and step size, whose square times the temper is the process noise; it
is also drawn. Loss: mean over the pass, each batch before it is learned from.
"""

import argparse
import gzip
import itertools
import json
import random
import statistics
from pathlib import Path

import torch
from kalman_streaming import DOMAINS, one_pass
from record import RESULTS, continued, drawing, environment, write
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_kalman import GKAConfig, GKAForCausalLM

RATES, SCALES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# Prior variances of the map; None is what follows from the step size.
VARIANCES = (None, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
BATCH, STEPS = 8, 200
GRIDS = {"adamw": RATES, "rmsprop": RATES, "kalman": (None,), "kalman diagonal": SCALES, "kalman block": SCALES}


class DigitsConfig(PreTrainedConfig):
    model_type = "digits"


class DigitsForSequenceClassification(PreTrainedModel):
    config_class = DigitsConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixels, labels=None):
        logits = self.layers(pixels)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def read(corpus, name, size=2_000_000):
    with gzip.open(Path(corpus) / DOMAINS[name], "rt", encoding="utf-8") as handle:
        return handle.read(size).encode()


def text_bytes(seed, corpus):
    text, length = read(corpus, "shakespeare"), 128
    start = 5000 + 300_000 * seed
    rows = torch.tensor(list(text[start : start + length * BATCH * STEPS])).view(-1, length)
    torch.manual_seed(seed)
    # Output projections start as wide as all others, as they did when these defaults were searched.
    config = GKAConfig(
        output_initializer_factor=1.0,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
    )
    return GKAForCausalLM(config), list(rows)


def digits(seed, corpus):
    from sklearn.datasets import load_digits

    data = load_digits()
    order = list(range(len(data.target)))
    random.Random(seed).shuffle(order)
    pixels, labels = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    torch.manual_seed(seed)
    return DigitsForSequenceClassification(DigitsConfig()), [
        {"pixels": pixels[i], "labels": labels[i]} for i in order[: BATCH * STEPS]
    ]


def sources(seed, corpus):
    texts, generator, rows = [read(corpus, name) for name in DOMAINS], random.Random(seed), []
    for _ in range(2 * BATCH * STEPS):
        label = generator.randrange(len(texts))
        start = generator.randrange(10_000, len(texts[label]) - 48)
        rows.append({"input_ids": torch.tensor(list(texts[label][start : start + 48])), "labels": torch.tensor(label)})
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=len(texts),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config), rows


TASKS = {"bytes": text_bytes, "digits": digits, "sources": sources}


def measured(task, method, value, seed, corpus, more=None):
    model, rows = TASKS[task](seed, corpus)
    losses, _ = one_pass(model, rows, BATCH, method, value, seed, more)
    row = {"task": task, "method": method, "value": value, "seed": seed, "steps": len(losses)}
    row["loss"] = statistics.mean(losses)
    row = {**row, "last_quarter": statistics.mean(losses[-len(losses) // 4 :]), **({"more": more} if more else {})}
    print(json.dumps(row), flush=True)
    return row


def name(row):
    """What tells a run from another."""
    return json.dumps([row["task"], row["method"], row["value"], row["seed"], row.get("more")])


def draw(result, folder):
    """Heat maps, one for each task."""
    plt = drawing()
    if plt is None:
        return
    tasks = list(dict.fromkeys(row["task"] for row in result["map"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        values = [
            [
                next(
                    row["loss"]
                    for row in result["map"]
                    if (row["task"], row["value"], row["more"]["step_size"]) == (task, variance, scale)
                )
                for scale in SCALES
            ]
            for variance in VARIANCES
        ]
        low = min(map(min, values))
        image = axis.imshow(values, vmin=low, vmax=low + 1, cmap="viridis_r", aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                color = "white" if value > low + 0.5 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
        axis.set_xticks(range(len(SCALES)), [f"{s:g}" for s in SCALES], fontsize=7)
        axis.set_yticks(range(len(VARIANCES)), ["follows" if v is None else f"{v:g}" for v in VARIANCES], fontsize=7)
        axis.set(title=f"{task}: nats", xlabel="step size", ylabel="prior variance")
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(folder / "kalman_defaults.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-map", action="store_true", help="leave the map out, which takes longest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with what the file in --output has")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"environment": environment(), "batch": BATCH, "search": [], "runs": [], "map": []}
    old = continued("kalman_defaults", {"batch": BATCH}, options.output) if options.resume else {}
    done = {name(row): row for kind in ("search", "runs", "map") for row in old.get(kind, [])}

    def found(task, method, value, seed, more=None):
        row = {"task": task, "method": method, "value": value, "seed": seed, "more": more}
        return done.get(name(row)) or measured(task, method, value, seed, options.corpus, more)

    for task in options.tasks:
        for method, grid in GRIDS.items():
            tried = [found(task, method, value, 0) for value in grid] if len(grid) > 1 else []
            best = min(tried, key=lambda row: row["loss"])["value"] if tried else None
            result["search"] += tried
            result["runs"] += [found(task, method, best, seed) for seed in range(1, options.seeds + 1)]
        cases = () if options.no_map else itertools.product(VARIANCES, SCALES)
        result["map"] += [found(task, "kalman diagonal", v, 0, {"step_size": scale}) for v, scale in cases]
    result["summary"] = [
        {
            "task": task,
            "method": method,
            "value": own[0]["value"],
            "loss": statistics.mean(row["loss"] for row in own),
            "deviation": statistics.stdev(row["loss"] for row in own) if len(own) > 1 else 0.0,
            "last_quarter": statistics.mean(row["last_quarter"] for row in own),
        }
        for task in options.tasks
        for method in GRIDS
        for own in [[row for row in result["runs"] if (row["task"], row["method"]) == (task, method)]]
    ]
    write("kalman_defaults", result, options.output)
    if result["map"]:
        draw(result, options.output)
    for row in result["summary"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
