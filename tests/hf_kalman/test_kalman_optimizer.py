"""The optimizer against closed forms, and as a citizen of torch."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_kalman.training import KalmanOptimizer, sampled_label_loss


def regression(structure, batches, gradient_scale=1.0, mean_loss=False, **options):
    """Weights (2, 5) of a linear model after one pass of summed Gaussian losses of variance 0.5."""
    torch.manual_seed(0)
    inputs, noise = torch.randn(60, 5), 0.5
    targets = inputs @ torch.randn(5, 2) + 0.7 * torch.randn(60, 2)
    model = nn.Linear(5, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = KalmanOptimizer(model.parameters(), 2.0, structure=structure, gradient_scale=gradient_scale, **options)
    for x, y in zip(inputs.chunk(batches), targets.chunk(batches), strict=True):
        predicted = model(x)
        # Rows of R^{-1/2} H, one for each observed number.
        for row in range(predicted.numel()):
            (predicted.flatten()[row] / noise**0.5).backward(retain_graph=True)
            optimizer.accumulate_fisher()
        loss = (predicted - y).square().sum() / (2 * noise)
        (loss / len(x) if mean_loss else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    precision = inputs.T @ inputs / noise + torch.eye(5) / 2.0
    return model.weight.detach(), torch.linalg.solve(precision, inputs.T @ targets / noise).T, optimizer


@pytest.mark.parametrize(("structure", "options"), [("full", {}), ("row_block", {}), ("low_rank", {"rank": 10})])
@pytest.mark.parametrize("batches", [1, 6, 60])
def test_one_pass_over_a_linear_model_is_the_ridge_posterior(structure, options, batches):
    found, expected, _ = regression(structure, batches, **options)
    # Low rank goes through a Gram matrix, which squares the condition: 5.4e-5 measured in float32, 1e-9 in float64.
    tolerance = 2e-4 if structure == "low_rank" else 2e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_mean_losses_need_their_scale():
    found, expected, _ = regression("full", 6, gradient_scale=10.0, mean_loss=True)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    wrong, _, _ = regression("full", 6, mean_loss=True)
    assert (wrong - expected).abs().max() > 0.1


def test_sampled_labels_give_the_fisher_information():
    """A linear softmax: E[q q^T] = sum_t J^T (diag p - p p^T) J, over many draws."""
    torch.manual_seed(1)
    inputs, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, -100, 2, 3, 1])
    kept = inputs[labels != -100]
    p = (kept @ weight.T).softmax(-1).detach()
    expected = sum(
        torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(x, x)) for q, x in zip(p, kept, strict=True)
    )
    draws, total = 4000, torch.zeros(12, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(draws):
        (factor,) = torch.autograd.grad(sampled_label_loss(inputs @ weight.T, labels, generator), weight)
        total += torch.outer(factor.flatten(), factor.flatten())
    # Sampling error of 4,000 draws: 3.6e-2 measured.
    assert (total / draws - expected).norm() / expected.norm() < 0.06
    with pytest.raises(ValueError, match="`labels` must have shape \\(6,\\), got \\(5,\\)"):
        sampled_label_loss(inputs @ weight.T, labels[:5])
    assert sampled_label_loss(inputs @ weight.T, torch.full((6,), -100)).item() == 0


def stream(model, optimizer, steps, seed=3):
    """Steps on a classification stream; returns the losses before each."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for number in range(max(steps) + 1):
        x = torch.randn(8, 6, generator=generator)
        y = (x[:, :3].sum(-1) > 0).long() + 2 * (x[:, 3] > 0).long()
        if number not in steps:
            continue
        draws = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        logits = model(x.to(next(model.parameters()).dtype))
        sampled_label_loss(logits, y, draws).backward(retain_graph=True)
        optimizer.accumulate_fisher()
        loss = nn.functional.cross_entropy(logits.float(), y, reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / 8)
    return losses


def classifier(dtype=torch.float32):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


