"""Checkpoints written by the reference implementation, loaded as they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_kalman.gka.hybrid_qwen3 import HybridQwen3Config

DATA = Path(__file__).parents[1] / "data" / "awslabs_gka"


@pytest.fixture(params=["a", "b"])
def golden(request):
    folder = DATA / request.param
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return folder, model.eval(), load_file(folder / "golden.safetensors")


def test_logits_and_loss(golden):
    _, model, expected = golden
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["input_ids"])
    assert (out.logits - expected["logits"]).abs().max() < 1e-4
    assert abs(out.loss.item() - expected["loss"].item()) < 1e-5


def test_prefill_then_greedy_one_by_one(golden):
    _, model, expected = golden
    steps, chosen = [], []
    with torch.no_grad():
        out = model(expected["input_ids"][:1, :40], use_cache=True)
        for _ in range(16):
            steps.append(out.logits[:, -1])
            chosen.append(out.logits[:, -1].argmax(-1))
            out = model(chosen[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
    assert (torch.stack(steps, 1) - expected["step_logits"]).abs().max() < 1e-4
    assert torch.equal(torch.cat(chosen), expected["greedy"].flatten())
    generated = model.generate(expected["input_ids"][:1, :40], max_new_tokens=16, do_sample=False)
    assert torch.equal(generated[0, 40:], expected["greedy"].flatten())


def test_gradient_norms(golden):
    folder, model, expected = golden
    model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
    norms = json.loads((folder / "grad_norms.json").read_text())
    mine = {
        f"grad.{n.replace('.mixer.', '.gka.').replace('decay_bias.', '')}": p.grad.norm().item()
        for n, p in model.named_parameters()
    }
    assert mine.keys() == norms.keys()
    assert {n: (g, norms[n]) for n, g in mine.items() if abs(g - norms[n]) > 5e-3 * norms[n]} == {}


def test_saving_writes_their_names_back(golden, tmp_path):
    folder, model, _ = golden
    model.save_pretrained(tmp_path)
    theirs, mine = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    assert json.loads((tmp_path / "config.json").read_text())["hybrid_override_pattern"] == "*-GKA-*-GKA"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.solver_iterations == 30 and again.config.solver == "chebyshev"


@pytest.mark.parametrize("symbol", ["M2", "GDN", "BMF", "GKA*", "M2*", "GDN>GKA", "*DA"])
def test_other_layer_kinds_are_refused_by_index_and_name(symbol):
    with pytest.raises(Exception, match=rf"layer 2 '{symbol.replace('*', '[*]')}'"):
        HybridQwen3Config(num_hidden_layers=4, hybrid_override_pattern=f"*-GKA-{symbol}-GKA")


def test_their_mixer_fields_are_read():
    fields = {
        "use_alpha_connection": False,
        "use_v_conv": False,
        "use_forgetting_gate": False,
        "use_forgetting_gate_kk": False,
        "gla_rescale": False,
        "bp_lambda": False,
        "use_gate": False,
        "use_beta_gate": False,
        "num_iter": 5,
        "ridge_strength": 0.05,
        "conv_size": 3,
        "chunk_size": 64,
    }
    config = HybridQwen3Config(num_hidden_layers=2, hybrid_override_pattern="*-GKA", gka_config=fields)
    switches = ("use_solution_mix", "use_value_conv", "use_decay", "decay_key_gram", "scale_output", "ridge_gradient")
    assert not any(getattr(config, name) for name in (*switches, "use_output_gate", "use_input_gate"))
    assert (config.solver_iterations, config.ridge_ratio, config.linear_conv_kernel_dim) == (5, 0.05, 3)
    with pytest.raises(Exception, match="'use_magic'"):
        HybridQwen3Config(num_hidden_layers=2, hybrid_override_pattern="*-GKA", gka_config={"use_magic": True})
