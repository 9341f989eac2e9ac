"""Benchmarks import each other as scripts do; their tests share the tiny tokenizer of the conversions."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(FOLDER), str(FOLDER / "tasks"), str(Path(__file__).parents[1] / "conversion")]
