import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import FAMILIES, projections, teacher, tokens
from transformers import AutoModelForCausalLM

from kalman_conversion import check_source, load_model, swap_attention, swap_checkpoint
from kalman_conversion import swap as swapping
from kalman_conversion.heal import heal_rls, layer_errors
from kalman_conversion.verify import kept_weights_differ, verify


@pytest.mark.parametrize("mixer", ["gka", "kla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_no_layer_gives_the_same_bits(family, mixer):
    source, ids = teacher(family), tokens(2, 20)
    student = swap_attention(source, mixer, layers="none")
    assert type(student).__name__ == f"{mixer.upper()}ForCausalLM"
    assert torch.equal(student(ids).logits, source(ids).logits)
    assert torch.equal(
        student.generate(ids, max_new_tokens=5, do_sample=False),
        source.generate(ids, max_new_tokens=5, do_sample=False),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_no_layer_gives_the_same_bits_in_narrow_dtypes(family, dtype):
    source, ids = teacher(family), tokens(2, 20)
    # As `from_pretrained` narrows: buffers such as rotary frequencies stay float32.
    for parameter in source.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(swap_attention(source, layers="none")(ids).logits, source(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids_of_every_family_decode_as_they_read(family):
    student, ids = swap_attention(teacher(family), layers=[0, 2]), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    found = student.generate(ids, **greedy)
    assert torch.equal(found, student.generate(ids, use_cache=False, **greedy))
    loss = student(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_least_squares_heals_every_family(family):
    source = teacher(family)
    student = swap_attention(source, layers=[0, 2])
    windows = tokens(24, 32)
    before = layer_errors(student, source, windows)
    heal_rls(student, source, windows, prior_tokens=1.0, progress=False)
    after = layer_errors(student, source, windows)
    assert all(after[index] < min(1.0, before[index]) for index in (0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_model_keeps_every_other_weight_and_survives_saving(family, tmp_path):
    source, ids = teacher(family), tokens(2, 20)
    student = swap_attention(source, layers=[0, 2])
    assert kept_weights_differ(student, source) == []
    for index in (0, 2):
        mixer, attention = student.model.layers[index].mixer, source.model.layers[index].self_attn
        for name, parameter in projections(attention).items():
            assert torch.equal(mixer.get_parameter(name), parameter), name
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kla_mixer_starts_from_values_and_outputs(family, tmp_path):
    source, ids = teacher(family), tokens(2, 20)
    student = swap_attention(source, "kla", layers=[0, 2])
    assert kept_weights_differ(student, source) == []
    mixer, attention = student.model.layers[2].mixer, source.model.layers[2].self_attn
    heads, width = source.config.num_attention_heads, attention.head_dim
    assert mixer.config.linear_inner_size == heads * width
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)
    parts, ones = projections(attention), torch.ones(1, source.config.hidden_size)
    values = torch.nn.functional.linear(ones, parts["v_proj.weight"], parts.get("v_proj.bias")).view(-1, width)
    expected = values.repeat_interleave(heads // len(values), dim=0).flatten()
    torch.testing.assert_close(mixer.in_proj(ones)[0, : heads * width], expected)
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    again = swap_attention(tmp_path, "kla", layers=[1])
    assert again.config.layer_types[:3] == ["linear_attention"] * 3
    random = swap_attention(source, "kla", layers=[2], initialisation="reference").model.layers[2].mixer
    assert not torch.equal(random.o_proj.weight, attention.o_proj.weight) and random.config.value_rank == "full"


def test_mixers_of_both_families_do_not_mix_in_one_model():
    with pytest.raises(ValueError, match=r"`model` must be of type .*kalman_kla, got 'kalman_gka'"):
        swap_attention(swap_attention(teacher(), layers=[0]), "kla", layers=[1])
    with pytest.raises(ValueError, match="but the mixer has 20; leave `linear_inner_size` out"):
        swap_attention(teacher(), "kla", layers=[1], linear_inner_size=20)


def test_from_a_folder_and_again_from_the_result(tmp_path):
    teacher().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    first = swap_attention(tmp_path / "source", layers=[1])
    first.save_pretrained(tmp_path / "first")
    second = swap_attention(tmp_path / "first", layers=[3])
    assert second.config.layer_types == ["full_attention", "linear_attention"] * 2
    mixers = (m.model.layers[1].mixer.state_dict() for m in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in mixers), strict=True))


def test_weights_are_copied_unless_shared():
    source = teacher()
    copied, shared = (swap_attention(source, layers=[1], share_weights=s) for s in (False, True))
    name = "model.layers.0.mlp.up_proj.weight"
    pointer = source.get_parameter(name).data_ptr()
    assert copied.get_parameter(name).data_ptr() != pointer
    assert shared.get_parameter(name).data_ptr() == pointer


def test_bfloat16_source_keeps_its_dtype_and_wide_decays():
    student = swap_attention(teacher().bfloat16(), layers=[1])
    wide = {n.rsplit(".", 1)[-1] for n, p in student.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"}


def test_both_initialisations():
    source = teacher()
    identity, reference = (
        swap_attention(source, layers=[1], initialisation=i).model.layers[1].mixer for i in ("identity", "reference")
    )
    x = torch.randn(1, 9, 32)
    keys = identity.k_proj(x)
    torch.testing.assert_close(identity.k_conv1d(keys, None, None, "auto")[0], keys)
    assert not torch.allclose(reference.k_conv1d(keys, None, None, "auto")[0], keys)
    lives = torch.log(torch.tensor(0.5)) / identity._log_decay(x)[0][0, 0]
    torch.testing.assert_close(lives, torch.logspace(2, 12, 4, base=2.0), rtol=1e-4, atol=0)
    # The gate starts at (W_o^T + repeat(W_v)) / 2 in both.
    attention = source.model.layers[1].self_attn
    value = attention.v_proj.weight.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    for mixer in (identity, reference):
        torch.testing.assert_close(mixer.g_proj.weight, 0.5 * (attention.o_proj.weight.T + value))


def test_the_same_seed_gives_the_same_model():
    source = teacher()
    a, b, c = (swap_attention(source, layers=[1], seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_verify():
    source = teacher()
    student = swap_attention(source, layers=[1, 3])
    result = verify(student, source, tokens(3, 20), context=100)
    assert result["swapped_layers"] == [1, 3] and result["changed_weights"] == []
    assert result["cache_bytes"]["model"] < result["cache_bytes"]["teacher"] == 4 * 2 * 2 * 8 * 100 * 4
    with torch.no_grad():
        student.model.embed_tokens.weight[5] += 1
    assert "model.embed_tokens.weight" in verify(student, source, tokens(1, 9))["changed_weights"]
    assert set(layer_errors(student, source, tokens(2, 9))) == {1, 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_num_query_heads": 2}, "layer 1 has a q_proj of shape"),
        ({"linear_value_head_dim": 16}, "layer 1 has a v_proj of shape"),
        ({"initialisation": "zeros"}, "`initialisation` must be"),
        ({"layers": [9]}, "indices from 0 to 3"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        swap_attention(teacher(), **{"layers": [1], **fields})


def test_a_bias_that_only_one_layer_has_is_refused_by_name():
    source = teacher()
    attention = source.model.layers[2].self_attn
    attention.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match="layer 2 has a bias in k_proj.*leave layer 2 out"):
        swap_attention(source, layers=[1, 2])


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        check_source(tmp_path)
    source = teacher()
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    check_source(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = sorted(set(index["weight_map"].values()))[1]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}.*is damaged"):
        swap_attention(tmp_path, layers=[1])
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the weight file '{name}'"):
        load_model(tmp_path)


@pytest.mark.parametrize("mixer", ["gka", "kla"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_conversion_is_the_one_in_memory(family, mixer, dtype, tmp_path):
    teacher(family).to(dtype).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    swap_attention(tmp_path / "source", mixer, [0, 2], seed=3).save_pretrained(tmp_path / "memory")
    plan = swap_checkpoint(tmp_path / "source", tmp_path / "stream", mixer, [0, 2], seed=3)
    assert plan.layers == (0, 2)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="auto") for n in ("memory", "stream"))
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]) and value.dtype == b.state_dict()[name].dtype, name
    assert a.config.to_dict() == {**b.config.to_dict(), "_name_or_path": a.config.to_dict().get("_name_or_path")}
    assert a.generation_config.to_dict() == b.generation_config.to_dict()
    # In the files of the source, but those that held nothing but what is gone.
    files = [{p.name for p in (tmp_path / n).glob("*.safetensors")} for n in ("stream", "source")]
    assert files[0] <= files[1]


def test_streaming_a_converted_model_swaps_more_of_it(tmp_path):
    teacher().save_pretrained(tmp_path / "source")
    swap_checkpoint(tmp_path / "source", tmp_path / "one", layers=[1])
    swap_checkpoint(tmp_path / "one", tmp_path / "two", layers=[3])
    swap_checkpoint(tmp_path / "source", tmp_path / "both", layers=[1, 3])
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("two", "both"))
    assert all(torch.equal(a[name], b[name]) for name in b) and a.keys() == b.keys()


def test_streaming_holds_one_new_layer_at_a_time(tmp_path, monkeypatch):
    teacher().save_pretrained(tmp_path / "source")
    alive, most, real = [], [], swapping._mixer_weights

    def counted(*arguments):
        made = real(*arguments)
        alive.extend(weakref.ref(tensor) for tensor in made.values())
        most.append(len({id(ref()) for ref in alive if ref() is not None}) - len(made))
        return made

    monkeypatch.setattr(swapping, "_mixer_weights", counted)
    swap_checkpoint(tmp_path / "source", tmp_path / "out", layers="all")
    assert most == [0] * 4


def test_streaming_refuses_before_it_writes(tmp_path, monkeypatch):
    source = teacher()
    source.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match="weights that are not known: .'model.extra'"):
        swap_checkpoint(tmp_path / "source", tmp_path / "out")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match="no weights for .'model.norm.weight'"):
        swap_checkpoint(tmp_path / "source", tmp_path / "out")
    source.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`initialisation` must be"):
        swap_checkpoint(tmp_path / "source", tmp_path / "out", initialisation="magic")

    def full(stored, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kalman_conversion.streaming._copy", full)
    with pytest.raises(OSError, match="No space"):
        swap_checkpoint(tmp_path / "source", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
