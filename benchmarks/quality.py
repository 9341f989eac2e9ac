# ruff: noqa: SIM905 - sixty strings are unreadable as a list
"""What a causal LM knows and finds again: LAMBADA, PIQA, retrieval from the context, and WikiText-2 perplexity.

Every task is pairs (context, continuation), scored in one forward pass each: the log-likelihood of the continuation,
and whether greedy decoding would give exactly it.
"""

import gzip
import json
import random
import re
from pathlib import Path

import torch

from kalman_conversion import perplexity, token_windows

NOUNS = (
    "apple bridge candle doctor engine forest garden hammer island jacket kettle ladder mirror needle orange pencil "
    "rabbit saddle temple tunnel valley window anchor basket castle dragon feather guitar harbor jungle lantern magnet "
    "orchid palace ribbon silver ticket violin walnut zipper barrel camera desert falcon glacier helmet iceberg kitten "
    "lemon monkey nickel oyster parrot quarry rocket spider turtle umpire vessel wagon".split()
)
PAIRS = (16, 64)


@torch.no_grad()
def scores(model, tokenizer, pairs, tokens_per_batch=32768):
    """[(log-likelihood, whether greedy decoding gives the continuation)] of (context, continuation) texts."""
    encoded = []
    for context, continuation in pairs:
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        encoded.append((whole, start))
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    found = [None] * len(encoded)
    while order:
        longest = len(encoded[order[0]][0])
        batch, order = order[: max(1, tokens_per_batch // longest)], order[max(1, tokens_per_batch // longest) :]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            whole = encoded[index][0]
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        best = logits.argmax(-1) == ids[:, 1:]
        likelihood = logits.gather(-1, ids[:, 1:, None])[..., 0].float() - logits.float().logsumexp(-1)
        for row, index in enumerate(batch):
            whole, start = encoded[index]
            part = slice(start - 1, len(whole) - 1)
            found[index] = (likelihood[row, part].sum().item(), bool(best[row, part].all()))
    return found


def lambada(path):
    """The last word of a passage."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"].rstrip() for line in file if line.strip()]
    return [(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in texts]


def piqa(path, labels):
    """The better of two ways to a goal; two pairs for each."""
    with open(path, encoding="utf-8") as file:
        items = [json.loads(line) for line in file if line.strip()]
    pairs = [(f"Question: {i['goal']}\nAnswer:", f" {i[s]}") for i in items for s in ("sol1", "sol2")]
    return pairs, [int(line) for line in Path(labels).read_text().split()]


def retrieval(pairs, count):
    """A code among many, asked for again."""
    cases, numbers = [], random.Random(0)
    for _ in range(count):
        names = [f"{a} {b}" for a, b in zip(numbers.sample(NOUNS, 60), numbers.sample(NOUNS, 60), strict=True)]
        names = (names + [f"{n} two" for n in names])[:pairs]
        codes = [str(numbers.randrange(1000, 10000)) for _ in names]
        lines = [f"The code of the {n} is {c}." for n, c in zip(names, codes, strict=True)]
        asked = numbers.randrange(pairs)
        context = "Here is a list of codes.\n" + "\n".join(lines) + f"\n\nThe code of the {names[asked]} is"
        cases.append((context, f" {codes[asked]}"))
    return cases


def completion(path, count):
    """A sentence of a passage begun again after it; its last name or number is asked for."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    cases = []
    for passage in passages:
        passage, found = passage[:4000], []
        for sentence in re.split(r"(?<=[.!?])\s+", passage)[1:-3]:
            match = re.fullmatch(r"(\w.{40,200}?) ([A-Z][a-z]+|\d[\d,]*\d)[.]", sentence, re.DOTALL)
            # The answer must be in the passage once, and not the first word of a sentence.
            if match and "\n" not in sentence and len(re.findall(rf"\b{match[2]}\b", passage)) == 1:
                found.append((f"{passage}\n\nAs said above: {match[1]}", f" {match[2]}"))
        cases += found[:3]
    return cases[:count]


def share(found):
    return round(sum(greedy for _, greedy in found) / len(found), 4)


def quality(model, tokenizer, folder, held_out, wikitext, limit=None):
    """All measures of a model; `folder` holds lambada_test.jsonl, piqa_valid.jsonl and its labels.

    Returns shares of right answers, perplexity and how many cases each stands on.
    """
    model.eval()
    words = lambada(Path(folder) / "lambada_test.jsonl")[:limit]
    pairs, labels = piqa(Path(folder) / "piqa_valid.jsonl", Path(folder) / "piqa_valid_labels.txt")
    labels = labels[:limit]
    found = scores(model, tokenizer, pairs[: 2 * len(labels)])
    right = [(found[2 * i + 1][0] > found[2 * i][0]) == bool(label) for i, label in enumerate(labels)]
    result = {
        "wikitext2_perplexity": round(perplexity(model, wikitext, batch_size=8), 4),
        "lambada": share(scores(model, tokenizer, words)),
        "piqa": round(sum(right) / len(right), 4),
    }
    count = min(200, limit or 200)
    for number in PAIRS:
        result[f"retrieval_{number}_pairs"] = share(scores(model, tokenizer, retrieval(number, count)))
    cases = completion(held_out, count)
    result["completion"] = share(scores(model, tokenizer, cases))
    result["cases"] = {
        "wikitext2_tokens": wikitext.numel(),
        "lambada": len(words),
        "piqa": len(labels),
        "retrieval": count,
        "completion": len(cases),
    }
    return result


def wikitext_windows(tokenizer, path, length=1024, count=None):
    """WikiText-2 as one text, cut into windows."""
    return token_windows(tokenizer, [Path(path).read_text(encoding="utf-8")], length, count)
