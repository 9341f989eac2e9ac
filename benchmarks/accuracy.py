"""Accuracy: the reference implementation's own outputs, and the solvers against the exact solve in float64."""

import argparse
import json
import sys
from pathlib import Path

import torch
from record import RESULTS, environment, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_kalman  # noqa: F401 - registers the architectures
from kalman_kernels import GKASolver

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS / "kernels"))

from gka_inputs import NAMES, call, gradients, make_cotangents, make_inputs, relative_error  # noqa: E402


def golden(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = load_file(folder / "golden.safetensors")
    out = model(expected["input_ids"], labels=expected["input_ids"])
    out.loss.backward()
    norms = json.loads((folder / "grad_norms.json").read_text())
    mine = {
        f"grad.{n.replace('.mixer.', '.gka.').replace('decay_bias.', '')}": p.grad.norm().item()
        for n, p in model.named_parameters()
    }
    return {
        "largest_logit_difference": (out.logits - expected["logits"]).abs().max().item(),
        "largest_relative_difference_of_a_gradient_norm": max(
            abs(mine[n] - norm) / norm for n, norm in norms.items() if norm > 0
        ),
    }


def solver(name, iterations, decay):
    inputs = make_inputs(130, width=64, value_width=32, dtype=torch.float32)
    inputs[3], inputs[5] = inputs[3] * decay, inputs[5] * decay
    wide, cotangents = [t.double() for t in inputs], make_cotangents(inputs)
    exact = gradients(wide, [c.double() for c in cotangents], implementation="reference")
    fast = gradients(inputs, cotangents, solver=GKASolver(name, iterations))
    return {
        "solver": name,
        "iterations": iterations,
        "decay_scale": decay,
        "output": relative_error(call(inputs, solver=GKASolver(name, iterations))[0], call(wide)[0]),
        "gradients": {n: relative_error(a, b) for n, a, b in zip(NAMES, fast, exact, strict=True)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    cases = (("cg", 12), ("cg", 20), ("cg", 32), ("chebyshev", 30), ("exact", 0))
    result = {
        "environment": environment(),
        "hybrid_qwen3": {n: golden(TESTS / "data" / "awslabs_gka" / n) for n in "ab"},
        "solvers_float32_against_exact_float64": [solver(*case, d) for case in cases for d in (1e-4, 1e-2, 2.0)],
    }
    write("accuracy", result, options.output)
    print(json.dumps(result["hybrid_qwen3"]))
    for row in result["solvers_float32_against_exact_float64"]:
        worst = max(row["gradients"].values())
        print(row["solver"], row["iterations"], row["decay_scale"], f"{row['output']:.1e} {worst:.1e}")


if __name__ == "__main__":
    main()
