"""Every Triton kernel compiles for a GPU, on a machine without one: the interpreter takes what the compiler refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "torch-ext" / "kalman_kernels"


def defined():
    """Names of all kernels, `module.function`."""
    names = set()
    for path in (*PACKAGE.rglob("triton_*.py"), *PACKAGE.rglob("gluon_*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names |= {f"{module}.{name}" for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    return names


def test_every_kernel_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    script = [sys.executable, ROOT / "benchmarks" / "kernel_builds.py"]
    script += ["--capabilities", "9.0", "--brief", "--output", tmp_path]
    run = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (row,) = json.loads((tmp_path / "kernel_builds.json").read_text())["brief"].values()
    assert set(row["kernels"]) == defined()
    assert row["too_large"] == []
