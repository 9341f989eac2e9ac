"""Every structure against dense algebra that shares nothing with it."""

import pytest
import torch

from hf_kalman.training import (
    STRUCTURES,
    ColumnBlockCovariance,
    DiagonalCovariance,
    FullCovariance,
    KroneckerCovariance,
    LowRankCovariance,
    RowBlockCovariance,
)

WIDE = {"dtype": torch.float64}
SHAPE = (3, 4)


def dense(covariance):
    """P as a matrix, column by column."""
    size = covariance.shape.numel()
    columns = [covariance.times(e.view(covariance.shape)).flatten() for e in torch.eye(size, **WIDE)]
    return torch.stack(columns, 1)


def of(name, **options):
    more = {"rank": 12} if name == "low_rank" else {}
    return STRUCTURES[name](SHAPE, 0.5, **{**more, **WIDE, **options})


def projected(name, information):
    """What a structure keeps of an information matrix."""
    grid = torch.arange(12).view(SHAPE)
    # A Kronecker basis is the entries themselves until it is first changed.
    kept = {"diagonal": grid.view(-1, 1), "kronecker": grid.view(-1, 1), "row_block": grid, "column_block": grid.T}
    mask = torch.zeros_like(information)
    for group in kept.get(name, grid.view(1, -1)):
        mask[group[:, None], group] = 1
    return information * mask


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("own", [False, True])
def test_predict_and_update_are_the_dense_ones(name, own):
    """From one prior variance, and from one of each entry's own."""
    torch.manual_seed(0)
    belief, prior = of(name), 0.5 * torch.eye(12, **WIDE)
    if own:
        prior = torch.diag(torch.rand(12, **WIDE) + 0.1)
        belief.restart(prior.diagonal().view(SHAPE))
    expected = prior
    for step in range(4):
        noise, forgetting, decay = 0.01 * step, 1 - 0.1 * step, 0.2 * step
        expected = ((1 - decay) * expected + decay * prior) / forgetting
        expected += noise * torch.eye(12, **WIDE)
        belief.predict(noise, forgetting, decay)
        torch.testing.assert_close(dense(belief), expected, rtol=1e-10, atol=1e-12)
        pieces, gradient = torch.randn(5, *SHAPE, **WIDE), torch.randn(*SHAPE, **WIDE)
        belief.accumulate(pieces[:2])
        belief.accumulate(pieces[2:])
        information = projected(name, pieces.flatten(1).T @ pieces.flatten(1))
        expected = torch.linalg.inv(torch.linalg.inv(expected) + information)
        found = belief.update(gradient)
        torch.testing.assert_close(found.flatten(), expected @ gradient.flatten(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dense(belief), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(belief.variances().flatten(), expected.diagonal(), rtol=1e-9, atol=1e-12)


def test_kronecker_basis_changes_as_the_dense_precision_says():
    """D after a change of basis is the diagonal of the old precision, seen in the new basis."""
    torch.manual_seed(9)
    belief, old = KroneckerCovariance(SHAPE, 0.5, refresh=3, **WIDE), None
    for _ in range(7):
        belief.predict(1e-3, 0.95)
        factor = torch.randn(2, *SHAPE, **WIDE)
        before, basis = torch.linalg.inv(dense(belief)), torch.kron(belief.row_basis, belief.column_basis)
        in_basis = (factor.flatten(1) @ basis).square().sum(0).diag()
        belief.accumulate(factor)
        belief.update(torch.zeros(SHAPE))
        new = torch.kron(belief.row_basis, belief.column_basis)
        wanted = new.T @ (before + basis @ in_basis @ basis.T) @ new
        torch.testing.assert_close(belief.precision.flatten(), wanted.diagonal(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dense(belief).diagonal(), belief.variances().flatten(), rtol=1e-9, atol=1e-12)
        changed, old = old is not None and not torch.equal(old, new), new
        assert changed == (belief.updates.item() in (3, 6))


def test_kronecker_information_is_kept_where_a_diagonal_loses_it():
    torch.manual_seed(10)
    left, right = torch.randn(3, 3, **WIDE), torch.randn(4, 4, **WIDE)
    exact, beliefs = FullCovariance(SHAPE, 1.0, **WIDE), (of("kronecker", refresh=1), of("diagonal"))
    exact.covariance.mul_(0.5 / 1.0)
    for _ in range(400):
        factor = (left @ torch.randn(20, *SHAPE, **WIDE) @ right) / 40
        for belief in (exact, *beliefs):
            belief.accumulate(factor)
            belief.update(torch.zeros(SHAPE))
    gradient = torch.randn(SHAPE, **WIDE)
    wanted = exact.times(gradient)
    errors = [((b.times(gradient) - wanted).norm() / wanted.norm()).item() for b in beliefs]
    # 0.02 and 0.81 measured.
    assert errors[0] < 0.2 and errors[1] > 0.5


@pytest.mark.parametrize("name", STRUCTURES)
def test_products_are_observed_as_the_rows_they_make(name):
    torch.manual_seed(11)
    options = {"refresh": 2} if name == "kronecker" else {}
    one, other = of(name, **options), of(name, **options)
    for _ in range(5):
        left, right = torch.randn(3, SHAPE[0], **WIDE), torch.randn(3, SHAPE[1], **WIDE)
        one.observe(left, right)
        other.accumulate(left[:, :, None] * right[:, None])
        gradient = torch.randn(SHAPE, **WIDE)
        torch.testing.assert_close(one.update(gradient), other.update(gradient), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="rows of the two sides of \\(3, 4\\), got \\(3, 4\\) and \\(3, 3\\)"):
        one.observe(right, left)


def test_rows_of_a_vector_are_its_entries():
    torch.manual_seed(8)
    beliefs = RowBlockCovariance((5,), 0.3, **WIDE), DiagonalCovariance((5,), 0.3, **WIDE)
    factor, gradient = torch.randn(2, 5, **WIDE), torch.randn(5, **WIDE)
    for belief in beliefs:
        belief.predict(0.1, 0.9)
        belief.accumulate(factor)
    torch.testing.assert_close(beliefs[0].update(gradient), beliefs[1].update(gradient), rtol=1e-12, atol=0)
    torch.testing.assert_close(beliefs[0].variances(), beliefs[1].variances(), rtol=1e-12, atol=0)


def test_linear_gaussian_regression_is_the_ridge_posterior():
    """One observation after the other, innovations through P g: the closed form of all at once."""
    torch.manual_seed(1)
    inputs, weights, noise = torch.randn(200, 6, **WIDE), torch.randn(2, 6, **WIDE), 0.3
    targets = inputs @ weights.T + noise**0.5 * torch.randn(200, 2, **WIDE)
    mean, belief = torch.zeros(2, 6, **WIDE), RowBlockCovariance((2, 6), 2.0, **WIDE)
    for x, y in zip(inputs, targets, strict=True):
        innovation = y - mean @ x
        belief.accumulate((x / noise**0.5).expand(1, 2, 6))
        mean += belief.update(torch.outer(innovation, x) / noise)
    precision = inputs.T @ inputs / noise + torch.eye(6, **WIDE) / 2.0
    torch.testing.assert_close(mean, torch.linalg.solve(precision, inputs.T @ targets / noise).T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(belief.covariance[1], torch.linalg.inv(precision), rtol=1e-9, atol=1e-12)


def test_step_is_gain_times_innovation():
    """K = P H^T (H P H^T + R)^{-1} with the prior P, and P^+ H^T R^{-1}, give the same step."""
    torch.manual_seed(2)
    root = torch.randn(5, 5, **WIDE)
    noise, jacobian, innovation = root @ root.T + torch.eye(5), torch.randn(5, *SHAPE, **WIDE), torch.randn(5, **WIDE)
    belief, flat = FullCovariance(SHAPE, 0.7, **WIDE), jacobian.flatten(1)
    gain = 0.7 * flat.T @ torch.linalg.inv(0.7 * flat @ flat.T + noise)
    belief.accumulate((torch.linalg.inv(torch.linalg.cholesky(noise)) @ flat).view(5, *SHAPE))
    step = belief.update((flat.T @ torch.linalg.solve(noise, innovation)).view(SHAPE))
    torch.testing.assert_close(step.flatten(), gain @ innovation, rtol=1e-9, atol=1e-12)


def test_prior_at_the_inverse_fisher_takes_half_a_natural_gradient_step():
    """And after t observations 1 / (t + 1) of one."""
    torch.manual_seed(3)
    factor, gradient = torch.randn(20, *SHAPE, **WIDE), torch.randn(*SHAPE, **WIDE)
    fisher = factor.flatten(1).T @ factor.flatten(1)
    natural = torch.linalg.solve(fisher, gradient.flatten())
    for observations in (1, 4, 9):
        belief = FullCovariance(SHAPE, 1.0, **WIDE)
        belief.covariance.copy_(torch.linalg.inv(observations * fisher))
        belief.accumulate(factor)
        step = belief.update(gradient).flatten()
        torch.testing.assert_close(step, natural / (observations + 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_stationary_variances_are_the_closed_forms(name):
    """A random walk settles at (-qi + sqrt(q^2 i^2 + 4qi)) / 2i, forgetting at (1 - lambda) / i, after an update."""
    information, noise, forgetting = 3.0, 1e-3, 0.95
    factor = (information**0.5 * torch.eye(12, **WIDE)).view(12, *SHAPE)
    for options, wanted in (
        ({"process_noise": noise}, ((noise * information) ** 2 + 4 * noise * information) ** 0.5 - noise * information),
        ({"forgetting": forgetting}, 2 * (1 - forgetting)),
    ):
        belief = of(name)
        for _ in range(2000):
            belief.predict(**options)
            belief.accumulate(factor)
            belief.update(torch.zeros(SHAPE))
        # The floor of the low-rank diagonal counts as 0.02 beside an information of 60: 3.3e-4.
        tolerance = 4e-4 if name == "low_rank" and "forgetting" in options else 1e-6
        expected = torch.full(SHAPE, wanted / (2 * information), **WIDE)
        torch.testing.assert_close(belief.variances(), expected, rtol=tolerance, atol=0)


def test_low_rank_keeps_gain_where_it_cuts():
    """Cut directions move to the diagonal: more information than there is room for, never none."""
    torch.manual_seed(4)
    factors = torch.randn(50, 40, **WIDE)
    belief, exact = LowRankCovariance((40,), 1.0, rank=8, **WIDE), FullCovariance((40,), 1.0, **WIDE)
    for rows in factors.split(5):
        for each in (belief, exact):
            each.accumulate(rows)
            each.update(torch.zeros(40))
    information = torch.linalg.inv(dense(belief)) - torch.eye(40, **WIDE)
    # The trace of the information is kept to the last digit, only its directions are simplified.
    torch.testing.assert_close(information.trace(), factors.square().sum(), rtol=1e-9, atol=0)
    assert (belief.variances() > 0).all() and (belief.variances() < 1).all()
    step = exact.times(factors[-1])
    angle = torch.cosine_similarity(belief.times(factors[-1]), step, dim=0)
    assert angle > torch.cosine_similarity(factors[-1], step, dim=0) > 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_variances_stay_positive_in_float32(name):
    """Ten thousand ill-conditioned updates with forgetting."""
    torch.manual_seed(5)
    belief = STRUCTURES[name](SHAPE, 1e3, **({"rank": 3} if name == "low_rank" else {}))
    direction = torch.randn(SHAPE)
    for _ in range(10_000):
        belief.predict(forgetting=0.98, decay=1e-4)
        belief.accumulate((direction + 1e-3 * torch.randn(SHAPE))[None])
        belief.update(torch.zeros(SHAPE))
    assert belief.variances().min() > 0 and torch.isfinite(belief.variances()).all()
    if name in ("full", "row_block", "column_block"):
        assert torch.linalg.eigvalsh(belief.covariance).min() > 0


def test_diagonal_variances_stay_positive_for_a_hundred_thousand_steps():
    torch.manual_seed(6)
    belief = DiagonalCovariance((7,), 1e-2)
    for _ in range(100_000):
        belief.predict(process_noise=1e-12)
        belief.accumulate(10 * torch.randn(1, 7))
        belief.update(torch.zeros(7))
    assert belief.variances().min() > 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_saved_state_continues_bit_for_bit(name):
    torch.manual_seed(7)
    factors, gradients = torch.randn(6, 2, *SHAPE), torch.randn(6, *SHAPE)

    def run(belief, steps):
        for step in steps:
            belief.predict(1e-3, 0.99, 0.1)
            belief.accumulate(factors[step])
            moved = belief.update(gradients[step])
        return moved

    whole, first = of(name, dtype=torch.float32), of(name, dtype=torch.float32)
    for belief in (whole, first):
        belief.restart(torch.linspace(0.1, 0.5, 12).view(SHAPE))
    expected = run(whole, range(6))
    run(first, range(3))
    first.accumulate(factors[3, :1])
    saved = first.state_dict()
    second = of(name, dtype=torch.float32)
    second.load_state_dict(saved)
    for belief in (first, second):
        belief.factors = belief.factors[:0]
    assert torch.equal(run(second, range(3, 6)), expected) and torch.equal(run(first, range(3, 6)), expected)
    with pytest.raises(ValueError, match="load_state_dict: `state` must hold"):
        STRUCTURES[name]((2, 5), 1.0).load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_wide_whatever_comes_in(dtype):
    for name in STRUCTURES:
        belief = STRUCTURES[name](SHAPE, 1.0)
        belief.accumulate(torch.ones(1, *SHAPE, dtype=dtype))
        assert belief.update(torch.ones(SHAPE, dtype=dtype)).dtype == torch.float32
        assert all(tensor.dtype == torch.float32 for tensor in belief.state().values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiagonalCovariance(SHAPE, 0.0), "`variance` must be > 0, got 0.0"),
        (lambda: DiagonalCovariance(SHAPE, 1.0, dtype=torch.bfloat16), "`dtype` must be torch.float32"),
        (lambda: RowBlockCovariance((), 1.0), "at least 1 dimension"),
        (lambda: ColumnBlockCovariance((3,), 1.0), "at least 2 dimensions, got \\(3,\\)"),
        (lambda: KroneckerCovariance((), 1.0), "at least 1 dimension"),
        (lambda: KroneckerCovariance(SHAPE, 1.0, refresh=0), "`refresh` must be at least 1, got 0"),
        (lambda: LowRankCovariance(SHAPE, 1.0, rank=0), "`rank` must be at least 1, got 0"),
        (lambda: of("full").predict(process_noise=-1.0), "`process_noise` is out of its range, got -1.0"),
        (lambda: of("full").predict(forgetting=0.0), "`forgetting` is out of its range, got 0.0"),
        (lambda: of("full").predict(decay=1.5), "`decay` is out of its range, got 1.5"),
        (lambda: of("full").restart(torch.ones(4, 3)), "`variance` must have shape \\(3, 4\\), got \\(4, 3\\)"),
        (lambda: of("full").accumulate(torch.zeros(2, 4, 3)), "`factor` must have shape \\(k, 3, 4\\)"),
        (lambda: of("full").update(torch.zeros(4, 3)), "`gradient` must have shape \\(3, 4\\)"),
    ],
)
def test_covariances_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
