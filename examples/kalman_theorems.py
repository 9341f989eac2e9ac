"""What theory says about Kalman filters on parameters, checked in numbers with the package's own filters.

    python examples/kalman_theorems.py

Five statements, each a function that returns what it measured and what was to be expected:

1. Gain. K = P H^T R^{-1} with the updated covariance P, so that gain times innovation is P times the gradient of the
   log-likelihood: exactly, for any prior.
2. Natural gradient. With the prior covariance at the inverse Fisher information of t observations a step is 1 / (t + 1)
   of a natural-gradient step: half of one for t = 1, whatever the noise.
3. Convergence. On a mu-strongly convex, l-smooth loss with p_low I <= P <= p_high I, p_high <= 1 / l, the distance to
   the optimum shrinks at least by 1 - mu p_low a step.
4. Excitation. With forgetting lambda, e^T P^{-1} e contracts by lambda a step where every direction is seen again and
   again, and the error with it; along a direction that is never seen the error stays and the variance grows as
   lambda^{-t}.
5. Low rank. With few directions plus a diagonal the filter converges as the full one does; with the directions alone
   the error outside of them stays for ever.

Statements 3 to 5 stand for the convergence and stability theorems that arXiv 2603.13423 announces in its abstract;
their precise form here is standard filtering theory (descent lemma; information form of the filter), not that paper's
text.
"""

import torch

from hf_kalman.training import FullCovariance, LowRankCovariance

WIDE = {"dtype": torch.float64}


def gain_is_posterior_covariance_times_gradient(seed=0):
    """Largest difference between K nu (from the prior) and P g (from the posterior), relative to the step."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for noise_scale in (1e-3, 1.0, 1e3):
        root = torch.randn(6, 6, generator=generator, **WIDE)
        prior = root @ root.T + 0.1 * torch.eye(6, **WIDE)
        jacobian = torch.randn(3, 6, generator=generator, **WIDE)
        noise_root = torch.randn(3, 3, generator=generator, **WIDE)
        noise = noise_scale * (noise_root @ noise_root.T + torch.eye(3, **WIDE))
        innovation = torch.randn(3, generator=generator, **WIDE)
        gain = prior @ jacobian.T @ torch.linalg.inv(jacobian @ prior @ jacobian.T + noise)
        belief = FullCovariance((6,), 1.0, **WIDE)
        belief.covariance.copy_(prior)
        belief.accumulate(torch.linalg.solve_triangular(torch.linalg.cholesky(noise), jacobian, upper=False))
        step = belief.update(jacobian.T @ torch.linalg.solve(noise, innovation))
        wanted = gain @ innovation
        worst = max(worst, ((step - wanted).norm() / wanted.norm()).item())
    return worst


def fraction_of_a_natural_gradient_step(observations, noise=1.0, seed=1):
    """Length of a step from the prior (t F)^{-1} along F^{-1} g, in units of it."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(20, 6, generator=generator, **WIDE) / noise**0.5
    gradient, fisher = torch.randn(6, generator=generator, **WIDE), jacobian.T @ jacobian
    natural = torch.linalg.solve(fisher, gradient)
    belief = FullCovariance((6,), 1.0, **WIDE)
    belief.covariance.copy_(torch.linalg.inv(observations * fisher))
    belief.accumulate(jacobian)
    step = belief.update(gradient)
    return (step @ natural / (natural @ natural)).item()


