"""The solvers of a ridge regression over the past, and what the adaptive ridge buys.

    python benchmarks/tasks/solvers.py

Systems (H_t + lambda_t I) x = q_t with H_t = sum_s g_t ... g_{s+1} k_s k_s^T from synthetic sequences: batch 8, 2,048
tokens, 8 heads, width 128, every 64th token; keys of norm 1, independent, correlated (half of each key is the last
key) or of rank 8 with a little noise; decays of one half in 64 to 4,096 tokens. Ridge: adaptive, lambda_t = 0.02
||H_t||_F, or constant. Operands float32, or bfloat16 as on tensor cores: the matrix is rounded, and the vector it is
multiplied by. Solvers: Chebyshev, gradient descent, accelerated gradient descent (all with the spectrum's known
bounds lambda and lambda + ||H||_F), conjugate gradients, conjugate gradients whose direction is rounded before it is
used anywhere, and a Cholesky solve. Residual, error of x and of the gradient of H (-x y^T with y the solution for a
random cotangent, by the same solver) against iterations, medians and the worst over systems, relative, against
float64; systems that end in NaN or beyond 1e3.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import RESULTS, drawing, environment, write  # noqa: E402

BATCH, LENGTH, HEADS, WIDTH, EVERY = 8, 2048, 8, 128, 64
RATIO = 0.02
RIDGES = {"adaptive": None, "constant 1": 1.0, "constant 0.1": 0.1, "constant 0.01": 0.01}
ITERATIONS = (1, 2, 4, 6, 8, 10, 15, 20, 30, 50)
KEYS = ("independent", "correlated", "rank 8")


def systems(kind, seed=0):
    """H (N, D, D) and q (N, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    lines = BATCH * HEADS
    noise = torch.randn(lines, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    if kind == "rank 8":
        basis = torch.randn(lines, 8, WIDTH, generator=generator, dtype=torch.float64)
        few = torch.randn(lines, LENGTH, 8, generator=generator, dtype=torch.float64)
        noise = few @ basis / 8**0.5 + 0.03 * noise
    keys = torch.nn.functional.normalize(noise, dim=-1)
    if kind == "correlated":
        for t in range(1, LENGTH):
            keys[:, t] = torch.nn.functional.normalize(0.5 * keys[:, t - 1] + 0.5 * keys[:, t], dim=-1)
    lives = torch.logspace(6, 12, HEADS, base=2.0, dtype=torch.float64).repeat(BATCH)
    decay = 0.5 ** (1 / lives)
    state, kept = torch.zeros(lines, WIDTH, WIDTH, dtype=torch.float64), []
    weights = decay[:, None] ** torch.arange(EVERY - 1, -1, -1, dtype=torch.float64)
    for start in range(0, LENGTH, EVERY):
        block = keys[:, start : start + EVERY]
        state = decay[:, None, None] ** EVERY * state + (block * weights[..., None]).mT @ block
        kept.append(state)
    queries = torch.nn.functional.normalize(
        torch.randn(len(kept) * lines, WIDTH, generator=generator, dtype=torch.float64), dim=-1
    )
    return torch.cat(kept), queries


def narrow(tensor, dtype):
    return tensor.to(dtype).float()


class Problem:
    """One right side for every system, with products as the device would make them."""

    def __init__(self, matrix, ridge, right, dtype):
        self.matrix, self.dtype = narrow(matrix, dtype), dtype
        self.ridge, self.right = ridge.float()[:, None], right.float()
        self.top = self.ridge + torch.linalg.matrix_norm(matrix).float()[:, None]

    def times(self, vector):
        return (self.matrix @ narrow(vector, self.dtype)[..., None])[..., 0] + self.ridge * vector


def dot(a, b):
    return (a * b).sum(-1, keepdim=True)


def chebyshev(problem):
    """The iterates, from the first; so do the others."""
    middle, half = (problem.top + problem.ridge) / 2, (problem.top - problem.ridge) / 2
    x = problem.right / middle
    residual, rho = problem.right - problem.times(x), 1 / middle
    direction = residual / middle
    for number in range(ITERATIONS[-1]):
        x = x + direction
        yield x
        residual = residual - problem.times(direction)
        rho_new = 1 / (middle - half.square() * rho / (4 if number else 2))
        direction = rho_new * residual + half.square() / (4 if number else 2) * rho * rho_new * direction
        rho = rho_new


def gradient_descent(problem):
    rate, x = 2 / (problem.top + problem.ridge), torch.zeros_like(problem.right)
    for _ in range(ITERATIONS[-1]):
        x = x + rate * (problem.right - problem.times(x))
        yield x


def accelerated(problem):
    rate, root = 1 / problem.top, (problem.ridge / problem.top).sqrt()
    momentum, x = (1 - root) / (1 + root), torch.zeros_like(problem.right)
    ahead = x
    for _ in range(ITERATIONS[-1]):
        new = ahead + rate * (problem.right - problem.times(ahead))
        ahead, x = new + momentum * (new - x), new
        yield x


def conjugate(problem, rounded=False):
    x, residual = torch.zeros_like(problem.right), problem.right
    direction, square = residual, dot(residual, residual)
    for _ in range(ITERATIONS[-1]):
        used = narrow(direction, problem.dtype) if rounded else direction
        product = problem.times(used)
        rate = square / dot(used, product).clamp(min=1e-30)
        x, residual = x + rate * used, residual - rate * product
        yield x
        new = dot(residual, residual)
        direction, square = residual + new / square.clamp(min=1e-30) * used, new


SOLVERS = {
    "Chebyshev": chebyshev,
    "gradient descent": gradient_descent,
    "accelerated gradient descent": accelerated,
    "conjugate gradients": conjugate,
    "conjugate gradients, rounded direction": lambda problem: conjugate(problem, True),
}


def figures(values):
    """Median and worst over systems; None where that is no number."""
    found = {"median": values.nanmedian().item(), "worst": values.nan_to_num(nan=float("inf")).max().item()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def errors(exact, x, y, queries, wanted):
    x, y, norm = x.double(), y.double(), torch.linalg.vector_norm
    residual = norm((exact @ x[..., None])[..., 0] - queries, dim=-1) / norm(queries, dim=-1)
    error = norm(x - wanted[0], dim=-1) / norm(wanted[0], dim=-1)
    # || x y^T - x* y*^T ||_F over the norm of the latter, without the matrices.
    true = norm(wanted[0], dim=-1) * norm(wanted[1], dim=-1)
    square = (dot(x, x) * dot(y, y) - 2 * dot(x, wanted[0]) * dot(y, wanted[1]))[..., 0] + true.square()
    gradient = square.clamp(min=0).sqrt() / true
    broken = (~error.isfinite() | (error > 1e3)).double().mean().item()
    return {
        "residual": figures(residual),
        "error": figures(error),
        "gradient_error": figures(gradient),
        "broken": broken,
    }


def cholesky(problem):
    """Of the rounded matrix, in float32; NaN where it is not positive."""
    matrix = problem.matrix + problem.ridge[..., None] * torch.eye(WIDTH)
    factor, info = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(problem.right[..., None], factor)[..., 0]
    yield torch.where(info[:, None] == 0, found, torch.nan)


def draw(result, folder):
    """Errors of the worst system over iterations, keys of rank 8."""
    rows = result["rows"]
    plt = drawing()
    if plt is None:
        return
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey=True, layout="constrained")
    for line, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for axis, ridge in zip(line, ("adaptive", "constant 0.1", "constant 0.01"), strict=True):
            for solver in SOLVERS:
                own = [
                    r
                    for r in rows
                    if (r["solver"], r["ridge"], r["dtype"], r["keys"]) == (solver, ridge, dtype, "rank 8")
                ]
                axis.plot(
                    [r["iterations"] for r in own],
                    [r["error"]["worst"] or math.nan for r in own],
                    marker=".",
                    label=solver,
                )
            axis.set(xscale="log", yscale="log", ylim=(1e-7, 1e4), title=f"{dtype}, {ridge} ridge")
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iterations")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of x, worst system")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("keys of rank 8 with a little noise")
    figure.savefig(folder / "solvers.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for keys in KEYS:
        matrix, queries = systems(keys)
        generator = torch.Generator().manual_seed(1)
        cotangents = torch.randn(queries.shape, generator=generator, dtype=torch.float64)
        for ridge, constant in RIDGES.items():
            size = torch.linalg.matrix_norm(matrix)
            own = RATIO * size if constant is None else torch.full_like(size, constant)
            exact = matrix + own[:, None, None] * torch.eye(WIDTH, dtype=torch.float64)
            wanted = [torch.linalg.solve(exact, v) for v in (queries, cotangents)]
            for dtype in (torch.float32, torch.bfloat16):
                problems = [Problem(matrix, own, v, dtype) for v in (queries, cotangents)]
                for solver, solve in {**SOLVERS, "Cholesky": cholesky}.items():
                    pairs = zip(*map(solve, problems), strict=True)
                    for count, (x, y) in enumerate(pairs, 0 if solver == "Cholesky" else 1):
                        if count in (0, *ITERATIONS):
                            row = {"keys": keys, "ridge": ridge, "dtype": str(dtype)[6:], "solver": solver}
                            row["iterations"] = count
                            rows.append({**row, **errors(exact, x, y, queries, wanted)})
        last = [r for r in rows if r["keys"] == keys and r["iterations"] in (0, 30)]
        for row in last:
            print(
                json.dumps([row[k] for k in ("keys", "ridge", "dtype", "solver")]),
                f"{row['error']['median']:.1e} {row['error']['worst']:.1e} {row['gradient_error']['worst']:.1e}",
                row["broken"],
                flush=True,
            )
    result = {"environment": environment(), "systems": len(matrix), "ratio": RATIO, "rows": rows}
    write("solvers", result, options.output)
    draw(result, options.output)


if __name__ == "__main__":
    main()
