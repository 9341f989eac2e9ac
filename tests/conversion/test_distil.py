import copy

import pytest
import torch
from test_heal import Kill, pair
from tiny_teachers import tokens

from kalman_conversion import swap_attention
from kalman_conversion.distil import (
    DistillationTrainer,
    Training,
    heal_distil,
    heal_finetune,
    share_frozen,
    soft_divergence,
)
from kalman_conversion.heal import heal_rls
from kalman_conversion.trainer import HealingTrainer, TokenWindows, complete_checkpoint

FAST = Training(learning_rate=3e-3, batch_size=4, warmup_steps=2, save_every=1000, progress=False)


def expected(student, teacher, temperature, top_k):
    """The divergence, written as its definition."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if top_k is not None:
        kept = teacher.argsort(-1, descending=True)[..., :top_k]
        p, q = (torch.cat([t.gather(-1, kept), 1 - t.gather(-1, kept).sum(-1, keepdim=True)], -1) for t in (p, q))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_the_definition_s(temperature, top_k, monkeypatch):
    monkeypatch.setattr("kalman_conversion.distil._ROWS", 4)
    student = torch.randn(2, 7, 19, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(2, 7, 19, dtype=torch.float64)
    wanted = expected(student, teacher, temperature, top_k)
    (wanted_gradient,) = torch.autograd.grad(3 * wanted, student)
    found = soft_divergence(student, teacher, temperature, top_k)
    (gradient,) = torch.autograd.grad(3 * found, student)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-14)


def test_divergence_of_narrow_logits_is_computed_wide():
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    wide = expected(student.bfloat16().double(), teacher.bfloat16().double(), 1.0, None)
    found = soft_divergence(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"), ({"top_k": 9}, "`top_k` must be from 1 to 8")],
)
def test_divergence_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_divergence(torch.zeros(2, 9), torch.zeros(2, 9), **arguments)
    with pytest.raises(ValueError, match="one shape"):
        soft_divergence(torch.zeros(2, 9), torch.zeros(3, 9))


def divergence(student, teacher, windows):
    with torch.no_grad():
        return soft_divergence(student(windows).logits, teacher(windows).logits).item()


@pytest.mark.parametrize(
    ("weights", "trained"),
    [
        ({}, "mixers"),
        ({"logits_weight": 0.0, "hidden_weight": 1.0}, "mixers"),
        ({"hidden_weight": 0.5, "top_k": 20, "temperature": 2.0}, "all"),
        ({"text_weight": 0.1}, "mixers"),
    ],
)
def test_distillation_brings_the_student_to_its_teacher(tmp_path, weights, trained):
    source, student = pair()
    windows = tokens(32, 16)
    kept = {n: p.detach().clone() for n, p in student.named_parameters() if ".mixer." not in n}
    before = divergence(student, source, windows)
    teacher_before = copy.deepcopy(source.state_dict())
    report = heal_distil(
        student, source, windows, work=tmp_path, trained=trained, training=FAST._replace(epochs=6), **weights
    )
    assert report.tokens == 6 * 32 * 16
    assert divergence(student, source, windows) < 0.7 * before
    assert all(torch.equal(value, teacher_before[name]) for name, value in source.state_dict().items())
    same = [torch.equal(kept[name], dict(student.named_parameters())[name]) for name in kept]
    assert all(same) if trained == "mixers" else not any(same)
    assert all(p.requires_grad for p in student.parameters())
    assert "forward" not in vars(student)


def test_loss_of_the_trainer_is_the_sum_it_says(tmp_path):
    source, student = pair()
    ids = tokens(2, 9)
    trainer = DistillationTrainer(
        student,
        FAST.arguments(tmp_path, student.device, {}),
        teacher=source,
        logits_weight=0.25,
        hidden_weight=2.0,
        temperature=1.5,
        text_weight=0.5,
    )
    found = trainer.compute_loss(student, {"input_ids": ids})
    ours, theirs = (m(ids, output_hidden_states=True) for m in (student, source))
    hidden = (ours.hidden_states[-1] - theirs.hidden_states[-1]).square().sum()
    wanted = 0.25 * expected(ours.logits, theirs.logits, 1.5, None)
    wanted = wanted + 2.0 * hidden / theirs.hidden_states[-1].square().sum()
    wanted = wanted + 0.5 * student(ids, labels=ids).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rates_of_mixers_and_of_their_small_parameters(tmp_path):
    _, student = pair()
    training = FAST._replace(small_factor=5.0, mixer_factor=2.0)
    arguments = training.arguments(tmp_path, student.device, {})
    factors = {"small_factor": training.small_factor, "mixer_factor": training.mixer_factor}
    optimizer = HealingTrainer(student, arguments, **factors).create_optimizer()
    rates = {id(p): group["lr"] / training.learning_rate for group in optimizer.param_groups for p in group["params"]}
    found = {name: round(rates[id(parameter)], 6) for name, parameter in student.named_parameters()}
    mixer = "model.layers.1.mixer."
    assert found[mixer + "decay_bias.A_log"] == found[mixer + "q_conv1d.weight"] == 5.0
    assert found[mixer + "q_proj.weight"] == 2.0
    assert found["model.layers.0.self_attn.q_proj.weight"] == found["model.embed_tokens.weight"] == 1.0


def test_frozen_weights_are_held_once(tmp_path):
    source, student = pair()
    student = copy.deepcopy(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".mixer." in name)
    theirs = dict(source.named_parameters())
    frozen = sum(p.nbytes for n, p in student.named_parameters() if not p.requires_grad)
    assert share_frozen(student, source) == frozen
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad or parameter.data_ptr() == theirs[name].data_ptr()
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert share_frozen(student, source) == 0


def stage(name, student, source, windows, work, **options):
    training = FAST._replace(epochs=2, save_every=3)
    if name == "distil":
        return heal_distil(student, source, windows, work=work, training=training, **options)
    trained = name.partition("-")[2]
    return heal_finetune(student, windows, work=work, training=training, trained=trained, **options)


@pytest.mark.parametrize("name", ["distil", "finetune-all", "finetune-mixers", "finetune-lora"])
@pytest.mark.parametrize("step", [2, 7])
def test_killed_run_resumes_bit_for_bit(tmp_path, name, step):
    windows = tokens(20, 12)
    source, student = pair()
    stage(name, student, source, windows, tmp_path / "whole")
    source, other = pair()
    with pytest.raises(KeyboardInterrupt):
        stage(name, other, source, windows, tmp_path / "killed", callbacks=[Kill(step)])
    # A new process has the swapped student again.
    source, other = pair()
    stage(name, other, source, windows, tmp_path / "killed")
    ours = other.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in student.state_dict().items())
    assert student.state_dict().keys() == ours.keys()
    assert not all(torch.equal(value, ours[key]) for key, value in pair()[1].state_dict().items())


def test_broken_checkpoints_are_passed_over(tmp_path):
    assert complete_checkpoint(tmp_path / "missing") is None
    for step, text in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    windows = tokens(20, 12)
    source, student = pair()
    stage("distil", student, source, windows, tmp_path / "whole")
    source, other = pair()
    real, calls = torch.save, []

    def full(value, file, *args, **kwargs):
        calls.append(file)
        real(value, file, *args, **kwargs)
        if "checkpoint-6" in str(file):
            with open(file, "wb") as half:
                half.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        stage("distil", other, source, windows, tmp_path / "killed")
    assert any("checkpoint-6" in str(file) for file in calls)
    monkeypatch.undo()
    assert complete_checkpoint(tmp_path / "killed").endswith("checkpoint-3")
    source, other = pair()
    stage("distil", other, source, windows, tmp_path / "killed")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in student.state_dict().items())


def test_accumulated_batches_are_one_batch(tmp_path):
    source, student = pair()
    windows = tokens(8, 12)
    stage_options = {"training": FAST._replace(batch_size=4, epochs=1)}
    heal_distil(student, source, windows, work=tmp_path / "a", **stage_options)
    source, other = pair()
    halves = FAST._replace(batch_size=2, accumulation=2, epochs=1)
    heal_distil(other, source, windows, work=tmp_path / "b", training=halves)
    for name, value in student.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], value, rtol=1e-4, atol=1e-5)


def test_fine_tuning_lowers_the_loss(tmp_path):
    windows = tokens(4, 16).repeat(8, 1)
    for trained in ("all", "mixers", "lora"):
        _, student = pair()
        with torch.no_grad():
            before = student(windows, labels=windows).loss
        training = FAST._replace(epochs=4)
        heal_finetune(student, windows, work=tmp_path / trained, trained=trained, training=training)
        with torch.no_grad():
            assert student(windows, labels=windows).loss < before - 0.02
        assert not any("lora" in name for name, _ in student.named_parameters())


def test_end_to_end_stages_refuse(tmp_path):
    source, student = pair()
    ids, options = tokens(4, 8), {"work": tmp_path, "training": FAST}
    with pytest.raises(ValueError, match="`trained` must be one of .*'lora'"):
        heal_distil(student, source, ids, trained="lora", **options)
    with pytest.raises(ValueError, match=r"the first two not both 0, got \(0.0, 0.0, 0.0\)"):
        heal_distil(student, source, ids, logits_weight=0.0, **options)
    with pytest.raises(ValueError, match="`top_k` must be from 1 to 60"):
        heal_distil(student, source, ids, top_k=61, **options)
    with pytest.raises(ValueError, match="float32 weights.*bfloat16"):
        heal_finetune(copy.deepcopy(student).bfloat16(), ids, **options)
    with pytest.raises(ValueError, match="no swapped layer"):
        heal_distil(source, source, ids, **options)
    assert not any(tmp_path.iterdir())


def test_distillation_after_least_squares_of_a_bfloat16_teacher(tmp_path):
    """A teacher may be narrow: nothing is shared then, and the student stays float32."""
    source, student = pair()
    heal_rls(student, source, tokens(4, 16), progress=False)
    narrow = copy.deepcopy(source).bfloat16()
    student = swap_attention(source, layers=[1, 3])
    heal_distil(student, narrow, tokens(8, 16), work=tmp_path, training=FAST)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_repeated_windows_hold_pieces_of_their_first_half():
    windows = torch.arange(3000).view(10, 300)
    plain, mixed = TokenWindows(windows), TokenWindows(windows, labels=True, repeated=0.3)
    same = [torch.equal(plain[i]["input_ids"], mixed[i]["input_ids"]) for i in range(10)]
    assert same == [True, True, True, False, True, True, False, True, True, False]
    for index in (3, 6, 9):
        ids = mixed[index]["input_ids"]
        assert torch.equal(ids, mixed[index]["labels"]) and torch.equal(ids[:150], windows[index, :150])
        assert len(ids) == 300 and set(ids[150:].tolist()) <= set(ids[:150].tolist())
        # Pieces of at least four tokens: three of four steps in the second half go to the next token.
        assert (ids[151:] - ids[150:-1] == 1).float().mean() > 0.75
        assert torch.equal(ids, mixed[index]["input_ids"])
    assert torch.equal(TokenWindows(windows[:, :5], repeated=1.0)[0]["input_ids"][:2], windows[0, :2])
    with pytest.raises(ValueError, match="`repeated` must be from 0 to 1, got 1.5"):
        TokenWindows(windows, repeated=1.5)
