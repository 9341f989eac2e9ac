"""Error of the Gated KalmaNet kernels against a float64 direct solve, beside that of the published scheme.

The published scheme (arXiv 2511.21016 and its released kernels) runs 30 Chebyshev steps with bfloat16 matrix operands,
float32 sums and a bfloat16 solution; it is emulated here on the torch path. 18 settings: random, correlated, low-rank
and slowly varying keys, slow and fast decay, input gates, a cold start. Errors are relative to the norm of the exact
result, of the output and of every gradient.
"""

import argparse
from pathlib import Path

import torch
from record import RESULTS, environment, write
from torch.utils._python_dispatch import TorchDispatchMode

from kalman_kernels import GKASolver, GKAState, gated_kalmanet
from kalman_kernels.gka import chunked

PREFIX, LENGTH, HEADS = 4096, 256, 4
SETTINGS = {
    "random, decay .9": ("random", 0.9, False),
    "random, decay .99": ("random", 0.99, False),
    "random, decay .999": ("random", 0.999, False),
    "random, decay .9999": ("random", 0.9999, False),
    "random, decay .99, gates": ("random", 0.99, True),
    "silu, decay .99, gates": ("silu", 0.99, True),
    "silu, decay .999, gates": ("silu", 0.999, True),
    "silu, initial decays": ("silu", None, True),
    "mean .5, decay .99": ("mean.5", 0.99, False),
    "mean .5, decay .999": ("mean.5", 0.999, False),
    "mean .9, decay .999": ("mean.9", 0.999, False),
    "rank 8, decay .999": ("rank8", 0.999, False),
    "geometric, decay .999": ("geometric", 0.999, False),
    "geometric, decay .9999": ("geometric", 0.9999, False),
    "autoregressive .98, decay .99": ("ar", 0.99, False),
    "cold, random, decay .999": ("random", 0.999, False),
    "cold, silu, decay .999, gates": ("silu", 0.999, True),
    "cold, mean .5, decay .99": ("mean.5", 0.99, False),
}
NAMES = ("output", "d_query", "d_key", "d_value", "d_log_decay", "d_solution_mix", "d_input_gate")


def make_keys(kind, length, width, generator):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = normal(length, HEADS, width)
    if kind == "silu":
        padded = torch.cat([keys.new_zeros(3, HEADS, width), keys])
        taps = 0.5 * normal(4, HEADS, width)
        keys = torch.nn.functional.silu(sum(taps[i] * padded[i : i + length] for i in range(4)))
    elif kind.startswith("mean"):
        cosine = float(kind[4:])
        common = torch.nn.functional.normalize(normal(1, HEADS, width), dim=-1)
        keys = cosine**0.5 * common + (1 - cosine) ** 0.5 * torch.nn.functional.normalize(keys, dim=-1)
    elif kind == "rank8":
        keys = torch.einsum("thr,hrd->thd", normal(length, HEADS, 8), normal(HEADS, 8, width)) / 8**0.5 + 0.03 * keys
    elif kind == "geometric":
        keys = keys * torch.logspace(0, -1.5, width, dtype=torch.float64)
    elif kind == "ar":
        for t in range(1, length):
            keys[t] = 0.98 * keys[t - 1] + (1 - 0.98**2) ** 0.5 * keys[t]
    return torch.nn.functional.normalize(keys, dim=-1)


