"""Innovations of a loss against their definitions and against draws; drift against noise."""

import pytest
import torch

from hf_kalman.training import DriftDetector, chi_square_quantile, log_loss_innovation


@pytest.mark.parametrize("degrees", [1, 2, 5, 40])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.999])
def test_quantiles_of_chi_square(probability, degrees):
    from scipy.stats import chi2

    assert chi_square_quantile(probability, degrees) == pytest.approx(chi2.ppf(probability, degrees), rel=1e-9)


def test_innovation_of_the_log_loss():
    logits, labels = 2 * torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 2, 2])
    p = logits.softmax(-1)
    surprise = -p.log()
    entropy = (p * surprise).sum(-1)
    wanted = [surprise[range(5), labels].sum(), entropy.sum(), ((p * surprise**2).sum(-1) - entropy**2).sum()]
    torch.testing.assert_close(log_loss_innovation(logits, labels), torch.stack(wanted), rtol=1e-12, atol=0)
    # Labels from the model itself: the normalised square has mean one.
    logits = torch.randn(2000, 50, 7)
    drawn = torch.distributions.Categorical(logits=logits).sample()
    found = [log_loss_innovation(a, b) for a, b in zip(logits, drawn, strict=True)]
    nis = torch.stack([(loss - entropy) ** 2 / variance for loss, entropy, variance in found])
    assert nis.mean().item() == pytest.approx(1.0, abs=0.1)


def test_drift_is_seen_once_and_noise_is_not():
    noise = torch.randn(600, generator=torch.Generator().manual_seed(5)).tolist()
    quiet, drifting = DriftDetector(), DriftDetector()
    alarms = [step for step in range(600) if quiet.update(5 + noise[step])]
    assert len(alarms) <= 1
    alarms = [s for s in range(600) if drifting.update(5 + noise[s] + (3 if s >= 300 else 0))]
    after = [step for step in alarms if step >= 300]
    assert len(after) == 1 and after[0] < 310
