import copy

import pytest
import torch
from tiny_teachers import teacher, tokens
from transformers import TrainerCallback

from kalman_conversion import swap_attention
from kalman_conversion.heal import (
    LayerwiseDistillation,
    Readout,
    check_pair,
    heal_layerwise,
    heal_rls,
    layer_errors,
)
from kalman_conversion.rls import RecursiveLeastSquares
from kalman_conversion.taps import AttentionTaps, zeroed_attention

MIXER = {"solver": "cg", "solver_iterations": 12, "use_local_values": True}
QUIET = {"progress": False}


def pair(layers=(1, 3), family="llama", **fields):
    source = teacher(family)
    own = MIXER if fields.get("mixer", "gka") == "gka" else {"linear_state_size": 4}
    return source, swap_attention(source, layers=list(layers), **{**own, **fields})


def test_recursive_least_squares_is_least_squares():
    features, targets = torch.randn(200, 7), torch.randn(200, 3)
    filter_ = RecursiveLeastSquares(7, 3)
    for start, stop in ((0, 1), (1, 64), (64, 200)):
        filter_.update(features[start:stop], targets[start:stop])
    expected = torch.linalg.lstsq(features.double(), targets.double()).solution.T
    torch.testing.assert_close(filter_.solve(1e-9), expected, rtol=1e-6, atol=1e-8)


def test_recursive_least_squares_is_a_kalman_filter():
    """Against the covariance form, token by token: gain and innovation, a prior, forgetting."""
    features, targets, prior = torch.randn(30, 4).double(), torch.randn(30, 2).double(), torch.randn(2, 4).double()
    filter_ = RecursiveLeastSquares(4, 2)
    filter_.update(features, targets)
    strength = 5.0 * filter_.precision.diagonal().mean() / 30
    covariance, mean = torch.eye(4).double() / strength, prior.clone()
    for f, y in zip(features, targets, strict=True):
        gain = covariance @ f / (1 + f @ covariance @ f)
        mean = mean + torch.outer(y - mean @ f, gain)
        covariance = covariance - torch.outer(gain, f @ covariance)
    torch.testing.assert_close(filter_.solve(5.0, prior), mean, rtol=1e-9, atol=1e-10)
    half = RecursiveLeastSquares(4, 2)
    half.update(features[:20], targets[:20])
    half.forget(0.5).update(features[20:], targets[20:])
    weights = torch.tensor([0.5] * 20 + [1.0] * 10).double().sqrt()[:, None]
    expected = torch.linalg.lstsq(weights * features, weights * targets).solution.T
    torch.testing.assert_close(half.solve(1e-12), expected, rtol=1e-8, atol=1e-9)


def test_recursive_least_squares_refuses():
    filter_ = RecursiveLeastSquares(4, 2)
    with pytest.raises(ValueError, match="must have widths"):
        filter_.update(torch.zeros(3, 4), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="needs tokens"):
        filter_.solve(1.0)


def test_taps_read_what_the_attention_computes():
    source, ids = teacher(), tokens(2, 12)
    states = source(ids, output_hidden_states=True).hidden_states
    read = AttentionTaps(source, [0, 2]).read(ids)
    assert sorted(read) == [0, 2]
    for index, (hidden, output) in read.items():
        layer = source.model.layers[index]
        torch.testing.assert_close(hidden, layer.input_layernorm(states[index]))
        after = states[index] + output
        torch.testing.assert_close(after + layer.mlp(layer.post_attention_layernorm(after)), states[index + 1])


def test_zeroed_attention_is_undone():
    source, ids = teacher(), tokens(1, 9)
    before = source(ids).logits
    with zeroed_attention(source, [1, 2]):
        assert not torch.equal(source(ids).logits, before)
    assert torch.equal(source(ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied"])
def test_readout_is_what_the_output_is_linear_in(family):
    _, student = pair(family=family)
    mixer, hidden = student.model.layers[1].mixer, torch.randn(2, 9, 32)
    readout = Readout(mixer)
    weight = torch.randn(readout.outputs, readout.features)
    readout.write(weight)
    torch.testing.assert_close(mixer(hidden), readout.read(hidden) @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["gka", "kla"])
@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "qwen3"])
def test_rls_is_the_optimum_of_the_linear_part(family, mixer):
    source, student = pair(family=family, mixer=mixer)
    windows = tokens(6, 40)
    before = layer_errors(student, source, windows)
    heal_rls(student, source, windows, prior_tokens=1e-6, **QUIET)
    after = layer_errors(student, source, windows)
    assert all(after[i] < before[i] for i in (1, 3)) and max(after.values()) < 1
    for index in (1, 3):
        mixer = student.model.layers[index].mixer
        hidden, target = AttentionTaps(source, [index]).read(windows)[index]
        loss = (mixer(hidden) - target).square().mean()
        reference = target.square().mean()
        parameters = Readout(mixer).parameters()
        gradients = torch.autograd.grad(loss, parameters)
        steps = sum((g * p).sum().abs() for g, p in zip(gradients, parameters, strict=True))
        assert steps < 1e-4 * reference


