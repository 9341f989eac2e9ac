"""Speed and memory of the Gated KalmaNet operator on a CPU: chunk-parallel path against the plain loop.

Each case runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from record import RESULTS, environment, timed, write

SHAPE = {"batch": 1, "length": 1024, "heads": 9, "key_heads": 3, "width": 64}
CASES = [
    {"implementation": "reference", "solver": "exact", "iterations": 0},
    {"implementation": "reference", "solver": "chebyshev", "iterations": 30},
    {"implementation": "torch", "solver": "chebyshev", "iterations": 30},
    {"implementation": "torch", "solver": "cg", "iterations": 20},
    {"implementation": "torch", "solver": "exact", "iterations": 0},
    {"implementation": "torch", "solver": "cg", "iterations": 20, "chunk": 16},
    {"implementation": "torch", "solver": "cg", "iterations": 20, "chunk": 64},
    {"implementation": "torch", "solver": "cg", "iterations": 20, "length": 4096},
    {"implementation": "torch", "solver": "cg", "iterations": 20, "length": 16384},
]


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case):
    import torch

    from kalman_kernels import GKASolver, gated_kalmanet
    from kalman_kernels.gka import chunked

    if "chunk" in case:
        chunked.CHUNK["cpu"] = case["chunk"]
    shape = {**SHAPE, **{k: v for k, v in case.items() if k in SHAPE}}
    torch.manual_seed(0)
    batch, length, heads, width = (shape[k] for k in ("batch", "length", "heads", "width"))

    def unit(count):
        return torch.nn.functional.normalize(torch.randn(batch, length, count, width), dim=-1)

    value = torch.randn(batch, length, shape["key_heads"], width)
    gates = -0.02 * torch.rand(batch, length, heads), torch.rand(batch, length, heads)
    leaves = [t.requires_grad_() for t in (unit(heads), unit(shape["key_heads"]), value, *gates)]
    solver = GKASolver(case["solver"], case["iterations"])
    slow = case["implementation"] == "reference"
    repeats = {"repeats": 3 if slow else 20, "warmup": 1 if slow else 3}

    def forward():
        return gated_kalmanet(*leaves, solver=solver, implementation=case["implementation"])[0]

    def both():
        for leaf in leaves:
            leaf.grad = None
        forward().sum().backward()

    before = peak()
    with torch.no_grad():
        result = {"forward": timed(forward, **repeats)}
    result["forward_peak_mib"] = round(peak() - before, 1)
    result["forward_backward"] = timed(both, **repeats)
    result["forward_backward_peak_mib"] = round(peak() - before, 1)
    return {**case, "shape": shape, **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{case}: forward {row['forward']['median_ms']} ms, forward+backward "
            f"{row['forward_backward']['median_ms']} ms, {row['forward_backward_peak_mib']} MiB",
            flush=True,
        )
    write("gka_cpu", {"environment": environment(), "dtype": "float32", "rows": rows}, options.output)


if __name__ == "__main__":
    main()
