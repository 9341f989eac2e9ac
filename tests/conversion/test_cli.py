import json
import subprocess
import sys

import pytest
import torch
from tiny_teachers import teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from kalman_conversion import cli
from kalman_conversion.heal import heal_layerwise

SWAP = [
    "--layers",
    "1,3",
    "--option",
    "solver=cg",
    "--option",
    "solver_iterations=12",
    "--option",
    "use_local_values=true",
]
HEAL = ["--window", "20", "--rls-tokens", "200", "--tokens", "100", "--device", "cpu"]


def swap(teacher_folder, output, *extra):
    return cli.main(["swap", "--model", str(teacher_folder), "--output", str(output), *SWAP, *extra])


def heal(student, teacher_folder, text, output, *extra):
    folders = ["--model", str(student), "--teacher", str(teacher_folder), "--data", str(text), "--output", str(output)]
    return cli.main(["heal", *folders, *HEAL, *extra])


def contents(folder):
    return sorted(p.name for p in folder.iterdir())


def test_swap_heal_verify(teacher_folder, text, tmp_path, capsys):
    assert swap(teacher_folder, tmp_path / "swapped") == 0
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert list(model.config.layer_types) == ["full_attention", "linear_attention"] * 2
    batch = AutoTokenizer.from_pretrained(tmp_path / "healed")(["gain", "a prior"], padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=4, do_sample=False).shape[0] == 2
    record = json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert [s["stage"] for s in record["stages"]] == ["rls", "layerwise"]
    assert [s["tokens"] for s in record["stages"]] == [200, 100]
    assert json.loads((tmp_path / "healed" / "conversion.json").read_text())["layers"] == [1, 3]
    assert not (tmp_path / "healed.work").exists()
    capsys.readouterr()
    arguments = ["--model", str(tmp_path / "healed"), "--teacher", str(teacher_folder), "--data", str(text)]
    assert cli.main(["verify", *arguments, "--window", "20", "--tokens", "100", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["changed_weights"] == [] and result["tokens"] == 100
    assert result["perplexity"]["model"] > 1


def test_dry_runs_write_nothing(teacher_folder, text, tmp_path, capsys):
    assert swap(teacher_folder, tmp_path / "swapped", "--dry-run") == 0
    assert "gka in 2 layers: 1, 3" in capsys.readouterr().out
    assert not (tmp_path / "swapped").exists()
    assert swap(teacher_folder, tmp_path / "swapped") == 0
    before = contents(tmp_path)
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed", "--dry-run") == 0
    assert contents(tmp_path) == before


def test_recipe_gives_defaults_and_options_override(teacher_folder, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "swap: {layers: [0, 2], initialisation: reference, options: {solver: exact}}\n"
        "heal: {method: rls, window: 20, rls_tokens: 100}\n"
    )
    common = ["--model", str(teacher_folder), "--recipe", str(recipe)]
    assert cli.main(["swap", *common, "--output", str(tmp_path / "a")]) == 0
    assert cli.main(["swap", *common, "--layers", "3", "--output", str(tmp_path / "b")]) == 0
    records = [json.loads((tmp_path / n / "conversion.json").read_text()) for n in "ab"]
    assert [r["layers"] for r in records] == [[0, 2], [3]]
    assert all(r["initialisation"] == "reference" and r["options"] == {"solver": "exact"} for r in records)
    arguments = ["--teacher", str(teacher_folder), "--data", str(text), "--device", "cpu", "--recipe", str(recipe)]
    assert cli.main(["heal", "--model", str(tmp_path / "a"), "--output", str(tmp_path / "c"), *arguments]) == 0
    assert [s["stage"] for s in json.loads((tmp_path / "c" / "healing.json").read_text())["stages"]] == ["rls"]


def test_an_interrupted_heal_continues_to_the_same_bits(teacher_folder, text, tmp_path, monkeypatch):
    assert swap(teacher_folder, tmp_path / "swapped") == 0
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "whole") == 0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "heal_layerwise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed")
    assert not (tmp_path / "healed").exists() and (tmp_path / "healed.work" / "rls.pt").exists()
    monkeypatch.setattr(cli, "heal_layerwise", heal_layerwise)
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed", "--seed", "1") == 2
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed") == 0
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "healed"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_bad_input_is_one_clear_line_and_leaves_nothing(teacher_folder, text, tmp_path, capsys):
    assert swap(teacher_folder, tmp_path / "swapped") == 0
    other = tmp_path / "other"
    teacher(vocab_size=62).save_pretrained(other)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    before = contents(tmp_path)
    student, out = tmp_path / "swapped", tmp_path / "out"
    base = ["--model", str(teacher_folder), "--output", str(out)]
    cases = [
        (["swap", *base, "--mixer", "mamba"], "`mixer` must be one of"),
        (["swap", *base, "--layers", "1,9"], "indices from 0 to 3"),
        (["swap", *base, "--initialisation", "magic"], "`initialisation` must be"),
        (["swap", *base, "--option", "solver"], "FIELD=VALUE"),
        (["swap", *base, "--option", "linear_num_query_heads=2"], "q_proj of shape"),
        (["swap", *base, "--recipe", str(tmp_path / "none.yaml")], "does not exist"),
        (["swap", "--model", str(tmp_path / "nowhere"), "--output", str(out)], "nowhere"),
        (["swap", "--model", str(teacher_folder), "--output", str(student)], "exists already"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 2, arguments
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line, (arguments, line)
    for extra, source, data, message in (
        ([], other, text, "its vocab_size is 62, the student's 61"),
        ([], teacher_folder, tmp_path / "none.txt", "does not exist"),
        ([], teacher_folder, empty, "holds no text"),
        (["--tokens", "5"], teacher_folder, text, "`--tokens` must be at least 20"),
        (["--rls-tokens", "999999"], teacher_folder, text, "must fill"),
    ):
        assert heal(student, source, data, out, *extra) == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_nothing_half_written(teacher_folder, tmp_path, monkeypatch, capsys):
    def full(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    from hf_kalman import GKAForCausalLM

    monkeypatch.setattr(GKAForCausalLM, "save_pretrained", full)
    before = contents(tmp_path)
    assert swap(teacher_folder, tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_console_script_and_module():
    out = subprocess.run(
        [sys.executable, "-m", "kalman_conversion", "--help"], capture_output=True, text=True, check=True
    )
    assert "swap" in out.stdout and "heal" in out.stdout and "verify" in out.stdout
