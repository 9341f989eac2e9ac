"""Do heads know how noisy their labels are? Predicted against true noise, and calibration.

    python benchmarks/bayesian_calibration.py MODEL --corpus FOLDER

Stream, splits and methods are those of benchmarks/bayesian_text.py. A share of the stream's labels is drawn at
random, 0 to 0.6 of them, and of the labels that the methods are tested on as well; after 400 samples every method
says how often its likeliest class will be wrong (mean of 1 - max p). That is compared with how often it is: slope and
R^2 over the shares of noise, expected calibration error (15 bins) and NLL. Methods: Bayesian head, last-layer
Laplace, and softmax (the same retraining, or none, without uncertainty), each with its hyper-parameter of
bayesian_text.json.
"""

import argparse
import json
import multiprocessing
import random
import statistics

import bayesian_text
import torch
from bayesian_text import FILES, METHODS, arguments, begin, prepare
from record import RESULTS, environment, interval, write

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
COMPARED = (
    "no adaptation",
    "Bayesian, full",
    "Bayesian, shared",
    "Bayesian, diagonal",
    "warm start, memory 10, adamw",
    "warm start, memory all, adamw",
    "Laplace, memory 10, sgd",
)


def noisy(label, share, generator):
    return generator.randrange(len(FILES)) if generator.random() < share else label


def calibration_error(p, right, bins=15):
    """Mean distance of confidence and accuracy over bins of confidence, weighted by their cases."""
    edges, total = torch.linspace(0, 1, bins + 1), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (p > low) & (p <= high)
        if inside.any():
            total += inside.double().mean().item() * abs((p[inside].mean() - right[inside].double().mean()).item())
    return total


def run(method, value, seed, share):
    linear, stream, _, (inputs, labels) = bayesian_text.DATA[seed]
    model, generator = METHODS[method][1](linear, value), random.Random(f"{seed} {share}")
    for x, y in stream:
        label = noisy(y, share, generator)
        if method != "no adaptation":
            model.filter_step(x, label)
    labels = torch.tensor([noisy(int(y), share, generator) for y in labels])
    p = model(inputs).probabilities
    best = p.max(-1)
    right = best.indices == labels
    return {
        "method": method,
        "seed": seed,
        "share": share,
        "predicted_error": 1 - best.values.mean().item(),
        "error": 1 - right.double().mean().item(),
        "calibration_error": calibration_error(best.values, right),
        "nll": -p[range(len(p)), labels].clamp(min=1e-30).log().mean().item(),
    }


def line(rows):
    """Slope and R^2 of predicted over true error."""
    x, y = ([row[name] for row in rows] for name in ("error", "predicted_error"))
    slope, _ = statistics.linear_regression(x, y)
    return {"slope": round(slope, 3), "r2": round(statistics.correlation(x, y) ** 2, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    options = parser.parse_args()
    device = prepare(options)
    found = json.loads((RESULTS / "bayesian_text.json").read_text())["summary"]
    values = {row["method"]: row["value"] for row in found}
    tasks = [
        (method, values[method], seed, share)
        for method in COMPARED
        for share in SHARES
        for seed in range(2, options.seeds + 2)
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs, begin, (bayesian_text.DATA,)) as pool:
        rows = pool.starmap(run, tasks, chunksize=1)
    result = {"environment": environment(device), "seeds": options.seeds, "runs": rows, "summary": []}
    for method in COMPARED:
        own = [row for row in rows if row["method"] == method]
        row = {"method": method, "value": values[method], **line(own)}
        for name in ("calibration_error", "nll"):
            for share in SHARES:
                scores = [r[name] for r in own if r["share"] == share]
                row[f"{name}_{share}"] = round(statistics.mean(scores), 4)
                row[f"{name}_{share}_95"] = round(interval(scores), 4)
        result["summary"].append(row)
        print(json.dumps({k: v for k, v in row.items() if not k.endswith("_95")}), flush=True)
    write("bayesian_calibration", result, options.output)


if __name__ == "__main__":
    main()
