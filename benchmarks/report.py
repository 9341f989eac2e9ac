"""Redraws every figure of `results/` from its JSON and writes the tables of `docs/results.md`.

    python benchmarks/report.py

Needs the package and matplotlib, no model, text or GPU.
"""

import argparse
import importlib
import json
import statistics
import sys
from functools import partial
from itertools import takewhile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "tasks"), str(Path(__file__).parent)]
import conversion_report  # noqa: E402
import run as tasks  # noqa: E402
from record import RESULTS  # noqa: E402
from run import done  # noqa: E402
from small_lm import PEERS, VARIANTS  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
# Scripts with `draw(result, folder)`, which write `<name>.json`.
DRAWN = (
    "bayesian_head",
    "bayesian_pendulum",
    "gka_gpu",
    "kalman_defaults",
    "kla_gpu",
    "kla_text_uncertainty",
    "kla_uncertainty",
    "layer_selection",
    "long_context",
    "small_lm",
    "small_lm_wide",
    "small_lm_64_wide",
    "smollm2_gpu",
    "solvers",
)
NAMES = {
    "attention": "softmax attention",
    "softmax": "softmax attention",
    "gka": "**GKA**",
    "kla": "**KLA**",
    "mamba2": "Mamba-2",
    "gla": "GLA",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "mesa_net": "MesaNet",
    "delta_product": "Gated DeltaProduct, 2 reflections",
}
HEAD = """# What the layers do

Recall, state tracking and small language models beside softmax attention and the layers of flash-linear-attention
0.6.0, each in the same blocks, on the same examples, with the same search over learning rates. This page is written by
`python benchmarks/report.py` from the JSON in `benchmarks/results/`; how each was measured is said there and in the
script beside it. Losses stand beside wins.
"""


