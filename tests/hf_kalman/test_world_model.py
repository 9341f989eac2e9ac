"""The world model against closed forms, textbook filters and autograd."""

import pytest
import torch
from transformers import AutoModel, Trainer, TrainingArguments

from hf_kalman.training import KalmanWorldModel, KalmanWorldModelConfig

WIDE = {"dtype": torch.float64}


def world(**options):
    own = {"observation_size": 2, "action_size": 1, "num_features": 12, "calibration_steps": 8}
    return KalmanWorldModel(KalmanWorldModelConfig(**{**own, **options})).double()


def oscillator(steps=400, noise=0.02, measured=0.0, drift_at=None, seed=0):
    """A pushed, damped pendulum: observations (T, 2), actions (T, 1)."""
    generator, x, rows = torch.Generator().manual_seed(seed), torch.tensor([0.5, 0.0], **WIDE), []
    actions = torch.randn(steps, 1, generator=generator, **WIDE)
    for step in range(steps):
        rows.append(x + measured * torch.randn(2, generator=generator, **WIDE))
        stiffness = 1.0 if drift_at is None or step < drift_at else 3.0
        force = -stiffness * x[0].sin() - 0.3 * x[1] + actions[step, 0]
        x = x + 0.1 * torch.stack([x[1], force]) + noise * torch.randn(2, generator=generator, **WIDE)
    return torch.stack(rows), actions


