"""Fetches the common tests of the installed transformers from its source distribution.

    python tests/hf_kalman/host/fetch.py

They land in `build/host/VERSION/host_tests/`, a package; nothing of them is committed. What they import from files that
the distribution leaves out, `missing.py` supplies.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Modules that the distribution leaves out, and what stands in for them here.
MISSING = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
    "utils/test_configuration_utils.py": "config_common_kwargs",
    "distributed_testing_utils.py": (
        "_get_distributed_backend, _get_distributed_device_type, _get_rank_device, _set_rank_device, "
        "_start_rank_processes, run_distributed"
    ),
}


def folder():
    """Where the tests of the installed version are, or will be."""
    return ROOT / "build" / "host" / importlib.metadata.version("transformers")


def fetch():
    """Download, unpack beside the target, move into place: a folder that exists is complete."""
    target = folder()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        work = Path(work)
        requirement = f"transformers=={target.name}"
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(work)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        package = work / "whole" / "host_tests"
        package.mkdir(parents=True)
        with tarfile.open(next(work.glob("transformers-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                path = Path(member.name)
                if path.parts[1:2] == ("tests",) and len(path.parts) == 3 and path.suffix == ".py":
                    (package / path.name).write_bytes(archive.extractfile(member).read())
        (package / "__init__.py").touch()
        for name, imported in MISSING.items():
            path = package / name
            path.parent.mkdir(exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(f"from missing import {imported}  # noqa: F401\n")
        shutil.move(package.parent, target)
    return target


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.write(f"{fetch()}\n")
