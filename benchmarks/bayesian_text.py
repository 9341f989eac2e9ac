"""Streaming text classification on frozen features: Bayesian heads against warm-started retraining and Laplace.

    python benchmarks/bayesian_text.py MODEL --corpus FOLDER

FOLDER holds shakespeare.txt.gz, wikipedia_articles.txt.gz, brown.txt.gz and passages.txt.gz. Which of the four a piece
of 240 characters comes from, from SmolLM2's last hidden states (mean over tokens). A linear head is fitted to 800
pieces; then pieces come in small letters without punctuation, one at a time, 400 of them. Scored: accuracy and negative
log likelihood on shifted pieces kept apart (new) and on unshifted ones (old) along the stream, mean log loss of each
sample before it is learned from, and the same with 20 and 40 % of the labels drawn at random, with every sample given
three times, with classes one after the other, and with outliers (features of another sample), with and without a gate.
Ten seeds draw pieces and order; each method's one hyper-parameter is the best of its grid on two further seeds.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import re
import statistics
import time
from pathlib import Path

import torch
from healing_text import clean
from record import RESULTS, environment, interval, write
from torch import nn

from hf_kalman.training import KalmanBayesianHead, LastLayerLaplace, WarmStart

FILES = ("shakespeare.txt.gz", "wikipedia_articles.txt.gz", "brown.txt.gz", "passages.txt.gz")
FIT, STREAM, TEST, MARKS = 800, 400, 400, (0, 25, 50, 100, 200, 400)
VARIANCES, RATES = (1e-2, 1e-1, 1.0, 10.0, 100.0), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SETTINGS = ("plain", "noise 0.2", "noise 0.4", "three times", "in order", "outliers")


def head(**options):
    return lambda linear, value: KalmanBayesianHead.from_linear(linear, "direct", variance=value, **options)


def pair(**options):
    def make(linear, value):
        return KalmanBayesianHead.from_linear(linear, "copy_negative_inputs", variance=(0.0, value), **options)

    return make


def warm(memory, optimizer):
    return lambda linear, value: WarmStart(
        linear, memory, optimizer=optimizer, learning_rate=value / (100 if optimizer == "adamw" else 1)
    )


METHODS = {
    "no adaptation": ((1.0,), lambda linear, value: KalmanBayesianHead.from_linear(linear, "direct", variance=0.0)),
    "Bayesian, full": (VARIANCES, head(covariance="full")),
    "Bayesian, diagonal": (VARIANCES, head(covariance="diagonal")),
    "Bayesian, shared": (VARIANCES, head(covariance="shared")),
    "Bayesian, diagonal, gate": (VARIANCES, head(covariance="diagonal", gate=0.99)),
    "Bayesian, diagonal, two layers": (VARIANCES, pair(covariance="diagonal")),
    "Bayesian, diagonal, fixed noise": (VARIANCES, head(covariance="diagonal", output="fixed_noise")),
    **{
        f"warm start, memory {memory or 'all'}, {optimizer}": (RATES, warm(memory, optimizer))
        for memory in (1, 10, 50, 100, None)
        for optimizer in ("sgd", "adamw")
    },
    "Laplace, memory 10, sgd": (
        RATES,
        lambda linear, value: LastLayerLaplace(linear, 0.1, memory=10, learning_rate=value),
    ),
}


def pieces(corpus, count):
    """[(text, class)], `count` of each class, from places far apart."""
    found = []
    for label, file in enumerate(FILES):
        with gzip.open(Path(corpus) / file, "rt", encoding="utf-8") as handle:
            text = re.sub(r"\s+", " ", clean(handle.read(6_000_000)))
        starts = range(5000, len(text) - 500, (len(text) - 6000) // count)
        found += [(text[text.index(" ", s) + 1 :][:240], label) for s in starts][:count]
    return found


def plain(text):
    return re.sub(r"[^a-z ]+", "", text.lower())


@torch.no_grad()
def features(model, tokenizer, texts):
    rows = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True, truncation=True, max_length=80)
        hidden = model.model(**batch.to(model.device)).last_hidden_state
        mask = batch["attention_mask"][..., None]
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).float().cpu())
    return torch.cat(rows)


def split(old, new, labels, seed):
    """(linear head fitted to unshifted pieces, stream, old test, new test), disjoint, features of length about 1."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    parts = [torch.tensor(order[a:b]) for a, b in ((0, FIT), (FIT, FIT + STREAM), (FIT + STREAM, FIT + STREAM + TEST))]
    center, spread = old[parts[0]].mean(0), old[parts[0]].std(0) * old.shape[1] ** 0.5
    old, new = (old - center) / spread, (new - center) / spread
    torch.manual_seed(seed)
    linear = nn.Linear(old.shape[1], len(FILES))
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear(old[parts[0]]), labels[parts[0]])
        loss = loss + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    stream = [(new[i], int(labels[i])) for i in parts[1].tolist()]
    return linear, stream, (old[parts[2]], labels[parts[2]]), (new[parts[2]], labels[parts[2]])


