"""Small language models side by side: ours, softmax attention and peers, same size, text, budget and search.

    pip install flash-linear-attention==0.6.0 einops
    python benchmarks/small_lm.py CORPUS... [--batch 16] [--output-start 0.03] [--models gka kla ...]

CORPUS are files of documents separated by blank lines (`.txt` or `.txt.gz`). A byte-level BPE tokenizer of 8,192 tokens
is trained on the training documents; every 30th is held out. Learning rates are chosen by the held-out loss of a
quarter of the budget, from a grid that goes on while its end is best; as a rate that is good for a quarter may be too
high for all of it, half of it is run as well. Peers are flash-linear-attention's layers in the same blocks
(`registry.py`), with MLPs that make all models equally large. The output projections of all mixers start at
`--output-start` of the deviation of other weights, GKA's default. `results/small_lm.json` (64 windows a step:
`small_lm_64.json`; a start of 1: `small_lm_wide.json`) and a plot: held-out bits per byte against tokens; for KLA also
how its marginal entropy goes with the loss of the same token; variants of GKA and KLA at a quarter of the budget, each
at its model's rate. `results/small_lm_speed.json`: training steps of 64 windows, model after model in a process of its
own with nothing else on the device, kernels tuned before.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from record import RESULTS, continued, drawing, environment, note_run, timed, write
from registry import HEAD, MIXERS, TaskModel, start_outputs, weight_decay_groups, without_tuning
from token_uncertainty import by_entropy, correlation, joined, token_columns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM
from kalman_conversion.text import read_documents

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from runner import run_all  # noqa: E402

WIDTH, LAYERS, VOCABULARY, WINDOW, BATCH = 384, 8, 8192, 512, 16
OUTPUT_START = 0.03
SPEED_BATCH, SPEED_STEPS = 64, 40
PARAMETERS = 20_736_384
RATES = (1e-3, 2e-3, 4e-3)
LANGUAGE_KLA = {"value_rank": "conv", "variance_rank": WIDTH // 8, "linear_state_size": 16}
OURS = {
    "softmax": (GKAConfig, GKAForCausalLM, {"layer_types": ["full_attention"] * LAYERS}),
    # `build` sets how the output projections start.
    "gka": (
        GKAConfig,
        GKAForCausalLM,
        {"solver": "cg", "solver_iterations": 20, "output_initializer_factor": 1.0},
    ),
    "kla": (KLAConfig, KLAForCausalLM, LANGUAGE_KLA),
}
PEERS = ("mamba2", "gla", "delta_net", "gated_delta_net", "mesa_net")
VARIANTS = {
    "gka": {
        "no mix": {"use_solution_mix": False},
        "no decay": {"use_decay": False},
        "no input gate": {"use_input_gate": False},
        "no output gate": {"use_output_gate": False},
        "with local values": {"use_local_values": True},
        "outputs start wide": {"output_start": 1.0},
        **{f"ridge ratio {ratio}": {"ridge_ratio": ratio} for ratio in (0.005, 0.05, 0.2)},
        **{f"{number} iterations": {"solver_iterations": number} for number in (0, 2, 5, 10)},
    },
    "kla": {
        "zero-order hold": {"discretization": "zoh"},
        "no process noise": {"process_noise": "none"},
        "outputs start wide": {"output_start": 1.0},
        **{f"state {number}": {"linear_state_size": number} for number in (4, 8, 32, 64)},
    },
}


class PeerForCausalLM(nn.Module):
    """A `TaskModel` that answers as far as `train` asks: the mean loss of the next token."""

    def __init__(self, name: str, mlp: int) -> None:
        super().__init__()
        mixers = MIXERS[name](WIDTH, HEAD, LAYERS)
        self.model = TaskModel(mixers, WIDTH, VOCABULARY, mlp, tied=True)

    def forward(self, batch, labels, use_cache=False):
        """An object with `loss`."""
        logits = self.model(batch)[:, :-1]
        return SimpleNamespace(loss=F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten()))


def shape(width, layers, mlp, window):
    """Fields of a configuration that say how large a model is."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "intermediate_size": mlp,
        "max_position_embeddings": window,
        "tie_word_embeddings": True,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }


