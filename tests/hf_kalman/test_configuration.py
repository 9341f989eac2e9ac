import pytest
from tiny import tiny_config
from transformers import AutoConfig

from hf_kalman import GKAConfig


def test_for_model_needs_only_sizes():
    config = AutoConfig.for_model("kalman_gka", hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    assert config.layer_types == ["linear_attention"] * 2
    assert (config.num_key_value_heads, config.head_dim, config.linear_num_heads) == (4, 16, 4)


def test_round_trip(tmp_path):
    config = tiny_config(linear_num_key_heads=1, solver="exact", ridge_ratio=0.05, key_activation="identity")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, GKAConfig)
    saved, original = again.to_dict(), config.to_dict()
    del saved["_name_or_path"], original["_name_or_path"]
    assert saved == original


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, "layer_types"),
        ({"layer_types": ["conv"] * 4}, r"`layer_types\[0\]` must be one of"),
        ({"sliding_window": None}, "`sliding_window` must be set"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide"),
        ({"linear_num_key_heads": 3}, "`linear_num_key_heads` must divide"),
        ({"linear_num_value_heads": 0}, "`linear_num_value_heads` must divide"),
        ({"linear_conv_kernel_dim": 0}, "`linear_conv_kernel_dim` must be >= 1"),
        ({"solver_iterations": -1}, "`solver_iterations` must be >= 0"),
        ({"ridge_ratio": 0.0}, "`ridge_ratio` must be > 0"),
        ({"output_initializer_factor": -0.1}, "`output_initializer_factor` must be >= 0, got -0.1"),
        ({"linear_kv_rank": 0}, "`linear_kv_rank` must be >= 1"),
        ({"linear_kv_residual": True}, "`linear_kv_residual` needs `linear_kv_rank`"),
        ({"solver": "newton"}, "solver"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)
