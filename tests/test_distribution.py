"""What is built installs elsewhere and does what README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What README's snippets take as given.
GIVEN = {
    "from_classifier(classifier": """
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification
tiny_model().save_pretrained("small")
classifier = AutoModelForSequenceClassification.from_pretrained("small", num_labels=3)
samples = [{"input_ids": torch.arange(1, 9), "labels": 1}, {"input_ids": torch.arange(4, 12), "labels": 2}]
""",
    "InnovationTuner(": """
from tiny import tiny_model, tokens
model, stream = tiny_model(["linear_attention"] * 29), tokens(2, 9).split(1)
""",
    "KalmanCallback()": """
from tiny import tiny_model, tokens
model, data = tiny_model(), [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
""",
    "KalmanWorldModel(": """
observations, actions, planned_actions = torch.randn(40, 3), torch.randn(40, 1), torch.randn(5, 1)
""",
    "gated_kalmanet(": """
query, key, value = torch.randn(3, 2, 20, 4, 16)
log_decay, solution_mix = -torch.rand(2, 20, 4), torch.rand(2, 20, 4)
mask, state = torch.ones(2, 20, dtype=torch.bool), None
""",
    "kalman_linear_attention(": """
value, value_precision = torch.randn(2, 20, 8), torch.rand(2, 20, 8) + 0.1
key, query = torch.randn(2, 2, 20, 4)
decay, process_noise = torch.rand(8, 4), torch.rand(8, 4)
""",
    "push_to_hub(": """
from tiny import tiny_model
model = tiny_model()
""",
    "build/demo/healed": None,
}


def snippets():
    """README's Python, each with what it takes as given; None where it needs the demo's checkpoint."""
    for text in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        given = next((code for part, code in GIVEN.items() if part in text), "")
        yield text, given


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(Python of an environment with the wheel and the libraries of this one, the built files)."""
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys\nfrom hatchling import build\nbuild.build_wheel(sys.argv[1])\nbuild.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    wheel = next(folder.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    import torch

    packages = next((environment / "lib").glob("python*")) / "site-packages"
    (packages / "host.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return python, sorted(folder.glob("*.*"))


def test_the_wheel_is_small_and_its_metadata_are_valid(elsewhere):
    _, files = elsewhere
    files = [path for path in files if path.name.endswith((".whl", ".tar.gz"))]
    assert len(files) == 2
    wheel = next(path for path in files if path.suffix == ".whl")
    assert wheel.stat().st_size <= 2**20
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", range(len(list(snippets()))))
def test_snippets_of_the_readme_run_from_the_wheel(number, elsewhere, tmp_path):
    text, given = list(snippets())[number]
    if given is None:
        pytest.skip("needs the checkpoint that make demo writes")
    code = f"import sys\nsys.path.append({str(ROOT / 'tests' / 'hf_kalman')!r})\nimport torch\ntorch.manual_seed(0)\n"
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    check = "\nimport hf_kalman, kalman_kernels\n"
    check += (
        f"assert all(m.__file__.startswith({str(elsewhere[0].parents[1])!r}) for m in (hf_kalman, kalman_kernels))\n"
    )
    done = subprocess.run(
        [str(elsewhere[0]), "-c", code + given + text + check],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-1500:]