def problem(name, width, device, dtype=torch.bfloat16):
    """Inputs of `dtype` (gates float32), the state before them, and a cotangent."""
    kind, decay, gated = SETTINGS[name]
    generator = torch.Generator().manual_seed(0)
    length = LENGTH if name.startswith("cold") else PREFIX + LENGTH
    keys = make_keys(kind, length, width, generator)
    queries = torch.nn.functional.normalize(torch.randn(length, HEADS, width, generator=generator).double(), dim=-1)
    queries[:, HEADS // 2 :] = make_keys(kind, length, width, generator)[:, HEADS // 2 :]
    values = torch.randn(length, HEADS, width, generator=generator)
    if decay is None:
        step = torch.nn.functional.softplus(torch.randn(length, HEADS, generator=generator) - 4)
        log_decay = -step * torch.tensor([0.5, 2.0, 8.0, 15.0])
    else:
        log_decay = torch.full((length, HEADS), decay).log()
    mix = torch.rand(length, HEADS, generator=generator)
    gate = torch.sigmoid(1.5 * torch.randn(length, HEADS, generator=generator)) if gated else torch.ones(length, HEADS)
    tensors = [t[None].to(device) for t in (queries, keys, values, log_decay, mix, gate)]
    tensors = [t.to(dtype) for t in tensors[:3]] + [t.float() for t in tensors[3:]]
    empty = torch.zeros(1, HEADS, width, width, dtype=torch.float64, device=device)
    state = GKAState(empty, empty.clone())
    if length > LENGTH:
        before = [t[:, :PREFIX].double() for t in tensors]
        state = run(before, state, GKASolver("chebyshev", 0), "torch")[1]
    cotangent = torch.randn(1, LENGTH, HEADS, width, generator=generator).to(device, dtype)
    return [t[:, -LENGTH:].contiguous() for t in tensors], GKAState(*(s.float() for s in state)), cotangent


def run(tensors, state, solver, implementation):
    query, key, value, log_decay, mix, gate = tensors
    return gated_kalmanet(
        query,
        key,
        value,
        log_decay,
        mix,
        input_gate=gate,
        initial_state=state,
        solver=solver,
        implementation=implementation,
    )


def differentiated(tensors, state, cotangent, solver, implementation):
    """Output and the six gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs, _ = run(leaves, state, solver, implementation)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, cotangent.to(outputs.dtype))]


class BFloat16Operands(TorchDispatchMode):
    """Matrix products with bfloat16 operands and float32 sums."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        skip = {"bmm": 0, "mm": 0, "baddbmm": 1, "baddbmm_": 1}.get(name)
        if skip is not None:
            args = (*args[:skip], *(t.bfloat16().float() for t in args[skip:]))
        return function(*args, **(kwargs or {}))


def published(tensors, state, cotangent):
    """Output and the six gradients of the published scheme, emulated on the torch path."""
    query, key, value, log_decay, mix, gate = (t.float() for t in tensors)
    inputs = chunked.Inputs(query, key, value, log_decay, log_decay, mix, gate, None)
    solver, scale = GKASolver("chebyshev", 30), query.shape[-1] ** -0.5
    solve = chunked._Ridge.solve
    chunked._Ridge.solve = lambda self, right: solve(self, right).bfloat16().float()
    try:
        with BFloat16Operands(), torch.no_grad():
            outputs, gram, value_key, *saved = chunked.gka_chunked_forward(inputs, *state, solver, scale, True)
            zeros = torch.zeros_like(gram), torch.zeros_like(value_key)
            gradients = chunked.gka_chunked_backward(
                inputs, tuple(saved), cotangent.float(), *zeros, state.key_gram, solver, scale
            )
    finally:
        chunked._Ridge.solve = solve
    d_query, d_key, d_value, d_log, d_key_log, d_mix, d_gate = gradients[:7]
    results = [outputs, d_query, d_key, d_value, d_log + d_key_log, d_mix, d_gate]
    return [t.bfloat16() if i < 4 else t for i, t in enumerate(results)]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def compare(name, width, device):
    tensors, state, cotangent = problem(name, width, device)
    wide = [t.double() for t in tensors]
    exact = differentiated(
        wide, GKAState(*(s.double() for s in state)), cotangent.double(), GKASolver("exact"), "torch"
    )
    half = differentiated(tensors, state, cotangent, GKASolver("cg", 20), "auto")
    polynomial = differentiated(tensors, state, cotangent, GKASolver("chebyshev", 30), "auto")
    single = differentiated([t.float() for t in tensors], state, cotangent, GKASolver("cg", 30), "auto")
    reference = published(tensors, state, cotangent)
    errors = {
        kind: {n: float(f"{relative(a, e):.2e}") for n, a, e in zip(NAMES, result, exact, strict=True)}
        for kind, result in (
            ("bfloat16 cg", half),
            ("bfloat16 chebyshev", polynomial),
            ("float32 cg", single),
            ("published scheme", reference),
        )
    }
    worse = [n for n in NAMES if errors["bfloat16 cg"][n] > errors["published scheme"][n]]
    return {"setting": name, "width": width, "errors": errors, "worse_than_published": worse}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for width in (128, 64):
        for name in SETTINGS:
            rows.append(compare(name, width, options.device))
            errors = rows[-1]["errors"]
            table = " ".join(
                f"{errors['bfloat16 cg'][n]:.1e}|{errors['bfloat16 chebyshev'][n]:.1e}|"
                f"{errors['published scheme'][n]:.1e}|{errors['float32 cg'][n]:.0e}"
                for n in NAMES
            )
            print(f"{width} {name:30} {table} {rows[-1]['worse_than_published']}", flush=True)
    result = {
        "environment": environment(options.device),
        "shape": {"batch": 1, "length": LENGTH, "prefix": PREFIX, "heads": HEADS},
        "oracle": "float64 direct solve of the same bfloat16 inputs",
        "rows": rows,
    }
    write("gka_accuracy", result, options.output)


if __name__ == "__main__":
    main()
