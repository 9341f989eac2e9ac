"""One commit with all that a checkpoint needs to be used elsewhere."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from ..training.optimizer import KalmanOptimizer
from ..training.posterior import save_posterior
from .bundle import AUTO_MAPS, write_bundle
from .card import model_card, validate_card
from .check import CHECKSUMS, check_checkpoint, checksums

__all__ = ["PushReport", "push_to_hub"]

# Of an earlier push, which must not stay beside the shards of this one.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors", "*_hf_kalman.py"]
# What training and conversion leave in a folder that is nobody else's business; records of conversions name paths.
_PRIVATE = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", CHECKSUMS}
_PRIVATE |= {"conversion.json", "healing.json"}


class PushReport(NamedTuple):
    """What was pushed, or would be."""

    repo_id: str
    files: dict[str, int]
    """{path in the repository: bytes}"""
    url: str | None
    """Of the commit; None for a dry run."""


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    card: ModelCard | None = None,
    figures: Iterable[str | Path] = (),
    optimizer: KalmanOptimizer | None = None,
    base_model: str | None = None,
    code: bool | None = None,
    private: bool = True,
    dry_run: bool = False,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> PushReport:
    """Push a model to the Hub: weights in shards, tokenizer, card, figures and code, in one commit.

    Everything is put together and checked in a folder of its own first. Files that the repository has already are not
    sent again, so that a push that was cut off goes on where it was, and a second push sends what changed; shards and
    code of an earlier push that this one does not have are removed.

    Args:
        model: a model, a peft model (its adapter is pushed), or the folder of a saved checkpoint.
        repo_id: "name" or "owner/name".
        tokenizer: saved beside the model; a folder's own files go along in any case.
        card: by default a folder's README.md, or a card of what the configuration says (`model_card`).
        figures: image files that the card shows.
        optimizer: filter whose posterior goes along (`save_posterior`), so that adaptation can go on elsewhere.
        base_model: Hub id of the model that an adapter belongs to, where it was trained on a copy in a folder.
        code: whether the model's code goes along, for `trust_remote_code=True` without this package; by default where
            there is such code: GKA and KLA models that are no adapters.
        private: of a repository that is created here; an existing one stays what it is.
        dry_run: put everything together, check it, and send nothing.
        max_shard_size: of a weight file.
        revision: branch, created from the main one where it does not exist.
        message: of the commit.
        token: for the Hub; the saved login when None.

    Raises:
        FileNotFoundError: `model` is a path and no folder of a checkpoint, or a figure does not exist.
        ValueError: an argument is out of its range, the card is not valid, or the checkpoint damaged; nothing was sent.
    """
    validate_repo_id(repo_id)
    figures = [Path(figure) for figure in figures]
    missing = [str(figure) for figure in figures if not figure.is_file()]
    if missing:
        raise FileNotFoundError(f"push_to_hub: `figures` {missing} do not exist.")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        _save(model, stage, tokenizer, max_shard_size)
        _name_base(stage, base_model)
        if optimizer is not None:
            if isinstance(model, str | Path):
                raise ValueError(
                    "push_to_hub: `optimizer` needs `model` to be the model that it trained, got a folder."
                )
            save_posterior(optimizer, model, stage)
        _add_code(stage, code)
        for figure in figures:
            shutil.copyfile(figure, stage / figure.name)
        if card is None and not (stage / "README.md").is_file():
            card = model_card(stage, repo_id)
        if card is not None:
            (stage / "README.md").write_text(str(card), encoding="utf-8")
        validate_card(ModelCard.load(stage / "README.md"), stage)
        # Before there are sums to compare with, which would read every weight once more.
        check_checkpoint(stage)
        (stage / CHECKSUMS).write_text(checksums(stage), encoding="utf-8")
        files = {p.relative_to(stage).as_posix(): p.stat().st_size for p in sorted(stage.rglob("*")) if p.is_file()}
        if dry_run:
            return PushReport(repo_id, files, None)
        name, commit = _send(stage, repo_id, private, revision, message, token)
        return PushReport(name, files, commit.commit_url)


def _save(model: Any, stage: Path, tokenizer: Any, max_shard_size: str) -> None:
    if isinstance(model, str | Path):
        source = Path(model)
        if not any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"push_to_hub: `model` {str(model)!r} is no folder of a saved checkpoint.")
        check_checkpoint(source)
        for file in source.iterdir():
            if not file.is_file() or file.name in _PRIVATE or file.name.startswith("rng_state"):
                continue
            if file.suffix in (".safetensors", ".bin", ".pt"):
                (stage / file.name).symlink_to(file.resolve())
            else:
                shutil.copyfile(file, stage / file.name)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        (stage / "README.md").unlink(missing_ok=True)  # peft's, with empty sections
    else:
        raise ValueError(f"push_to_hub: `model` must be a model or the folder of one, got {type(model).__name__}.")
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)


def _name_base(stage: Path, base_model: str | None) -> None:
    """Let an adapter name its base model as others find it."""
    file = stage / "adapter_config.json"
    if not file.is_file():
        if base_model is not None:
            raise ValueError(f"push_to_hub: `base_model` {base_model!r} is for adapters, and `model` is none.")
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    named = base_model or config.get("base_model_name_or_path")
    if not named or Path(named).exists():
        raise ValueError(
            f"push_to_hub: the adapter's base model is {named!r}, which others do not have; give its Hub id as "
            "`base_model`."
        )
    config["base_model_name_or_path"] = named
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_code(stage: Path, code: bool | None) -> None:
    file = stage / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = config.get("model_type") in AUTO_MAPS
    if code and not known:
        raise ValueError(
            f"push_to_hub: `code` travels with the model types {sorted(AUTO_MAPS)}, got {config.get('model_type')!r}; "
            "use code=False: whoever loads it installs hf-kalman."
        )
    if code is None:
        code = known
    config.pop("auto_map", None)
    if code:
        write_bundle(stage)
        config["auto_map"] = AUTO_MAPS[config["model_type"]]
    if config:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _send(
    stage: Path, repo_id: str, private: bool, revision: str | None, message: str, token: str | None
) -> tuple[str, CommitInfo]:
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=stage,
        commit_message=message,
        revision=revision,
        delete_patterns=_REPLACED,
    )
    return name, commit
