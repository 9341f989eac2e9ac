"""The statements of examples/kalman_theorems.py hold, and fail where theory says they must."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "kalman_theorems.py"
spec = importlib.util.spec_from_file_location("kalman_theorems", PATH)
theorems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theorems)


def test_gain_is_posterior_covariance_times_gradient():
    assert theorems.gain_is_posterior_covariance_times_gradient() < 1e-10


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("observations", [1, 4, 9])
def test_a_prior_at_the_inverse_fisher_takes_part_of_a_natural_gradient_step(observations, noise):
    found = theorems.fraction_of_a_natural_gradient_step(observations, noise)
    assert found == pytest.approx(1 / (observations + 1), rel=1e-9)


def test_convergence_is_as_fast_as_the_bound():
    rows = theorems.convergence_on_a_strongly_convex_loss()
    assert len(rows) > 20 and all(ratio <= bound < 1 for ratio, bound in rows)


def test_errors_contract_over_windows_only_where_everything_is_excited():
    error, variance, ratio, allowed = theorems.windowed_contraction(excited=True)
    assert error < 1e-4 and variance < 1 and ratio <= allowed
    error, variance, _, _ = theorems.windowed_contraction(excited=False)
    assert error == pytest.approx(1.0) and variance > 1e4


def test_low_rank_needs_its_diagonal():
    found = theorems.low_rank_errors()
    assert found["plus diagonal"] < 0.01 and found["full"] <= found["plus diagonal"]
    assert found["alone"] > 0.9 * found["outside"] > 0.5
