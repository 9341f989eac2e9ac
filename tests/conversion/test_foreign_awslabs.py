import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import teacher, tokens
from transformers import AutoModelForCausalLM

from kalman_conversion import cli, swap_attention
from kalman_conversion.foreign.awslabs import export_awslabs, import_awslabs
from kalman_conversion.streaming import read_shards

DATA = Path(__file__).parents[1] / "data" / "awslabs_gka"


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def theirs(folder, which="a", **config):
    shutil.copytree(DATA / which, folder)
    for name in ("golden.safetensors", "grad_norms.json"):
        (folder / name).unlink()
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    return folder


def sharded(folder, parts):
    """The same checkpoint in several files."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({n: tensors[n] for n in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("parts", [1, 3])
def test_import_computes_the_same_and_export_gives_the_same_bits(tmp_path, which, parts):
    source = theirs(tmp_path / "theirs", which)
    direct = AutoModelForCausalLM.from_pretrained(source).eval()
    sharded(source, parts) if parts > 1 else None
    (source / "tokenizer_config.json").write_text("{}")
    import_awslabs(source, tmp_path / "ours")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(model).__name__ == "GKAForCausalLM" and not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokens(2, 70)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, direct(ids).logits)
    assert (tmp_path / "ours" / "tokenizer_config.json").exists() and (
        tmp_path / "ours" / "generation_config.json"
    ).exists()
    assert export_awslabs(tmp_path / "ours", tmp_path / "back") == "hybrid_qwen3"
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again).__name__ == "HybridQwen3ForCausalLM"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, direct(ids).logits)


def test_narrow_checkpoints_keep_their_bits(tmp_path):
    source = theirs(tmp_path / "theirs", dtype="bfloat16")
    save_file({n: t.bfloat16() for n, t in weights(source).items()}, source / "model.safetensors", {"format": "pt"})
    import_awslabs(source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.model.layers[1].mixer.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mixer.decay_bias.A_log.dtype == torch.float32
    export_awslabs(tmp_path / "ours", tmp_path / "back")
    before, after = weights(source), weights(tmp_path / "back")
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == torch.bfloat16 for n in before)


def test_stage_1_checkpoints_lose_their_teacher(tmp_path):
    standard, fused = theirs(tmp_path / "standard"), theirs(tmp_path / "fused", hybrid_override_pattern="*-GKA*-*-GKA*")
    tensors = weights(fused)
    for index in (1, 3):
        like = f"model.layers.{index - 1}.self_attn."
        tensors |= {
            n.replace(like, f"model.layers.{index}.self_attn."): t for n, t in weights(standard).items() if like in n
        }
    save_file({n: t.clone() for n, t in tensors.items()}, fused / "model.safetensors", {"format": "pt"})
    import_awslabs(standard, tmp_path / "a")
    import_awslabs(fused, tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "hybrid_llama"), ("qwen2", "hybrid_qwen2"), ("qwen3", "hybrid_qwen3")]
)
def test_other_families_go_out_and_come_back(tmp_path, family, kind):
    student = swap_attention(teacher(family), layers=[1, 2], initialisation="reference").eval()
    student.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    assert export_awslabs(tmp_path / "ours", tmp_path / "theirs") == kind
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == kind and config["hybrid_override_pattern"] == "*-GKA-GKA-*"
    assert any(".gka.A_log" in name for name in weights(tmp_path / "theirs"))
    import_awslabs(tmp_path / "theirs", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, student(ids).logits)
    ours, again = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert ours.keys() == again.keys() and all(torch.equal(ours[n], again[n]) for n in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "hybrid_qwen3_moe"}, "got 'hybrid_qwen3_moe': it has experts"),
        ({"model_type": "hybrid_ministral3"}, "got 'hybrid_ministral3': its scaling of attention"),
        ({"model_type": "llama"}, "must be of type hybrid_qwen3, hybrid_llama, hybrid_qwen2, got 'llama'"),
        ({"hybrid_override_pattern": "*-GDN-*-GKA"}, "names layer 1 'GDN'"),
        ({"intermediate_size": 64}, "in shape .* its config.json asks for"),
        ({"hybrid_override_pattern": "*-GKA-*-*"}, "are missing .*model.layers.3.self_attn"),
        ({"gka_config": {"magic": 1}}, "got 'magic'"),
    ],
)
def test_import_refuses_before_it_writes(tmp_path, change, message):
    source = theirs(tmp_path / "theirs", **change)
    with pytest.raises(ValueError, match=message):
        import_awslabs(source, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"use_local_values": True}, "cannot say use_local_values=True; it must be False"),
        ("llama", {"solver": "cg"}, "cannot say solver='cg'"),
        ("llama", {"linear_num_key_heads": 4}, "cannot say linear_num_key_heads=4; it must be 2"),
        ("olmo2", {}, "cannot say norm_style='olmo2'"),
        ("llama-bias-tied", {}, "cannot say mlp_bias=True"),
        ("qwen3-bias", {}, "no use_qk_norm=True with attention_bias=True"),
    ],
)
def test_export_refuses_what_theirs_cannot_say(tmp_path, family, fields, message):
    student = swap_attention(teacher(family), layers=[1], initialisation="reference")
    for name, value in fields.items():
        setattr(student.config, name, value)
    student.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_awslabs(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_damaged_files_and_full_disks_leave_nothing(tmp_path, monkeypatch):
    source = sharded(theirs(tmp_path / "theirs"), 2)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(OSError, match="has 0 MB left"):
        import_awslabs(source, tmp_path / "ours")
    monkeypatch.undo()
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        import_awslabs(source, tmp_path / "ours")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks the weight file"):
        import_awslabs(source, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_commands(tmp_path, capsys):
    source = theirs(tmp_path / "theirs")
    assert cli.main(["import-awslabs", "--model", str(source), "--output", str(tmp_path / "ours")]) == 0
    assert "4 layers, 2 of them GKA" in capsys.readouterr().out
    assert cli.main(["export-awslabs", "--model", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]) == 0
    assert "hybrid_qwen3 written" in capsys.readouterr().out
    assert read_shards(tmp_path / "back").keys() == {"model.safetensors"}
    assert cli.main(["export-awslabs", "--model", str(source), "--output", str(tmp_path / "x")]) == 2
    assert "must be of type kalman_gka, got 'hybrid_qwen3'" in capsys.readouterr().err