def convergence_on_a_strongly_convex_loss(steps=60, seed=2):
    """Rows (ratio of the losses' distances to the optimum, bound 1 - mu p_low) of a filter with process noise.

    The loss is logistic with a ridge; its Hessian is between mu (the ridge) and l. The filter sees l as the information
    of every step, so that P settles below 1 / l.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, ridge = torch.randn(200, 5, generator=generator, **WIDE), 0.2
    labels = (inputs.sum(1) + torch.randn(200, generator=generator, **WIDE) > 0).double()
    smoothness = (torch.linalg.eigvalsh(inputs.T @ inputs / 200)[-1] / 4 + ridge).item()

    def loss(theta):
        logits = inputs @ theta
        return torch.nn.functional.softplus(logits).mean() - (labels * logits).mean() + ridge / 2 * theta @ theta

    def gradient(theta):
        return inputs.T @ ((inputs @ theta).sigmoid() - labels) / 200 + ridge * theta

    best = torch.zeros(5, **WIDE)
    for _ in range(200):
        p = (inputs @ best).sigmoid()
        hessian = (inputs.T * (p * (1 - p))) @ inputs / 200 + ridge * torch.eye(5, **WIDE)
        best = best - torch.linalg.solve(hessian, gradient(best))
    theta, rows = 2 * torch.ones(5, **WIDE), []
    # Stationary after an update: (-qi + sqrt(q^2 i^2 + 4 q i)) / 2i for i = l; q = 1 / l makes it 0.62 / l.
    belief = FullCovariance((5,), 1 / smoothness, **WIDE)
    for _ in range(steps):
        belief.predict(process_noise=1 / smoothness)
        belief.accumulate(smoothness**0.5 * torch.eye(5, **WIDE))
        before = loss(theta) - loss(best)
        theta = theta + belief.update(-gradient(theta))
        low, high = torch.linalg.eigvalsh(belief.covariance)[[0, -1]]
        assert high <= 1 / smoothness
        if before > 1e-12:
            rows.append((((loss(theta) - loss(best)) / before).item(), (1 - ridge * low).item()))
    return rows


def windowed_contraction(excited, steps=200, forgetting=0.95, window=4, seed=3):
    """(error along the last direction, its variance, largest ratio of e^T P^{-1} e over a window, its bound)."""
    directions = torch.eye(4, **WIDE)[: 4 if excited else 3]
    truth, theta = torch.ones(4, **WIDE), torch.zeros(4, **WIDE)
    belief, lengths = FullCovariance((4,), 1.0, **WIDE), []
    for step in range(steps):
        row = directions[step % len(directions)]
        belief.predict(forgetting=forgetting)
        belief.accumulate(row[None])
        theta = theta + belief.update(row * (row @ (truth - theta)))
        error = truth - theta
        lengths.append((error @ torch.linalg.solve(belief.covariance, error)).item())
    ratios = [b / a for a, b in zip(lengths, lengths[window:], strict=False) if a > 1e-20]
    return (truth - theta)[-1].abs().item(), belief.variances()[-1].item(), max(ratios), forgetting**window


def low_rank_errors(rank=3, size=12, steps=3000, seed=4):
    """Relative errors after a stream: of the full filter, of low rank plus diagonal, of low rank alone."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(size, generator=generator, **WIDE)
    full, low = FullCovariance((size,), 1.0, **WIDE), LowRankCovariance((size,), 1.0, rank=rank, **WIDE)
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator, **WIDE))[0]
    means = {"full": torch.zeros(size, **WIDE), "plus diagonal": torch.zeros(size, **WIDE)}
    alone, covariance = torch.zeros(size, **WIDE), basis @ basis.T
    for _ in range(steps):
        row = torch.randn(size, generator=generator, **WIDE)
        noise = 0.1 * torch.randn((), generator=generator, **WIDE)
        for name, belief in (("full", full), ("plus diagonal", low)):
            belief.accumulate(row[None])
            means[name] += belief.update(row * (row @ (truth - means[name]) + noise))
        crossed = covariance @ row
        gain = crossed / (1 + row @ crossed)
        alone = alone + gain * (row @ (truth - alone) + noise)
        covariance = covariance - torch.outer(gain, crossed)
    found = {name: ((mean - truth).norm() / truth.norm()).item() for name, mean in means.items()}
    outside = truth - basis @ (basis.T @ truth)
    return {
        **found,
        "alone": ((alone - truth).norm() / truth.norm()).item(),
        "outside": (outside.norm() / truth.norm()).item(),
    }


def main():
    print(f"1. gain times innovation against P g: {gain_is_posterior_covariance_times_gradient():.1e} apart")
    for t in (1, 4, 9):
        parts = [fraction_of_a_natural_gradient_step(t, noise) for noise in (1.0, 1e-3, 1e-6)]
        print(
            f"2. prior of {t} observations: {parts[0]:.6f} of a natural-gradient step (1/{t + 1}), any noise: {parts}"
        )
    rows = convergence_on_a_strongly_convex_loss()
    print(f"3. slowest step {max(r for r, _ in rows):.4f}, allowed {max(b for _, b in rows):.4f}, {len(rows)} steps")
    for excited in (True, False):
        error, variance, ratio, allowed = windowed_contraction(excited)
        print(
            f"4. {'every direction seen' if excited else 'one never seen'}: error there {error:.1e}, variance "
            f"{variance:.1e}, largest windowed ratio {ratio:.4f} (lambda^N = {allowed:.4f})"
        )
    print("5. relative errors:", {name: round(value, 4) for name, value in low_rank_errors().items()})


if __name__ == "__main__":
    main()
