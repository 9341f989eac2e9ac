"""Benchmarks import each other as scripts do."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(FOLDER), str(FOLDER / "tasks")]
