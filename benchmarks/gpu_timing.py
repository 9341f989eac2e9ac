"""Device time and memory of calls on a GPU."""

import shutil
import statistics
import subprocess

import torch
from record import drawing


def milliseconds(function, repeats=15, warmup=3):
    """Median, 20th and 80th percentile of device time; calls are queued one after the other, the host runs ahead."""
    for _ in range(warmup):
        function()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    samples = [start.elapsed_time(end) for start, end in events]
    cuts = statistics.quantiles(samples, n=5)
    return {"median_ms": round(statistics.median(samples), 4), "p20_ms": round(cuts[0], 4), "p80_ms": round(cuts[3], 4)}


def replayed(function, launches=20):
    """Milliseconds of one call inside a CUDA graph of `launches` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    return {key: round(value / launches, 5) for key, value in milliseconds(graph.replay).items()}


def clock_mhz():
    """The multiprocessors' clock right after a measurement: at its power limit a GPU lowers it. None if unknown."""
    if shutil.which("nvidia-smi") is None:
        return None
    # By its name: nvidia-smi counts devices that CUDA_VISIBLE_DEVICES hides.
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["nvidia-smi", device, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    clock = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return int(clock) if clock.isdigit() else None


def extra_memory(function):
    """Peak MiB above what was allocated before the call."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def ceilings():
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))["median_ms"]
    # As a step does with its states.
    replaced = target.view(torch.float32).fill_(1.0)
    in_place = milliseconds(lambda: replaced.mul_(1.0))["median_ms"]
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    product = milliseconds(lambda: left @ left)["median_ms"]
    return {
        "copy_tb_per_s": round(2 * 2**30 / copy / 1e9, 2),
        "in_place_tb_per_s": round(2 * 2**30 / in_place / 1e9, 2),
        "float16_matmul_tflops": round(2 * 8192**3 / product / 1e9, 1),
    }


def plot_scaling(path, rows):
    """Times against lengths on double logarithmic axes, where matplotlib is installed."""
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    lengths = [r["length"] for r in rows]
    for kind, label, style in (("forward", "forward", "o-"), ("forward_backward", "forward + backward", "s--")):
        axes.loglog(lengths, [r[kind]["median_ms"] for r in rows], style, color="black", label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
