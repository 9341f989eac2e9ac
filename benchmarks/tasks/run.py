"""Recall, state tracking and the MAD suite: GKA and KLA beside softmax attention and flash-linear-attention's layers.

    pip install flash-linear-attention==0.6.0 einops
    python benchmarks/tasks/run.py STUDY [--models gka ...] [--limit 600]

STUDY is mqar, words, two-blocks, starts, s5, long-words, mad, ablations, iterations or all.

On GPUs (all that are visible) many models train at once, see `runner.py`; processes of one GPU take turns unless CUDA's
multi-process service runs (`nvidia-cuda-mps-control -d`). It has room for some ten processes with fewer hardware queues
each (`CUDA_DEVICE_MAX_CONNECTIONS=8`), for three with 32, the default here. Results: `results/tasks_<study>.json`, one
object for each cell with the rates tried, every seed's curve and tests; what it holds already, a cell or a rate of one,
is not run again. Sizes, rates and steps are those of `STUDIES`; MLPs are SwiGLU, AdamW has betas (0.9, 0.98), weight
decay 0.1 on matrices, 10 % warm-up and a cosine to 5 %; bfloat16 autocast. Tests are drawn apart from training and
choice of rates.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

# Each stream a hardware queue of its own: eight, the driver's default, run one after the other.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from record import RESULTS, continued, drawing, note_run, write  # noqa: E402
from registry import KLA_STARTS, MIXERS, MODELS, OURS, Cell, Size  # noqa: E402
from runner import best_rate, run_all, run_cells  # noqa: E402
from sequences import Mad, Recall, Word  # noqa: E402


@dataclass(frozen=True)
class Task:
    """What a cell trains on and is tested on; `by_position` asks for the accuracy at each position."""

    training: object
    tests: dict
    by_position: bool = False


@dataclass(frozen=True)
class Study:
    """Cells, their tasks, how many examples training goes over, and how many a check or test has.

    `at_inference`: solver iterations of GKA with which every test is made once more.
    """

    cells: tuple
    tasks: dict
    examples: int
    checks: int
    at_inference: tuple = ()


PAIRS = (4, 8, 16, 32, 64, 128, 256)
RECALL = Task(Recall(512, 128, mixed=True), {f"{p}": Recall(max(64, 8 * p), p) for p in PAIRS})
RATES = (1e-3, 3e-3, 1e-2)
# As GKA's paper does it (section 5.1): the bare recurrences. An output gate on noise hides for a while what it gates.
BARE = {
    "gka": {"use_output_gate": False, "use_solution_mix": False, "use_decay": False, "use_input_gate": False},
    "kla": {"use_output_gate": False},
    "gla": {"use_output_gate": False},
    "gated_delta_net": {"use_gate": False},
}


def mqar():
    """Two layers without MLP or output gates; trained at 512 tokens, 4 to 128 pairs, tested at 8 tokens a pair."""
    sizes = {w: Size(width=w, batch=32, steps=4000, rates=RATES) for w in (64, 128, 256)}
    cells = [Cell(m, "mqar", replace(sizes[w], fields=BARE.get(m, {}))) for w in sizes for m in MODELS]
    return Study(tuple(cells), {"mqar": RECALL}, 65536, 512)


WORDS = ("kla", "gka", "attention", "mamba2", "gated_delta_net", "delta_product")


LONGER = 256


def tracked(group, length):
    """Trained on words of `length`; the accuracy at each position of those and of longer ones."""
    return Task(Word(group, length), {"whole": Word(group, length), "longer": Word(group, LONGER)}, by_position=True)


def _words(length, steps, batch, depths, models, groups, rates, seeds=2):
    sizes = [Size(layers=n, mlp=256, batch=batch, steps=steps, rates=rates, seeds=seeds) for n in depths]
    tasks = {g: tracked(g, length) for g in groups}
    cells = tuple(Cell(model, g, size) for g in groups for size in sizes for model in models)
    return Study(cells, tasks, 2**19, 2048)


def words():
    """A5, words of 16 elements, 1 to 4 blocks; two first, the depth that KLA's paper speaks of."""
    return _words(16, 8000, 512, (2, 1, 3, 4), WORDS, ("A5",), (1e-3, 3e-3))


