"""The tables and the plot of converted models in README, from what benchmarks/conversion_recipes.py measured.

python benchmarks/conversion_report.py
"""

import argparse
import json
from pathlib import Path

from record import RESULTS, drawing

# Results in the order of the table, and what they are called there.
ROWS = {
    "teacher": "teacher (softmax)",
    "smollm2-135m-gka-8": "GKA, 8 of 30 layers",
    "smollm2-135m-gka-15": "GKA, 15 of 30",
    "smollm2-135m-gka-22": "GKA, 22 of 30",
    "smollm2-135m-gka-30": "GKA, all 30",
    "smollm2-135m-kla-8": "KLA, 8 of 30",
    "smollm2-135m-kla-15": "KLA, 15 of 30",
    "control-teacher": "control: the teacher, trained like GKA in 15",
    "control-sliding-512": "control: sliding window of 512 in 15",
    "control-published-15": "control: published layer, start and first stage, in 15",
}
SHARES = ("lambada", "piqa", "retrieval_16_pairs", "retrieval_64_pairs", "completion")


def load(folder):
    """{result name: result} of those that are there."""
    found = {}
    for name in ROWS:
        path = Path(folder) / f"conversion_{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    return found


def table(results):
    """Quality beside the teacher, with what it took."""
    teacher = results["teacher"]["quality"]["wikitext2_perplexity"]
    lines = [
        "| | WikiText-2 perplexity | LAMBADA | PIQA | codes, 16 | codes, 64 | completion | tokens | GPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if "quality" not in result:
            continue
        quality = result["quality"]
        perplexity = quality["wikitext2_perplexity"]
        cells = [ROWS[name], f"{perplexity:.2f} (× {perplexity / teacher:.3f})"]
        cells += [f"{100 * quality[share]:.1f}" for share in SHARES]
        cells += [f"{result['tokens'] / 1e6:.1f} M" if "tokens" in result else ""]
        cells += [f"{result['seconds']:.0f} s" if "seconds" in result else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations(path):
    """One change at a time, sorted as they were run."""
    result = json.loads(Path(path).read_text())
    lines = [
        "| half of the layers, {:.1f} M tokens | perplexity | recall perplexity | LAMBADA | codes, 16 |".format(
            result["distillation_tokens"] / 1e6
        ),
        "|---|---|---|---|---|",
    ]
    rows = [("teacher", result["teacher"])]
    rows += [
        (f"{row['variant']} (layers: {run['layers_chosen_by']})", row) for run in result["runs"] for row in run["rows"]
    ]
    for name, row in rows:
        values = f"{row['perplexity']:.2f} | {row['recall_perplexity']:.3f} | {100 * row['lambada']:.1f}"
        lines.append(f"| {name} | {values} | {100 * row['retrieval_16_pairs']:.1f} |")
    return "\n".join(lines)


def draw(results, folder):
    """Perplexity over tokens of healing; `results` as `load` gives them."""
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    teacher = results["teacher"]["curve_perplexity"]
    axes.axhline(teacher, color="black", linestyle=":", label="teacher")
    for name, result in results.items():
        points = [p for p in result.get("curve", ()) if p["tokens"]]
        if points:
            style = "--" if name.startswith("control") else "-"
            values = [p["perplexity"] for p in points]
            axes.plot([p["tokens"] / 1e6 for p in points], values, style, marker=".", label=ROWS[name])
    axes.set(xlabel="million tokens of healing", ylabel="WikiText-2 valid perplexity", xscale="log", yscale="log")
    axes.set_yticks([20, 25, 30, 40, 60, 100, 200], labels=["20", "25", "30", "40", "60", "100", "200"])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "conversion.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = load(options.results)
    print(table(results), ablations(options.results / "conversion_ablations.json"), sep="\n\n")
    draw(results, options.results)


if __name__ == "__main__":
    main()