def test_rls_does_not_depend_on_the_split_and_continues(tmp_path):
    source, whole = pair()
    resumed = copy.deepcopy(whole)
    windows = tokens(6, 20)
    heal_rls(whole, source, windows, **QUIET)
    heal_rls(copy.deepcopy(resumed), source, windows[:4], work=tmp_path, **QUIET)
    report, _ = heal_rls(resumed, source, windows, work=tmp_path, **QUIET)
    assert report.tokens == 120
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_mixers_change():
    source, student = pair()
    before = {n: p.clone() for n, p in student.state_dict().items()}
    heal_rls(student, source, tokens(4, 20), **QUIET)
    changed = {n.split(".mixer.")[-1] for n, p in student.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {"o_proj.weight", "local_proj.weight"}


@pytest.mark.parametrize("mixer", ["gka", "kla"])
def test_layerwise_lowers_the_error_that_least_squares_leaves(mixer, tmp_path):
    source, student = pair(mixer=mixer)
    windows, held_out = tokens(40, 200), tokens(4, 200, seed=9)
    frozen = {n: p.clone() for n, p in student.state_dict().items() if ".mixer." not in n}
    _, filters = heal_rls(student, source, windows, **QUIET)
    start = layer_errors(student, source, held_out)
    report = heal_layerwise(student, source, windows, filters, work=tmp_path, epochs=2, learning_rate=3e-3, **QUIET)
    end = layer_errors(student, source, held_out)
    assert report.tokens == 40 * 200 * 2
    assert sum(end.values()) < 0.95 * sum(start.values())
    assert all(torch.equal(student.state_dict()[n], p) for n, p in frozen.items())
    assert all(p.requires_grad for p in student.parameters()) and all(p.requires_grad for p in source.parameters())


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_interrupted_layerwise_run_continues_bit_for_bit(tmp_path):
    source, student = pair()
    windows = tokens(10, 20)
    _, filters = heal_rls(student, source, windows, **QUIET)
    resumed = copy.deepcopy(student)
    options = {"save_every": 3, "epochs": 2, **QUIET}
    heal_layerwise(student, source, windows, filters, work=tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        broken = copy.deepcopy(resumed)
        heal_layerwise(broken, source, windows, filters, work=tmp_path / "b", callbacks=[Kill(8)], **options)
    heal_layerwise(resumed, source, windows, filters, work=tmp_path / "b", **options)
    different = [
        n for (n, a), b in zip(student.named_parameters(), resumed.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert different == []


def test_the_filter_follows_the_features(tmp_path):
    """With frozen features, no forgetting and a vanishing learning rate, the filter ends at plain least squares."""
    source, student = pair(layers=(1,))
    windows = tokens(8, 20)
    expected = copy.deepcopy(student)
    heal_rls(expected, source, windows, **QUIET)
    _, filters = heal_rls(student, source, windows[:1], **QUIET)
    heal_layerwise(student, source, windows[1:], filters, work=tmp_path, learning_rate=1e-12, forgetting=0.0, **QUIET)
    a, b = (m.model.layers[1].mixer.o_proj.weight for m in (student, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_teacher_stays_out_of_the_trained_module():
    source, student = pair()
    _, filters = heal_rls(student, source, tokens(2, 20), **QUIET)
    names = LayerwiseDistillation(student, source, filters, 0.06).state_dict()
    assert all(n.startswith(("mixers.", "precision_", "information_", "tokens")) for n in names)


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 62), ("hidden_size", 64), ("num_hidden_layers", 5)])
def test_another_teacher_is_refused(field, value):
    _, student = pair()
    with pytest.raises(ValueError, match=f"its {field} is {value}, the student's"):
        check_pair(student, teacher(**{field: value}))


def test_a_teacher_that_was_itself_converted_is_refused():
    source, student = pair()
    with pytest.raises(ValueError, match="must have softmax attention in layer 1"):
        check_pair(student, copy.deepcopy(student))
    with pytest.raises(ValueError, match="no swapped layer"):
        check_pair(source, source)
