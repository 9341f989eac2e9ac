"""Conversions of SmolLM2-135M by the recipes in conversion/recipes, each measured beside its teacher.

    python benchmarks/conversion_recipes.py TEACHER --data train.jsonl.gz --held-out held_out.jsonl.gz \
        --tests FOLDER --recipes smollm2-135m-gka-15 control-sliding-512 ...

FOLDER holds wikitext2_test.txt, wikitext2_valid.txt, lambada_test.jsonl, piqa_valid.jsonl, piqa_valid_labels.txt. The
texts come from benchmarks/healing_text.py. Each recipe and the teacher
get a JSON, `conversion_<recipe>.json`.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from quality import quality, wikitext_windows
from record import RESULTS, environment, write
from transformers import AutoTokenizer, TrainerCallback

from hf_kalman import GKAForCausalLM
from hf_kalman.cache import cache_bytes
from kalman_conversion import (
    choose_layers,
    load_model,
    perplexity,
    plan_conversion,
    read_documents,
    read_stages,
    run_stages,
    swap_attention,
    token_windows,
)
from kalman_conversion.distil import DistillationTrainer, Training
from kalman_conversion.layer_selection import read_ranking
from kalman_conversion.recipe import load_recipe
from kalman_conversion.stages import window_counts
from kalman_conversion.trainer import TokenWindows

# The end-to-end stage of a recipe without its mixers: with attention to the last tokens in the same layers, or with the
# teacher as it is.
CONTROLS = {"control-sliding-512": ("smollm2-135m-gka-15", 512), "control-teacher": ("smollm2-135m-gka-15", None)}
RECIPES = Path(__file__).parents[1] / "conversion" / "recipes"
CONTEXTS = (2048, 8192, 32768)


class Curve(TrainerCallback):
    """Perplexity on text of its own along the way; the time that takes is counted apart."""

    def __init__(self, windows, every):
        self.windows, self.every, self.points, self.seconds, self.before = windows, every, [], 0.0, 0
        self.started = time.perf_counter()

    def measure(self, model, tokens):
        now = time.perf_counter()
        healing = now - self.started - self.seconds
        value = round(perplexity(model, self.windows, batch_size=16), 4)
        self.points.append({"tokens": tokens, "seconds": round(healing, 1), "perplexity": value})
        print(self.points[-1], flush=True)
        self.seconds += time.perf_counter() - now

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 and hasattr(model, "model"):
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.measure(model, self.before + state.global_step * rows * self.windows.shape[1])


def heal(student, teacher, windows, stages, curve, seed=0):
    """Reports of the stages, with the seconds that the curve took subtracted."""
    rows, counted = [], curve.seconds

    def after(report):
        nonlocal counted
        seconds = report.seconds - (curve.seconds - counted)
        counted = curve.seconds
        curve.before += report.tokens
        curve.measure(student, curve.before)
        counted = curve.seconds
        row = {"stage": report.stage, "tokens": report.tokens, "seconds": round(seconds, 1)}
        rows.append({**row, "tokens_per_s": round(report.tokens / seconds)})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as work:
        # Without checkpoints in between: nothing here is resumed.
        quiet = [
            s._replace(settings={k: 10**9 if k == "save_every" else v for k, v in s.settings.items()}) for s in stages
        ]
        options = {"work": work, "seed": seed, "progress": False, "callbacks": [curve]}
        run_stages(student, teacher, windows, quiet, after=after, **options)
    return rows


def control(teacher, layers, window, windows, stage, curve):
    """The teacher, with a sliding window in some attention layers or none, trained like a swapped student."""
    config = plan_conversion(teacher.config, "gka", "none").config
    if window is not None:
        kinds = ["sliding_attention" if i in layers else kind for i, kind in enumerate(config.layer_types)]
        config = type(config)(**{**config.to_dict(), "layer_types": kinds, "sliding_window": window})
    student = GKAForCausalLM(config)
    student.load_state_dict(teacher.state_dict())
    student.to(teacher.device)
    curve.measure(student, 0)
    settings = stage.settings
    training = Training(**{k: settings[k] for k in Training._fields if k in settings}, progress=False)
    rows = windows[: settings["tokens"] // windows.shape[1]]
    with tempfile.TemporaryDirectory() as work:
        trainer = DistillationTrainer(
            student,
            training._replace(save_every=10**9).arguments(work, teacher.device, {}),
            train_dataset=TokenWindows(rows, repeated=settings["repeated"]),
            callbacks=[curve],
            small_factor=1.0,
            teacher=teacher,
            **{
                name: settings[name]
                for name in ("logits_weight", "hidden_weight", "temperature", "top_k", "text_weight")
            },
        )
        started, measuring = time.perf_counter(), curve.seconds
        tokens = trainer.run()
        seconds = time.perf_counter() - started - (curve.seconds - measuring)
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    curve.measure(student, tokens)
    row = {"stage": "distil", "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds)}
    return student, [row]


def speed(teacher, configurations):
    """Prefill, decoding and cache at three contexts, in bfloat16; the weights do not matter."""
    from smollm2_gpu import generation, in_bfloat16

    rows = []
    for name, swap in configurations.items():
        model = teacher if swap is None else swap_attention(teacher, **swap)
        model = in_bfloat16(copy.deepcopy(model))
        for context in CONTEXTS:
            row = generation(model, context)
            row["cache_bytes_one_sequence"] = cache_bytes(model.config, context, torch.bfloat16)
            rows.append({"model": name, **row})
            print(rows[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    return rows


def resolved(recipe, ranking):
    """A recipe with auto:COUNT replaced by the layers of a ranking."""
    layers = recipe["swap"]["layers"]
    if isinstance(layers, str) and layers.startswith("auto:"):
        recipe["swap"]["layers"] = choose_layers(read_ranking(ranking), int(layers.partition(":")[2]))
    return recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--with-teacher", action="store_true", help="measure the teacher, too")
    parser.add_argument("--save", type=Path, help="keep the students here")
    parser.add_argument("--curve-every", type=int, default=50, help="steps between two points of the curve")
    parser.add_argument("--limit", type=int, help="cases of each task, all when not given")
    parser.add_argument("--speed", action="store_true", help="measure speed and cache only, of all recipes named")
    parser.add_argument("--ranking", type=Path, help="for recipes with layers: auto:COUNT")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    test = wikitext_windows(tokenizer, options.tests / "wikitext2_test.txt", count=options.limit and 2)
    valid = wikitext_windows(tokenizer, options.tests / "wikitext2_valid.txt", count=2 if options.limit else 64)
    about = {"model": "SmolLM2-135M-Instruct (de-quantised Q4_1)", "environment": environment(device)}

    def measured(model):
        return {"quality": quality(model, tokenizer, options.tests, options.held_out, test, options.limit)}

    def load():
        return load_model(options.teacher, torch.float32, device).eval()

    if options.speed:
        loaded = {name: resolved(load_recipe(RECIPES / f"{name}.yaml"), options.ranking) for name in options.recipes}
        swaps = {n: {k: v for k, v in r["swap"].items() if k != "options"} for n, r in loaded.items()}
        write(
            "conversion_speed",
            {**about, "dtype": "bfloat16", "rows": speed(load(), {"teacher": None, **swaps})},
            options.output,
        )
        return
    if options.with_teacher:
        teacher = load()
        row = {"curve_perplexity": round(perplexity(teacher, valid, batch_size=16), 4), **measured(teacher)}
        write("conversion_teacher", {**about, **row}, options.output)
    documents = read_documents(options.data) if options.recipes else []
    for name in options.recipes:
        print(f"== {name}", flush=True)
        source, sliding_window = CONTROLS.get(name, (name, None))
        recipe = resolved(load_recipe(RECIPES / f"{source}.yaml"), options.ranking)
        length, seed = recipe["heal"].get("window", 1024), recipe["heal"].get("seed", 0)
        stages = read_stages(recipe["heal"]["stages"])
        windows = token_windows(tokenizer, documents, length, window_counts(stages, length))
        teacher, curve = load(), Curve(valid, options.curve_every)
        swap = {k: v for k, v in recipe["swap"].items() if k != "options"}
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
        if name in CONTROLS:
            student, rows = control(teacher, swap["layers"], sliding_window, windows, stages[-1], curve)
        else:
            student = swap_attention(teacher, share_weights=True, **swap, **recipe["swap"].get("options", {}))
            curve.measure(student, 0)
            rows = heal(student, teacher, windows, stages, curve, seed)
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None
        if options.save is not None:
            student.save_pretrained(options.save / name)
            tokenizer.save_pretrained(options.save / name)
        result = {
            **about,
            "recipe": recipe,
            "control": name in CONTROLS and (f"sliding window of {sliding_window}" if sliding_window else "teacher"),
            "stages": rows,
            "tokens": sum(row["tokens"] for row in rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "peak_mib": peak,
            "curve_text": f"WikiText-2 valid, first {valid.numel()} tokens",
            "curve": curve.points,
        }
        write(f"conversion_{name}", result, options.output)
        del teacher
        result |= measured(student)
        write(f"conversion_{name}", result, options.output)
        print(json.dumps({"recipe": name, "seconds": result["seconds"], **result["quality"]}), flush=True)
        del student


if __name__ == "__main__":
    main()
