"""How small what leaves a mixer should start when a model is trained from scratch: `output_initializer_factor` of GKA.

    python benchmarks/output_start.py CORPUS...

Models of 4 layers of width 192 learn the same 300 thousand tokens (150 steps of 8 windows of 256, AdamW at 2e-3,
cosine, float32, the tokenizer of `small_lm.py`) on a CPU; softmax attention and KLA with equal MLPs beside them, also
with the output projections of their mixers started small, and KLA with other first steps and observation variances.
`noise`: root mean square of what the first mixer adds to the residual stream before training, over that of the
embeddings. Results: `results/output_start.json`, held-out bits per byte along the way, two seeds; what it holds is not
run again. 50 minutes on two cores.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import small_lm
import torch
from record import RESULTS, continued, environment, write
from registry import KLA_STARTS, start_outputs, weight_decay_groups

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from runner import run_all  # noqa: E402

WIDTH, LAYERS, WINDOW, BATCH, STEPS, RATE, SEEDS, HELD = 192, 4, 256, 8, 150, 2e-3, 2, 32
FACTORS, SMALL = (1.0, 0.3, 0.1, 0.03, 0.0), 0.03
KLA = {"value_rank": "conv", "variance_rank": WIDTH // 8}
STARTS = {f"kla, {name}": KLA_STARTS[name] for name in ("steps 0.01 to 1", "observation variance 1/16")}
KINDS = {
    "softmax attention": (GKAConfig, GKAForCausalLM, {"layer_types": ["full_attention"] * LAYERS}),
    "kla": (KLAConfig, KLAForCausalLM, KLA),
    **{name: (KLAConfig, KLAForCausalLM, KLA | fields) for name, fields in STARTS.items()},
    "gka": small_lm.OURS["gka"],
}
# Kinds and how their output projections start, over other weights.
MODELS = {
    "softmax attention": ("softmax attention", 1.0),
    f"softmax attention, {SMALL:g}": ("softmax attention", SMALL),
    "kla": ("kla", 1.0),
    f"kla, {SMALL:g}": ("kla", SMALL),
    **{name: (name, 1.0) for name in STARTS},
    **{f"gka, {factor:g}": ("gka", factor) for factor in FACTORS},
}


def build(name, seed):
    kind, factor = MODELS[name]
    config, model, fields = KINDS[kind]
    torch.manual_seed(seed)
    return start_outputs(model(config(**small_lm.shape(WIDTH, LAYERS, 2 * WIDTH, WINDOW), **fields)), factor)


@torch.no_grad()
def noise(model, batch):
    """Size of the first mixer's output over that of the embeddings."""
    outputs = {}
    layer = model.model.layers[0]
    mixer = getattr(layer, "mixer", None) or layer.self_attn
    handle = mixer.register_forward_hook(lambda module, inputs, output: outputs.update(mixer=output))
    model(batch, use_cache=False)
    handle.remove()
    output = outputs["mixer"][0] if isinstance(outputs["mixer"], tuple) else outputs["mixer"]
    return (output.square().mean().sqrt() / model.model.embed_tokens.weight.square().mean().sqrt()).item()


@torch.no_grad()
def bits(model, held, per_token):
    """Held-out bits per byte; `per_token` bytes."""
    loss = sum(model(batch, labels=batch, use_cache=False).loss.item() for batch in held.split(BATCH))
    return round(loss / (len(held) / BATCH) / math.log(2) / per_token, 4)


def train(job, device, training, held, per_token):
    """One model from one seed."""
    name, seed = job
    model = build(name, seed)
    row = {"noise": noise(model, held[:2]), "parameters": sum(p.numel() for p in model.parameters()), "curve": []}
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.1), RATE, betas=(0.9, 0.95))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        small_lm.set_rate(optimizer, RATE, step, STEPS, 30)
        batch = training[order[step * BATCH : (step + 1) * BATCH]]
        small_lm.descend(model, optimizer, model(batch, labels=batch, use_cache=False).loss)
        if (step + 1) % 25 == 0:
            row["curve"].append((step + 1, bits(model, held, per_token)))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokens, held, held_bytes = small_lm.prepare(options.corpus)
    windows = [t[: len(t) // WINDOW * WINDOW].view(-1, WINDOW).long() for t in (tokens, held)]
    settings = {"corpus": [p.name for p in options.corpus]}
    result = continued("output_start", settings, options.output) or {**settings, "models": {}}
    result["environment"] = environment()

    def report(key, row):
        name, _, seed = key.rpartition(" ")
        result["models"].setdefault(name, {})[seed] = row
        print(key, row, flush=True)
        write("output_start", result, options.output)

    work = partial(train, training=windows[0], held=windows[1][:HELD], per_token=held_bytes / len(held))
    jobs = {
        f"{name} {seed}": (name, seed)
        for seed in range(SEEDS)
        for name in MODELS
        if str(seed) not in result["models"].get(name, {})
    }
    run_all(jobs, work, ["cpu"], 2, 1e9, report)


if __name__ == "__main__":
    main()
