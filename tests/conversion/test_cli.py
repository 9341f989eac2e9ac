import json
import subprocess
import sys

import pytest
import torch
from tiny_teachers import teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from kalman_conversion import cli, stages
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
HEAL = ["--window", "20", "--set", "rls.tokens=200", "--set", "layerwise.tokens=100", "--device", "cpu"]


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
    assert [s["stage"] for s in record["ran"]] == ["rls", "layerwise"]
    assert [s["tokens"] for s in record["ran"]] == [200, 100]
    assert all(set(s["layer_errors"]) == {"1", "3"} for s in record["ran"])
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
        "heal: {window: 20, stages: [rls: {tokens: 100}, finetune: {tokens: 40, learning_rate: 1e-4}]}\n"
    )
    common = ["--model", str(teacher_folder), "--recipe", str(recipe)]
    assert cli.main(["swap", *common, "--output", str(tmp_path / "a")]) == 0
    assert cli.main(["swap", *common, "--layers", "3", "--output", str(tmp_path / "b")]) == 0
    records = [json.loads((tmp_path / n / "conversion.json").read_text()) for n in "ab"]
    assert [r["layers"] for r in records] == [[0, 2], [3]]
    assert all(r["initialisation"] == "reference" and r["options"] == {"solver": "exact"} for r in records)
    arguments = ["--teacher", str(teacher_folder), "--data", str(text), "--device", "cpu", "--recipe", str(recipe)]
    assert cli.main(["heal", "--model", str(tmp_path / "a"), "--output", str(tmp_path / "c"), *arguments]) == 0
    record = json.loads((tmp_path / "c" / "healing.json").read_text())
    assert [(s["stage"], s["tokens"]) for s in record["ran"]] == [("rls", 100), ("finetune", 160)]
    assert record["stages"][1]["finetune"]["learning_rate"] == 1e-4


def test_an_interrupted_heal_continues_to_the_same_bits(teacher_folder, text, tmp_path, monkeypatch):
    assert swap(teacher_folder, tmp_path / "swapped") == 0
    assert heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "whole") == 0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "heal_layerwise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path / "swapped", teacher_folder, text, tmp_path / "healed")
    assert not (tmp_path / "healed").exists() and (tmp_path / "healed.work" / "0-rls" / "rls.pt").exists()
    monkeypatch.setattr(stages, "heal_layerwise", heal_layerwise)
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
        (["swap", *base, "--option", "solver"], "NAME=VALUE"),
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
        (["--set", "rls.tokens=5"], teacher_folder, text, "`tokens` of stage 'rls' must be at least 20"),
        (["--set", "rls.tokens=999999"], teacher_folder, text, "must fill"),
        (["--set", "rls.steps=5"], teacher_folder, text, "stage 'rls' must hold settings of"),
        (
            ["--set", "distil.tokens=50"],
            teacher_folder,
            text,
            "STAGE.SETTING=VALUE with a stage of ('rls', 'layerwise')",
        ),
        (["--stages", "boil"], teacher_folder, text, "stages must be of"),
    ):
        assert heal(student, source, data, out, *extra) == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_nothing_half_written(teacher_folder, text, tmp_path, monkeypatch, capsys):
    def full(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    from hf_kalman import GKAForCausalLM

    assert swap(teacher_folder, tmp_path / "swapped") == 0
    monkeypatch.setattr(GKAForCausalLM, "save_pretrained", full)
    own = ["--data", str(text), "--window", "20", "--tokens", "100", "--device", "cpu"]
    folders = [
        "--model",
        str(tmp_path / "swapped"),
        "--teacher",
        str(teacher_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(["rls", *folders, *own]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {"out.work", "swapped"} <= set(contents(tmp_path)) and "out" not in contents(tmp_path)


def test_console_script_and_module():
    out = subprocess.run(
        [sys.executable, "-m", "kalman_conversion", "--help"], capture_output=True, text=True, check=True
    )
    assert "swap" in out.stdout and "heal" in out.stdout and "verify" in out.stdout


def test_every_stage_is_a_command_and_continues_the_one_before(teacher_folder, text, tmp_path, capsys):
    assert swap(teacher_folder, tmp_path / "0") == 0
    common = ["--data", str(text), "--window", "20", "--device", "cpu"]
    teacher_option = ["--teacher", str(teacher_folder)]
    orders = [
        ["rls", *teacher_option, "--tokens", "100"],
        ["layerwise", *teacher_option, "--tokens", "100", "--rls-tokens", "100", "--learning-rate", "1e-3"],
        ["distil", *teacher_option, "--tokens", "200", "--epochs", "2", "--top-k", "9", "--bf16", "false"],
        ["finetune", "--tokens", "200", "--trained", "lora", "--lora-rank", "2"],
    ]
    for number, (name, *own) in enumerate(orders):
        folders = ["--model", str(tmp_path / str(number)), "--output", str(tmp_path / str(number + 1))]
        assert cli.main([name, *folders, *common, *own]) == 0, capsys.readouterr().err
    record, names = json.loads((tmp_path / "4" / "healing.json").read_text()), []
    while record is not None:
        names += [stage["stage"] for stage in record["ran"]]
        record = record.get("earlier")
    assert names == ["finetune", "distil", "layerwise", "rls"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / str(n)).state_dict() for n in range(5)]
    for before, now in zip(models, models[1:], strict=False):
        assert before.keys() == now.keys()
        assert not all(torch.equal(before[name], now[name]) for name in now if ".mixer." in name)
    kept = [name for name in models[0] if ".mixer." not in name]
    assert all(torch.equal(models[0][name], models[3][name]) for name in kept)
    arguments = ["distil", "--model", str(tmp_path / "1"), "--output", str(tmp_path / "out"), *common]
    assert cli.main(arguments) == 2
    assert "`--teacher` must be given" in capsys.readouterr().err
    assert cli.main([*arguments, *teacher_option, "--tokens", "many"]) == 2
    assert "`tokens` of stage 'distil' must be of type int, got 'many'" in capsys.readouterr().err


def test_card_push_and_check(teacher_folder, text, tmp_path, capsys):
    """A healed checkpoint gets its card, a dry run lists its files, and a damaged one is told apart."""
    swapped = tmp_path / "swapped"
    assert cli.main(["swap", "--model", str(teacher_folder), "--layers", "1", "--output", str(swapped)]) == 0
    assert cli.main(["check", "--model", str(swapped)]) == 0
    about = ["--model", str(swapped), "--repo", "me/toy", "--base-model", "someone/base", "--license", "mit"]
    about += ["--teacher", str(teacher_folder), "--training-text", "Words."]
    assert cli.main(["card", *about, "--output", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "base_model: someone/base" in card and "1 of its 4 attention layers" in card and str(tmp_path) not in card
    assert (tmp_path / "card" / "cache.png").stat().st_size > 1000
    capsys.readouterr()
    assert cli.main(["push", *about, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for name in (
        "model.safetensors",
        "README.md",
        "cache.png",
        "tokenizer.json",
        "modeling_hf_kalman.py",
        "SHA256SUMS",
    ):
        assert name in listed
    # What says where it was made stays here.
    assert "conversion.json" not in listed and "dry run: nothing sent" in listed
    assert cli.main(["push", *about[:-6], "--dry-run"]) == 2
    assert "`--base-model` and `--license`" in capsys.readouterr().err
    file = swapped / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for command in (["check", "--model", str(swapped)], ["push", *about, "--dry-run"]):
        assert cli.main(command) == 2
        assert "model.safetensors" in capsys.readouterr().err