def two_blocks():
    """A5, words of 16, two blocks: four times the steps of `words`, and with as many what changes how far KLA comes."""
    size = Size(layers=2, mlp=256, batch=512, steps=8000, rates=(3e-3,), seeds=2)
    longer = replace(size, steps=32000)
    variants = {
        "in float32": {"autocast": False},
        "rate 0.01": {"rates": (1e-2,)},
        "zero-order hold": {"fields": {"discretization": "zoh"}},
        "no process noise": {"fields": {"process_noise": "none"}},
        "state 64": {"fields": {"linear_state_size": 64}},
        "language-model block": {"fields": {"value_rank": "conv", "variance_rank": 16}},
    }
    cells = [Cell(model, "A5", longer, f"{model}: 32,000 steps") for model in ("kla", "mamba2", "attention")]
    cells.append(
        Cell("kla", "A5", replace(longer, fields=variants["state 64"]["fields"]), "kla: state 64, 32,000 steps")
    )
    cells += [Cell("kla", "A5", replace(size, **changes), f"kla: {name}") for name, changes in variants.items()]
    return Study(tuple(cells), {"A5": tracked("A5", 16)}, 2**19, 2048)


def starts():
    """A5, words of 16, two and four blocks: KLA from other starts."""
    size = Size(mlp=256, batch=512, steps=8000, rates=(3e-3,), seeds=2)
    cells = []
    for layers in (4, 2):
        at = replace(size, layers=layers)
        cells += [Cell("kla", "A5", replace(at, fields=fields), f"kla: {name}") for name, fields in KLA_STARTS.items()]
        cells.append(Cell("kla", "A5", replace(at, outputs=0.1), "kla: outputs of mixers 0.1"))
    return Study(tuple(cells), {"A5": tracked("A5", 16)}, 2**19, 2048)


def s5():
    """S5, words of 16 elements, 4 blocks."""
    return _words(16, 8000, 512, (4,), ("kla", "attention", "mamba2", "delta_product"), ("S5",), (1e-3, 3e-3))


def long_words():
    """A5, words of 256 elements, 4 blocks, at the one rate that is best for most on short words."""
    return _words(256, 8000, 64, (4,), ("kla", "attention", "mamba2", "delta_product"), ("A5",), (3e-3,))


def mad():
    """The six MAD tasks, two blocks."""
    names = ("recall", "noisy", "fuzzy", "copy", "compress", "memorise")
    tasks = {name: Task(Mad(name), {"test": Mad(name)}) for name in names}
    size = Size(mlp=256, batch=128, steps=1500, rates=(1e-3, 4e-3))
    return Study(tuple(Cell(model, name, size) for name in names for model in MODELS), tasks, 12800, 1280)


def ablations():
    """What GKA's and KLA's parts do: recall at width 64, each model at the rate that is best for it there."""
    variants = {
        ("gka", "as in the table"): {},
        ("kla", "as in the table"): {},
        ("gka", "with mix"): {"use_solution_mix": True},
        ("gka", "with decay"): {"use_decay": True},
        ("gka", "with input gate"): {"use_input_gate": True},
        ("gka", "with output gate"): {"use_output_gate": True},
        ("gka", "with all four"): dict.fromkeys(BARE["gka"], True),
        **{("gka", f"ridge ratio {r}"): {"ridge_ratio": r} for r in (0.005, 0.01, 0.05, 0.1)},
        **{("gka", f"constant ridge {r:g}"): {"constant_ridge": r} for r in (1.0, 0.1)},
        # Other numbers of iterations: `iterations`.
        ("gka", "0 iterations"): {"solver_iterations": 0},
        ("kla", "zero-order hold"): {"discretization": "zoh"},
        ("kla", "no process noise"): {"process_noise": "none"},
        **{("kla", f"state {n}"): {"linear_state_size": n} for n in (4, 8, 32, 64)},
        **{("kla", f"start with {name}"): KLA_STARTS[name] for name in ("steps 0.01 to 1", "weights 0.1")},
    }
    rates = {"gka": 3e-3, "kla": 1e-2}
    cells = tuple(
        Cell(
            model,
            "mqar",
            Size(width=64, steps=4000, rates=(rates[model],), fields=BARE[model] | fields),
            f"{model}: {name}",
        )
        for (model, name), fields in variants.items()
    )
    return Study(cells, {"mqar": RECALL}, 65536, 512)


