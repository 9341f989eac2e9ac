"""Trains many small models at once: each is a CUDA graph of its step on a stream of its own, replayed side by side.

A model's step picks its batch, sets its rate, and updates its weights without the host: what the host does is to
replay. All seeds and learning rates of several cells train together. Packs of cells are handed to worker processes, and
what a pack gave goes back as soon as it is there.
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import statistics
import threading
import time
import traceback
from collections.abc import Sequence

import torch
from registry import Cell, build, weight_decay_groups, without_tuning
from sequences import IGNORED, Examples
from torch.nn import functional as F

WARM, WEIGHT_DECAY = 0.1, 0.1
WARM_STEPS = 3
SOLVED = 0.999


class Training:
    """One model in training: `advance` takes a step; on a GPU, once `prepare` was called, as a captured graph."""

    def __init__(self, cell: Cell, task, data: Examples, rate: float, seed: int):
        size, device = cell.size, data.inputs.device
        self.cell, self.rate, self.seed, self.data, self.device = cell, rate, seed, data, device
        self.model = build(cell, task, seed).to(device).train()
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        order = torch.randperm(len(data.inputs), generator=torch.Generator().manual_seed(seed))
        self.order, self.offsets = order.to(device), torch.arange(size.batch, device=device)
        self.lr = torch.zeros((), device=device)
        groups = weight_decay_groups(self.model, WEIGHT_DECAY, ("bias", "A_log", "embedding"))
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.98), capturable=cuda, fused=True)
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.graph, self.curve = None, []
        self.loss = torch.zeros((), device=device)

    def _precision(self):
        enabled = self.cell.size.autocast
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _step(self):
        size, data = self.cell.size, self.data
        rows = self.order[(self.counter * size.batch + self.offsets) % len(self.order)]
        tokens, targets = data.inputs[rows].long(), data.targets[rows].long()
        positions = None if data.positions is None else data.positions[rows].long()
        progress = self.counter / size.steps
        schedule = (progress / WARM).clamp(max=1) * (0.05 + 0.475 * (1 + (math.pi * progress).cos()))
        self.lr.copy_(self.rate * schedule)
        with self._precision():
            logits = self.model(tokens, positions)
        loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        self.counter += 1

    def prepare(self):
        """Take the first `WARM_STEPS` one by one, then capture the next; nothing on a CPU."""
        if self.stream is None:
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_STEPS):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
        self.stream.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()

    def advance(self):
        """One step."""
        if self.graph is not None:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._step()

    @torch.no_grad()
    def accuracy(self, test: Examples, by_position=False):
        """Share of right answers, or a list of it for each position."""
        right, asked = 0, 0
        rows = max(1, 65536 // test.inputs.shape[1])
        for start in range(0, len(test.inputs), rows):
            tokens, targets, positions = (None if t is None else t[start : start + rows].long() for t in test)
            with self._precision():
                found = self.model(tokens, positions).argmax(-1)
            right = right + ((found == targets) & (targets != IGNORED)).sum(0)
            asked = asked + (targets != IGNORED).sum(0)
        if by_position:
            return [round(v, 4) for v in (right / asked).tolist()]
        return round((right.sum() / asked.sum()).item(), 4)


def together(trainings, steps, test, every):
    """Advance all by turns until the end, or until each is solved or lost; curves of (step, accuracy, loss).

    Those that `prepare` took further than others wait for them.
    """
    active = list(trainings)
    taken = {training: int(training.counter) for training in active}
    for step in range(min(taken.values(), default=0), steps):
        for training in active:
            if taken[training] <= step:
                training.advance()
        if (step + 1) % every == 0 or step + 1 == steps:
            for training in list(active):
                if training.stream is not None:
                    training.stream.synchronize()
                point = (step + 1, training.accuracy(test), round(training.loss.item(), 4))
                training.curve.append(point)
                if point[1] >= SOLVED or not math.isfinite(point[2]):
                    active.remove(training)
        if not active:
            break


def packed(data: Examples) -> Examples:
    """The same in the smallest integers that hold it."""
    small = torch.int16 if max(int(t.max()) for t in data if t is not None) < 2**15 else torch.int32
    return Examples(*(None if t is None else t.to(small) for t in data))


def run_cells(cells: Sequence[Cell], device, study) -> dict:
    """Every seed at every rate of cells of one task, all side by side; tests of the rate that is best in the mean.

    Returns {key of the cell: JSON object}; `seconds` is its share of what all took, and a cell whose model raises has
    `failed`, the traceback.
    """
    if device.type == "cuda":
        without_tuning()
    task = study.tasks[cells[0].task]
    data = packed(task.training.draw(study.examples, 1, device))
    check = packed(task.training.draw(study.checks, 2, device))
    tests = {name: test.draw(study.checks, 3, device) for name, test in task.tests.items()}
    runs, results, started = [], {}, time.perf_counter()
    for cell in cells:
        try:
            own = [Training(cell, task.training, data, r, s) for r in cell.rates for s in range(cell.size.seeds)]
            for training in own:
                training.prepare()
            runs.append(own)
        except Exception:
            results[cell.key] = {"failed": traceback.format_exc()[-1500:]}
    steps = cells[0].size.steps
    together([training for own in runs for training in own], steps, check, max(1, steps // 10))
    for own in runs:
        results[own[0].cell.key] = _summary(own, tests, task.by_position, study.at_inference)
    seconds = round((time.perf_counter() - started) / len(cells), 1)
    return {key: row | {"seconds": seconds} for key, row in results.items()}


def best_rate(reached):
    """The rate whose last points of (step, accuracy, loss) have the best mean accuracy."""
    return max(reached, key=lambda rate: statistics.mean(accuracy for _, accuracy, _ in reached[rate]))


def _summary(runs, tests, by_position, at_inference):
    cell, size = runs[0].cell, runs[0].cell.size
    reached = {rate: [t.curve[-1] for t in runs if t.rate == rate] for rate in cell.rates}
    best = best_rate(reached)
    tested = [
        {
            "seed": training.seed,
            "curve": training.curve,
            "tests": {name: training.accuracy(test, by_position) for name, test in tests.items()},
            **({"at_inference": _with_iterations(training, tests, at_inference)} if at_inference else {}),
        }
        for training in runs
        if training.rate == best
    ]
    return {
        "model": cell.model,
        "label": cell.label or cell.model,
        "task": cell.task,
        "width": size.width,
        "layers": size.layers,
        "steps": size.steps,
        "autocast": size.autocast,
        "outputs": size.outputs,
        "fields": size.fields,
        "parameters": sum(p.numel() for p in runs[0].model.parameters()),
        "rates": reached,
        "rate": best,
        "runs": tested,
    }


def _with_iterations(training, tests, numbers):
    """{solver iterations: {test: accuracy}}; the training's own are set again."""
    configs = [block.mixer.config for block in training.model.blocks]
    own, found = [config.solver_iterations for config in configs], {}
    for number in numbers:
        for config in configs:
            config.solver_iterations = number
        found[number] = {name: training.accuracy(test) for name, test in tests.items()}
    for config, number in zip(configs, own, strict=True):
        config.solver_iterations = number
    return found


