"""Text files to windows of tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_documents", "token_windows"]

# Documents tokenised at once, in parallel where the tokenizer can.
_DOCUMENTS = 64
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


def read_documents(path: str | Path) -> list[str]:
    """Documents of a text file.

    Args:
        path: `.txt` (documents separated by blank lines) or `.jsonl` (one object with a "text" field per line), plain
            or gzipped, UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no document in it, or a line without text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_documents: `data` {str(path)!r} does not exist.")
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"read_documents: `data` must end in one of {', '.join(_SUFFIXES)}, got {path.name!r}.")
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        documents = list(_jsonl(file, path) if ".jsonl" in path.name else _paragraphs(file))
    if not documents:
        raise ValueError(f"read_documents: `data` {str(path)!r} holds no text.")
    return documents


def _jsonl(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f'read_documents: `data` {str(path)!r} must hold one JSON object with a "text" string per line, but '
                f"line {number} is {line.strip()[:60]!r}."
            )
        if text.strip():
            yield text


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).strip()
            block = []
    if block:
        yield "".join(block).strip()


def token_windows(tokenizer, documents: Iterable[str], length: int, count: int | None = None) -> Tensor:
    """Documents, each closed by the end-of-sequence token, cut into windows.

    Args:
        tokenizer: a tokenizer of the host library.
        documents: texts.
        length: tokens in a window.
        count: windows to make; as many as the text fills when None.

    Returns:
        (count, length) int64.

    Raises:
        ValueError: the text does not fill `count` windows, or not a single one.
    """
    tokens: list[int] = []
    wanted = None if count is None else count * length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = iter(documents)
    while (wanted is None or len(tokens) < wanted) and (batch := list(islice(documents, _DOCUMENTS))):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            tokens += ids + end
    full = len(tokens) // length if count is None else count
    if full == 0 or len(tokens) < full * length:
        raise ValueError(
            f"token_windows: `data` must fill {count or 1} windows of {length} tokens, got {len(tokens)} tokens; use "
            "more text or fewer tokens."
        )
    return torch.tensor(tokens[: full * length]).view(full, length)
