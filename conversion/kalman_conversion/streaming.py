"""Checkpoints rewritten without loading them: renamed, cut and completed tensor by tensor.

The safetensors format is a header (JSON: dtype, shape, byte range by name) and the tensors' bytes behind one another. A
tensor that stays is copied as bytes from file to file, so a model of any size takes the memory of one new layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = [
    "DTYPES",
    "NewTensor",
    "StoredTensor",
    "all_tensors",
    "copy_rest",
    "read_shards",
    "read_tensor",
    "shard_names",
    "write_checkpoint",
    "write_shard",
]

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK = 16 << 20
INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor in a file: its bytes are those from `begin` to `end`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class NewTensor(NamedTuple):
    """A tensor that is made when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def shard_names(folder: Path) -> list[str]:
    """Names of a checkpoint's weight files: those of the index, or the only one."""
    index = folder / INDEX
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return ["model.safetensors"]


def read_shards(folder: str | Path) -> dict[str, dict[str, StoredTensor]]:
    """{file name: {tensor name: where it is}} of a checkpoint folder, from the headers alone."""
    folder = Path(folder)
    return {name: _header(folder / name) for name in shard_names(folder)}


def all_tensors(shards: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """{tensor name: where it is} over all files."""
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), begin, end)
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """The tensor itself."""
    with safe_open(stored.file, framework="pt") as weights:
        return weights.get_tensor(stored.name)


def write_shard(path: Path, tensors: Mapping[str, StoredTensor | NewTensor]) -> int:
    """Write a safetensors file and return the bytes of its tensors; one tensor at a time is in memory.

    Raises:
        ValueError: a new tensor is not what it was announced to be.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):
            dtype, size = tensor.dtype, tensor.end - tensor.begin
        else:
            dtype, size = DTYPES[tensor.dtype], torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, tensor in tensors.items():
            if isinstance(tensor, StoredTensor):
                _copy(tensor, out)
                continue
            made = tensor.make().detach().cpu().contiguous()
            if made.dtype != tensor.dtype or tuple(made.shape) != tuple(tensor.shape):
                raise ValueError(
                    f"write_shard: {name!r} must be {tensor.dtype} {tensor.shape}, got {made.dtype} {made.shape}."
                )
            out.write(made.view(-1).view(torch.uint8).numpy().data)
    return offset


def _copy(stored: StoredTensor, out: BinaryIO) -> None:
    with stored.file.open("rb") as source:
        source.seek(stored.begin)
        left = stored.end - stored.begin
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise OSError(f"{str(stored.file)!r} ends inside {stored.name!r}.")
            out.write(block)
            left -= len(block)


def write_checkpoint(folder: Path, shards: Mapping[str, Mapping[str, StoredTensor | NewTensor]]) -> int:
    """Write shards and, where there are several, their index; bytes of all tensors."""
    sizes = {name: write_shard(folder / name, tensors) for name, tensors in shards.items() if tensors}
    if set(sizes) != {"model.safetensors"}:
        weight_map = {tensor: name for name in sizes for tensor in shards[name]}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(sizes.values())


def copy_rest(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings and whatever else lies beside the weights; no card, it speaks of the source."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name == INDEX
        if (
            path.is_file()
            and not weights
            and path.name not in ("config.json", "README.md")
            and not path.name.startswith(".")
        ):
            shutil.copy(path, folder / path.name)