def build(name, seed=0, mlp=None, changes=None):
    """The model; its MLPs as wide as makes it as large as the others.

    `changes`: fields of its configuration and `output_start`, how its mixers' outputs start.
    """
    changes = {"output_start": OUTPUT_START} | (changes or {})
    start = changes.pop("output_start")
    if mlp is None:
        sizes = [sum(p.numel() for p in build(name, seed, width).parameters()) for width in (256, 512)]
        per_width = (sizes[1] - sizes[0]) / 256
        mlp = round(256 + (PARAMETERS - sizes[0]) / per_width)
        # Tensor cores take multiples of eight.
        mlp = max(8, 8 * round(mlp / 8))
    torch.manual_seed(seed)
    if name in PEERS:
        model = PeerForCausalLM(name, mlp)
    else:
        config, maker, fields = OURS[name]
        model = maker(config(**shape(WIDTH, LAYERS, mlp, WINDOW), **fields | changes))
    return start_outputs(model, start)


def prepare(paths):
    """(training tokens, held-out tokens, held-out bytes)."""
    documents = [d for path in paths for d in read_documents(path)]
    held, kept = documents[::30], [d for i, d in enumerate(documents) if i % 30]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(kept, trainer)

    def encode(texts):
        return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in (*e.ids, 0)], dtype=torch.int32)

    return encode(kept), encode(held), sum(len(d.encode()) for d in held)


def windows(tokens, device):
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW).long().to(device)


@torch.no_grad()
def bits_per_byte(model, held, held_bytes, share):
    """Of the held-out text: each window is read on its own."""
    model.eval()
    total = 0.0
    for batch in held.split(BATCH):
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        total += loss.item() * batch.numel()
    model.train()
    return total / math.log(2) / (held_bytes * share)