ITERATIONS = (0, 1, 2, 5, 10, 20, 30)


def iterations():
    """GKA's Chebyshev iterations in training and at inference: recall of 32 pairs in 128 tokens."""
    task = Task(Recall(128, 32, vocabulary=256, mixed=True), {"32": Recall(128, 32, vocabulary=256)})
    fields = {**BARE["gka"], "solver": "chebyshev"}
    cells = tuple(
        Cell(
            "gka",
            "recall",
            Size(width=64, steps=1500, rates=(3e-3,), seeds=2, fields={**fields, "solver_iterations": n}),
            f"gka: {n} iterations",
        )
        for n in ITERATIONS
    )
    return Study(cells, {"recall": task}, 32768, 512, ITERATIONS)


STUDIES = {
    "mqar": mqar,
    "words": words,
    "two-blocks": two_blocks,
    "starts": starts,
    "s5": s5,
    "long-words": long_words,
    "mad": mad,
    "ablations": ablations,
    "iterations": iterations,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--models", nargs="+", choices=[*MIXERS])
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose names have one of these in them")
    parser.add_argument("--workers", type=int, help="processes; two for each GPU, two without one")
    parser.add_argument(
        "--beside", type=int, default=0, help="processes of other runs on the same devices, for the stated device time"
    )
    parser.add_argument(
        "--pack", type=int, default=3, help="cells, each at one rate, that a process trains side by side"
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no cell is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.pack < 1:
        parser.error(f"--pack must be at least 1, got {options.pack}")
    started = time.time()
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    workers = options.workers or 2 * len(devices)
    for name in STUDIES if options.study == "all" else [options.study]:
        run_study(name, options, devices, workers, options.limit - (time.time() - started))


def run_study(name, options, devices, workers, limit):
    """Run what `results/tasks_<name>.json` does not hold yet; it is written after every cell."""
    study = STUDIES[name]()
    settings = {"study": study_notes(STUDIES[name], study)}
    # Cells of other settings are no part of this study.
    result = continued(f"tasks_{name}", settings, options.output) or {**settings, "cells": {}}
    noted = note_run(result, devices, workers + options.beside)
    parts = result.setdefault("parts", {})
    wanted = [c for c in study.cells if not options.models or c.model in options.models]
    wanted = [c for c in wanted if any(text in c.key for text in options.only)]
    if not wanted:
        print(f"{name}: no such cell; it has {', '.join(cell.key for cell in study.cells)}")
    wanted = [c for c in wanted if "runs" not in result["cells"].get(c.key, {})]
    missing = [part for cell in wanted for part in cell.parts if "runs" not in parts.get(part.key, {})]

    def report(keys, rows):
        # A process that failed as a whole tells so of the pack.
        rows = dict.fromkeys(keys, rows) if "failed" in rows else rows
        for key, row in rows.items():
            parts[key] = row | noted
            if "failed" in row:
                print(key, "failed:", row["failed"].splitlines()[-1], flush=True)
            else:
                tests = {n: [run["tests"][n] for run in row["runs"]] for n in row["runs"][0]["tests"]}
                brief = {n: [sum(x) / len(x) for x in v] if isinstance(v[0], list) else v for n, v in tests.items()}
                print(key, brief, row["seconds"], "s", flush=True)
        join(wanted, parts, result["cells"])
        write(f"tasks_{name}", result, options.output)

    jobs = {tuple(part.key for part in pack): pack for pack in packs(missing, options.pack)}
    run_all(jobs, partial(run_cells, study=study), devices, workers, limit, report)
    draw(result, options.output, name)


def join(cells, parts, joined):
    """Move cells trained at all their rates from `parts` to `joined`: the runs at the rate that is best in the mean."""
    for cell in cells:
        own = {part.at: parts[part.key] for part in cell.parts if part.key in parts}
        if len(own) < len(cell.parts):
            continue
        if failed := [row for row in own.values() if "failed" in row]:
            joined[cell.key] = failed[0]
            continue
        # The one rate of a part: a number, or its text where the part is of a file.
        reached = {rate: next(iter(row["rates"].values())) for rate, row in own.items()}
        seconds = round(sum(row["seconds"] for row in own.values()), 1)
        joined[cell.key] = own[best_rate(reached)] | {"rates": reached, "seconds": seconds}
        for part in cell.parts:
            del parts[part.key]


def packs(cells, size):
    """Cells in their order in groups of `size`, each of one task and number of steps."""

    def kind(cell):
        return cell.task, cell.size.steps

    kinds = dict.fromkeys(map(kind, cells))
    for own in ([cell for cell in cells if kind(cell) == wanted] for wanted in kinds):
        yield from (tuple(own[start : start + size]) for start in range(0, len(own), size))


def done(result):
    """Cells that were trained; others failed."""
    return [cell for cell in result["cells"].values() if "runs" in cell]


def along(cell):
    """Mean over seeds of the accuracy at each position of a word problem."""
    return [statistics.mean(values) for values in zip(*(run["tests"]["whole"] for run in cell["runs"]), strict=True)]


def draw(result, folder, name):
    """Accuracy over pairs for each width (`mqar`), over positions for each depth (`words`): means over seeds."""
    pyplot = drawing()
    cells = done(result)
    if pyplot is None or name not in ("mqar", "words") or not cells:
        return
    kind = "width" if name == "mqar" else "layers"
    sizes, order = sorted({cell[kind] for cell in cells}), list(MIXERS)
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes) + 1.5, 3.4), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        own = sorted((cell for cell in cells if cell[kind] == size), key=lambda cell: order.index(cell["label"]))
        for cell in own:
            style = {"label": cell["label"], "marker": "os^vDx+*ph"[order.index(cell["label"])], "markersize": 4}
            style |= {"color": f"C{order.index(cell['label'])}", "linestyle": "-" if cell["model"] in OURS else "--"}
            if name == "mqar":
                tests = {pairs: [run["tests"][pairs] for run in cell["runs"]] for pairs in cell["runs"][0]["tests"]}
                axis.plot([int(p) for p in tests], [statistics.mean(v) for v in tests.values()], **style)
                axis.set(xscale="log", xlabel="key-value pairs", title=f"width {size}")
                axis.set_xticks([int(p) for p in tests], list(tests))
                axis.minorticks_off()
            else:
                values = along(cell)
                axis.plot(range(1, len(values) + 1), values, **style)
                axis.set_xticks(range(0, len(values) + 1, max(1, len(values) // 8)))
                axis.set(xlabel="elements of the word", title=f"{size} block{'s' if size > 1 else ''}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.tight_layout()
    figure.legend(lines.values(), lines.keys(), fontsize=7, loc="outside center right", frameon=False)
    figure.subplots_adjust(right=1 - 1.4 / figure.get_figwidth())
    figure.savefig(folder / f"tasks_{name}.png", dpi=150)
    pyplot.close(figure)


def study_notes(maker, study):
    """What a reader of the JSON must know of the study, and what tells whether an older file belongs to it."""
    size = study.cells[0].size
    steps = sorted({cell.size.steps for cell in study.cells})
    return {
        "what": maker.__doc__,
        "training": {name: repr(task.training) for name, task in study.tasks.items()},
        "examples": study.examples,
        "batch": size.batch,
        "steps": steps[0] if len(steps) == 1 else steps,
        "mlp": size.mlp,
        "search": f"{size.seeds} seeds at each rate of {', '.join(f'{r:g}' for r in size.rates)}; the best mean",
    }


if __name__ == "__main__":
    main()
