"""Does a KLA model know on text where it is unsure? Marginal entropy and posterior variance against the loss.

    python benchmarks/kla_text_uncertainty.py MODEL TEXT

MODEL is a folder with a KLA model whose last layer is KLA, and its tokenizer; see examples/uncertainty.py for one made
out of SmolLM2-135M. Correlations are over all tokens of windows that are read each on their own.
"""

import argparse
import json
from pathlib import Path

import torch
from record import RESULTS, environment, write
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
    columns = {name: [] for name in ("loss", "plain_loss", "marginal_entropy", "plain_entropy", "log_variance")}
    for window in windows:
        target = window[None, 1:, None]
        with torch.no_grad():
            out = model(window[None], marginal_samples=options.samples, output_uncertainty=True, use_cache=False)
            logs = torch.log_softmax(model(window[None], use_cache=False).logits, -1)
        columns["loss"].append(-out.logits[:, :-1].gather(-1, target).flatten())
        columns["plain_loss"].append(-logs[:, :-1].gather(-1, target).flatten())
        columns["marginal_entropy"].append(out.predictive_entropy[0, :-1])
        columns["plain_entropy"].append(-(logs.exp() * logs).sum(-1)[0, :-1])
        columns["log_variance"].append(out.uncertainties[-1].mean(-1)[0, :-1].log())
    columns = {name: torch.cat(pieces) for name, pieces in columns.items()}

    def correlation(name, loss="loss"):
        return round(torch.corrcoef(torch.stack([columns[name], columns[loss]]))[0, 1].item(), 4)

    record = options.model / "conversion.json"
    result = {
        "environment": environment(),
        "conversion": json.loads(record.read_text()).get("layers") if record.is_file() else None,
        "samples": options.samples,
        "tokens": len(columns["loss"]),
        "mean_loss": {n: round(columns[n].mean().item(), 4) for n in ("loss", "plain_loss")},
        "correlation_with_loss": {
            "marginal_entropy": correlation("marginal_entropy"),
            "plain_entropy": correlation("plain_entropy", "plain_loss"),
            "log_variance": correlation("log_variance"),
        },
    }
    edges = torch.quantile(columns["marginal_entropy"], torch.linspace(0, 1, 11)[1:-1])
    bins = torch.bucketize(columns["marginal_entropy"], edges)
    result["by_entropy"] = [
        {n: round(columns[n][bins == b].mean().item(), 4) for n in ("marginal_entropy", "loss")} for b in range(10)
    ]
    print(result)
    write("kla_text_uncertainty", result, options.output)
    plot(options.output, result["by_entropy"])


def plot(folder, rows):
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.5, 3.5))
    entropy = [row["marginal_entropy"] for row in rows]
    axes.plot(entropy, [row["loss"] for row in rows], "k-o")
    axes.plot([0, entropy[-1]], [0, entropy[-1]], color="0.7")
    axes.set_xlabel("marginal entropy, nats")
    axes.set_ylabel("loss of the same tokens, nats")
    figure.tight_layout()
    figure.savefig(Path(folder) / "kla_text_uncertainty.png", dpi=150)


if __name__ == "__main__":
    main()
