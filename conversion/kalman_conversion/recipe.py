"""Recipes: one YAML file per conversion that was run and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["load_recipe"]

_SECTIONS = {
    "description": str,
    "source": str,
    "swap": dict,
    "heal": dict,
}
_SWAP = ("mixer", "layers", "initialisation", "seed", "options")
_HEAL = ("window", "seed", "stages")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read and check a recipe.

    Args:
        path: YAML file with the sections `description`, `source`, `swap` (arguments of `swap_attention`; `options` are
            fields of `GKAConfig`) and `heal` (`window` and `seed`, and `stages` as `read_stages` takes them).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or has a section or entry that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_recipe: `recipe` {str(path)!r} does not exist.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"load_recipe: `recipe` {str(path)!r} is not YAML ({error}).") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"load_recipe: `recipe` {str(path)!r} must hold the sections {tuple(_SECTIONS)}.")
    for name, value in recipe.items():
        if name not in _SECTIONS or not isinstance(value, _SECTIONS[name]):
            raise ValueError(f"load_recipe: `recipe` must hold the sections {tuple(_SECTIONS)}, got {name!r}.")
    for section, known in (("swap", _SWAP), ("heal", _HEAL)):
        for name in recipe.get(section, {}):
            if name not in known:
                raise ValueError(f"load_recipe: section `{section}` must hold entries of {known}, got {name!r}.")
    if not isinstance(recipe.get("heal", {}).get("stages", []), list):
        raise ValueError(f"load_recipe: `stages` of section `heal` must be a list, got {recipe['heal']['stages']!r}.")
    return recipe
