import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_training_step_of_a_converted_smollm2_fits_in_six_gigabytes(tmp_path):
    command = [sys.executable, "benchmarks/training_memory.py", "--steps", "1", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert json.loads((tmp_path / "training_memory.json").read_text())["peak_process_gib"] < 6e9 / 2**30
