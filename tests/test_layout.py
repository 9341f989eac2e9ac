"""Three import roots, one direction."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {
    "kalman_kernels": ROOT / "kernels" / "torch-ext" / "kalman_kernels",
    "hf_kalman": ROOT / "src" / "hf_kalman",
    "kalman_conversion": ROOT / "conversion" / "kalman_conversion",
}
FORBIDDEN = {
    "kalman_kernels": {"hf_kalman", "kalman_conversion", "transformers", "peft", "accelerate", "huggingface_hub"},
    "hf_kalman": {"kalman_conversion"},
    "kalman_conversion": set(),
}
STANDARD = set(sys.stdlib_module_names)


def imports(path):
    """(module, level) of every import statement of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def upward(root, source):
    return [module for module, level in source if not level and module.split(".")[0] in FORBIDDEN[root]]


@pytest.mark.parametrize("root", ROOTS)
def test_no_upward_import(root):
    for path in ROOTS[root].rglob("*.py"):
        assert upward(root, imports(path)) == [], path


def test_kernels_import_torch_and_triton_alone():
    for path in ROOTS["kalman_kernels"].rglob("*.py"):
        outside = {module.split(".")[0] for module, level in imports(path) if not level}
        assert outside <= {"torch", "triton"} | STANDARD, path


def test_the_check_sees_a_violation(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from kalman_conversion.swap import swap_attention\n")
    assert upward("hf_kalman", imports(path)) == ["kalman_conversion.swap"]


def test_no_package_shadows_a_library():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conversion" / "__init__.py").exists()
    assert all((folder / "py.typed").exists() for folder in ROOTS.values())