def learn(model, optimizer, batch):
    """One step; the gradient's norm."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        loss = model(batch, labels=batch, use_cache=False).loss
    return descend(model, optimizer, loss)


def descend(model, optimizer, loss):
    """Clipped gradients of the loss into the weights; their norm before."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def set_rate(optimizer, rate, step, steps, warm):
    """The rate of this step: linear over the first `warm`, a cosine to a tenth over all."""
    rate *= min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def train(name, data, budget, rate, evaluations, device, changes=None, size=None):
    """Losses along the way and the final bits per byte; AdamW, cosine, bfloat16 autocast.

    `gradient_norms`: the largest between two evaluations, before they are clipped.
    """
    training, held, held_bytes, share = data
    model = build(name, changes=changes).to(device).train()
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.1), rate, betas=(0.9, 0.95))
    size = BATCH if size is None else size
    steps = budget // (size * WINDOW)
    order = torch.cat([torch.randperm(len(training)) for _ in range(1 + steps * size // len(training))])
    curve, norms, largest = [], [], torch.zeros((), device=device)
    for step in range(steps):
        set_rate(optimizer, rate, step, steps, min(100, steps // 5 + 1))
        norm = learn(model, optimizer, training[order[step * size : (step + 1) * size]])
        largest = torch.maximum(largest, norm)
        if (step + 1) % max(1, steps // evaluations) == 0 or step + 1 == steps:
            curve.append(((step + 1) * size * WINDOW, round(bits_per_byte(model, held, held_bytes, share), 4)))
            norms.append(round(largest.item(), 3))
            largest = torch.zeros_like(largest)
    return model, {
        "learning_rate": rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * size * WINDOW,
        "held_out_bits_per_byte": curve[-1][1],
        "curve": curve,
        "gradient_norms": norms,
    }


@torch.no_grad()
def uncertainty(model, held, samples=8):
    """Correlation over held-out tokens of the loss with the marginal entropy, and with that of the plain read-out."""
    model.eval()
    torch.manual_seed(0)
    pieces = []
    for batch in held[:64].split(8):
        with torch.autocast(batch.device.type, torch.bfloat16):
            pieces.append(token_columns(model, batch, samples))
    columns = joined(pieces)
    return {
        "samples": samples,
        "tokens": len(columns["loss"]),
        "correlation_marginal_entropy_loss": correlation(columns, "marginal_entropy"),
        "correlation_plain_entropy_loss": correlation(columns, "plain_entropy"),
        "correlation_log_variance_loss": correlation(columns, "log_variance"),
        "mean_loss_by_entropy": by_entropy(columns, 20),
    }


def file_name(batch, start):
    """Results of other windows a step or another start stand beside those of `BATCH` and `OUTPUT_START`."""
    parts = ["small_lm"] + ([str(batch)] if batch != BATCH else [])
    return "_".join(parts + ([] if start == OUTPUT_START else ["wide"] if start == 1 else [f"start{start:g}"]))


def draw(result, folder):
    """Held-out bits per byte over tokens; loss over KLA's marginal entropy."""
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    rows = {name: row for name, row in result["models"].items() if "curve" in row}
    for (name, row), marker in zip(rows.items(), "os^vDx+*", strict=False):
        line = "-" if name in OURS else "--"
        axes[0].plot(*zip(*((t / 1e6, b) for t, b in row["curve"]), strict=True), line, marker=marker, label=name)
    axes[0].set_xlabel("million tokens")
    axes[0].set_ylabel("held-out bits per byte")
    axes[0].legend(frameon=False)
    if "uncertainty" in rows.get("kla", {}):
        pairs = rows["kla"]["uncertainty"]["mean_loss_by_entropy"]
        axes[1].plot([e for e, _ in pairs], [loss for _, loss in pairs], "k-o")
        axes[1].plot([0, pairs[-1][0]], [0, pairs[-1][0]], color="0.7")
        axes[1].set_xlabel("marginal entropy, nats")
        axes[1].set_ylabel("loss of the same tokens, nats")
    figure.tight_layout()
    figure.savefig(folder / f"{file_name(result['batch'], result['output_start'])}.png", dpi=150)
    pyplot.close(figure)


def run(job, device, data, budget, size=None, start=OUTPUT_START):
    """What `learned` returns, with the seconds that it took this process."""
    started = time.perf_counter()
    row = learned(job, device, data, budget, size, start)
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def learned(job, device, data, budget, size, start):
    """One model, rates searched unless one is given, or one variant of a model at a known rate."""
    name, changes, rate = job
    own = {"output_start": start}
    if device.type == "cuda":
        without_tuning()
    if changes is not None:
        return train(name, data(device), budget // 4, rate, 4, device, own | changes, size)[1]
    data = data(device)
    if rate is not None:
        return train(name, data, budget, rate, 12, device, own, size)[1]
    rates, search = list(RATES), {}
    for rate in rates:
        row = train(name, data, budget // 4, rate, 1, device, own, size)[1]
        search[rate] = row["held_out_bits_per_byte"]
        best = min(search, key=search.__getitem__)
        if rate == rates[-1] == best:
            rates.append(2 * rate)
    model, row = train(name, data, budget, best, 12, device, own, size)
    row["search"] = search
    if name == "kla":
        row["uncertainty"] = uncertainty(model, data[1])
    return row


def speed(name, device):
    """Milliseconds of a training step on random tokens, tokens per second, and memory at its peak."""
    model = build(name).to(device).train()
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.1), 1e-3, betas=(0.9, 0.95))
    batch = torch.randint(VOCABULARY, (SPEED_BATCH, WINDOW), device=device)
    figures = timed(lambda: learn(model, optimizer, batch), SPEED_STEPS, warmup=5, device=device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    rate = round(1e3 * batch.numel() / figures["median_ms"])
    return {"windows": SPEED_BATCH, **figures, "tokens_per_s": rate, "peak_mib": peak and round(peak)}


@dataclass
class Data:
    """Texts that every process puts on its device."""

    training: torch.Tensor
    held: torch.Tensor
    held_bytes: int

    def __call__(self, device):
        """(training windows, held-out windows, held-out bytes, share of the held-out text in whole windows)."""
        held = windows(self.held, device)
        return windows(self.training, device), held, self.held_bytes, held.numel() / len(self.held)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--batch", type=int, default=BATCH, help="windows a step")
    parser.add_argument(
        "--output-start", type=float, default=OUTPUT_START, help="of mixers' output projections, over other weights'"
    )
    parser.add_argument("--models", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--workers", type=int, help="processes that train; two for each GPU, one without one")
    parser.add_argument("--only", choices=["quality", "speed"], help="one half alone")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no model is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.output_start < 0:
        parser.error(f"--output-start must be 0 or more, got {options.output_start}")
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    workers = options.workers or (2 * len(devices) if devices[0] != "cpu" else 1)
    if options.only != "speed":
        qualities(options, devices, workers)
    if options.only != "quality":
        speeds(options, devices[:1])


def qualities(options, devices, workers):
    """Train every model, once more at half its rate, then the variants."""
    started = time.time()
    data = Data(*prepare(options.corpus))
    print(f"{data.training.numel()} training tokens, {time.time() - started:.0f} s to prepare", flush=True)
    settings = {
        "corpus": [p.name for p in options.corpus],
        "training_tokens": data.training.numel(),
        "held_out_bytes": data.held_bytes,
        "window": WINDOW,
        "batch": options.batch,
        "output_start": options.output_start,
        "budget": options.tokens,
    }
    name = file_name(options.batch, options.output_start)
    result = continued(name, settings, options.output) or {**settings, "models": {}, "variants": {}}
    result.setdefault("halved", {})
    noted = note_run(result, devices, workers)

    def report(key, row):
        kind, label = key
        result[kind][label] = row | noted
        print(label, {k: v for k, v in row.items() if k not in ("curve", "uncertainty")}, flush=True)
        write(name, result, options.output)

    work = partial(run, data=data, budget=options.tokens, size=options.batch, start=options.output_start)
    wanted = [model for model in options.models if "curve" not in result["models"].get(model, {})]
    jobs = {("models", model): (model, None, None) for model in wanted}
    run_all(jobs, work, devices, workers, options.limit, report)
    trained = [model for model in options.models if "curve" in result["models"].get(model, {})]
    halved = {
        ("halved", model): (model, None, result["models"][model]["learning_rate"] / 2)
        for model in trained
        if "curve" not in result["halved"].get(model, {})
    }
    run_all(halved, work, devices, workers, options.limit - (time.time() - started), report)
    variants = {
        ("variants", f"{model}: {label}"): (model, changes, result["models"][model]["learning_rate"])
        for model, own in VARIANTS.items()
        if model in trained
        for label, changes in {"as it is": {}, **own}.items()
        if "curve" not in result["variants"].get(f"{model}: {label}", {})
    }
    run_all(variants, work, devices, workers, options.limit - (time.time() - started), report)
    draw(result, options.output)


def speeds(options, devices):
    """Time every model: all at once for what has to be compiled and tuned, then one by one."""
    jobs = {name: name for name in options.models}
    if devices[0] != "cpu":
        run_all(jobs, speed, devices, len(jobs), options.limit, lambda name, row: None)
    rows = {}
    for name in jobs:
        run_all({name: name}, speed, devices, 1, options.limit, rows.__setitem__)
        print(name, rows.get(name), flush=True)
    write("small_lm_speed", {"environment": environment(devices[0]), "window": WINDOW, "models": rows}, options.output)


if __name__ == "__main__":
    main()
