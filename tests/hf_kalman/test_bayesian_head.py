"""The Bayesian head: moments against integrals and draws, updates against dense algebra, learning, state."""

import io

import pytest
import torch
from torch import nn

from hf_kalman.training import KalmanBayesianHead, relu_moments, softmax_moments

WIDE = {"dtype": torch.float64}


def integral(function, mean, deviation):
    """E function(a) for a ~ N(mean, deviation^2), by a fine sum over +-12 deviations that has a point at 0."""
    step = deviation / 4000
    grid = torch.arange(-12 * 4000, 12 * 4000 + 1, **WIDE) * step + mean
    grid = grid - (grid[0] % step)
    density = torch.exp(-((grid - mean) / deviation).square() / 2) / (deviation * (2 * torch.pi) ** 0.5)
    return (function(grid) * density).sum() * step


@pytest.mark.parametrize("deviation", [0.03, 1.0, 20.0])
def test_relu_moments_are_the_integrals(deviation):
    for t in torch.arange(-8, 8.5, 0.5).tolist():
        mean = torch.tensor(t * deviation, **WIDE)
        found = relu_moments(mean, torch.tensor(deviation**2, **WIDE))
        first = integral(lambda a: a.clamp(min=0), mean, deviation)
        second = integral(lambda a, first=first: (a.clamp(min=0) - first).square(), mean, deviation)
        cross = integral(lambda a, mean=mean: a.clamp(min=0) * (a - mean), mean, deviation)
        for a, b in zip(found, (first, second, cross), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-300)


