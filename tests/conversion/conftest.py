from pathlib import Path

import pytest
from tiny_teachers import teacher
from tiny_tokenizer import tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipes():
    return sorted((ROOT / "conversion" / "recipes").glob("*.yaml"))


@pytest.fixture
def teacher_folder(tmp_path):
    folder = tmp_path / "teacher"
    teacher().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    words = ["state", "gain", "noise", "filter", "prior"]
    file.write_text("\n\n".join(" ".join(words[(i * j) % 5] for j in range(20)) for i in range(40)))
    return file
