"""What stopping the solve early costs and saves: error and time against `solver_tolerance`.

    python benchmarks/solver_tolerance.py [--model FOLDER --text FILE]

The operator on the GPU if there is one, else on the CPU, against the float64 direct solve; with a GKA model also its
perplexity on the first 16 windows of 1,024 tokens (4 on a CPU) of a text. Without one that of an earlier run stays in
the file, with its own environment. Results: `results/solver_tolerance.json`.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from gpu_timing import milliseconds
from record import RESULTS, environment, timed, write

from kalman_kernels import GKASolver, gated_kalmanet

TOLERANCES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SHAPES = {"cuda": (8, 2048, 16, 128, torch.bfloat16), "cpu": (1, 1024, 9, 64, torch.float32)}
DECAYS = (0.9, 0.99, 0.999)


def operands(device, decay):
    batch, length, heads, width, dtype = SHAPES[device]
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(batch, length, heads, width, device=device, generator=generator) for _ in range(3))
    query, key = (torch.nn.functional.normalize(t, dim=-1) for t in (query, key))
    log_decay = torch.full((batch, length, heads), math.log(decay), device=device)
    mix = torch.full((batch, length, heads), 0.9, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in (query, key, value)]
    return [*leaves, log_decay, mix]


def call(tensors, solver):
    query, key, value, log_decay, mix = tensors
    return gated_kalmanet(query, key, value, log_decay, mix, solver=solver)[0]


def measured(function, device):
    return milliseconds(function) if device == "cuda" else timed(function, repeats=5, warmup=1)


def gradients(tensors, solver, cotangent):
    return torch.autograd.grad((call(tensors, solver) * cotangent).sum(), tensors[:3])


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def operator(device):
    rows = []
    for decay in DECAYS:
        tensors = operands(device, decay)
        # The oracle on one sequence: rows do not depend on one another.
        first = [t[:1].detach().requires_grad_(i < 3) for i, t in enumerate(tensors)]
        wide = [t[:1].detach().double().requires_grad_(i < 3) for i, t in enumerate(tensors)]
        cotangent = torch.randn_like(first[2])
        exact = call(wide, GKASolver("exact")).detach()
        exact_gradients = gradients(wide, GKASolver("exact"), cotangent.double())
        for tolerance in TOLERANCES:
            solver = GKASolver("cg", 30, tolerance=tolerance)
            with torch.no_grad():
                error = relative(call(first, solver), exact)
                forward = measured(lambda s=solver, t=tensors: call(t, s), device)
            near = gradients(first, solver, cotangent)
            both = measured(lambda s=solver, t=tensors: call(t, s).sum().backward(), device)
            rows.append(
                {
                    "decay": decay,
                    "tolerance": tolerance,
                    "error": error,
                    "gradient_errors": [relative(a, b) for a, b in zip(near, exact_gradients, strict=True)],
                    "forward": forward,
                    "forward_backward": both,
                }
            )
            print(
                f"{decay:6} {tolerance:6} {error:.1e} {max(rows[-1]['gradient_errors']):.1e} "
                f"{forward['median_ms']:8.3f} {both['median_ms']:8.3f}",
                flush=True,
            )
    return rows


@torch.no_grad()
def perplexities(folder, text, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_kalman  # noqa: F401

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    if model.config.solver != "cg":
        raise SystemExit(f"--model must have solver='cg', got {model.config.solver!r}")
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: 1024 * (16 if device == "cuda" else 4)].view(-1, 1024).to(device)
    rows = []
    for tolerance in TOLERANCES:
        model.set_solver_iterations(model.config.solver_iterations, tolerance)
        started = time.perf_counter()
        losses = [model(w[None], labels=w[None], use_cache=False).loss.item() for w in windows]
        seconds = time.perf_counter() - started
        rows.append({"tolerance": tolerance, "perplexity": math.exp(sum(losses) / len(losses)), "seconds": seconds})
        print(rows[-1], flush=True)
    return {"iterations": model.config.solver_iterations, "windows": len(windows), "rows": rows}


def earlier(file):
    """A model's part of an earlier run, with the environment that was measured in."""
    before = json.loads(file.read_text()) if file.exists() else {}
    return {"environment": before["environment"], **before["model"]} if "model" in before else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"environment": environment(device), "shape": [str(s) for s in SHAPES[device]], "rows": operator(device)}
    if options.model is not None:
        result["model"] = {"environment": result["environment"], **perplexities(options.model, options.text, device)}
    elif model := earlier(options.output / "solver_tolerance.json"):
        result["model"] = model
    write("solver_tolerance", result, options.output)


if __name__ == "__main__":
    main()
