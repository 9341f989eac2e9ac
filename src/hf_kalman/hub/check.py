"""Is a checkpoint whole? What is wrong with it, and what to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

__all__ = ["CHECKSUMS", "check_checkpoint", "checksums", "damage"]

# In the format of `sha256sum --check`.
CHECKSUMS = "SHA256SUMS"
_INDEX, _SINGLE, _ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"


def checksums(folder: str | Path) -> str:
    """The text of a `SHA256SUMS` file for all the files of a folder."""
    folder = Path(folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)


def check_checkpoint(path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None) -> list[str]:
    """Look through a checkpoint before a model is built from it.

    Every shard that the index names is there, every safetensors file is as long as its header says and holds the
    tensors that the index promises, every file agrees with `SHA256SUMS` where the checkpoint has one, and this package
    knows the architecture.

    Args:
        path_or_repo: folder, or Hub id, which is downloaded to the cache first.
        revision: of the repository.
        token: for the Hub; the saved login when None.

    Returns:
        The names of the files that were looked at.

    Raises:
        FileNotFoundError: files are missing; the message names them.
        ValueError: files are damaged, or the architecture is not known here; the message says what to do.
    """
    folder, remote = Path(path_or_repo), None
    if not folder.is_dir():
        remote = str(path_or_repo)
        folder = Path(snapshot_download(remote, revision=revision, token=token))
    again = (
        f"fetch it again (hf download --force-download {remote})"
        if remote
        else "copy or download it again, or save the model again"
    )
    names = _weights(folder, again)
    damaged = [f"{name}: {text}" for name in names if (text := damage(folder / name)) is not None]
    damaged += _changed(folder)
    if damaged:
        raise ValueError(f"check_checkpoint: {str(path_or_repo)!r} is damaged: {'; '.join(damaged)}; {again}.")
    _check_index(folder, names, again)
    _check_config(folder)
    return names


def _weights(folder: Path, again: str) -> list[str]:
    known = ("config.json", "adapter_config.json")
    if not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(f"check_checkpoint: {str(folder)!r} has none of {known}; is it a checkpoint's folder?")
    if (folder / _INDEX).is_file():
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [name for name in (_SINGLE, _ADAPTER) if (folder / name).is_file()]
        if not names:
            raise FileNotFoundError(
                f"check_checkpoint: {str(folder)!r} has none of {(_SINGLE, _INDEX, _ADAPTER)}; {again}."
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"check_checkpoint: {str(folder)!r} lacks {missing} of {len(names)} shards; {again}.")
    return names


def damage(path: Path) -> str | None:
    """What is wrong with a safetensors file by its header and length; None when nothing is."""
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except SafetensorError as error:
        return str(error)
    return None


def _tensors(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as weights:
        return set(weights.keys())


def _changed(folder: Path) -> list[str]:
    file, found = folder / CHECKSUMS, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        wanted, _, name = line.partition("  ")
        if (folder / name).is_file() and _sha256(folder / name) != wanted:
            found.append(f"{name} is not what {CHECKSUMS} says")
    return found


def _check_index(folder: Path, names: list[str], again: str) -> None:
    if not (folder / _INDEX).is_file():
        return
    promised = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    held = {name: _tensors(folder / name) for name in names}
    missing = sorted(tensor for tensor, name in promised.items() if tensor not in held[name])
    if missing:
        raise ValueError(
            f"check_checkpoint: {str(folder)!r} is damaged: the index names tensors that its files do not hold, "
            f"{missing[:3]} and {max(len(missing) - 3, 0)} more; {again}."
        )


def _check_config(folder: Path) -> None:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        return
    written = json.loads(file.read_text(encoding="utf-8"))
    kind = written.get("model_type")
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError as error:
        if "architecture_version" in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"check_checkpoint: `model_type` {kind!r} of {str(file)!r} cannot be read here ({reason}); "
            "upgrade hf-kalman and transformers."
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
