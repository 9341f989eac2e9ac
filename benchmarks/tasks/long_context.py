"""What a model finds in a long context, and its loss against the position: a teacher, its conversions, healed or not.

    kalman-convert swap --model TEACHER --output SWAPPED \\
        --layers auto:8 --ranking benchmarks/results/layer_selection.json
    kalman-convert heal --model SWAPPED --teacher TEACHER --output HEALED \\
        --data TEXT --stages rls --set rls.tokens=65536
    python benchmarks/tasks/long_context.py --models teacher=TEACHER swapped=SWAPPED healed=HEALED --text FILE...

needle: one sentence with a code of four digits in running text, at five depths, asked for at the end. pairs: nothing
but such sentences, as many as fit, one of them asked for. Share of codes that greedy decoding gives exactly. Loss:
nats per token of running text by position, whole texts read in one go. FILEs are texts whose documents are joined;
none that a model was healed on. Contexts count the tokens of the whole prompt. Results: `results/long_context.json`
and a plot; models that it holds from other runs with the same questions stay beside the new ones, each with what it
was measured on.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kalman  # noqa: F401
from kalman_conversion.text import read_documents

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality import NOUNS  # noqa: E402
from record import RESULTS, continued, drawing, environment, write  # noqa: E402

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Tokens read at once: a GPU's kernels for causal attention serve a prompt that is read whole.
CHUNK = 65536 if torch.cuda.is_available() else 4096


def sentence(numbers, used):
    """A name that `used` does not have yet, and its code."""
    while (name := f"{numbers.choice(NOUNS)} {numbers.choice(NOUNS)} {numbers.randrange(10, 100)}") in used:
        pass
    used.add(name)
    return name, str(numbers.randrange(1000, 10000))


def needle(tokenizer, text, length, case):
    """(prompt, answer) as token lists; `text` is a long list of tokens, the case decides place, name and depth."""
    numbers = random.Random(f"needle {length} {case}")
    name, code = sentence(numbers, set())
    told = tokenizer(f"\nThe code of the {name} is {code}.\n", add_special_tokens=False)["input_ids"]
    asked = tokenizer(f"\n\nThe code of the {name} is", add_special_tokens=False)["input_ids"]
    free = length - len(told) - len(asked)
    start = numbers.randrange(max(1, len(text) - free))
    hay, place = text[start : start + free], int(DEPTHS[case % len(DEPTHS)] * free)
    return hay[:place] + told + hay[place:] + asked, tokenizer(f" {code}", add_special_tokens=False)["input_ids"]


def pairs(tokenizer, text, length, case):
    """As `needle`, with nothing but sentences of that kind around it."""
    numbers, used, lines, told = random.Random(f"pairs {length} {case}"), set(), [], []
    longest = len(tokenizer("\n\nThe code of the kangaroo kangaroo 10 is", add_special_tokens=False)["input_ids"]) + 8
    while True:
        name, code = sentence(numbers, used)
        line = tokenizer(f"The code of the {name} is {code}.\n", add_special_tokens=False)["input_ids"]
        if len(told) + len(line) + longest > length:
            break
        told += line
        lines.append((name, code))
    name, code = numbers.choice(lines)
    asked = tokenizer(f"\nThe code of the {name} is", add_special_tokens=False)["input_ids"]
    return told + asked, tokenizer(f" {code}", add_special_tokens=False)["input_ids"]


@torch.no_grad()
def found(model, prompt, answer):
    """Whether greedy decoding gives exactly the answer; the prompt is read in chunks."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.device)
    wanted, cache, best = torch.tensor(answer, device=model.device), None, []
    for start in range(0, tokens.shape[1], CHUNK):
        part = tokens[:, start : start + CHUNK]
        # Logits of the answer's predecessors alone.
        keep = max(0, start + part.shape[1] - (len(prompt) - 1))
        out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=max(1, min(keep, part.shape[1])))
        cache = out.past_key_values
        best += out.logits[0, -keep:].argmax(-1).tolist() if keep else []
    return torch.equal(torch.tensor(best[-len(answer) :], device=wanted.device), wanted)


