import gzip
import json
import os
import stat

import pytest
import torch
from tiny_tokenizer import tokenizer

from kalman_conversion import read_documents, token_windows
from kalman_conversion.files import check_output, new_folder
from kalman_conversion.recipe import load_recipe


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n\n two \n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("one\nline\n\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\nline"}\n\n{"text": " "}\n{"text": "two"}\n')
    for name in ("a.txt", "a.txt.gz", "a.jsonl"):
        assert read_documents(tmp_path / name) == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", None, FileNotFoundError, "does not exist"),
        ("a.txt", "\n \n", ValueError, "holds no text"),
        ("a.csv", "text", ValueError, "must end in one of .txt"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', ValueError, 'line 2 is \'{"body"'),
        ("a.jsonl", "not json\n", ValueError, "line 1 is 'not json'"),
    ],
)
def test_unreadable_text(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_documents(tmp_path / name)


def test_windows():
    tok = tokenizer()
    windows = token_windows(tok, ["abcd", "efg"], 3)
    assert windows.shape == (3, 3)
    assert windows.flatten().tolist() == tok("abcd")["input_ids"] + [2] + tok("efg")["input_ids"] + [2]
    assert torch.equal(token_windows(tok, ["abcd", "efg"], 3, 2), windows[:2])
    with pytest.raises(ValueError, match="must fill 4 windows of 3 tokens, got 9"):
        token_windows(tok, ["abcd", "efg"], 3, 4)
    with pytest.raises(ValueError, match="must fill 1 windows of 30 tokens, got 9"):
        token_windows(tok, ["abcd", "efg"], 30)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "other") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("taken", "file"):
        with pytest.raises(FileExistsError, match="exists already"):
            check_output(tmp_path / name)
    with pytest.raises(OSError, match="file system has"):
        check_output(tmp_path / "out", needed=1 << 60)
    # As root nothing is read-only, so the answer of the system is replaced.
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission"):
        check_output(tmp_path / "out")
    tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "must hold the sections"),
        ("a: [", "is not YAML"),
        ("train: {}", "got 'train'"),
        ("swap: {layer: [1]}", "got 'layer'"),
        ("heal: {rate: 1}", "got 'rate'"),
    ],
)
def test_recipes_are_checked(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_recipe(tmp_path / "s.yaml")


def test_shipped_recipes_are_valid(recipes):
    assert recipes
    for path in recipes:
        assert json.dumps(load_recipe(path))