def changed(stream, setting, seed):
    generator = random.Random(1000 + seed)
    if setting.startswith("noise"):
        share = float(setting.split()[1])
        return [(x, generator.randrange(len(FILES)) if generator.random() < share else y) for x, y in stream]
    if setting == "three times":
        return [sample for sample in stream for _ in range(3)]
    if setting == "in order":
        return sorted(stream, key=lambda sample: sample[1])
    if setting == "outliers":
        return [(10 * generator.choice(stream)[0] if generator.random() < 0.1 else x, y) for x, y in stream]
    return stream


def tested(model, test):
    p = model(test[0]).probabilities
    right = (p.argmax(-1) == test[1]).double().mean().item()
    return {"accuracy": right, "nll": -p[range(len(p)), test[1]].clamp(min=1e-30).log().mean().item()}


DATA = {}


def begin(data):
    torch.set_num_threads(1)
    DATA.update(data)


def run(method, value, seed, setting="plain"):
    linear, stream, old, new = DATA[seed]
    model, scores, along = METHODS[method][1](linear, value), [], {}
    stream = changed(stream, setting, seed)
    seconds = 0.0
    for number, (x, y) in enumerate(stream):
        if number in MARKS and setting == "plain":
            along[number] = {"old": tested(model, old), "new": tested(model, new)}
        started = time.perf_counter()
        scores.append(model.filter_step(x, y) if method != "no adaptation" else 0.0)
        seconds += time.perf_counter() - started
    result = {
        "method": method,
        "value": value,
        "seed": seed,
        "setting": setting,
        "ms_per_sample": 1e3 * seconds / len(stream),
    }
    result |= {"old": tested(model, old), "new": tested(model, new), "log_loss": -statistics.mean(scores)}
    return {**result, **({"along": along} if along else {})}


def arguments(parser):
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--pieces", type=int, default=450, help="of each class")
    parser.add_argument(
        "--features", type=Path, help="file that keeps the features, which take longest, for a next run"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)


def prepare(options):
    """Fill DATA with a split for each seed; the device that the features were computed on."""
    from transformers import AutoTokenizer

    from kalman_conversion import load_model

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_model(options.model, torch.float32, device).eval()
    found = pieces(options.corpus, options.pieces)
    labels = torch.tensor([label for _, label in found])
    if options.features is not None and options.features.is_file():
        old, new = torch.load(options.features, weights_only=True)
    else:
        old = features(model, tokenizer, [text for text, _ in found])
        new = features(model, tokenizer, [plain(text) for text, _ in found])
        if options.features is not None:
            torch.save((old, new), options.features)
    DATA.update({seed: split(old, new, labels, seed) for seed in range(options.seeds + 2)})
    return device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    options = parser.parse_args()
    device = prepare(options)
    result = {"model": "SmolLM2-135M-Instruct (de-quantised Q4_1)", "environment": environment(device)}
    result |= {"fit": FIT, "stream": STREAM, "test": TEST, "search": [], "runs": []}
    with multiprocessing.get_context("spawn").Pool(options.jobs, begin, (DATA,)) as pool:
        searches = [(m, v, s) for m, (grid, _) in METHODS.items() for v in grid for s in (0, 1)]
        tried = pool.starmap(run, searches, chunksize=1)
        best = {
            m: min(grid, key=lambda v: sum(r["new"]["nll"] for r in tried if (r["method"], r["value"]) == (m, v)))
            for m, (grid, _) in METHODS.items()
        }
        result["search"] = [{k: v for k, v in row.items() if k != "along"} for row in tried]
        seeds = range(2, options.seeds + 2)
        tasks = [(m, best[m], s, setting) for m in METHODS for setting in SETTINGS for s in seeds]
        result["runs"] = pool.starmap(run, tasks, chunksize=1)
    for method in METHODS:
        own = [row for row in result["runs"] if row["method"] == method]
        for setting in SETTINGS:
            rows = [row for row in own if row["setting"] == setting]
            row = {"method": method, "value": best[method], "setting": setting}
            for name, values in {
                "new_accuracy": [r["new"]["accuracy"] for r in rows],
                "new_nll": [r["new"]["nll"] for r in rows],
                "old_accuracy": [r["old"]["accuracy"] for r in rows],
                "log_loss": [r["log_loss"] for r in rows],
                "ms_per_sample": [r["ms_per_sample"] for r in rows],
            }.items():
                row |= {name: round(statistics.mean(values), 4), f"{name}_95": round(interval(values), 4)}
            result.setdefault("summary", []).append(row)
            print(json.dumps({k: v for k, v in row.items() if not k.endswith("_95")}), flush=True)
    write("bayesian_text", result, options.output)


if __name__ == "__main__":
    main()