def load(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def figures(folder):
    """Draw everything; returns the files."""
    for name in DRAWN:
        if (result := load(name)) is not None:
            # The same script's results of other settings have names of their own.
            importlib.import_module("small_lm" if name.startswith("small_lm") else name).draw(result, folder)
    for study in tasks.STUDIES:
        if (result := load(f"tasks_{study}")) is not None:
            tasks.draw(result, folder, study)
    conversion_report.draw(conversion_report.load(RESULTS), folder)
    return sorted(Path(folder).glob("*.png"))


def table(head, rows):
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def spread(values):
    """Mean and standard deviation over seeds, in percent."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def device(result):
    at = result["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in at["versions"].items() if k in ("torch", "triton") and v)
    return f"{at['device']}, {versions}"


def recall(result):
    study = result["study"]
    parts = [
        "## Recall\n",
        "Multi-query associative recall (arXiv 2312.04927): keys with values, then keys again; the share of right "
        "values. Two layers without MLP and without output gates; GKA bare as in its paper (no decay, mix or input "
        "gate); 1,024 symbols, tied embeddings. "
        f"{study['steps']:,} steps of {study['batch']} sequences with 4 to 128 pairs in 512 tokens; tested at 8 "
        "tokens for each pair (64 at least), so 256 pairs in 2,048 tokens are longer than anything trained on. Mean "
        f"and standard deviation over seeds; {study['search']}. Softmax attention stands behind the short convolution "
        "that all others have "
        f"({origin('tasks_mqar', result)}).\n",
        "![accuracy over pairs](../benchmarks/results/tasks_mqar.png)\n",
    ]
    for width in sorted({cell["width"] for cell in done(result)}):
        own = [cell for cell in done(result) if cell["width"] == width]
        own.sort(key=lambda cell: -statistics.mean(run["tests"]["64"] for run in cell["runs"]))
        pairs = list(own[0]["runs"][0]["tests"])
        rows = [
            [NAMES[cell["model"]], *(spread([run["tests"][p] for run in cell["runs"]]) for p in pairs)] for cell in own
        ]
        parts.append(table([f"width {width}, %", *(f"{p} pairs" for p in pairs)], rows) + "\n")
    return parts


WORD_NOTES = {
    "tasks_words": (
        "## State tracking\n",
        "The word problem of A5 (arXiv 2404.08819): after each of 16 random elements, the product so far. Entries: the "
        "longest word with at least 90 % right answers, for each seed. Width 128, SwiGLU MLPs",
    ),
    "tasks_s5": ("### S5\n", "The same with the 120 elements of S5"),
    "tasks_long-words": ("### Long words\n", "A5, trained on words of 256 elements; entries as above"),
}


def words(result, name="tasks_words"):
    """Word problems by depth."""
    study, cells = result["study"], done(result)
    head, lead = WORD_NOTES[name]
    parts = [head, f"{lead}; {study['steps']:,} steps of {study['batch']} words ({origin(name, result)}).\n"]
    if name == "tasks_words":
        parts.append("![accuracy over positions](../benchmarks/results/tasks_words.png)\n")
    depths = sorted({cell["layers"] for cell in cells})
    rows = []
    for label in dict.fromkeys(cell["label"] for cell in cells):
        row = [NAMES[label]]
        for depth in depths:
            own = [cell for cell in cells if (cell["label"], cell["layers"]) == (label, depth)]
            row += [reached(cell) for cell in own] or [""]
        rows.append(row)
    parts.append(table(["blocks", *depths], rows) + "\n")
    return parts


def reached(cell):
    """The longest word of every seed."""
    return ", ".join(str(longest(run["tests"]["whole"])) for run in cell["runs"])


def two_blocks(result):
    """What changes how far KLA comes with two blocks, and what more steps give it and others."""
    found = result["cells"]
    cells = [found[cell.key] for cell in tasks.two_blocks().cells if "runs" in found.get(cell.key, {})]
    plain = [cell for cell in done(load("tasks_words") or {"cells": {}}) if cell["layers"] == 2]
    wanted = {cell["model"] for cell in cells}
    labelled = [(f"{cell['model']}: as above", cell) for cell in plain if cell["model"] in wanted]
    labelled += [(cell["label"], cell) for cell in cells]
    labelled.sort(key=lambda pair: -overall(pair[1]))
    rows = [[label, reached(cell), f"{100 * overall(cell):.0f}"] for label, cell in labelled]
    beyond = max(longest(run["tests"]["longer"]) for cell in cells for run in cell["runs"])
    return [
        "### Two blocks\n",
        "As above with two blocks: changes to KLA, and four times the steps. No model answers words that are longer "
        f"than what it learned: tested on 256 elements, the longest is {beyond} "
        f"({origin('tasks_two-blocks', result)}).\n",
        table(["", "longest word with 90 %", "right of 16, %"], rows) + "\n",
    ]


def first_values(result):
    """How far KLA comes by what it starts from."""
    plain = [cell for cell in done(load("tasks_words") or {"cells": {}}) if cell["model"] == "kla"]
    cells = [("kla: as published", cell) for cell in plain] + [(cell["label"], cell) for cell in done(result)]
    rows = []
    for label in dict.fromkeys(label for label, _ in cells):
        row = [label]
        for depth in (2, 4):
            own = [cell for name, cell in cells if (name, cell["layers"]) == (label, depth)]
            row += [f"{reached(cell)} ({100 * overall(cell):.0f} %)" for cell in own] or [""]
        rows.append(row)
    return [
        "### What KLA starts from\n",
        "As above, one rate (0.003): the longest word with 90 % for each seed and what is right of 16. As published, "
        "steps start between 0.001 and 0.1, weights from N(0, 0.02²), observation variances near 0.7, the projections "
        "out of the mixers like other weights "
        f"({origin('tasks_starts', result)}).\n",
        table(["", "2 blocks", "4 blocks"], rows) + "\n",
    ]


def overall(cell):
    """Mean over seeds and positions of the accuracy."""
    return statistics.mean(statistics.mean(run["tests"]["whole"]) for run in cell["runs"])


def longest(shares):
    """Positions from the first that are all right at least 90 % of the time."""
    return len(list(takewhile(lambda share: share >= 0.9, shares)))


def mad(result):
    cells = done(result)
    names = list(dict.fromkeys(cell["task"] for cell in cells))
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = {c["task"]: spread([run["tests"]["test"] for run in c["runs"]]) for c in cells if c["model"] == model}
        rows.append([NAMES[model], *(own.get(name, "") for name in names)])
    note = f"({origin('tasks_mad', result)})"
    head = "## MAD\n\nThe six tasks of arXiv 2403.17844, two blocks of width 128; share of right answers, three seeds"
    return [f"{head} {note}.\n", table(["%", *names], rows) + "\n"]


def ablations(result):
    found = result["cells"]
    cells = [found[cell.key] for cell in tasks.ablations().cells if "runs" in found.get(cell.key, {})]
    pairs = list(cells[0]["runs"][0]["tests"])
    rows = [[cell["label"], *(spread([run["tests"][p] for run in cell["runs"]]) for p in pairs)] for cell in cells]
    return [
        "### What the parts do\n",
        "One change to the bare layer each, width 64, three seeds at the rate that is best for the bare layer "
        f"({origin('tasks_ablations', result)}).\n",
        table(["%", *(f"{p} pairs" for p in pairs)], rows) + "\n",
    ]


def iterations(result):
    cells = done(result)
    numbers = list(cells[0]["runs"][0]["at_inference"])
    rows = [
        [
            cell["fields"]["solver_iterations"],
            *(spread([run["at_inference"][n]["32"] for run in cell["runs"]]) for n in numbers),
        ]
        for cell in cells
    ]
    return [
        "### Iterations in training and at inference\n",
        "GKA with the published polynomial, two layers of width 64, 32 pairs in 128 tokens, two seeds; rows: "
        "iterations in training, columns: at inference "
        f"([JSON](../benchmarks/results/tasks_iterations.json), {device(result)}).\n",
        table(["%", *numbers], rows) + "\n",
    ]


def starts(result):
    """How the first tokens of training from scratch go by the start of the output projections."""
    names = list(result["models"])
    steps = [step for step, _ in result["models"][names[0]]["0"]["curve"]]
    rows = [
        [
            name,
            f"{statistics.mean(run['noise'] for run in runs.values()):.2f}",
            *(f"{statistics.mean(dict(run['curve'])[step] for run in runs.values()):.2f}" for step in steps),
        ]
        for name, runs in result["models"].items()
    ]
    rows.sort(key=lambda row: row[-1])
    return [
        "### How small the outputs of mixers should start\n",
        "Bits per byte along the first 150 steps of 2,048 tokens, 3 M parameters, two seeds; a number behind a name is "
        "the start of the output projections over that of other weights, 1 where there is none (GKA's "
        "`output_initializer_factor`), and noise what the first mixer adds to the residual stream before training, "
        "over the size of the embeddings "
        f"([JSON](../benchmarks/results/output_start.json), {device(result)}). In recall, word problems and "
        "MAD all start with 1.\n",
        table(["", "noise", *(f"{step} steps" for step in steps)], rows) + "\n",
    ]


LANGUAGE = {
    "small_lm": "The output projections of all mixers start at 0.03 of the deviation of other weights, GKA's default:",
    "small_lm_wide": "All weights start equally wide:",
    "small_lm_64_wide": "All weights start equally wide, few and large steps:",
}


def language(result):
    parts = [
        "## Small language models\n",
        f"Wikipedia articles and passages ({result['training_tokens'] / 1e6:.1f} M different tokens), byte-level BPE "
        "of 8,192 tokens, windows of 512, 8 layers of width 384, MLPs that make all models equally large (20.7 M "
        "parameters), the best rate of a grid at a quarter of the budget, one seed.\n",
    ]
    for name, lead in LANGUAGE.items():
        if (found := load(name)) is not None:
            parts += [f"{lead}\n", *losses(found, name), *changed(found)]
    if (speed := load("small_lm_speed")) is not None:
        rows = [
            [NAMES[name], f"{row['tokens_per_s']:,}", f"{row['peak_mib'] / 1024:.1f}"]
            for name, row in speed["models"].items()
            if "median_ms" in row
        ]
        parts += [
            "Speed and memory: training steps of 64 windows, one model after the other on a free GPU "
            f"([JSON](../benchmarks/results/small_lm_speed.json), {device(speed)}).\n",
            table(["", "tokens/s", "peak GiB"], rows) + "\n",
        ]
    return parts


def finished(rows):
    """Those that were trained to their end."""
    return {name: row for name, row in rows.items() if "curve" in row}


def changed(result):
    """The variants of GKA and KLA."""
    known = [f"{model}: {name}" for model, own in VARIANTS.items() for name in ("as it is", *own)]
    variants = finished(result["variants"])
    names = sorted(variants, key=lambda name: known.index(name) if name in known else len(known))
    if len(names) < 2:
        return []
    rows = [[name, f"{variants[name]['held_out_bits_per_byte']:.3f}"] for name in names]
    return ["A quarter of the budget, one change each:\n", table(["", "bits/byte"], rows) + "\n"]


def losses(result, name):
    """What was trained, its curves and its table."""
    models = finished(result["models"])
    tokens = next(iter(models.values()))["tokens"]
    halved = finished(result.get("halved", {}))
    rows = [
        [
            NAMES[model],
            f"{row['held_out_bits_per_byte']:.3f}",
            f"{next(b for t, b in row['curve'] if t >= tokens / 4):.3f}",
            f"{row['learning_rate']:g}",
            *([f"{halved[model]['held_out_bits_per_byte']:.3f}" if model in halved else ""] if halved else []),
        ]
        for model, row in sorted(models.items(), key=lambda pair: pair[1]["held_out_bits_per_byte"])
    ]
    missing = [NAMES[m] for m in ("softmax", "gka", "kla", *PEERS) if m not in models]
    steps = tokens // (result["batch"] * result["window"])
    return [
        f"{tokens / 1e6:.0f} M tokens in {steps:,} steps of {result['batch']} windows "
        f"([JSON](../benchmarks/results/{name}.json), {device(result)})"
        + (f"; not run: {', '.join(missing)}.\n" if missing else ".\n"),
        f"![held-out bits per byte over tokens](../benchmarks/results/{name}.png)\n",
        table(["", "bits/byte", "at a quarter", "rate", *(["bits/byte at half the rate"] if halved else [])], rows)
        + "\n",
    ]


def solvers(result):
    wanted = [("adaptive", "adaptive"), ("constant 0.1", "0.1"), ("constant 0.01", "0.01")]
    rows = []
    for solver in dict.fromkeys(row["solver"] for row in result["rows"]):
        line = [solver]
        for ridge, _ in wanted:
            own = [
                row
                for row in result["rows"]
                if (row["solver"], row["ridge"], row["dtype"], row["keys"]) == (solver, ridge, "bfloat16", "rank 8")
                and row["iterations"] in (0, 30)
            ]
            worst, broken = own[0]["error"]["worst"], own[0]["broken"]
            line.append(f"{'–' if worst is None else f'{worst:.0e}'}, {broken:.0%}")
        rows.append(line)
    return [
        "## Solvers\n",
        f"(H + λI) x = q for {result['systems']:,} states of width 128, keys of rank 8 with a little noise, operands "
        "in bfloat16, 30 iterations: relative error of the worst system that did not break, and the share that broke "
        "(NaN or beyond 1e3), by ridge "
        f"([JSON](../benchmarks/results/solvers.json), {device(result)}).\n",
        "![errors over iterations](../benchmarks/results/solvers.png)\n",
        table(["solver", *(f"λ {name}" for _, name in wanted)], rows) + "\n",
    ]


def device_minutes(rows, result):
    """Minutes that rows held a device: their seconds over the processes that shared it."""
    return sum(row["seconds"] / row["processes"] for row in rows) * result["devices"] / 60


def origin(name, result):
    """Where the figures of a study are, what they were measured on, and how long that took."""
    minutes = device_minutes(done(result), result)
    return f"[JSON](../benchmarks/results/{name}.json), {device(result)}, {minutes:.0f} minutes of a device"


def cost():
    """What it takes to run the studies that train many models."""
    rows, total = [], 0.0
    for name in (*(f"tasks_{name}" for name in tasks.STUDIES), *LANGUAGE):
        if (result := load(name)) is None:
            continue
        kinds = ("models", "halved", "variants")
        runs = [row for k in kinds for row in result.get(k, {}).values()] if name in LANGUAGE else done(result)
        timed = [row for row in runs if "seconds" in row]
        if timed:
            minutes = device_minutes(timed, result)
            rows.append([name, len(timed), f"{minutes:.0f}", device(result)])
            total += minutes
    if not rows:
        return []
    return [
        "## Time to run it\n",
        f"Minutes of a device for what stands above, {total:.0f} in all, without what was measured before the time was "
        "recorded (small language models with a wide start, long contexts) and what ran on a CPU (solvers).\n",
        table(["study", "runs", "minutes", "device"], rows) + "\n",
    ]


def long_context(result):
    rows, devices = [], {}
    for name, row in result["models"].items():
        rows += [[f"{name}, {kind}", *(f"{100 * v:.0f}" for v in row[kind].values())] for kind in ("needle", "pairs")]
        devices.setdefault(f"{device(row)}, {row['dtype']}", []).append(name)
    contexts = list(max((row["needle"] for row in result["models"].values()), key=len))
    rows = [row + [""] * (1 + len(contexts) - len(row)) for row in rows]
    where = "; ".join(f"{what}: {' / '.join(names)}" for what, names in devices.items())
    return [
        "## Long context\n",
        f"SmolLM2-135M-Instruct and conversions of it, {result['cases']} questions each, the same for all: codes of "
        "four digits found, %, in running text (needle) or among nothing but such sentences (pairs). Least squares is "
        "healing on 65,536 tokens without a gradient; healed is the recipe of 16.8 M tokens in "
        "`conversion/recipes/smollm2-135m-gka-8.yaml` "
        f"([JSON](../benchmarks/results/long_context.json); {where}).\n",
        "![found over the context, loss over the position](../benchmarks/results/long_context.png)\n",
        table(["context", *(f"{int(c):,}" for c in contexts)], rows) + "\n",
    ]


SECTIONS = (
    ("tasks_mqar", recall),
    ("tasks_ablations", ablations),
    ("tasks_iterations", iterations),
    ("tasks_words", words),
    ("tasks_two-blocks", two_blocks),
    ("tasks_starts", first_values),
    ("tasks_s5", partial(words, name="tasks_s5")),
    ("tasks_long-words", partial(words, name="tasks_long-words")),
    ("tasks_mad", mad),
    ("small_lm_wide", language),
    ("output_start", starts),
    ("long_context", long_context),
    ("solvers", solvers),
)


def page():
    """The text of `docs/results.md`."""
    parts, missing = [HEAD], []
    for name, section in SECTIONS:
        result = load(name)
        if result is None:
            missing.append(f"`{name}`")
        else:
            parts += section(result)
    parts += cost()
    missing += [f"`{name}`" for name in (*LANGUAGE, "small_lm_speed") if load(name) is None]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the figures")
    options = parser.parse_args()
    for path in figures(options.output):
        print(path.name)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
