"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_output", "new_folder"]


def check_output(output: str | Path, needed: int = 0) -> Path:
    """The output folder as a path, after making sure that it can be made.

    Args:
        output: folder to be written.
        needed: bytes that will be written.

    Raises:
        FileExistsError: it exists and is not an empty folder.
        PermissionError: its parent cannot be written to.
        OSError: the file system has less than `needed` bytes left.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output` {str(output)!r} exists already; choose another folder or remove it.")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"`output` {str(output)!r} cannot be written: no permission in {str(parent)!r}.")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"`output` {str(output)!r} needs {needed / 1e6:.0f} MB, but the file system has {free / 1e6:.0f} MB left."
        )
    return output


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends without an error."""
    output = check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
