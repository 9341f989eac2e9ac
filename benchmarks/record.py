"""Results as JSON: what was measured, on what, with which versions and at which commit."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def environment(device="cpu"):
    """Device, versions and commit; HF_KALMAN_COMMIT names the commit of a copy without git."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, cwd=RESULTS.parent)
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else _cpu()
    versions = {}
    for package in ("torch", "transformers", "triton", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "commit": os.environ.get("HF_KALMAN_COMMIT")
        or commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu():
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def timed(function, repeats=20, warmup=3, device="cpu"):
    """{"median_ms", "p20_ms", "p80_ms", "repeats"} of a call."""
    samples = []
    for number in range(warmup + repeats):
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        if number >= warmup:
            samples.append(1e3 * (time.perf_counter() - started))
    cuts = statistics.quantiles(samples, n=5) if len(samples) > 1 else [samples[0]] * 4
    return {
        "median_ms": round(statistics.median(samples), 3),
        "p20_ms": round(cuts[0], 3),
        "p80_ms": round(cuts[3], 3),
        "repeats": repeats,
    }


def drawing():
    """matplotlib's pyplot without a display, None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def interval(values):
    """Half the width of the 95 % interval of a mean, by the normal distribution; 0 for a single value."""
    return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def continued(name, settings, folder=RESULTS):
    """What `<folder>/<name>.json` holds if it was measured with these settings, entries of the same names; else {}."""
    path = Path(folder) / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if all(found.get(key) == value for key, value in settings.items()) else {}


def note_run(result, devices, workers):
    """Note in a result what this run has; what its rows say of themselves, as later runs may go on with the file."""
    result |= {"environment": environment(devices[0]), "devices": len(devices)}
    return {"commit": result["environment"]["commit"], "processes": workers}


def write(name, result, folder=RESULTS):
    """Write `result` to `<folder>/<name>.json`."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
