"""The filter's belief as a file beside the weights, so that adaptation goes on elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .optimizer import KalmanOptimizer

__all__ = ["POSTERIOR_FILE", "load_posterior", "save_posterior"]

POSTERIOR_FILE = "kalman_posterior.safetensors"
_FORMAT = "1"


def save_posterior(optimizer: KalmanOptimizer, model: nn.Module, folder: str | Path) -> Path:
    """Write what a filter knows of a model's parameters, by their names, to `kalman_posterior.safetensors`.

    Covariances (or precisions), priors, and the running estimates that they follow from, in float32; of parameters
    in a narrower dtype also their float32 means. The weights themselves are the model's to save.

    Args:
        optimizer: the filter; `KalmanCallback.optimizer` after a run.
        model: the model that holds its parameters.
        folder: existing folder, that of the adapter or checkpoint.

    Returns:
        The file.

    Raises:
        ValueError: a parameter of the filter is not one of `model`.
    """
    tensors: dict[str, Tensor] = {}
    options: dict[str, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    for name, group, index in _named(optimizer, model):
        options[name] = {key: value for key, value in group.items() if key != "params"}
        for key, value in saved["state"][index].items():
            tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    path = Path(folder) / POSTERIOR_FILE
    half = path.with_suffix(".part")
    save_file(tensors, half, metadata={"format": _FORMAT, "options": json.dumps(options, sort_keys=True)})
    half.replace(path)
    return path


def load_posterior(optimizer: KalmanOptimizer, model: nn.Module, folder: str | Path) -> None:
    """Let a filter begin with a saved belief in place of its prior; its other arguments stay its own.

    Args:
        optimizer: the filter, of the same structure.
        model: the model that holds its parameters, under the names that they were saved with.
        folder: where `save_posterior` wrote to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or the belief of other parameters or of another structure; nothing is changed.
    """
    path = Path(folder) / POSTERIOR_FILE
    if not path.is_file():
        raise FileNotFoundError(f"load_posterior: `folder` {str(folder)!r} holds no {POSTERIOR_FILE}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load_posterior: {str(path)!r} is damaged ({error}); fetch it again.") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"load_posterior: {str(path)!r} has format {metadata.get('format')!r}, this hf-kalman reads {_FORMAT!r}; "
            "upgrade it (pip install --upgrade hf-kalman)."
        )
    options = json.loads(metadata["options"])
    named = _named(optimizer, model)
    names = {name for name, _, _ in named}
    if names != options.keys():
        raise ValueError(
            f"load_posterior: {str(path)!r} holds beliefs of other parameters: missing "
            f"{sorted(names - options.keys())[:3]}, unknown {sorted(options.keys() - names)[:3]}."
        )
    state = optimizer.state_dict()
    for name, group, index in named:
        # Of what the belief is made.
        for key in ("structure", "rank") if group["structure"] == "low_rank" else ("structure",):
            if group[key] != options[name][key]:
                raise ValueError(
                    f"load_posterior: the belief of {name!r} has {key} {options[name][key]!r}, the filter has "
                    f"{group[key]!r}; build it with {key}={options[name][key]!r}."
                )
        fresh = state["state"][index]
        saved = {key.rpartition("|")[2]: tensor for key, tensor in tensors.items() if key.rpartition("|")[0] == name}
        # What only one of the two keeps, such as the estimates behind a prior, stays the filter's own.
        saved = {key: value for key, value in saved.items() if key in fresh or key == "prior"}
        if any(saved[key].shape != fresh[key].shape for key in saved.keys() & fresh.keys() - {"factors"}):
            raise ValueError(f"load_posterior: the belief of {name!r} in {str(path)!r} has another shape.")
        state["state"][index] = {**fresh, **saved}
    optimizer.load_state_dict(state)


def _named(optimizer: KalmanOptimizer, model: nn.Module) -> list[tuple[str, dict[str, Any], int]]:
    """(name, group, index in the state) of every parameter of a filter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found, index = [], 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"posterior: `model` has not the filter's parameter {index} of shape {tuple(parameter.shape)}; "
                    "give the model that was trained."
                )
            found.append((names[id(parameter)], group, index))
            index += 1
    return found
