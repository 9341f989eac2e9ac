import copy
import json

import pytest
import torch
from tiny_teachers import teacher, tokens
from transformers import AutoModelForCausalLM

from kalman_conversion import cli, perplexity, swap_attention
from kalman_conversion.layer_selection import (
    CRITERIA,
    choose_layers,
    rank_layers,
    read_ranking,
    recall_perplexity,
    swapped_in,
)
from kalman_conversion.taps import windowed_attention

MIXER = {"solver": "cg", "solver_iterations": 8}


@pytest.fixture(scope="module")
def ranking():
    return rank_layers(teacher(), tokens(4, 24), tokens(3, 32, seed=1), count=2, keep=[0], progress=False, **MIXER)


def test_every_criterion_orders_the_free_layers(ranking):
    assert json.loads(json.dumps(ranking))["layers"].keys() == {"0", "1", "2", "3"}
    assert [len(choose_layers(ranking, 2, criterion)) for criterion in CRITERIA] == [2] * len(CRITERIA)
    for criterion in CRITERIA[1:]:
        order = sorted((1, 2, 3), key=lambda i: ranking["layers"][i][criterion])
        assert choose_layers(ranking, 2, criterion) == sorted(order[:2])
    # The first greedy choice is the best single layer by both measures, and a second one is judged beside it.
    both = {i: ranking["layers"][i]["healed"] * ranking["layers"][i]["recall"] for i in (1, 2, 3)}
    first, second = ranking["greedy"]
    assert first[0] == min(both, key=both.get) and first[1] * first[2] == pytest.approx(both[first[0]])
    assert second[0] != first[0] and second[1] not in [ranking["layers"][i]["healed"] for i in (1, 2, 3)]


def test_measures_are_what_they_say(ranking):
    source, selection = teacher(), tokens(3, 32, seed=1)
    assert ranking["teacher"]["perplexity"] == pytest.approx(perplexity(source, selection))
    half = selection[:, :16]
    with torch.no_grad():
        logs = source(torch.cat([half, half], 1)).logits[:, 15:-1].log_softmax(-1)
    wanted = -logs.gather(-1, half[..., None]).mean()
    assert recall_perplexity(source, selection, 2) == pytest.approx(wanted.exp().item(), rel=1e-5)
    assert ranking["window"] == 2
    muted = copy.deepcopy(source)
    torch.nn.init.zeros_(muted.model.layers[2].self_attn.o_proj.weight)
    assert ranking["layers"][2]["zeroed"] == pytest.approx(perplexity(muted, selection), rel=1e-5)


def test_windowed_attention_sees_the_window_and_nothing_else():
    source, ids = teacher(), tokens(1, 12)
    other = ids.clone()
    other[0, :6] = (other[0, :6] - 3 + 7) % 58 + 3
    layers, plain = range(4), source(ids).logits
    with windowed_attention(source, layers, 1):
        # With a window of one nothing mixes tokens at all.
        torch.testing.assert_close(source(ids).logits[:, 6:], source(other).logits[:, 6:])
    with windowed_attention(source, layers, 12):
        torch.testing.assert_close(source(ids).logits, plain)
    with windowed_attention(source, [1], 3):
        assert not torch.allclose(source(ids).logits[:, 6:], plain[:, 6:])
    torch.testing.assert_close(source(ids).logits, plain)


def test_swapped_in_is_the_converted_model_and_is_undone():
    source, ids = teacher(), tokens(2, 9)
    plain = source(ids).logits
    student = swap_attention(source, layers=[1, 2], **MIXER)
    with swapped_in(source, student, [1, 2]):
        torch.testing.assert_close(source(ids).logits, student(ids).logits)
    with pytest.raises(AttributeError), swapped_in(source, student, [1, 3]):
        pass
    torch.testing.assert_close(source(ids).logits, plain, rtol=0, atol=0)


def test_rankings_refuse(ranking, tmp_path):
    with pytest.raises(ValueError, match="`count` must be from 1 to 3.*got 4"):
        rank_layers(teacher(), tokens(4, 8), tokens(2, 8), count=4, keep=[0])
    with pytest.raises(ValueError, match="at least 2 windows, got 1"):
        rank_layers(teacher(), tokens(1, 8), tokens(2, 8), count=1)
    with pytest.raises(ValueError, match="`criterion` must be one of"):
        choose_layers(ranking, 1, "luck")
    with pytest.raises(ValueError, match="greedy has ranked 2 layers, `count` 3"):
        choose_layers(ranking, 3)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="is not what `kalman-convert select` writes"):
        read_ranking(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_ranking(tmp_path / "y.json")


def test_select_and_swap_auto(teacher_folder, text, tmp_path, capsys):
    own = ["--data", str(text), "--window", "20", "--rls-tokens", "100", "--selection-tokens", "60", "--device", "cpu"]
    select = ["select", "--model", str(teacher_folder), *own, "--count", "2", "--output", str(tmp_path / "r.json")]
    assert cli.main(select) == 0, capsys.readouterr().err
    ranking = read_ranking(tmp_path / "r.json")
    pytest.importorskip("matplotlib")
    assert (tmp_path / "r.png").stat().st_size > 10000
    swap = ["swap", "--model", str(teacher_folder), "--layers", "auto:2"]
    assert cli.main([*swap, "--ranking", str(tmp_path / "r.json"), "--output", str(tmp_path / "a")]) == 0
    assert cli.main([*swap, *own, "--output", str(tmp_path / "b")]) == 0
    wanted = choose_layers(ranking, 2)
    for name in "ab":
        kinds = AutoModelForCausalLM.from_pretrained(tmp_path / name).config.layer_types
        assert [i for i, kind in enumerate(kinds) if kind == "linear_attention"] == wanted
        assert json.loads((tmp_path / name / "conversion.json").read_text())["layers"] == wanted
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in (
        (select, "exists already"),
        ([*select[:-1], str(tmp_path / "r.txt")], "must end in .json"),
        ([*select[:-1], str(tmp_path / "s.json"), "--keep", "a"], "`--keep` must be indices"),
        ([*select[:-1], str(tmp_path / "s.json"), "--rls-tokens", "3"], "`--rls-tokens` must be at least 20, got 3"),
        ([*swap, "--output", str(tmp_path / "c")], "needs `--ranking`, or `--data`"),
        ([*swap[:-1], "auto", "--output", str(tmp_path / "c")], "must look like auto:COUNT, got 'auto'"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
