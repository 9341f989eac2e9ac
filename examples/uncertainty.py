"""How sure a KLA model is, token by token: posterior variance, marginal entropy and loss along a text.

    python examples/uncertainty.py MODEL TEXT [--plot uncertainty.png]

MODEL is a folder with a KLA model and its tokenizer, TEXT a file. The posterior variance is that of the last KLA
layer's output, averaged over its width: high where the filters have seen little that bears on what they are asked. The
entropy is that of the token distribution averaged over draws from the last layer's belief (`marginal_samples`), for
which that layer must be a KLA layer. To make such a model out of SmolLM2-135M:

    kalman-convert swap --model SmolLM2 --mixer kla --layers 29 --output swapped
    kalman-convert rls --model swapped --teacher SmolLM2 --data text.txt --output healed
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kalman  # noqa: F401 - registers the architectures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : options.tokens]
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(ids, marginal_samples=options.samples, output_uncertainty=True)
    variance = out.uncertainties[-1][0].mean(-1)
    entropy = out.predictive_entropy[0, :-1]
    loss = -out.logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    for token, spread, sure, cost in zip(ids[0, 1:].tolist(), variance[:-1], entropy, loss, strict=True):
        text = tokenizer.decode([token])
        print(f"{text!r:>20}  variance {spread:.3e}  entropy {sure:5.2f}  loss {cost:5.2f}")
    pair = torch.corrcoef(torch.stack([entropy, loss]))[0, 1]
    print(f"{len(loss)} tokens: correlation of entropy and loss {pair:.2f}")
    if options.plot:
        draw(options.plot, variance[:-1], entropy, loss)


def draw(path, variance, entropy, loss):
    """Three curves over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(8, 4), sharex=True)
    axes[0].semilogy(variance, "k-")
    axes[0].set_ylabel("posterior variance")
    axes[1].plot(entropy, "k-", label="marginal entropy")
    axes[1].plot(loss, color="0.6", label="loss")
    axes[1].set_ylabel("nats")
    axes[1].set_xlabel("token")
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
