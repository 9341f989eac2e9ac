"""Speed, memory and accuracy of the Kalman Linear Attention kernels on a GPU, beside the torch path in one process.

    python benchmarks/kla_gpu.py [--sections ceilings prefill decode scaling accuracy]

The torch path is parallel over chunks of time and has the same hand-derived gradient. The published implementation
(`kla` package) cannot be installed here; its published figures, on an H100, stand beside ours in the JSON.
"""

import argparse
import time
from pathlib import Path

import torch
from gpu_timing import ceilings, extra_memory, milliseconds, plot_scaling, replayed
from record import RESULTS, environment, write

from kalman_kernels import KLAState, kalman_linear_attention, kalman_linear_attention_step

# (B, T, M, S), and what the `kla` package (Triton backend, float32) is known to need there on an H100 80GB.
PREFILL = {
    (8, 2048, 1024, 16): {"forward_ms": 4.83, "forward_backward_ms": 107, "forward_backward_mib": 23245},
    (1, 16384, 1024, 16): {"forward_ms": 5.20},
    (1, 65536, 2048, 16): {"forward_ms": 40.9, "forward_backward_ms": "out of memory"},
    (8, 2048, 1024, 64): {"forward_ms": 41.2, "forward_backward_ms": "out of memory"},
}
DECODE = [1, 8, 64, 256, 1024]
SCALING = [2**n for n in range(11, 21)]


def problem(batch, length, channels, states, dtype=torch.float32, seed=0):
    """Unit keys and queries, decays .9 to 1, noises .01 to .06, observation precisions .1 to 2.1."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, device="cuda")

    key, query = (torch.nn.functional.normalize(normal(batch, length, states), dim=-1) for _ in range(2))
    value, observed = normal(batch, length, channels), 0.1 + 2 * uniform(batch, length, channels)
    tokens = [t.to(dtype) for t in (value, observed, key, query)]
    return [*tokens, 0.9 + 0.1 * uniform(channels, states), 0.01 + 0.05 * uniform(channels, states)]


def measured(tensors, implementation, repeats=9):
    """Times and memory of forward, and of forward and backward of every input."""
    started = time.perf_counter()
    leaves = [t.clone().requires_grad_() for t in tensors]

    def call():
        return kalman_linear_attention(*leaves, implementation=implementation)[:2]

    cotangents = [torch.randn_like(t) for t in call()]

    def both():
        torch.autograd.grad(call(), leaves, cotangents)

    def forward():
        with torch.no_grad():
            call()

    both()
    forward()
    torch.cuda.synchronize()
    return {
        "first_call_s": round(time.perf_counter() - started, 2),
        "forward": {**milliseconds(forward, repeats, 1), "extra_mib": extra_memory(forward)},
        "forward_backward": {**milliseconds(both, repeats, 1), "extra_mib": extra_memory(both)},
    }


def prefill(rows, save):
    for shape, published in PREFILL.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = problem(*shape, dtype)
            for name in ("triton", "torch") if dtype == torch.float32 else ("triton",):
                row = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "implementation": name}
                row.update(measured(tensors, name, 9 if name == "triton" else 2))
                if name == "triton":
                    row["kla_package_h100"] = published
                rows.append(row)
                save()
                print(
                    f"{shape} {row['dtype']} {name}: {row['forward']['median_ms']} ms "
                    f"{row['forward']['extra_mib']} MiB, {row['forward_backward']['median_ms']} ms "
                    f"{row['forward_backward']['extra_mib']} MiB, first {row['first_call_s']} s",
                    flush=True,
                )
            torch.cuda.empty_cache()


def decode(rows, save, channels=1024, states=16):
    for batch in DECODE:
        tensors = problem(batch, 1, channels, states, torch.bfloat16)
        state = KLAState(*(torch.ones(batch, channels, states, device="cuda") for _ in range(2)))

        def step(tensors=tensors, state=state):
            return kalman_linear_attention_step(*tensors, state=state, in_place=True)

        moved = 4 * 4 * batch * channels * states
        row = {"batch": batch, "channels": channels, "states": states, "state_bytes_moved": moved}
        row["eager"], row["graph"] = milliseconds(step), replayed(step)
        row["state_tb_per_s"] = round(moved / row["graph"]["median_ms"] / 1e9, 3)
        rows.append(row)
        save()
        print(f"step B {batch}: {row['graph']['median_ms'] * 1e3:.1f} us, {row['state_tb_per_s']} TB/s", flush=True)


def scaling(rows, save, channels=256, states=16):
    for length in SCALING:
        row = {"length": length, "channels": channels, "states": states}
        row.update(measured(problem(1, length, channels, states), "triton", 5))
        rows.append(row)
        save()
        print(f"T {length}: {row['forward']['median_ms']} / {row['forward_backward']['median_ms']} ms", flush=True)
        torch.cuda.empty_cache()


def accuracy(rows, save):
    """Float32 errors at 65,536 tokens, relative to the torch path in float64: outputs and every gradient."""
    names = ("mean", "variance", "value", "value_precision", "key", "query", "decay", "process_noise")
    for prior in (False, True):
        tensors = problem(1, 65536, 32, 16)
        results = []
        for implementation, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            mean, variance, _ = kalman_linear_attention(*leaves, decode_from_prior=prior, implementation=implementation)
            generator = torch.Generator("cuda").manual_seed(1)
            cotangents = [torch.randn(mean.shape, generator=generator, device="cuda").to(dtype) for _ in range(2)]
            results.append([mean, variance, *torch.autograd.grad((mean, variance), leaves, cotangents)])
        errors = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, *results, strict=True)}
        rows.append({"length": 65536, "decode_from_prior": prior, "relative_errors": errors})
        save()
        print({n: f"{e:.1e}" for n, e in errors.items()}, flush=True)


def draw(result, folder):
    """Times over the length."""
    plot_scaling(folder / "kla_gpu_scaling.png", result["scaling"])


def main():
    sections = {"prefill": prefill, "decode": decode, "scaling": scaling, "accuracy": accuracy}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", default=["ceilings", *sections])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {"environment": environment("cuda"), **{name: [] for name in sections}}

    def save():
        write("kla_gpu", result, options.output)

    if "ceilings" in options.sections:
        result["ceilings"] = ceilings()
    for name, section in sections.items():
        if name in options.sections:
            section(result[name], save)
    save()
    if result["scaling"]:
        draw(result, options.output)


if __name__ == "__main__":
    main()
