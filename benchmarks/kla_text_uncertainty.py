"""Does a KLA model know on text where it is unsure? Marginal entropy and posterior variance against the loss.

    python benchmarks/kla_text_uncertainty.py MODEL TEXT

MODEL is a folder with a KLA model whose last layer is KLA, and its tokenizer; see examples/uncertainty.py for one made
out of SmolLM2-135M. Correlations are over all tokens of windows that are read each on their own.
"""

import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, drawing, environment, write
from token_uncertainty import by_entropy, correlation, joined, token_columns
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kalman  # noqa: F401 - registers the architectures
from kalman_conversion.text import read_documents, token_windows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    windows = token_windows(tokenizer, read_documents(options.text), 512, options.windows)
    torch.manual_seed(0)
    columns = joined([token_columns(model, window[None], options.samples) for window in windows])
    record = options.model / "conversion.json"
    result = {
        "environment": environment(),
        "conversion": json.loads(record.read_text()).get("layers") if record.is_file() else None,
        "samples": options.samples,
        "tokens": len(columns["loss"]),
        "mean_loss": {n: round(columns[n].mean().item(), 4) for n in ("loss", "plain_loss")},
        "correlation_with_loss": {
            "marginal_entropy": correlation(columns, "marginal_entropy"),
            "plain_entropy": correlation(columns, "plain_entropy", "plain_loss"),
            "log_variance": correlation(columns, "log_variance"),
        },
    }
    result["by_entropy"] = [{"marginal_entropy": e, "loss": loss} for e, loss in by_entropy(columns, 10)]
    print(result)
    write("kla_text_uncertainty", result, options.output)
    draw(result, options.output)


def draw(result, folder):
    """Loss of tokens over their marginal entropy."""
    rows = result["by_entropy"]
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(4.5, 3.5))
    entropy = [row["marginal_entropy"] for row in rows]
    axes.plot(entropy, [row["loss"] for row in rows], "k-o")
    axes.plot([0, entropy[-1]], [0, entropy[-1]], color="0.7")
    axes.set_xlabel("marginal entropy, nats")
    axes.set_ylabel("loss of the same tokens, nats")
    figure.tight_layout()
    figure.savefig(folder / "kla_text_uncertainty.png", dpi=150)


if __name__ == "__main__":
    main()
