"""One way to refuse arguments that are out of their range."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["check_ranges"]


def check_ranges(owner: str, rows: Iterable[tuple[str, Any, Any, str]]) -> None:
    """Refuse the first argument that does not fit.

    Args:
        owner: class or function whose arguments they are.
        rows: name, value, whether it fits, and what would.

    Raises:
        ValueError: naming all of these.
    """
    for name, value, fits, wanted in rows:
        if not fits:
            raise ValueError(f"{owner}: `{name}` must be {wanted}, got {value!r}.")
