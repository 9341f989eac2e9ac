"""Baselines of the Bayesian head: what they are said to do, and on the same stream."""

import pytest
import torch
from test_bayesian_head import shifted
from torch import nn

from hf_kalman.training import LastLayerLaplace, WarmStart


def test_a_memory_of_everything_is_retraining():
    """Steps on all samples so far, from where the last sample left the weights."""
    linear, (stream, labels), _ = shifted(0, count=12)
    own = WarmStart(linear, None, learning_rate=0.05, steps=3)
    expected = nn.Linear(16, 4)
    expected.load_state_dict(linear.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    for count, (x, y) in enumerate(zip(stream, labels, strict=True), start=1):
        before = expected(x).log_softmax(-1)[y].item()
        assert own.filter_step(x, y) == pytest.approx(before, rel=1e-4, abs=1e-5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(expected(stream[:count]), labels[:count]).backward()
            optimizer.step()
    torch.testing.assert_close(own.linear.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert len(own.memory) == 12


@pytest.mark.parametrize(("memory", "optimizer", "rate"), [(1, "sgd", 0.05), (10, "sgd", 0.1), (50, "adamw", 0.01)])
def test_a_shift_is_learned(memory, optimizer, rate):
    linear, (stream, labels), (test, wanted) = shifted(0)
    for own in (
        WarmStart(linear, memory, optimizer=optimizer, learning_rate=rate),
        LastLayerLaplace(linear, memory=memory, optimizer=optimizer, learning_rate=rate),
    ):
        before = (own(test).probabilities.argmax(-1) == wanted).double().mean()
        for x, y in zip(stream, labels, strict=True):
            own.filter_step(x, y)
        assert (own(test).probabilities.argmax(-1) == wanted).double().mean() > before + 0.2


def test_variances_of_laplace_are_the_curvature_s():
    linear, (stream, labels), _ = shifted(1, count=30)
    own = LastLayerLaplace(linear, 0.5, learning_rate=1e-12)
    for x, y in zip(stream, labels, strict=True):
        own.filter_step(x, y)
    x = torch.cat([stream, torch.ones(30, 1)], 1).double()
    p = linear(stream).softmax(-1).double().detach()
    precision = torch.eye(17).double() / 0.5 + (x.T * (p * (1 - p)).mean(1)) @ x
    torch.testing.assert_close(own.covariance.double(), torch.linalg.inv(precision), rtol=1e-3, atol=1e-5)
    wanted = (x @ torch.linalg.inv(precision) * x).sum(-1)
    torch.testing.assert_close(own(stream).variance[:, 2].double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "`memory` must be >= 1 or None, got 0"),
        ({"optimizer": "lion"}, "`optimizer` must be 'sgd' or 'adamw', got 'lion'"),
        ({"learning_rate": 0.0}, "`learning_rate` must be > 0, got 0.0"),
        ({"steps": 0}, "`steps` must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WarmStart(nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match="`variance` must be > 0, got 0.0"):
        LastLayerLaplace(nn.Linear(2, 2), 0.0)
