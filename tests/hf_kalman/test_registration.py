import subprocess
import sys

import pytest
import torch
from tiny import HYBRID, KLA_HYBRID, tiny_model, tokens
from transformers import AutoModelForCausalLM

import hf_kalman
from hf_kalman.registration import register


def test_registering_twice_changes_nothing():
    register()
    register()


def test_public_names_exist():
    for name in hf_kalman.__all__:
        assert getattr(hf_kalman, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        hf_kalman.nothing  # noqa: B018


def test_import_is_all_that_loading_needs(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    code = (
        "import hf_kalman, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "GKAForCausalLM"


def test_report():
    out = subprocess.run([sys.executable, "-m", "hf_kalman"], capture_output=True, text=True, check=True).stdout
    assert f"hf_kalman {hf_kalman.__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert "kalman_gka: GKAModel, GKAForCausalLM" in out
    assert "kalman_kla: KLAModel, KLAForCausalLM" in out
    assert "gated_kalmanet: torch (" in out


def test_lora_finds_its_targets(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(HYBRID), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    trained = {n.split(".lora_")[0].split("layers.")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert {"1.mixer.q_proj", "1.mixer.o_proj", "1.mixer.g_proj", "0.self_attn.k_proj", "3.mlp.down_proj"} <= trained
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path)
    base = tiny_model(HYBRID)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_lora_finds_its_targets_in_kla_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(KLA_HYBRID), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    trained = {n.split(".lora_")[0].split("layers.")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert {f"1.mixer.{n}" for n in ("in_proj", "sensor_proj", "o_proj")} | {"0.self_attn.k_proj"} <= trained
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    adapted = model.eval()(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def test_auto_class_makes_a_model_from_a_configuration():
    for kinds in (HYBRID, KLA_HYBRID):
        model = AutoModelForCausalLM.from_config(tiny_model(kinds).config)
        assert type(model).__name__ == f"{kinds.family.upper()}ForCausalLM"
