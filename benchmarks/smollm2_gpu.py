"""Prefill, decoding and training of a converted SmolLM2-135M beside its softmax teacher (SDPA) on a GPU.

    python benchmarks/smollm2_gpu.py SmolLM2-folder

The layers are swapped and not healed: that changes what a model says and not how fast it says it. Decoding is timed as
a plain loop of forward calls, whose time is the host's, and as a CUDA graph of the same calls, whose time is the GPU's.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from gpu_timing import milliseconds, replayed
from record import RESULTS, drawing, environment, write
from transformers import AutoModelForCausalLM, DynamicCache

from kalman_conversion import swap_attention

CONTEXTS = [1024, 4096, 16384, 65536]
STUDENTS = {"6 of 30 layers GKA": [6, 7, 16, 21, 25, 27], "15 of 30 layers GKA": "half", "30 of 30 layers GKA": "all"}
DECODED, BATCH = 8, 16


def in_bfloat16(model):
    """As `from_pretrained` narrows: decays and noises stay float32."""
    model = model.to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "decay_bias" in name or "dynamics_bias" in name:
            parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def generation(model, context):
    """Tokens per second of one prompt's prefill, of BATCH prompts' decoding, and peak memory of both."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(5, 40000, (1, context), generator=generator, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = milliseconds(lambda: model(ids, use_cache=True, logits_to_keep=1), repeats=3, warmup=1)
    row = {
        "context": context,
        "prefill_tokens_per_s": round(1e3 * context / time["median_ms"]),
        "prefill_range": [round(1e3 * context / time[k]) for k in ("p80_ms", "p20_ms")],
        "prefill_peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
    }
    for batch in (1, BATCH):
        cache = DynamicCache(config=model.config)
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        token = ids[:, :1].expand(batch, 1)

        def decode(token=token, cache=cache):
            for _ in range(DECODED):
                model(token, past_key_values=cache, use_cache=True)

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time, count = milliseconds(decode, repeats=3, warmup=1), 1e3 * batch * DECODED
        row[f"decode_batch_{batch}"] = {
            "tokens_per_s": round(count / time["median_ms"], 1),
            "range": [round(count / time[k], 1) for k in ("p80_ms", "p20_ms")],
            "peak_above_cache_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
            "cache_mib": round(sum(t.nbytes for t in held(cache)) / 2**20, 1),
        }
        kept = []

        def decode_one(token=token, cache=cache, kept=kept):
            model(token, past_key_values=cache, use_cache=True)
            if not torch.cuda.is_current_stream_capturing():
                # What the graph starts from has to stay.
                kept[:] = held(cache)

        time = replayed(decode_one, launches=DECODED)
        row[f"decode_batch_{batch}"] |= {
            "captured_tokens_per_s": round(1e3 * batch / time["median_ms"]),
            "captured_range": [round(1e3 * batch / time[k]) for k in ("p80_ms", "p20_ms")],
        }
        del cache, kept
    return row


def held(cache):
    """All tensors of a cache."""
    tensors = []
    for layer in cache.layers:
        tensors += [layer.keys, layer.values]
        for name in ("conv_states", "recurrent_states"):
            tensors += list(getattr(layer, name, {}).values())
    return [t for t in tensors if t is not None]


def training(model, batch=4, length=2048):
    """Tokens per second and peak memory of forward, backward and AdamW in bfloat16."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(5, 40000, (batch, length), device="cuda")

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    time, count = milliseconds(step, repeats=5, warmup=1), 1e3 * batch * length
    model.eval()
    return {
        "batch": batch,
        "length": length,
        "tokens_per_s": round(count / time["median_ms"]),
        "range": [round(count / time[k]) for k in ("p80_ms", "p20_ms")],
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
    }


def draw(result, folder):
    """Prefill, decoding and cache over the context."""
    rows = result["models"]
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    styles = ["k-o", "k--s", "k-.^", "k:d"]
    for row, style in zip(rows, styles, strict=False):
        found = row["generation"]
        contexts = [r["context"] for r in found]
        axes[0].loglog(contexts, [r["prefill_tokens_per_s"] for r in found], style, label=row["model"])
        name = f"decode_batch_{BATCH}"
        axes[1].loglog(contexts, [r[name]["captured_tokens_per_s"] for r in found], style)
        axes[2].loglog(contexts, [r[name]["cache_mib"] for r in found], style)
    for axis, title in zip(
        axes, ("prefill, tokens/s", f"decoding {BATCH} rows (graph), tokens/s", "cache, MiB"), strict=True
    ):
        axis.set_xlabel("context")
        axis.set_title(title, fontsize=9)
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "smollm2_gpu.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {"environment": environment("cuda"), "dtype": "bfloat16", "models": []}
    for name in ["softmax teacher", *STUDENTS]:
        model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
        if name in STUDENTS:
            model = swap_attention(model, layers=STUDENTS[name])
        model = in_bfloat16(model.to("cuda"))
        row = {"model": name, "generation": []}
        result["models"].append(row)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            for context in CONTEXTS:
                row["generation"].append(generation(model, context))
                print(name, row["generation"][-1], flush=True)
                write("smollm2_gpu", result, options.output)
        row["training"] = training(model)
        print(name, row["training"], flush=True)
        write("smollm2_gpu", result, options.output)
        del model
        torch.cuda.empty_cache()
    draw(result, options.output)


if __name__ == "__main__":
    main()
