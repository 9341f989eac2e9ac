"""The opt-in hook by which programs that never import the package know its architectures."""

import subprocess
import sys

import pytest
from tiny import tiny_model

from hf_kalman import autoload
from hf_kalman.__main__ import main

PROGRAM = """
import sys, site
site.addsitedir(sys.argv[1])
assert "hf_kalman" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[2])).__name__)
"""


def program(*arguments):
    return subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True)


def test_a_program_that_never_imports_us(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    assert not autoload.status(hooks)
    assert program(hooks, tmp_path / "model").returncode != 0
    autoload.enable(hooks)
    assert autoload.status(hooks)
    done = program(hooks, tmp_path / "model")
    assert done.stdout.strip() == "GKAForCausalLM", done.stderr[-1500:]
    autoload.disable(hooks)
    autoload.disable(hooks)
    assert program(hooks, tmp_path / "model").returncode != 0


def test_the_hook_costs_others_nothing(tmp_path):
    autoload.enable(tmp_path)
    code = "import sys, site\nsite.addsitedir(sys.argv[1])\n"
    code += "assert not {'torch', 'transformers', 'hf_kalman'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    # Nor does an environment from which the package is gone.
    gone = code.replace("site.addsitedir", "sys.meta_path.clear() or site.addsitedir")
    subprocess.run([sys.executable, "-c", gone, str(tmp_path)], check=True)


def test_the_system_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(ValueError, match="virtual environment"):
        autoload.enable()


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(autoload, "_file", lambda folder: tmp_path / "hook.pth")
    assert main(["autoload", "enable"]) == 0 and (tmp_path / "hook.pth").is_file()
    assert main(["autoload", "status"]) == 0 and "autoload enabled" in capsys.readouterr().out
    assert main(["autoload", "disable"]) == 0 and not (tmp_path / "hook.pth").exists()
    assert main(["autoload", "sometimes"]) == 2 and "enable|disable|status" in capsys.readouterr().err
