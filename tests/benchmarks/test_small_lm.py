"""The small-language-model benchmark at toy size: search, curve, uncertainty, variants, figure, resuming."""

import pytest
import record
import small_lm
import torch
from sequences import Word

CPU = torch.device("cpu")


@pytest.fixture
def data(monkeypatch, tmp_path):
    for name, value in {
        "WIDTH": 64,
        "LAYERS": 1,
        "VOCABULARY": 300,
        "WINDOW": 32,
        "BATCH": 4,
        "PARAMETERS": 90_000,
    }.items():
        monkeypatch.setattr(small_lm, name, value)
    monkeypatch.setitem(small_lm.OURS["softmax"][2], "layer_types", ["full_attention"])
    monkeypatch.setitem(small_lm.LANGUAGE_KLA, "variance_rank", 8)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"quick brown fox number {n} jumps over the lazy dog" for n in range(300)))
    return small_lm.Data(*small_lm.prepare([text]))


def test_models_of_equal_size_are_searched_and_drawn(data, monkeypatch, tmp_path):
    monkeypatch.setattr(small_lm, "RATES", (1e-2,))
    found = {name: small_lm.run((name, None, None), CPU, data, 8 * 128) for name in ("softmax", "kla")}
    for row in found.values():
        assert abs(row["parameters"] / 90_000 - 1) < 0.05
        assert row["learning_rate"] == min(row["search"], key=row["search"].get)
        assert row["curve"][-1] == (1024, row["held_out_bits_per_byte"])
    assert found["kla"]["uncertainty"]["tokens"] > 0
    for models in (found, {"softmax": found["softmax"], "gka": {"failed": "out of memory"}}):
        small_lm.draw({"models": models, "batch": small_lm.BATCH, "output_start": small_lm.OUTPUT_START}, tmp_path)
        assert (tmp_path / "small_lm.png").exists()


def test_speed_is_of_whole_steps(data, monkeypatch):
    monkeypatch.setattr(small_lm, "SPEED_STEPS", 3)
    monkeypatch.setattr(small_lm, "SPEED_BATCH", 2)
    row = small_lm.speed("gka", CPU)
    assert row["windows"] == 2 and row["repeats"] == 3 and row["peak_mib"] is None
    assert row["tokens_per_s"] == round(1e3 * 2 * 32 / row["median_ms"])


def test_a_variant_is_the_model_with_one_change(data):
    plain, changed = (small_lm.run(("gka", fields, 1e-2), CPU, data, 8 * 128) for fields in ({}, {"use_decay": False}))
    assert plain["tokens"] == changed["tokens"] == 256 and plain["curve"] != changed["curve"]


def test_a_known_rate_takes_the_whole_budget(data):
    row = small_lm.run(("softmax", None, 5e-3), CPU, data, 8 * 128)
    assert row["tokens"] == 1024 and row["learning_rate"] == 5e-3 and "search" not in row
    assert len(row["gradient_norms"]) == len(row["curve"]) and all(norm > 0 for norm in row["gradient_norms"])


@pytest.mark.parametrize("name", ["softmax", "gka", "kla"])
def test_output_projections_alone_start_small(data, name):
    changes = {"use_local_values": True} if name == "gka" else {}
    wide, small = (
        small_lm.build(name, mlp=32, changes=changes | {"output_start": s}).state_dict() for s in (1.0, 0.25)
    )
    for key, weight in wide.items():
        factor = 0.25 if key.split(".")[-2] in ("o_proj", "local_proj") else 1.0
        assert torch.equal(factor * weight, small[key])
    assert any("o_proj" in key for key in wide)


def test_results_of_other_settings_are_not_gone_on_with(tmp_path):
    assert record.continued("x", {"budget": 1}, tmp_path) == {}
    record.write("x", {"budget": 1, "models": {"a": 2}}, tmp_path)
    assert record.continued("x", {"budget": 1}, tmp_path)["models"] == {"a": 2}
    assert record.continued("x", {"budget": 2}, tmp_path) == record.continued("x", {"other": 1}, tmp_path) == {}


def test_other_batches_take_as_many_tokens_and_have_files_of_their_own(data, tmp_path):
    row = small_lm.run(("softmax", {}, 1e-2), CPU, data, 8 * 128, size=2)
    assert row["tokens"] == 256 and row["curve"][0] == (64, row["curve"][0][1])
    names = [small_lm.file_name(b, s) for b in (small_lm.BATCH, 64) for s in (small_lm.OUTPUT_START, 1.0, 0.5)]
    assert names[:3] == ["small_lm", "small_lm_wide", "small_lm_start0.5"]
    assert names[3:] == ["small_lm_64", "small_lm_64_wide", "small_lm_64_start0.5"]
    small_lm.draw({"models": {"softmax": row}, "batch": 64, "output_start": 1.0}, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["small_lm_64_wide.png"]


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="group"):
        Word("A6", 4)