def _end_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _serve(device, jobs, results, work, limit):
    # A parent that was killed leaves nobody to train for.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    while time.time() < limit:
        try:
            key, job = jobs.get(timeout=2)
        except queue.Empty:
            break
        try:
            results.put((key, work(job, torch.device(device))))
        except Exception:
            results.put((key, {"failed": traceback.format_exc()[-1500:]}))
    results.put((None, device))


def run_all(jobs, work, devices, workers, limit, report):
    """Spread `{key: job}` over processes: `report(key, work(job, device))` as each ends.

    Args:
        jobs: what to do, in this order; keys and jobs that can be pickled.
        work: a function of a module, `(job, device) -> dict`; what it raises is reported as {"failed": traceback}.
        devices: names; worker n gets number n modulo their count.
        workers: processes.
        limit: seconds after which no job is begun.
        report: called here.
    """
    context = multiprocessing.get_context("spawn")
    line, results = context.Queue(), context.Queue()
    for pair in jobs.items():
        line.put(pair)
    deadline = time.time() + limit
    processes = [
        context.Process(target=_serve, args=(devices[n % len(devices)], line, results, work, deadline))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    ended = 0
    while ended < len(processes):
        try:
            key, result = results.get(timeout=5)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        if key is None:
            ended += 1
        else:
            report(key, result)
    while not line.empty():
        line.get()
    for process in processes:
        process.join()
