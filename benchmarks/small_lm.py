"""Small language models side by side: KLA, GKA and softmax attention, same size, text, budget and search.

    python benchmarks/small_lm.py CORPUS... [--tokens 16000000]

CORPUS are files of documents separated by blank lines (`.txt` or `.txt.gz`). A byte-level BPE tokenizer of 8,192 tokens
is trained on the training documents; every 30th is held out. Learning rates are chosen by the held-out loss of a
quarter of the budget, from a grid that goes on while its end is best. Results: `results/small_lm.json` and a plot of
held-out bits per byte against tokens; for KLA also how its marginal entropy goes with the loss of the same token.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from record import RESULTS, drawing, environment, write
from token_uncertainty import by_entropy, correlation, joined, token_columns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf_kalman import GKAConfig, GKAForCausalLM, KLAConfig, KLAForCausalLM
from kalman_conversion.text import read_documents

WIDTH, LAYERS, VOCABULARY, WINDOW, BATCH = 384, 8, 8192, 512, 64
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
# MLP widths that make the models equally large.
MODELS = {
    "softmax": (GKAConfig, GKAForCausalLM, {"layer_types": ["full_attention"] * LAYERS, "intermediate_size": 1396}),
    "gka": (GKAConfig, GKAForCausalLM, {"intermediate_size": 1252, "solver": "cg", "solver_iterations": 20}),
    "kla": (
        KLAConfig,
        KLAForCausalLM,
        {"intermediate_size": 1024, "value_rank": "conv", "variance_rank": WIDTH // 8, "linear_state_size": 16},
    ),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    config, model, fields = MODELS[name]
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            **fields,
        )
    )


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


def train(name, data, budget, rate, evaluations, device):
    """Losses along the way, the final bits per byte, tokens per second; AdamW, cosine, bfloat16 autocast."""
    training, held, held_bytes, share = data
    model = build(name).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 32]
    others = [p for p in model.parameters() if not (p.ndim == 2 and min(p.shape) > 32)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], rate, betas=(0.9, 0.95)
    )
    steps = budget // (BATCH * WINDOW)
    order = torch.cat([torch.randperm(len(training)) for _ in range(1 + steps * BATCH // len(training))])
    curve, started, seconds = [], time.perf_counter(), 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / min(100, steps // 5 + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        batch = training[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast(device, torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // evaluations) == 0 or step + 1 == steps:
            loss.item()
            seconds += time.perf_counter() - started
            curve.append(((step + 1) * BATCH * WINDOW, round(bits_per_byte(model, held, held_bytes, share), 4)))
            started = time.perf_counter()
    return model, {
        "learning_rate": rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * BATCH * WINDOW,
        "tokens_per_s": round(steps * BATCH * WINDOW / seconds),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None,
        "held_out_bits_per_byte": curve[-1][1],
        "curve": curve,
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


def plot(folder, result):
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for (name, row), style in zip(result["models"].items(), ("k-o", "k--s", "k-.^"), strict=True):
        axes[0].plot([t / 1e6 for t, _ in row["curve"]], [b for _, b in row["curve"]], style, label=name)
    axes[0].set_xlabel("million tokens")
    axes[0].set_ylabel("held-out bits per byte")
    axes[0].legend(frameon=False)
    pairs = result["uncertainty"]["mean_loss_by_entropy"]
    axes[1].plot([e for e, _ in pairs], [loss for _, loss in pairs], "k-o")
    axes[1].plot([0, pairs[-1][0]], [0, pairs[-1][0]], color="0.7")
    axes[1].set_xlabel("marginal entropy, nats")
    axes[1].set_ylabel("loss of the same tokens, nats")
    figure.tight_layout()
    figure.savefig(Path(folder) / "small_lm.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    training, held, held_bytes = prepare(options.corpus)
    used = windows(held, device)
    data = windows(training, device), used, held_bytes, used.numel() / len(held)
    print(f"{training.numel()} training tokens, {time.perf_counter() - started:.0f} s to prepare", flush=True)
    result = {
        "environment": environment(device),
        "corpus": [p.name for p in options.corpus],
        "training_tokens": training.numel(),
        "held_out_bytes": held_bytes,
        "window": WINDOW,
        "batch": BATCH,
        "models": {},
        "search": {},
    }
    for name in MODELS:
        rates, search = list(RATES), {}
        for rate in rates:
            search[rate] = train(name, data, options.tokens // 4, rate, 1, device)[1]["held_out_bits_per_byte"]
            best = min(search, key=search.__getitem__)
            if rate == rates[-1] == best:
                rates.append(2 * rate)
        result["search"][name] = search
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model, result["models"][name] = train(name, data, options.tokens, best, 12, device)
        print(name, result["search"][name], result["models"][name], flush=True)
        if name == "kla":
            result["uncertainty"] = uncertainty(model, used)
            print(result["uncertainty"], flush=True)
        write("small_lm", result, options.output)
    plot(options.output, result)


if __name__ == "__main__":
    main()
