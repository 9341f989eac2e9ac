"""Chunks encoded on their own, then one question: does a converted model still find the needle?

    python benchmarks/composition.py --model HEALED --text FILE [--teacher SMOLLM2]

A sentence with a random four-digit number stands at a random place in a text of 1,024 tokens; the model reads the text
whole, or in 4 chunks whose caches are made into one by each method of `hf_kalman.encode_chunks`, and is asked for the
number. Counted: the number comes first in greedy decoding; and the loss of its tokens. Results:
`results/composition.json`.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from record import RESULTS, environment, write
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kalman import encode_chunks

LENGTH, CHUNKS = 1024, 4


def cases(tokenizer, text, count):
    """(context ids (1, LENGTH), question ids, answer ids)."""
    filler = tokenizer(text)["input_ids"]
    choose = random.Random(0)
    for index in range(count):
        number = choose.randint(1000, 9999)
        needle = tokenizer(f" The secret number is {number}. Remember: the secret number is {number}.")["input_ids"]
        start = (index * LENGTH * 7) % (len(filler) - LENGTH)
        place = choose.randint(16, LENGTH - len(needle) - 16)
        rest = filler[start : start + LENGTH - len(needle)]
        context = rest[:place] + needle + rest[place:]
        question = tokenizer(" As I said, the secret number is")["input_ids"]
        whole = tokenizer(f" As I said, the secret number is {number}")["input_ids"]
        yield (torch.tensor([ids]) for ids in (context, question, whole[len(question) :]))


@torch.no_grad()
def score(model, cache, context, question, answer):
    """(whether greedy decoding gives the answer, its mean loss)."""
    logits = model(torch.cat([question, answer], 1), past_key_values=cache).logits[:, question.shape[1] - 1 : -1]
    return bool((logits.argmax(-1) == answer).all()), F.cross_entropy(logits[0].float(), answer[0]).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="also the model that it was made from, read whole")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text()
    result = {"environment": environment(device), "context": LENGTH, "chunks": CHUNKS, "count": options.count}
    result["rows"] = []

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def run(name, model, encode):
        started, found, losses = time.perf_counter(), [], []
        for context, question, answer in cases(tokenizer, text, options.count):
            context, question, answer = (t.to(device) for t in (context, question, answer))
            hit, loss = score(model, encode(model, context), context, question, answer)
            found.append(hit)
            losses.append(loss)
        row = {"reading": name, "found": sum(found) / len(found), "loss": sum(losses) / len(losses)}
        result["rows"].append(row | {"losses": losses, "seconds": time.perf_counter() - started})
        print(row, flush=True)

    def whole(model, context):
        with torch.no_grad():
            return model.base_model(context, use_cache=True).past_key_values

    if options.teacher is not None:
        run("teacher, whole", load(options.teacher), whole)
    student = load(options.model)
    run("whole", student, whole)
    for method in ("decayed", "sum", "mean"):
        run(
            f"{CHUNKS} chunks, {method}",
            student,
            lambda model, context, method=method: encode_chunks(model, context.chunk(CHUNKS, dim=1), method),
        )
    # What a chunked reader has without composition: the last chunk alone.
    run("last chunk alone", student, lambda model, context: whole(model, context.chunk(CHUNKS, dim=1)[-1]))
    write("composition", result, options.output)


if __name__ == "__main__":
    main()