def test_relu_moments_are_those_of_draws():
    """A million draws each: within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1_000_000, generator=generator, **WIDE)
    for t in (-2.0, -0.5, 0.0, 1.0, 3.0):
        draws = (t + normal).clamp(min=0)
        mean, variance, cross = relu_moments(torch.tensor(t, **WIDE), torch.tensor(1.0, **WIDE))
        assert abs(draws.mean() - mean) < 5 * draws.std() / 1000
        squares = (draws - mean).square()
        assert abs(squares.mean() - variance) < 5 * squares.std() / 1000
        products = draws * normal
        assert abs(products.mean() - cross) < 5 * products.std() / 1000


def test_relu_moments_have_stable_tails():
    mean = torch.tensor([-1e4, -50.0, 50.0, 1e4, 3.0, -3.0, 0.0])
    variance = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    z, v, cross = relu_moments(mean, variance)
    assert torch.equal(z[[0, 2, 3, 4, 5, 6]], torch.tensor([0.0, 50.0, 1e4, 3.0, 0.0, 0.0]))
    assert torch.equal(v[2:], torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])) and torch.equal(v[2:], cross[2:])
    assert (v >= 0).all() and torch.isfinite(torch.stack([z, v, cross])).all()


def test_softmax_moments_hold_for_small_variances_and_fail_for_large_ones():
    """Errors of mean and deviation over the variance of the logits: 1e6 draws; where order 2 pays and where not."""
    generator = torch.Generator().manual_seed(1)
    mean, normal = torch.tensor([2.0, 0.5, -1.0, 0.0]), torch.randn(200_000, 4, generator=generator)
    errors = {}
    for variance in (0.01, 0.1, 1.0, 4.0):
        draws = (mean + variance**0.5 * normal).softmax(-1)
        first, spread = softmax_moments(mean, torch.full((4,), variance))
        second, _ = softmax_moments(mean, torch.full((4,), variance), order=2)
        wanted = draws.mean(0)
        errors[variance] = [
            (first - wanted).abs().max().item(),
            (second - wanted).abs().max().item(),
            (spread.sqrt() / draws.std(0) - 1).abs().max().item(),
        ]
    assert errors[0.01][0] < 2e-3 and errors[0.01][2] < 0.02
    assert errors[0.1][1] < 0.3 * errors[0.1][0] and errors[0.1][2] < 0.1
    assert errors[4.0][0] > 0.05 and errors[4.0][2] > 0.3
    with pytest.raises(ValueError, match="`order` must be 1 or 2, got 3"):
        softmax_moments(mean, mean, 3)


@pytest.mark.parametrize("mode", ["copy_negative_inputs", "copy_negative_outputs", "direct"])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
@pytest.mark.parametrize("variance", [0.0, 1e-3, 1.0, 100.0])
def test_a_new_head_computes_what_the_linear_layer_computed(mode, covariance, variance):
    torch.manual_seed(0)
    linear, features = nn.Linear(6, 4, bias=variance != 1.0), torch.randn(50, 6)
    head = KalmanBayesianHead.from_linear(linear, mode, covariance=covariance, variance=variance)
    found = head(features)
    torch.testing.assert_close(found.mean, linear(features).detach(), rtol=0, atol=2e-6 * max(1, variance**0.5))
    torch.testing.assert_close(found.probabilities, linear(features).softmax(-1).detach(), rtol=0, atol=1e-5)
    assert (found.variance > 0).all() == (variance > 0)


@pytest.mark.parametrize("covariance", ["full", "shared"])
def test_a_gaussian_layer_is_recursive_least_squares(covariance):
    torch.manual_seed(1)
    inputs, noise = torch.randn(60, 4), 0.25
    targets = inputs @ torch.randn(4, 3) + 0.5 * torch.randn(60, 3) + 1
    head = KalmanBayesianHead((4, 3), covariance=covariance, variance=2.0, likelihood="gaussian", noise_variance=noise)
    mean, precision = torch.zeros(3, 5), torch.eye(5, **WIDE) / 2.0
    ones, score, wanted = torch.cat([inputs, torch.ones(60, 1)], 1).double(), 0.0, 0.0
    for count, (x, y) in enumerate(zip(inputs, targets, strict=True), start=1):
        row = torch.cat([x, torch.ones(1)]).double()
        spread = row @ torch.linalg.solve(precision, row) + noise
        error = y.double() - mean.double() @ row
        wanted += (-0.5 * (error.square() / spread + (2 * torch.pi * spread).log())).sum().item()
        score += head.filter_step(x, y)
        precision += torch.outer(row, row) / noise
        seen = ones[:count]
        mean = torch.linalg.solve(precision, seen.T @ targets[: len(seen)].double() / noise).T
    torch.testing.assert_close(head.mean_0.double(), mean, rtol=1e-5, atol=1e-5)
    covariance_found = head.covariance_0 if covariance == "shared" else head.covariance_0[1]
    torch.testing.assert_close(covariance_found.double(), torch.linalg.inv(precision), rtol=1e-4, atol=1e-6)
    assert score == pytest.approx(wanted, rel=1e-4)


def test_the_categorical_update_is_the_dense_one_and_moves_on_confident_errors():
    head = KalmanBayesianHead((3, 5), iterations=1)
    z, v = torch.tensor([9.0, 0.0, -1.0, 1.0, 0.5]), torch.tensor([0.1, 0.3, 0.2, 0.5, 0.1])
    _, mean, spread = head._observe(z, v, torch.tensor(2))
    p = z.softmax(-1)
    dense = torch.linalg.inv(torch.diag(1 / v) + p.diag() - torch.outer(p, p))
    error = torch.eye(5)[2] - p
    torch.testing.assert_close(mean, z + dense @ error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spread, dense.diagonal(), rtol=1e-4, atol=1e-6)
    assert mean[2] - z[2] > 0.9 * v[2]
    # The fixed-noise observation of the softmax saturates there; it is the dense Kalman update.
    literal = KalmanBayesianHead((3, 5), output="fixed_noise", noise_variance=0.09)
    _, other, narrowed = literal._observe(z, v, torch.tensor(2))
    jacobian = p.diag() - torch.outer(p, p)
    gain = v.diag() @ jacobian @ torch.linalg.inv(jacobian @ v.diag() @ jacobian + 0.09 * torch.eye(5))
    torch.testing.assert_close(other, z + gain @ error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(narrowed, (v.diag() - gain @ jacobian @ v.diag()).diagonal(), rtol=1e-4, atol=1e-6)
    assert other[2] - z[2] < 0.01 * v[2]


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e3, 1e6])
def test_the_iterated_update_is_the_mode_of_the_posterior(scale):
    torch.manual_seed(4)
    head, z, v = KalmanBayesianHead((3, 6), iterations=50), 5 * torch.randn(6), scale * (0.5 + torch.rand(6))
    _, mean, spread = head._observe(z, v, torch.tensor(1))
    p = mean.double().softmax(-1)
    error = torch.eye(6, **WIDE)[1] - p
    torch.testing.assert_close(mean.double(), z + v * error, rtol=1e-2, atol=1e-2 * scale**0.5)
    dense = torch.linalg.inv(torch.diag(1 / v.double()) + p.diag() - torch.outer(p, p))
    torch.testing.assert_close(spread.double(), torch.minimum(dense.diagonal(), v.double()), rtol=2e-2, atol=1e-6)


def test_messages_equal_the_smoother_for_one_output_and_stay_positive_for_many():
    torch.manual_seed(2)
    for outputs in (1, 200):
        heads = [KalmanBayesianHead((4, 8, outputs), variance=0.1, smoothing=s) for s in ("messages", "sums")]
        weights, mu, var = torch.randn(outputs, 9), torch.rand(8), 0.1 + torch.rand(8)
        found = []
        for head in heads:
            head.mean_1.copy_(weights)
            z, v, own = head._linear(1, mu, var)
            target, spread = z + v.sqrt() * torch.linspace(-1, 1, outputs), 0.3 * v
            found.append(head._smooth_inputs(1, mu, var, z, v, own, target, spread))
        if outputs == 1:
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert (found[0][1] > 0).all() and (found[0][1] <= var).all()
            assert (found[1][1] == 0).any()  # What the sums take away is more than there is.


def shifted(seed, count=200, size=16, classes=4):
    """A linear head fitted before two classes were exchanged, and a stream after it."""
    generator = torch.Generator().manual_seed(seed)
    centers = 1.2 * torch.randn(classes, size, generator=generator)

    def draw(number, order):
        labels = torch.randint(classes, (number,), generator=generator)
        return centers[order][labels] + torch.randn(number, size, generator=generator), labels

    old, labels = draw(2000, [0, 1, 2, 3])
    linear = nn.Linear(size, classes)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear(old), labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear, draw(count, [1, 0, 2, 3]), draw(1000, [1, 0, 2, 3])


@pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
@pytest.mark.parametrize("mode", ["direct", "copy_negative_inputs"])
def test_a_shift_is_learned_from_single_samples(covariance, mode):
    linear, (stream, labels), (test, wanted) = shifted(0)
    variance = 0.1 if mode == "direct" else (0.0, 0.1)
    head = KalmanBayesianHead.from_linear(linear, mode, covariance=covariance, variance=variance)
    before = (head(test).probabilities.argmax(-1) == wanted).double().mean()
    scores = [head.filter_step(x, y) for x, y in zip(stream, labels, strict=True)]
    after = head(test)
    accuracy = (after.probabilities.argmax(-1) == wanted).double().mean()
    assert before < 0.6 and accuracy > 0.85
    assert sum(scores[-50:]) / 50 > sum(scores[:50]) / 50 + 0.3
    assert (after.variance > 0).all()


@pytest.mark.parametrize("outputs", [2, 64, 1024])
@pytest.mark.parametrize("covariance", ["diagonal", "shared"])
def test_covariances_stay_positive(outputs, covariance):
    torch.manual_seed(3)
    head = KalmanBayesianHead((5, 12, outputs), covariance=covariance, variance=0.5, forgetting=0.99)
    head.mean_0.normal_()
    head.mean_1.normal_()
    for _ in range(1000 if outputs < 1000 else 200):
        head.filter_step(10 * torch.randn(5), torch.randint(outputs, ()))
    for index in (0, 1):
        own = head._covariance(index)
        lowest = own.min() if covariance == "diagonal" else torch.linalg.eigvalsh(own.double()).min()
        assert lowest > -1e-6 and torch.isfinite(own).all() and torch.isfinite(head._mean(index)).all()


def test_forgetting_keeps_a_head_able_to_follow():
    linear, (stream, labels), _ = shifted(1, count=800)
    losses = {}
    for options in ({}, {"forgetting": 0.98}, {"decay": 0.02}, {"process_noise": 1e-3}):
        head = KalmanBayesianHead.from_linear(linear, "direct", variance=0.1, **options)
        for x, y in zip(stream[:600], labels[:600], strict=True):
            head.filter_step(x, y)
        again = [head.filter_step(x, (y + 1) % 4) for x, y in zip(stream[600:], labels[600:], strict=True)]
        losses[next(iter(options), None)] = -sum(again) / len(again)
        assert head.covariance_0.max() <= 0.1 * 1.0001 or "process_noise" in options
    assert all(value < losses[None] for key, value in losses.items() if key)


def test_outliers_count_less_behind_a_gate():
    linear, (stream, labels), (test, wanted) = shifted(2)
    found = {}
    for gate in (None, 0.99):
        head = KalmanBayesianHead.from_linear(linear, "direct", variance=0.1, gate=gate)
        for step, (x, y) in enumerate(zip(stream, labels, strict=True)):
            head.filter_step(x, torch.randint(4, ()) if step % 3 == 0 else y)
        found[gate] = head.covariance_0.mean().item()
    assert found[0.99] > found[None]


def test_saved_heads_continue_bit_for_bit():
    linear, (stream, labels), _ = shifted(3)
    whole, first = (KalmanBayesianHead.from_linear(linear, covariance="full", variance=(1e-3, 0.1)) for _ in range(2))
    expected = [whole.filter_step(x, y) for x, y in zip(stream[:20], labels[:20], strict=True)]
    found = [first.filter_step(x, y) for x, y in zip(stream[:10], labels[:10], strict=True)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = KalmanBayesianHead(first.sizes, covariance="full", variance=(1e-3, 0.1))
    second.load_state_dict(torch.load(file, weights_only=True))
    found += [second.filter_step(x, y) for x, y in zip(stream[10:20], labels[10:20], strict=True)]
    assert found == expected
    spoiled = {name: value.clone() for name, value in first.state_dict().items()}
    spoiled["covariance_1"][0] = -spoiled["covariance_1"][0]
    before = {name: value.clone() for name, value in second.state_dict().items()}
    with pytest.raises(
        ValueError, match="`covariance_1` must be a finite covariance, got one with lowest eigenvalue -"
    ):
        second.load_state_dict(spoiled)
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())


def test_bad_samples_are_refused_and_teach_nothing():
    head = KalmanBayesianHead((3, 4))
    regression = KalmanBayesianHead((3, 2), likelihood="gaussian")
    before = {name: value.clone() for name, value in head.state_dict().items()}
    good = torch.ones(3)
    for own, features, label, message in (
        (head, torch.tensor([1.0, float("nan"), 0.0]), 1, "must be 3 finite numbers, got shape \\(3,\\) with others"),
        (head, torch.ones(2), 1, "must be 3 finite numbers, got shape \\(2,\\)"),
        (head, good, 4, "must be a class from 0 to 3, got tensor\\(4\\)"),
        (head, good, torch.tensor(1.0), "must be a class from 0 to 3"),
        (regression, good, torch.tensor([1.0, float("inf")]), "must be 2 finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            own.filter_step(features, label)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (3,)}, "`sizes` must be at least two widths"),
        ({"covariance": "dense"}, "`covariance` must be one of .* got 'dense'"),
        ({"variance": (0.1, 0.1)}, "`variance` must be >= 0, one or 1 numbers"),
        ({"likelihood": "poisson"}, "`likelihood` must be one of .* got 'poisson'"),
        ({"noise_variance": 0.0}, "`noise_variance` must be > 0, got 0.0"),
        ({"output": "pinv"}, "`output` must be one of .* got 'pinv'"),
        ({"iterations": 0}, "`iterations` must be >= 1, got 0"),
        ({"smoothing": "none"}, "`smoothing` must be one of .* got 'none'"),
        ({"forgetting": 0.0}, "`forgetting` must be in \\(0, 1\\], got 0.0"),
        ({"gate": 1.0}, "`gate` must be in \\(0, 1\\) or None, got 1.0"),
        ({"max_step": 0.0}, "`max_step` must be > 0 or None, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KalmanBayesianHead(**{"sizes": (3, 4), **options})
    with pytest.raises(ValueError, match="`mode` must be 'copy_negative_inputs', .* got 'copy'"):
        KalmanBayesianHead.from_linear(nn.Linear(2, 2), "copy")
