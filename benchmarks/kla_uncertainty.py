"""What a KLA model's posterior variance says on selective copying: a small model trained on a CPU in minutes.

    python benchmarks/kla_uncertainty.py [--steps 1500]

A row is blanks with a few symbols among them at random places, then as many prompts: at each, the next symbol is to be
named. Reported are the model's accuracy and, by layer, the posterior variance (mean over the output's width) at
symbols and at blanks, and how well it tells the two apart (area under the ROC curve; 0.5 says nothing).
"""

import argparse
from pathlib import Path

import torch
from record import RESULTS, drawing, environment, write

from hf_kalman import KLAConfig, KLAForCausalLM

SYMBOLS, COPIED, CONTEXT, BATCH = 8, 4, 28, 64
BLANK, PROMPT = 0, SYMBOLS + 1


def rows(count, generator):
    """(tokens, labels): labels are -100 but at the prompts."""
    symbols = torch.randint(1, SYMBOLS + 1, (count, COPIED), generator=generator)
    places = torch.rand(count, CONTEXT, generator=generator).argsort(-1)[:, :COPIED].sort(-1).values
    tokens = torch.full((count, CONTEXT + COPIED), BLANK)
    tokens.scatter_(1, places, symbols)
    tokens[:, CONTEXT:] = PROMPT
    labels = torch.full_like(tokens, -100)
    labels[:, CONTEXT:] = symbols
    return tokens, labels


def area(positive, negative):
    """Probability that a positive is above a negative."""
    ranks = torch.cat([positive, negative]).argsort().argsort().double() + 1
    count = len(positive)
    return ((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(negative))).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {"environment": environment(), "steps": options.steps, "batch": BATCH, "runs": []}
    for seed in range(options.seeds):
        result["runs"].append(run(seed, options.steps))
        print({k: v for k, v in result["runs"][-1].items() if k != "profile"}, flush=True)
        write("kla_uncertainty", result, options.output)
    draw(result, options.output)


def run(seed, steps):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = KLAForCausalLM(
        KLAConfig(
            vocab_size=SYMBOLS + 2,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            linear_state_size=16,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        tokens, labels = rows(BATCH, generator)
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    tokens, labels = rows(512, generator)
    with torch.no_grad():
        out = model(tokens, use_cache=False, output_uncertainty=True)
    found = out.logits[:, CONTEXT:].argmax(-1)
    variances = [v.mean(-1)[:, :CONTEXT] for v in out.uncertainties]
    symbol = tokens[:, :CONTEXT] != BLANK
    return {
        "seed": seed,
        "accuracy": round((found == labels[:, CONTEXT:]).double().mean().item(), 4),
        "variance_at_symbols": [round(v[symbol].mean().item(), 6) for v in variances],
        "variance_at_blanks": [round(v[~symbol].mean().item(), 6) for v in variances],
        "area_under_roc": [round(area(v[symbol], v[~symbol]), 4) for v in variances],
        "profile": {
            "symbols": symbol[0].long().tolist(),
            "variances": [[round(x, 6) for x in v[0].tolist()] for v in variances],
        },
    }


def draw(result, folder):
    """Posterior variances along one sequence of the first run."""
    first = result["runs"][0]
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 3))
    for layer, (variance, style) in enumerate(zip(first["profile"]["variances"], ("k-o", "k--s"), strict=True)):
        axes.semilogy(variance, style, markersize=3, label=f"layer {layer + 1}")
    for place, here in enumerate(first["profile"]["symbols"]):
        if here:
            axes.axvline(place, color="0.8", zorder=0)
    axes.set_xlabel("token (grey: a symbol to copy)")
    axes.set_ylabel("posterior variance")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "kla_uncertainty.png", dpi=150)


if __name__ == "__main__":
    main()
