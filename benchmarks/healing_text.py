"""Healing text and held-out passages from plain corpora, apart from every test text.

    python benchmarks/healing_text.py --corpus wikipedia.txt.gz passages.txt.gz --test wikitext2_test.txt ... OUTPUT

A document is what stands between blank lines. Documents that share a sequence of eight words with a test text are left
out. The rest is shuffled; two in a hundred become `held_out.jsonl.gz`, all others `train.jsonl.gz`.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

from kalman_conversion import read_documents

WORDS, HELD_OUT = 8, 0.02
# Corpora that come with spaces around punctuation.
SPACED = [
    (re.compile(r" (n't|'s|'re|'ve|'ll|'d|'m)\b"), r"\1"),
    (re.compile(r" ' (s|re|ve|ll|d|m)\b"), r"'\1"),
    (re.compile(r"\s+([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$])\s+"), r"\1"),
    (re.compile(r"`` ?| ?''"), '"'),
    (re.compile(r" @([-,.])@ "), r"\1"),
]


def sequences(text):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + WORDS])) for i in range(len(words) - WORDS + 1)}


def clean(text):
    for pattern, replacement in SPACED:
        text = pattern.sub(replacement, text)
    return text.strip()


def test_texts(path):
    if ".jsonl" not in Path(path).name:
        return [Path(path).read_text(encoding="utf-8")]
    with open(path, encoding="utf-8") as file:
        return [" ".join(str(value) for value in json.loads(line).values()) for line in file if line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    options = parser.parse_args()
    seen = set()
    for path in options.test:
        for text in test_texts(path):
            seen |= sequences(text)
    kept, dropped, block = [], 0, []
    for path in options.corpus:
        for document in map(clean, read_documents(path)):
            if not sequences(document).isdisjoint(seen):
                dropped += 1
                continue
            # Verses and short paragraphs are joined to about a thousand characters.
            block.append(document)
            if sum(map(len, block)) >= 1000:
                kept.append("\n\n".join(block))
                block = []
    random.Random(0).shuffle(kept)
    count = round(HELD_OUT * len(kept))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, documents in (("held_out", kept[:count]), ("train", kept[count:])):
        with gzip.open(options.output / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB")
    print(f"left out: {dropped} documents that share {WORDS} words in a row with a test text")


if __name__ == "__main__":
    main()
