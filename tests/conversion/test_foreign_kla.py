"""Checkpoints written by the `kla` package: what its own code computed from them, and the way back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kalman_conversion.cli import main
from kalman_conversion.foreign.kla import export_kla, import_kla

DATA = Path(__file__).parents[1] / "data" / "kla"


@pytest.fixture(params=["a", "b"])
def golden(request, tmp_path):
    folder = DATA / request.param
    assert main(["import-kla", "--model", str(folder), "--output", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    return folder, model, load_file(folder / "golden.safetensors")


def test_logits_and_loss(golden):
    _, model, expected = golden
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["input_ids"])
    # Measured: 2.2e-6.
    assert (out.logits - expected["logits"]).abs().max() < 1e-5
    assert abs(out.loss.item() - expected["loss"].item()) < 1e-6


def test_greedy(golden):
    _, model, expected = golden
    greedy = expected["greedy"]
    prompt = (greedy == expected["input_ids"][:, : greedy.shape[1]]).all(0).long().cumprod(0).sum().item()
    model.generation_config.eos_token_id = None
    found = model.generate(greedy[:, :prompt], max_new_tokens=greedy.shape[1] - prompt, do_sample=False)
    assert torch.equal(found, greedy)


def test_mixer_outputs_and_variances(golden):
    _, model, expected = golden
    with torch.no_grad():
        output, variance = model.model.layers[0].mixer(expected["mixer_x"], output_uncertainty=True)
    assert (output - expected["mixer_y"]).abs().max() < 1e-5
    assert (variance - expected["mixer_y_var"]).abs().max() < 1e-5


def test_state_after_half_a_sequence(golden):
    _, model, expected = golden
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        cache = model(expected["input_ids"][:, :2], use_cache=True).past_key_values
        cache.reset()
        mixer(expected["mixer_x"][:, : expected["mixer_x"].shape[1] // 2], past_key_values=cache)
    layer = cache.layers[0]
    found = (layer.recurrent_states[0], layer.recurrent_states[1], layer.conv_states[0])
    for tensor, name in zip(found, ("mixer_half_lam", "mixer_half_eta", "mixer_half_conv"), strict=True):
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_gradient_norms(golden, tmp_path):
    folder, model, expected = golden
    model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
    # The way back gives the gradients the names that the reference has.
    model.load_state_dict({n: p.grad for n, p in model.named_parameters()}, strict=False)
    export_kla(model, tmp_path / "gradients")
    mine = {n: t.norm().item() for n, t in load_file(tmp_path / "gradients" / "model.safetensors").items()}
    norms = json.loads((folder / "golden.json").read_text())["grad_norms"]
    assert mine.keys() == norms.keys()
    assert {n: (g, norms[n]) for n, g in mine.items() if abs(g - norms[n]) > 1e-3 * norms[n]} == {}


def test_the_way_back_is_exact(golden, tmp_path):
    folder, model, _ = golden
    export_kla(model, tmp_path / "back")
    theirs, mine = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    again = import_kla(tmp_path / "back", tmp_path / "again")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    left = {"_name_or_path", "architectures", "dtype"}
    first, second = ({k: v for k, v in m.config.to_dict().items() if k not in left} for m in (model, again))
    assert first == second


def altered(tmp_path, weights=None, **fields):
    """Checkpoint a with other weights or configuration fields."""
    folder = tmp_path / "theirs"
    shutil.copytree(DATA / "a", folder)
    found = json.loads((folder / "golden.json").read_text())
    for name, value in fields.items():
        found["model_config" if name in found["model_config"] else "kla_config"][name] = value
    (folder / "golden.json").unlink()
    (folder / "config.json").write_text(json.dumps(found))
    if weights is not None:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_the_newer_form_with_log_noise_and_bias(tmp_path):
    def newer(weights):
        result = {
            n.replace("process_noise", "p_log"): t.log() if "process_noise" in n else t for n, t in weights.items()
        }
        return result | {f"blocks.{i}.mixer.obs_noise_bias": torch.zeros(96) for i in range(3)}

    folder = altered(tmp_path, newer, process_noise_param="log")
    model = import_kla(folder, tmp_path / "out")
    assert model.config.process_noise_parameterization == "log" and model.config.use_observation_bias
    expected = load_file(folder / "golden.safetensors")
    with torch.no_grad():
        assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-5
    export_kla(model, tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "gelu"}, "`model_config.mlp` must be 'swiglu', got 'gelu'"),
        ({"logit_softcap": 15.0}, "logit_softcap"),
        ({"use_magic": True}, r"not known: \['use_magic'\]"),
        ({"conv_activation": "gelu"}, "`kla_config.conv_activation` must be 'silu'"),
        ({"n_layers": 4}, "missing .*layers.3"),
        ({"weights": lambda w: {n: t for n, t in w.items() if "delta" not in n}}, "holds no blocks.0.mixer.delta"),
        ({"weights": lambda w: w | {"blocks.1.mixer.extra": torch.zeros(1)}}, "unknown .*extra"),
        ({"weights": lambda w: w | {"norm_f.weight": torch.ones(7)}}, r"model.norm.weight must have shape \(48,\)"),
    ],
    ids=["mlp", "softcap", "field", "activation", "layers", "missing", "unknown", "shape"],
)
def test_bad_checkpoints_are_refused_and_nothing_is_written(change, message, tmp_path, capsys):
    folder = altered(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        import_kla(folder, tmp_path / "out")
    assert main(["import-kla", "--model", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "kalman-convert import-kla:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_files_and_hybrids_are_refused(tmp_path, golden):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold config.json or golden.json"):
        import_kla(tmp_path / "empty", tmp_path / "new")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a section 'kla_config'"):
        import_kla(tmp_path / "empty", tmp_path / "new")
    (tmp_path / "empty" / "config.json").write_text('{"kla_config": {}, "model_config": {}}')
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors"):
        import_kla(tmp_path / "empty", tmp_path / "new")
    model = golden[1]
    model.config.layer_types[0] = "full_attention"
    with pytest.raises(ValueError, match="must be made of KLA layers alone"):
        export_kla(model, tmp_path / "new")
