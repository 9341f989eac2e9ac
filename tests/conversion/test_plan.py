import pytest
from tiny_teachers import FAMILIES, teacher
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, Phi3Config, Qwen3MoeConfig

from kalman_conversion import plan_conversion, resolve_layers

FULL = ["full_attention"] * 6


def test_words_and_indices():
    assert resolve_layers("all", FULL) == (0, 1, 2, 3, 4, 5)
    assert resolve_layers("half", FULL) == (1, 3, 5)
    assert resolve_layers("none", FULL) == ()
    assert resolve_layers("4, 1", FULL) == resolve_layers([4, 1], FULL) == (1, 4)


def test_layers_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("swap: {layers: [2, 0]}")
    assert resolve_layers(tmp_path / "recipe.yaml", FULL) == (0, 2)
    assert resolve_layers(str(tmp_path / "recipe.yaml"), FULL) == (0, 2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_layers("nowhere.yaml", FULL)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("most", "'all', 'half', 'none' or indices"),
        ([6], "indices from 0 to 5 of the 6-layer model, got 6"),
        ([-1], "got -1"),
        ([True], "got True"),
        ([1.5], "got 1.5"),
        ([2, 2], "got 2 twice"),
    ],
)
def test_layers_that_do_not_exist(layers, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(layers, FULL)


def test_a_layer_that_is_no_attention():
    with pytest.raises(ValueError, match="got 1, which is linear_attention"):
        resolve_layers([1], ["full_attention", "linear_attention"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_carries_over(family):
    source = teacher(family).config
    plan = plan_conversion(source, layers=[1])
    assert plan.layers == (1,)
    assert plan.config.layer_types[1] == "linear_attention"
    for name in ("vocab_size", "hidden_size", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(plan.config, name) == getattr(source, name)
    kept = {name: value for name, value in plan.config.rope_parameters.items() if value is not None}
    assert kept == {name: value for name, value in source.rope_parameters.items() if name in kept}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "mamba"}, "`mixer` must be one of"),
        ({"hidden_size": 8}, "fields of GKAConfig that describe the mixer, got 'hidden_size'"),
        ({"layer_types": ["linear_attention"] * 4}, "got 'layer_types'"),
        ({"taps": 4}, "got 'taps'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_conversion(teacher().config, **arguments)


def test_other_model_types_are_refused_by_name():
    with pytest.raises(ValueError, match="`model` must be of type llama, mistral, qwen2, qwen3.*got 'gpt2'"):
        plan_conversion(GPT2Config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3MoeConfig(), "got 'qwen3_moe': its experts, their router"),
        (Gemma3Config(), "got 'gemma3': it holds a vision tower"),
        (GPT2Config(), "got 'gpt2': it has learned positions"),
        (Phi3Config(resid_pdrop=0.1), "type 'phi3' can be converted with resid_pdrop=0.0 only, got 0.1"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "with attn_logit_softcapping=None only, got 50.0"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention=False only, got True"),
    ],
)
def test_what_is_not_converted_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        plan_conversion(config)


def test_rotary_parameters_of_kinds_that_are_gone_go_too():
    source = teacher("gemma3").config
    plan = plan_conversion(source, layers=[1, 3])
    assert plan.config.rope_parameters["sliding_attention"] == source.rope_parameters["sliding_attention"]
    assert not plan.config.rope_parameters.get("full_attention")
    # A model without attention keeps no positions.
    assert plan_conversion(source, layers="all").config.layer_types == ["linear_attention"] * 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "granite", "olmo2", "phi3", "gemma3"])
def test_tensor_parallel_plans_are_the_source_s_where_attention_stays(family):
    source = teacher(family).config
    plan = plan_conversion(source, layers=[1]).config.base_model_tp_plan
    # Their names for the same entries; a plan may say more, for mixers and for norms that are not there.
    assert source.base_model_tp_plan.items() <= plan.items()
