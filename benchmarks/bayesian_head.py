"""The Bayesian head by itself: moments against draws, where its softmax stops being valid, stability, time and memory.

    python benchmarks/bayesian_head.py [--long] [--cuda]

`relu`: largest distance of the closed-form moments from 1e6 draws, in standard errors of the draws, over t = mean /
deviation from -8 to 8. `softmax`: error of mean and deviation over the variance of the logits. `stability`: lowest
variance or eigenvalue along 1e4 updates (1e3 without --long), relative to the largest. `speed`: milliseconds and peak
memory of an update, by width and outputs, in a process of its own each. --cuda measures the same on a GPU and nothing
else: `results/bayesian_head_cuda.json` (peak: of what the GPU's allocator gave out).
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from record import RESULTS, drawing, environment, timed, write

from hf_kalman.training import KalmanBayesianHead, relu_moments, softmax_moments

DRAWS = 1_000_000


def relu():
    """Left of -1 the draws are of N(0, 1) and weighted, or none of a million would come through."""
    generator, rows = torch.Generator().manual_seed(0), []
    normal = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
    for t in torch.arange(-8, 8.25, 0.25).tolist():
        mean, variance, cross = relu_moments(
            torch.tensor(t, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        )
        a, weight = (normal, (normal * t - t * t / 2).exp()) if t < -1 else (t + normal, torch.ones_like(normal))
        z = a.clamp(min=0)
        row: dict[str, float] = {"t": t}
        for name, sample, wanted in (
            ("mean", weight * z, mean),
            ("square", weight * z.square(), variance + mean.square()),
            ("covariance", weight * z * (a - t), cross),
        ):
            row[name] = ((sample.mean() - wanted).abs() / (sample.std() / DRAWS**0.5)).item()
        rows.append(row)
    return rows


def softmax():
    generator, rows = torch.Generator().manual_seed(1), []
    means = {"even": torch.zeros(10), "sure": torch.tensor([5.0, *[0.0] * 9]), "mixed": torch.linspace(-2, 2, 10)}
    normal = torch.randn(DRAWS // 5, 10, generator=generator)
    for (name, mean), variance in itertools.product(means.items(), (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)):
        p = (mean + variance**0.5 * normal).softmax(-1)
        row = {"logits": name, "variance": variance}
        for order in (1, 2):
            found, spread = softmax_moments(mean, torch.full((10,), variance), order)
            row[f"mean_error_order_{order}"] = (found - p.mean(0)).abs().max().item()
        row["deviation_ratio"] = (spread.sqrt() / p.std(0)).mean().item()
        rows.append(row)
    return rows


def stability(steps):
    rows = []
    for outputs, covariance in itertools.product((2, 32, 512, 4096), ("diagonal", "shared")):
        torch.manual_seed(2)
        head = KalmanBayesianHead((16, 32, outputs), covariance=covariance, variance=0.1, forgetting=0.999)
        head.mean_0.normal_(0, 0.25)
        head.mean_1.normal_(0, 0.25)
        lowest = 1.0
        for step in range(steps):
            head.filter_step(torch.randn(16), torch.randint(outputs, ()))
            if step % (steps // 20) == 0:
                for index in (0, 1):
                    own = getattr(head, f"covariance_{index}")
                    values = own if covariance == "diagonal" else torch.linalg.eigvalsh(own.double())
                    lowest = min(lowest, (values.min() / values.max()).item())
        finite = all(torch.isfinite(value).all().item() for value in head.state_dict().values())
        rows.append({"outputs": outputs, "covariance": covariance, "steps": steps, "lowest": lowest, "finite": finite})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def update(case, device):
    """Time and peak memory of one update."""
    inputs, outputs, covariance, layers = case
    sizes = (inputs, outputs) if layers == 1 else (inputs, 2 * inputs, outputs)
    before = resident()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    head = KalmanBayesianHead(sizes, covariance=covariance, variance=0.1 if layers == 1 else (0.0, 0.1)).to(device)
    x, label = torch.randn(inputs, device=device), torch.tensor(1, device=device)
    started = time.perf_counter()
    head.filter_step(x, label)
    first = time.perf_counter() - started
    repeats = max(3, min(20, int(5 / max(first, 1e-4))))
    figures = timed(lambda: head.filter_step(x, label), repeats=repeats, device=device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident() - before
    row = {"inputs": inputs, "outputs": outputs, "covariance": covariance, "layers": layers, **figures}
    return {**row, "state_mib": sum(b.nbytes for b in head.buffers()) / 2**20, "peak_mib": peak}


def resident():
    """Most MiB of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(case, queue):
    """`update` on one core, for a process of its own."""
    torch.set_num_threads(1)
    queue.put(update(case, "cpu"))


def speed(device):
    cases = [(d, v, "diagonal", 1) for d in (64, 256, 1024, 4096) for v in (2, 100, 50_000)]
    cases += [(d, 100, "shared", 1) for d in (64, 256, 1024, 4096)]
    cases += [(d, v, "full", 1) for d, v in ((64, 2), (64, 100), (256, 2), (256, 100), (1024, 2), (4096, 2))]
    cases += [(d, v, "diagonal", 2) for d in (64, 256, 1024) for v in (2, 100)]
    context, rows = multiprocessing.get_context("spawn"), []
    for case in cases:
        if device == "cuda":
            rows.append(update(case, device))
        else:
            queue = context.Queue()
            process = context.Process(target=apart, args=(case, queue))
            process.start()
            rows.append(queue.get())
            process.join()
        print(json.dumps(rows[-1]), flush=True)
    return rows


def draw(result, folder):
    """Errors of the softmax moments over the variance of the logits."""
    rows = result["softmax"]
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for name in dict.fromkeys(row["logits"] for row in rows):
        own = [row for row in rows if row["logits"] == name]
        variances = [row["variance"] for row in own]
        for order, style in ((1, "-"), (2, "--")):
            errors = [row[f"mean_error_order_{order}"] for row in own]
            axes[0].plot(variances, errors, style, marker=".", label=f"{name}, order {order}")
        axes[1].plot(variances, [row["deviation_ratio"] for row in own], marker=".", label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="variance of the logits", ylabel="largest error of a probability")
    axes[1].set(xscale="log", xlabel="variance of the logits", ylabel="deviation, ours over true")
    axes[1].axhline(1, color="black", linestyle=":")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "bayesian_head.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.cuda:
        write("bayesian_head_cuda", {"environment": environment("cuda"), "speed": speed("cuda")}, options.output)
        return
    result = {"environment": environment(), "draws": DRAWS, "relu": relu(), "softmax": softmax()}
    draw(result, options.output)
    result["speed"] = speed("cpu")
    result["stability"] = stability(10_000 if options.long else 1000)
    write("bayesian_head", result, options.output)


if __name__ == "__main__":
    main()