@pytest.mark.parametrize("structure", ["diagonal", "row_block", "low_rank", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_is_learned_in_one_pass(structure, dtype):
    model = classifier(dtype)
    groups = [
        {"params": model[0].parameters(), "structure": structure},
        {"params": model[2].parameters(), "structure": "diagonal", "variance": 0.2},
    ]
    losses = stream(model, KalmanOptimizer(groups, 0.3, process_noise=1e-5), range(150))
    assert sum(losses[-30:]) / 30 < 0.6 * sum(losses[:10]) / 10


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_optimizer_continues_bit_for_bit(structure, dtype):
    options = {"structure": structure, "process_noise": 1e-5, "rank": 3, "noise_memory": 0.9}
    if structure == "low_rank":
        options |= {"variance": None, "prior_steps": 12}
    options = {"variance": 0.3, **options}
    whole = classifier(dtype)
    stream(whole, KalmanOptimizer(whole.parameters(), **options), range(20))
    model = classifier(dtype)
    optimizer = KalmanOptimizer(model.parameters(), **options)
    stream(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = classifier(dtype)
    again.load_state_dict(saved["model"])
    resumed = KalmanOptimizer(again.parameters(), 0.1)
    resumed.load_state_dict(saved["optimizer"])
    states = [t for s in resumed.state_dict()["state"].values() for t in s.values()]
    assert {t.dtype for t in states} == {torch.float32}
    stream(again, resumed, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_tempering_counts_observations_less():
    """temper = k is what k copies of the data, each counted 1/k, give: half the information, half the gradient."""
    torch.manual_seed(5)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])

    def moved(temper, copies):
        model = classifier()
        optimizer = KalmanOptimizer(model.parameters(), 0.1, temper=temper)
        for _ in range(copies):
            sampled_label_loss(model(x), y, torch.Generator().manual_seed(0)).backward()
            optimizer.accumulate_fisher()
        (copies * nn.functional.cross_entropy(model(x), y, reduction="sum")).backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(moved(1.0, 1), moved(3.0, 3), strict=True):
        torch.testing.assert_close(a, b)


def test_noise_follows_the_innovations():
    """Gradients k times as large as the model expects count k^2 times less: the step of a k^2 times larger temper."""
    torch.manual_seed(7)
    factors, shape = torch.randn(30, 1, 3, 4), (3, 4)

    def moved(size, **options):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = KalmanOptimizer([weight], 0.1, structure="block", **options)
        for factor in factors:
            optimizer.beliefs[weight].accumulate(factor)
            # The gradient points where the factor does, so that each ratio is size^2.
            weight.grad = -size * factor[0].clone()
            optimizer.step()
        return weight.detach(), optimizer.variances()[weight]

    for memory in (0.0, 0.9):
        for found, wanted in zip(moved(3.0, noise_memory=memory), moved(3.0, temper=9.0), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(moved(1.0, noise_memory=0.9), moved(1.0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", ["diagonal", "row_block", "kronecker", "low_rank"])
def test_a_prior_of_none_is_where_the_filter_settles(structure):
    """Stationary from the first step, at sqrt(q / i), for information that is a product of rows and columns."""
    torch.manual_seed(8)
    noise, rows, columns = 1e-6, torch.tensor([0.9, 1.2]), torch.tensor([1.0, 0.8, 1.4])
    information = (rows[:, None] * columns).square()
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = KalmanOptimizer([weight], None, structure=structure, process_noise=noise, prior_steps=3)
    wanted = (noise / information).sqrt()
    for _ in range(3):
        optimizer.beliefs[weight].accumulate(torch.diag(information.sqrt().flatten()).view(6, 2, 3))
        weight.grad = torch.zeros(2, 3)
        optimizer.step()
    torch.testing.assert_close(optimizer.beliefs[weight].prior, wanted, rtol=1e-5, atol=0)
    for _ in range(2000):
        optimizer.beliefs[weight].accumulate(torch.diag(information.sqrt().flatten()).view(6, 2, 3))
        weight.grad = torch.zeros(2, 3)
        optimizer.step()
    found = optimizer.variances()[weight]
    # After an update: below sqrt(q / i) by half of q; 1e-3 of it here.
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=0)


def test_a_row_that_says_little_does_not_move_furthest():
    """A row with a millionth of the others' information begins as if it had three tenths of the mean."""
    weight = torch.nn.Parameter(torch.zeros(4, 1))
    optimizer = KalmanOptimizer([weight], None, process_noise=1e-6, prior_steps=1)
    optimizer.beliefs[weight].accumulate(torch.tensor([1.0, 1.0, 1.0, 1e-3]).view(1, 4, 1))
    weight.grad = torch.zeros(4, 1)
    optimizer.step()
    prior = optimizer.beliefs[weight].prior.flatten()
    torch.testing.assert_close(prior[3] / prior[0], torch.tensor((1.0 / 0.75 / 0.3) ** 0.5))


@pytest.mark.parametrize("size", [1e-13, 1e-9, 1.0])
def test_priors_do_not_overflow(size):
    """A bias that the softmax does not see has factors of 1e-10: as large a step as any other, and no infinity."""
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = KalmanOptimizer([weight], None, process_noise=1e-6)
    for _ in range(10):
        weight.grad = size * torch.ones(4)
        optimizer.accumulate_fisher()
        weight.grad = -size * torch.ones(4)
        optimizer.step()
    assert torch.isfinite(weight).all() and 5e-3 < weight.max() <= 1.01e-2


def test_tensors_behind_a_zero_wait_for_their_prior():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = KalmanOptimizer([weight], None, process_noise=1e-4)
    for value in (0.0, 0.0, 2.0):
        assert (weight == 1).all()  # Gradients without a factor do not move it.
        weight.grad = torch.full((2, 2), value)
        optimizer.accumulate_fisher()
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert optimizer.state[weight]["told"] == 1 and (weight < 1).all()
    torch.testing.assert_close(optimizer.beliefs[weight].prior, torch.full((2, 2), (1e-4 / 4) ** 0.5))


def test_a_prior_is_estimated_again_when_information_has_grown():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = KalmanOptimizer([weight], None, process_noise=1e-4, prior_steps=4)
    for step in range(16):
        value = 0.1 if step < 4 else 10.0
        weight.grad = torch.full((2, 2), value)
        optimizer.accumulate_fisher()
        weight.grad = torch.zeros(2, 2)
        optimizer.step()
        # The mean over about four factors: 1e-2 at first, 82 of the 100 four steps later, and no fourfold growth since.
        wanted = 1e-4 / (1e-2 if step < 7 else (1 - 0.75**4) * 100 + 0.75**4 * 1e-2)
        torch.testing.assert_close(optimizer.beliefs[weight].prior[0, 0].item(), wanted**0.5, rtol=1e-4, atol=0)


def test_boosted_priors_go_back_to_where_the_filter_settles():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    options = {"process_noise": 1e-12, "prior_steps": 1, "boost": 4.0, "decay": 0.5}
    optimizer = KalmanOptimizer([weight], None, **options)
    found = []
    for _ in range(4):
        weight.grad = torch.full((2, 2), 1e-3)
        optimizer.accumulate_fisher()
        weight.grad = torch.zeros(2, 2)
        optimizer.step()
        found.append(optimizer.variances()[weight][0, 0].item() / 1e-3)
    # Information of 1e-6 beside a precision of 1e3: nothing but the way back from 4 to 1, by half of it a step.
    assert found == pytest.approx([4.0, 2.5, 1.75, 1.375], rel=1e-5)
    optimizer.inflate(2.0)
    assert optimizer.variances()[weight][0, 0].item() == pytest.approx(2.75e-3, rel=1e-5)
    with pytest.raises(ValueError, match="`factor` must be > 0, got 0.0"):
        optimizer.inflate(0.0)


def test_steps_are_cut_to_their_mahalanobis_length():
    torch.manual_seed(6)
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = KalmanOptimizer([weight], 0.5, structure="full", max_step=0.1)
    weight.grad = torch.randn(3, 4)
    optimizer.accumulate_fisher()
    weight.grad = 100 * torch.randn(3, 4)
    optimizer.step()
    covariance = optimizer.beliefs[weight].covariance
    length = (weight.detach().flatten() @ torch.linalg.solve(covariance, weight.detach().flatten())).sqrt()
    torch.testing.assert_close(length, torch.tensor(0.1), rtol=1e-4, atol=0)


def test_closures_frozen_parameters_and_copies():
    model = classifier()
    model[0].requires_grad_(False)
    optimizer = KalmanOptimizer([p for p in model.parameters() if p.requires_grad], 0.1, fisher="empirical")
    before = copy.deepcopy(model[0].weight)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and torch.equal(model[0].weight, before)
    assert set(optimizer.variances()) == {model[2].weight, model[2].bias}
    assert all((v > 0).all() and (v <= 0.1).all() for v in optimizer.variances().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": 0.0}, "`variance` must be > 0, got 0.0"),
        ({"structure": "dense"}, "`structure` must be one of .* got 'dense'"),
        ({"fisher": "true"}, "`fisher` must be 'sampled' or 'empirical', got 'true'"),
        ({"fisher": "empirical", "structure": "full"}, "needs structure='diagonal', got 'full'"),
        ({"temper": 0.5}, "`temper` must be >= 1, got 0.5"),
        ({"gradient_scale": 0.0}, "`gradient_scale` must be > 0"),
        ({"variance": None}, "`process_noise` must be > 0 with variance=None, got 0.0"),
        ({"variance": None, "process_noise": 1e-6, "prior_steps": 0}, "`prior_steps` must be >= 1, got 0"),
        ({"boost": 0.5}, "`boost` must be >= 1, got 0.5"),
        ({"noise_memory": 1.0}, "`noise_memory` must be in \\[0, 1\\) or None, got 1.0"),
        ({"max_step": 0.0}, "`max_step` must be > 0 or None"),
        ({"forgetting": 1.5}, "`forgetting` must be in \\(0, 1\\], got 1.5"),
        ({"decay": -0.1}, "`decay` must be in \\[0, 1\\], got -0.1"),
        ({"process_noise": -1.0}, "`process_noise` must be >= 0, got -1.0"),
        ({"lr": -1.0}, "`lr` must be >= 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KalmanOptimizer([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_step_without_a_factor_is_refused():
    model = classifier()
    optimizer = KalmanOptimizer(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no Fisher factor was accumulated"):
        optimizer.step()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