@torch.no_grad()
def losses(model, tokens):
    """Nats of every token but the first of a (1, T) text, in chunks."""
    cache, rows = None, []
    for start in range(0, tokens.shape[1], CHUNK):
        part = tokens[:, start : start + CHUNK]
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        following = tokens[:, start + 1 : start + 1 + part.shape[1]]
        logits = out.logits[0, : following.shape[1]]
        for piece, wanted in zip(logits.split(1024), following[0].split(1024), strict=True):
            rows.append(torch.nn.functional.cross_entropy(piece.float(), wanted, reduction="none").cpu())
    return torch.cat(rows)


def measure(model, tokenizer, text, contexts, cases, texts, save):
    """Fill in one model's row; `save` is called with it after every context."""
    row = {"needle": {}, "pairs": {}, "loss": []}
    for context in contexts:
        for kind, make in (("needle", needle), ("pairs", pairs)):
            hits = [found(model, *make(tokenizer, text, context, case)) for case in range(cases)]
            row[kind][str(context)] = round(sum(hits) / cases, 4)
        save(row)
    longest = contexts[-1]
    starts = [i * (len(text) - longest) // max(1, texts - 1) for i in range(texts)]
    nats = torch.stack(
        [losses(model, torch.tensor([text[s : s + longest]], device=model.device)) for s in starts]
    ).mean(0)
    edges = sorted({0, longest, *(e for e in (256, 512, *contexts) if e < longest)})
    for low, high in zip(edges, edges[1:], strict=False):
        row["loss"].append({"positions": [low, high], "nats": round(nats[low : high - 1].mean().item(), 4)})
    save(row)


def draw(result, folder):
    """Shares of codes over the context, and loss over the position."""
    pyplot = drawing()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4))
    # Texts start elsewhere where the longest context is shorter, and their losses do not compare.
    reach = max(row["loss"][-1]["positions"][1] for row in result["models"].values() if row["loss"])
    for number, (name, row) in enumerate(result["models"].items()):
        style = {"marker": "os^vDx+*p"[number % 9], "color": f"C{number}", "label": name}
        for axis, kind in zip(axes, ("needle", "pairs"), strict=False):
            axis.plot([int(c) for c in row[kind]], list(row[kind].values()), **style)
        if row["loss"] and row["loss"][-1]["positions"][1] == reach:
            axes[2].plot([r["positions"][1] for r in row["loss"]], [r["nats"] for r in row["loss"]], **style)
    for axis, title in zip(
        axes, ("a needle, share found", "one of many pairs, share found", "nats per token"), strict=True
    ):
        axis.set(xscale="log", title=title, xlabel="position" if "nats" in title else "context")
        places = sorted({int(x) for line in axis.get_lines() for x in line.get_xdata()})
        axis.set_xticks(places, [str(x) if x < 1024 else f"{x // 1024}k" for x in places], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "long_context.png", dpi=150)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER")
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--cases", type=int, default=50, help="questions of each kind and context")
    parser.add_argument("--texts", type=int, default=8, help="texts for the loss")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    contexts, folders = sorted(options.contexts), [pair.partition("=") for pair in options.models]
    for name, _, folder in folders:
        if not (folder and Path(folder).is_dir()):
            parser.error(f"--models takes NAME=FOLDER, got {name!r} with {folder!r}, which is no folder")
    documents = "\n\n".join(document for path in options.text for document in read_documents(path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = {"text": [path.name for path in options.text], "cases": options.cases, "texts": options.texts}
    result = continued("long_context", settings, options.output) or {**settings, "models": {}}
    measured_on = {"dtype": str(dtype).removeprefix("torch."), "environment": environment(device)}
    for name, _, folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        text = tokenizer(documents, add_special_tokens=False)["input_ids"]
        if len(text) < contexts[-1]:
            parser.error(f"--text has {len(text)} tokens, --contexts asks for {contexts[-1]}")

        def save(row, name=name):
            result["models"][name] = {**row, **measured_on}
            write("long_context", result, options.output)

        measure(model, tokenizer, text, contexts, options.cases, options.texts, save)
        print(name, result["models"][name], flush=True)
    draw(result, options.output)


if __name__ == "__main__":
    main()