def test_one_pass_is_the_ridge_posterior():
    """Without noise of the observation, all weights at once: ridge regression of differences on features."""
    observations, actions = oscillator()
    model = world(prior_variance=10.0)
    model.fit_stream(observations, actions)
    phi = model.features(observations[7:-1], actions[7:-1])
    targets = observations[8:] - observations[7:-1]
    gram = phi.T @ phi + torch.eye(phi.shape[1], **WIDE) / 10.0
    torch.testing.assert_close(model.weight.data, torch.linalg.solve(gram, phi.T @ targets).T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.covariance, torch.linalg.inv(gram), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lags", [1, 2])
def test_the_state_filter_is_the_textbook_one(lags):
    """Known linear weights: every prediction is a conditional mean of the joint Gaussian of all observations."""
    m, share, steps = 2, 0.4, 6
    model = world(lags=lags, action_size=0, num_features=0, observation_share=share)
    d = m * lags
    with torch.no_grad():
        model.weight[:, 1:] = 0.3 * torch.randn(m, d, generator=torch.Generator().manual_seed(2), **WIDE)
        model.noise.copy_(torch.tensor([0.5, 2.0]))
        model.covariance.zero_()
        model.seen.fill_(8.0)
    observations = torch.randn(lags + steps, m, generator=torch.Generator().manual_seed(3), **WIDE)
    report = model.fit_stream(observations, learn=False)
    transition = model.jacobian(torch.zeros(d, **WIDE), torch.zeros(0, **WIDE))
    start = observations[:lags].flip(0).flatten()
    process, noise = torch.zeros(d, d, **WIDE), share * model.noise
    process[:m, :m] = ((1 - share) * model.noise).diag()
    # Means and covariances of the states x_1 ... x_n given the start, and of all pairs.
    means, covariances, powers = [start], [noise.repeat(lags).diag()], [torch.eye(d, **WIDE)]
    for _ in range(steps):
        means.append(transition @ means[-1])
        covariances.append(transition @ covariances[-1] @ transition.T + process)
        powers.append(transition @ powers[-1])
    for t in range(1, steps + 1):
        joint = torch.zeros(t * m, t * m, **WIDE)
        for i in range(1, t + 1):
            for j in range(1, i + 1):
                block = (powers[i - j] @ covariances[j])[:m, :m]
                joint[(i - 1) * m : i * m, (j - 1) * m : j * m] = block
                joint[(j - 1) * m : j * m, (i - 1) * m : i * m] = block.T
        joint += noise.repeat(t).diag()
        past, now = slice(0, (t - 1) * m), slice((t - 1) * m, t * m)
        gain = torch.linalg.solve(joint[past, past], joint[past, now]).T
        surprise = (observations[lags : lags + t - 1] - torch.stack([x[:m] for x in means[1:t]])) if t > 1 else None
        wanted = means[t][:m] + (gain @ surprise.flatten() if surprise is not None else 0)
        torch.testing.assert_close(report.predictions[lags + t - 1], wanted, rtol=1e-8, atol=1e-9)
        spread = (joint[now, now] - gain @ joint[past, now]).diagonal()
        torch.testing.assert_close(report.variances[lags + t - 1], spread, rtol=1e-8, atol=1e-9)


def test_the_jacobian_is_the_derivative():
    model = world(lags=3)
    model.fit_stream(*oscillator(60))
    state, action = torch.randn(6, **WIDE), torch.randn(1, **WIDE)
    wanted = torch.autograd.functional.jacobian(lambda x: model.transition(x, action), state)
    torch.testing.assert_close(model.jacobian(state, action).detach(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("measured", "share"), [(0.0, 0.0), (0.05, 0.5)])
def test_predictions_are_calibrated_after_one_pass(measured, share):
    model = world(observation_share=share)
    report = model.fit_stream(*oscillator(1500, measured=measured))
    late = report.squares[500:]
    assert 0.7 < late.mean() < 1.4
    assert torch.isnan(report.predictions[:8]).all() and torch.isfinite(report.predictions[8:]).all()
    errors = (report.predictions - oscillator(1500, measured=measured)[0])[500:]
    steady = (oscillator(1500, measured=measured)[0].diff(dim=0))[499:]
    assert errors.square().mean() < 0.6 * steady.square().mean()


def test_drift_is_followed_with_forgetting():
    observations, actions = oscillator(2000, drift_at=1000)
    errors = {}
    for forgetting in (1.0, 0.98):
        report = world(forgetting=forgetting).fit_stream(observations, actions)
        errors[forgetting] = (report.predictions - observations)[1600:].square().mean().item()
    # 9e-4 and 6e-4 measured; the noise alone is 4e-4.
    assert errors[0.98] < 0.85 * errors[1.0]


def test_rollouts_know_how_far_to_trust_themselves():
    model = world(num_features=24)
    model.fit_stream(*oscillator(1500))
    observations, actions = oscillator(400, seed=5)
    squares, early, late = [], [], []
    for start in range(0, 350, 25):
        mean, variance = model.rollout(actions[start : start + 50], observations=observations[start : start + 1])
        error = observations[start + 1 : start + 51] - mean
        squares.append((error.square() / variance).mean())
        early.append(variance[0].mean())
        late.append(variance[-1].mean())
    assert 0.3 < torch.stack(squares).mean() < 3 and min(late) > 3 * max(early)


def test_variances_of_rollouts_are_those_of_drawn_models():
    """Weights and noise drawn many times, models run forward with each: spread along the way as said."""
    model = world(num_features=6, lags=2, observation_share=0.2)
    observations, actions = oscillator(200)
    model.fit_stream(observations, actions)
    past, steps = observations[-2:], actions[:6]
    _, variance = model.rollout(steps, observations=past)
    torch.manual_seed(6)
    weight, lower, draws = model.weight.data.clone(), torch.linalg.cholesky(model.covariance), []
    for _ in range(3000):
        model.weight.data = weight + model.noise.sqrt()[:, None] * (torch.randn_like(weight) @ lower.T)
        state = past.flip(0).flatten() + (0.2 * model.noise).sqrt().repeat(2) * torch.randn(4, **WIDE)
        rows = []
        for action in steps:
            state = model.transition(state, action).detach()
            state[:2] += (0.8 * model.noise).sqrt() * torch.randn(2, **WIDE)
            rows.append(state[:2] + (0.2 * model.noise).sqrt() * torch.randn(2, **WIDE))
        draws.append(torch.stack(rows))
    torch.testing.assert_close(torch.stack(draws).var(0), variance, rtol=0.15, atol=0)
    assert (variance[-1] > 1.5 * variance[0]).all()


def test_episodes_are_apart():
    """An episode that begins anew is predicted as if it came first."""
    observations, actions = oscillator(60)
    starts = torch.zeros(60, dtype=torch.bool)
    starts[40] = True
    one, other = world(lags=2), world(lags=2)
    one.fit_stream(observations[:40], actions[:40])
    other.load_state_dict(one.state_dict())
    other.start_episode()
    a = other.fit_stream(observations[40:], actions[40:])
    b = world(lags=2)
    whole = b.fit_stream(observations, actions, starts)
    assert torch.isnan(whole.predictions[40:42]).all()
    torch.testing.assert_close(whole.predictions[42:], a.predictions[2:], rtol=1e-10, atol=1e-12)


def test_saved_models_continue_as_if_they_had_not_stopped(tmp_path):
    observations, actions = oscillator(100)
    for cut in (5, 50):
        whole, first = world(lags=2, forgetting=0.99), world(lags=2, forgetting=0.99)
        expected = whole.fit_stream(observations, actions).predictions
        first.fit_stream(observations[:cut], actions[:cut])
        first.save_pretrained(tmp_path)
        second = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(second) is KalmanWorldModel
        found = second.fit_stream(observations[cut:], actions[cut:]).predictions
        torch.testing.assert_close(found, expected[cut:], rtol=0, atol=0, equal_nan=True)


def test_the_same_model_is_trained_by_the_stock_trainer(tmp_path):
    observations, actions = oscillator(400)
    model = KalmanWorldModel(KalmanWorldModelConfig(observation_size=2, action_size=1, num_features=12)).float()
    model.fit_stream(observations[:40].float(), actions[:40].float(), learn=False)
    rows = [
        {"observations": observations[i : i + 40].float(), "actions": actions[i : i + 40].float()}
        for i in range(0, 400, 40)
    ]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=40, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=5, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    before = model(**batch).loss.item()
    Trainer(model, arguments, train_dataset=rows).train()
    assert model(**batch).loss.item() < 0.5 * before


def test_nothing_is_differentiated_and_memory_is_of_one_step():
    model = world()
    report = model.fit_stream(*oscillator(30))
    assert not report.predictions.requires_grad and report.predictions.is_inference()
    assert model.weight.grad is None and model.covariance.shape == (16, 16)
    long = sum(b.numel() for b in model.buffers())
    model.fit_stream(*oscillator(300))
    assert sum(b.numel() for b in model.buffers()) == long


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observation_size": 0}, "`observation_size` must be >= 1, got 0"),
        ({"forgetting": 0.0}, "`forgetting` must be in \\(0, 1\\], got 0.0"),
        ({"observation_share": 1.0}, "`observation_share` must be in \\[0, 1\\), got 1.0"),
        ({"lags": 0}, "`lags` must be >= 1, got 0"),
        ({"prior_variance": -1.0}, "`prior_variance` must be > 0, got -1.0"),
    ],
)
def test_configurations_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        KalmanWorldModelConfig(**options)


def test_bad_streams_are_refused_and_teach_nothing():
    observations, actions = oscillator(40)
    model = world()
    model.fit_stream(observations, actions)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoiled = observations.clone()
    spoiled[20, 1] = float("inf")
    for arguments, message in (
        ((spoiled, actions), "not finite; nothing was learned"),
        ((observations,), "must be \\(40, 2\\) and \\(40, 1\\), got \\(40, 2\\) and \\(40, 0\\)"),
        ((observations[:, :1], actions), "got \\(40, 1\\) and \\(40, 1\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit_stream(*arguments)
    with pytest.raises(ValueError, match="give `actions` for a model with actions"):
        model.rollout(horizon=3)
    with pytest.raises(ValueError, match="`observations` must be \\(1, 2\\)"):
        model.rollout(actions, observations=observations[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
