"""Opt-in: every Python of this environment knows the architectures, without `import hf_kalman`.

    python -m hf_kalman autoload enable      # also: disable, status

For programs that cannot be told to import anything. A line in a `.pth` file of the environment registers the package
when a program imports the Auto classes of the host library, and costs the others nothing but that hook. Nothing is
enabled by installing the package.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import site
import sys
from pathlib import Path

__all__ = ["disable", "enable", "hook", "status"]

_FILE = "hf_kalman_autoload.pth"
# The module that every use of an Auto class imports, after which registering is possible.
_WATCHED = "transformers.models.auto.modeling_auto"
# Without the package itself: a `.pth` line runs at the start of every Python.
_LINE = (
    "import sys; exec(\"try:\\n import importlib.util as u\\n s=u.find_spec('hf_kalman')\\n p=s and "
    "s.submodule_search_locations[0]+'/autoload.py'\\n m=p and u.spec_from_file_location('_hf_kalman_autoload',p)\\n "
    'o=m and u.module_from_spec(m)\\n m and (m.loader.exec_module(o),o.hook())\\nexcept Exception: pass")\n'
)


def _file(folder: str | Path | None) -> Path:
    if folder is None:
        if sys.prefix == sys.base_prefix:
            raise ValueError(
                "autoload: works in a virtual environment, and this is the system's Python; make one (python -m venv "
                ".venv)."
            )
        folder = next(path for path in site.getsitepackages() if path.startswith(sys.prefix))
    return Path(folder) / _FILE


def enable(folder: str | Path | None = None) -> Path:
    """Write the hook's file; the file.

    Args:
        folder: a site-packages folder; that of this virtual environment when None.

    Raises:
        ValueError: outside of a virtual environment.
    """
    path = _file(folder)
    path.write_text(_LINE, encoding="utf-8")
    return path


def disable(folder: str | Path | None = None) -> Path:
    """Remove the hook's file where there is one; see `enable`."""
    path = _file(folder)
    path.unlink(missing_ok=True)
    return path


def status(folder: str | Path | None = None) -> bool:
    """Whether the hook's file is there; see `enable`."""
    return _file(folder).is_file()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds the watched module as everybody else does, and registers the package behind its import."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        original = spec.loader.exec_module

        def exec_module(module):
            original(module)
            importlib.import_module("hf_kalman")

        spec.loader.exec_module = exec_module
        return spec


def hook() -> None:
    """Watch for the import of the Auto classes, or register at once where they are imported already."""
    if _WATCHED in sys.modules:
        importlib.import_module("hf_kalman")
    elif not any(type(finder).__name__ == "_Watch" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
