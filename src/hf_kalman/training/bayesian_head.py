r"""A Bayesian multilayer head that is trained by filtering: one sample in memory, no autograd.

Every neuron's weights are Gaussian, w_n ~ N(m_n, C_n), a constant 1 in the input standing for the bias. A sample goes
forward as moments and comes back as a smoother's corrections [Wagner, Wu and Huber, arXiv 2110.00944; for a head of a
frozen transformer: Jing et al., arXiv 2509.10695]. With z ~ N(mu_z, diag v_z) the input of a layer:

    forward   mu_a = m^T mu_z                s_a = m^T diag(v_z) m + mu_z^T C mu_z + tr(C diag v_z)      (exact)
              ReLU: the exact moments of max(0, a), and cov(a, z) = s_a Phi(mu_a / sqrt(s_a))            (Stein)
              softmax: p = softmax(mu_a), J = diag p - p p^T, C_p = J diag(s_a) J                        (first order)
    output    C_a+ = (diag(1 / s_a) + J)^{-1},   mu_a+ = mu_a + C_a+ (y - p)
    back      weights: m+ = m + C mu_z (mu_a+ - mu_a) / s_a,   C+ = C + C mu_z mu_z^T C (s_a+ - s_a) / s_a^2
              inputs: the message that the outputs send, C_z+ = (diag(1/v_z) + M^T D^{-1} M)^{-1}, below
              ReLU: k = cov(a, z) / v_z,   mu_a+ = mu_a + k (mu_z+ - mu_z),   s_a+ = s_a + k^2 (v_z+ - v_z)

The output's update is that of a categorical observation in information form: nothing is inverted that may be singular,
and confident errors move the belief as they should. `output="fixed_noise"` takes the one-hot label for a Gaussian
observation of p instead, S = J diag(s_a) J + sigma^2 I; there confident errors are ignored, for J vanishes.

Messages: output n says tau_n = 1/s_a+ - 1/s_a of information about its own value. Of the input it sees that through its
uncertain weights, omega_n = mu_z^T C_n mu_z + tr(C_n diag v_z):

    D_n = 1 / tau_n + omega_n,   C_z+ = (diag(1 / v_z) + sum_n m_n m_n^T / D_n)^{-1},
    mu_z+ = mu_z + C_z+ sum_n m_n (mu_a+ - mu_a)_n / (s_a+ (1 + tau_n omega_n))

which is positive for any number of outputs. The smoother's sums over neurons, `smoothing="sums"`, equal it for one
output and take away more variance than there is for many, as they count neurons that share their input as independent.
[standard algebra of Gaussian messages]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_ranges
from .covariance import cap_variances, passage_of_time
from .drift import chi_square_quantile, log_loss_innovation

__all__ = ["HeadPrediction", "KalmanBayesianHead", "relu_moments", "softmax_moments"]

_COVARIANCES, _SMOOTHINGS = ("full", "diagonal", "shared"), ("messages", "sums")
_Pair = tuple[Tensor, Tensor]
_Triple = tuple[Tensor, Tensor, Tensor]
_LIKELIHOODS, _OUTPUTS = ("categorical", "gaussian"), ("information", "fixed_noise")


def relu_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean and variance of z = max(0, a), and cov(a, z), for a ~ N(mean, variance); exact, with stable tails.

        t = mean / sigma,   R(t) = Phi(t) / phi(t)
        E z = sigma phi (1 + t R),   E z^2 = sigma^2 phi ((1 + t^2) R + t),   cov(a, z) = sigma^2 Phi(t)

    Args:
        mean: any shape and float dtype.
        variance: of that shape, >= 0; where it is 0 the result is max(0, mean) without variance.
    """
    mu, s = mean.double(), variance.double()
    sigma = s.sqrt()
    sure = sigma <= 0
    t = torch.where(sure, torch.zeros_like(mu), mu / sigma.clamp(min=torch.finfo(torch.float64).tiny))
    # On the left everything is phi times a small bracket; on the right z = a + max(0, -a), with the left's moments.
    # Beyond 37 deviations the other side has less than 1e-297 of the mass.
    a = -t.abs().clamp(max=37)
    density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    below = math.sqrt(math.pi / 2) * torch.special.erfcx(-a / math.sqrt(2))  # Phi(a) / phi(a)
    first, second = density * (1 + a * below), density * ((1 + a.square()) * below + a)
    right = t > 0
    z_mean = torch.where(right, t + first, first)
    # Var(a + n) for n = max(0, -a): 1 + Var n - 2 Phi(-t), as cov(a, n) = -Phi(-t).
    part = second - first.square()
    z_variance = torch.where(right, 1 + part - 2 * density * below, part)
    cross = torch.where(right, 1 - density * below, density * below)
    found = torch.where(sure, mu.clamp(min=0), sigma * z_mean), s * z_variance.clamp(min=0), s * cross
    narrow = [values.to(mean.dtype) for values in found]
    return narrow[0], torch.where(sure, torch.zeros_like(narrow[1]), narrow[1]), narrow[2]


def softmax_moments(mean: Tensor, variance: Tensor, order: int = 1) -> tuple[Tensor, Tensor]:
    r"""Mean and variances of softmax(a) for independent a_j ~ N(mean_j, variance_j), by Taylor expansion.

        order 1:  p = softmax(mean)
        order 2:  p_i + 1/2 sum_j variance_j d^2 p_i / d a_j^2
                  = p_i (1 + (variance_i (1 - 2 p_i) - sum_j variance_j p_j (1 - 2 p_j)) / 2)
        variances: diagonal of J diag(variance) J,   J = diag p - p p^T

    Good while variances are well below 1 (`tests/hf_kalman/test_bayesian_head.py` measures it). What order 2 takes
    below 0 is set to 0 and the rest scaled to sum to 1.

    Args:
        mean: (..., V).
        variance: (..., V).
        order: 1 or 2.

    Raises:
        ValueError: another `order`.
    """
    if order not in (1, 2):
        raise ValueError(f"softmax_moments: `order` must be 1 or 2, got {order!r}.")
    p = mean.softmax(-1)
    spread = p.square() * (variance * (1 - 2 * p) + (variance * p.square()).sum(-1, keepdim=True))
    if order == 2:
        bend = variance * (1 - 2 * p)
        p = (p * (1 + (bend - (bend * p).sum(-1, keepdim=True)) / 2)).clamp(min=0)
        p = p / p.sum(-1, keepdim=True)
    return p, spread


class HeadPrediction(NamedTuple):
    """What a head says about its inputs.

    Args:
        mean: (B, V) logits, or values of a regression.
        variance: (B, V) of those, without noise of the observation.
        probabilities: (B, V) of classes, None for a regression.
        probability_variance: (B, V) of the probabilities, None for a regression.
    """

    mean: Tensor
    variance: Tensor
    probabilities: Tensor | None
    probability_variance: Tensor | None


class KalmanBayesianHead(nn.Module):
    """Linear layers with ReLU between them, Gaussian weights, trained by `filter_step`; see the module.

        head = KalmanBayesianHead.from_linear(model.score)       # computes what the linear layer computed
        for features, label in stream:
            log_probability = head.filter_step(features, label)    # of the label, before it was learned from

    Means and covariances are float32 buffers, saved and loaded with the module they are in.

    Args:
        sizes: widths, (inputs, ..., outputs); two of them make one linear layer.
        covariance: of a neuron's weights: "full", "diagonal", or "shared", one full matrix for all neurons of a layer
            (exact where all outputs have the same noise, as in least squares).
        variance: prior variance of each weight, one number or one for each layer; 0 keeps a layer as it is.
        likelihood: "categorical", labels are classes; "gaussian", labels are (V,) values.
        noise_variance: of a Gaussian observation, and sigma^2 of output="fixed_noise".
        output: "information" or "fixed_noise"; for a categorical likelihood.
        iterations: of output="information": 1 linearises the softmax at the prediction, as above; more, until nothing
            changes, at the corrected outputs themselves (an iterated filter, whose mean is the posterior's mode): with
            prior variances of 1 and more a single step overshoots.
        smoothing: "messages" or "sums", how corrections reach the layer below.
        softmax_order: see `softmax_moments`; for predictions.
        process_noise: variance that every step adds to every weight.
        forgetting: lambda in (0, 1]: covariances are divided by it every step, and no variance exceeds its prior.
        decay: in [0, 1]: how far covariances go back to the prior in a step.
        gate: probability: a sample whose normalised innovation is beyond that quantile of chi-square counts less, by
            their ratio; None for no gate.
        max_step: largest correction of an output in units of its standard deviation; None for no limit.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        covariance: str = "diagonal",
        variance: float | Sequence[float] = 0.1,
        likelihood: str = "categorical",
        noise_variance: float = 0.09,
        output: str = "information",
        iterations: int = 20,
        smoothing: str = "messages",
        softmax_order: int = 1,
        process_noise: float = 0.0,
        forgetting: float = 1.0,
        decay: float = 0.0,
        gate: float | None = None,
        max_step: float | None = None,
    ) -> None:
        super().__init__()
        layers = len(sizes) - 1
        if layers < 1 or min(sizes) < 1:
            raise ValueError(f"KalmanBayesianHead: `sizes` must be at least two widths >= 1, got {tuple(sizes)!r}.")
        variances = [float(variance)] * layers if isinstance(variance, (int, float)) else [float(v) for v in variance]
        fitting = len(variances) == layers and min(variances) >= 0
        check_ranges(
            "KalmanBayesianHead",
            (
                ("covariance", covariance, covariance in _COVARIANCES, f"one of {_COVARIANCES}"),
                ("variance", variance, fitting, f">= 0, one or {layers} numbers"),
                ("likelihood", likelihood, likelihood in _LIKELIHOODS, f"one of {_LIKELIHOODS}"),
                ("noise_variance", noise_variance, noise_variance > 0, "> 0"),
                ("output", output, output in _OUTPUTS, f"one of {_OUTPUTS}"),
                ("iterations", iterations, iterations >= 1, ">= 1"),
                ("smoothing", smoothing, smoothing in _SMOOTHINGS, f"one of {_SMOOTHINGS}"),
                ("softmax_order", softmax_order, softmax_order in (1, 2), "1 or 2"),
                ("process_noise", process_noise, process_noise >= 0, ">= 0"),
                ("forgetting", forgetting, 0 < forgetting <= 1, "in (0, 1]"),
                ("decay", decay, 0 <= decay <= 1, "in [0, 1]"),
                ("gate", gate, gate is None or 0 < gate < 1, "in (0, 1) or None"),
                ("max_step", max_step, max_step is None or max_step > 0, "> 0 or None"),
            ),
        )
        self.sizes, self.covariance, self.prior = tuple(sizes), covariance, variances
        self.likelihood, self.noise_variance, self.output = likelihood, noise_variance, output
        self.iterations, self.smoothing, self.softmax_order = iterations, smoothing, softmax_order
        self.process_noise, self.forgetting, self.decay = process_noise, forgetting, decay
        self.gate, self.max_step = gate, max_step
        self._bounds = {} if gate is None else {n: chi_square_quantile(gate, n) for n in {1, sizes[-1]}}
        for index, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            self.register_buffer(f"mean_{index}", torch.zeros(outputs, inputs + 1))
            self.register_buffer(f"covariance_{index}", self._prior_covariance(index))

    def _prior_covariance(self, index: int) -> Tensor:
        outputs, width, variance = self.sizes[index + 1], self.sizes[index] + 1, self.prior[index]
        if self.covariance == "diagonal":
            return torch.full((outputs, width), variance)
        eye = variance * torch.eye(width)
        return eye if self.covariance == "shared" else eye.repeat(outputs, 1, 1)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mode: str = "copy_negative_inputs", **options: Any) -> KalmanBayesianHead:
        """A head that computes what a linear layer computes, whatever its prior variances.

        u = max(0, u) - max(0, -u) turns the layer into two with a ReLU between them, and of every pair one side always
        takes corrections: "copy_negative_inputs" has W_1 = [I; -I], W_2 = [W, -W], hidden width 2 x inputs;
        "copy_negative_outputs" has W_1 = [W; -W], W_2 = [I, -I], hidden width 2 x outputs. "direct" is one layer.

        Args:
            linear: the layer; its bias may be missing.
            mode: see above.
            options: of the head.

        Raises:
            ValueError: an unknown `mode`.
        """
        weight = linear.weight.detach().float()
        outputs, inputs = weight.shape
        bias = weight.new_zeros(outputs) if linear.bias is None else linear.bias.detach().float()

        def padded(matrix: Tensor, constants: Tensor) -> Tensor:
            return torch.cat([matrix, constants[:, None]], 1)

        both = padded(weight, bias)
        eye = torch.eye(inputs if mode == "copy_negative_inputs" else outputs, device=weight.device)
        if mode == "direct":
            sizes, means = (inputs, outputs), [both]
        elif mode == "copy_negative_inputs":
            sizes = (inputs, 2 * inputs, outputs)
            first = padded(torch.cat([eye, -eye]), bias.new_zeros(2 * inputs))
            means = [first, padded(torch.cat([weight, -weight], 1), bias)]
        elif mode == "copy_negative_outputs":
            sizes = (inputs, 2 * outputs, outputs)
            means = [torch.cat([both, -both]), padded(torch.cat([eye, -eye], 1), bias.new_zeros(outputs))]
        else:
            raise ValueError(
                "KalmanBayesianHead.from_linear: `mode` must be 'copy_negative_inputs', 'copy_negative_outputs' or "
                f"'direct', got {mode!r}."
            )
        head = cls(sizes, **options).to(weight.device)
        for index, mean in enumerate(means):
            head._mean(index).copy_(mean)
        return head

    def _mean(self, index: int) -> Tensor:
        return getattr(self, f"mean_{index}")

    def _covariance(self, index: int) -> Tensor:
        return getattr(self, f"covariance_{index}")

    # -- forward -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, features: Tensor) -> HeadPrediction:
        """What the head says about features (B, inputs)."""
        z, v, _ = self._propagate(features)[-1][2]
        if self.likelihood == "gaussian":
            return HeadPrediction(z, v, None, None)
        return HeadPrediction(z, v, *softmax_moments(z, v, self.softmax_order))

    def _propagate(self, features: Tensor) -> list[tuple[_Pair, _Triple, _Triple]]:
        """Moments on the way up, for every layer: before its ReLU, behind it (`relu_moments`), of its outputs."""
        z, v = features.float(), torch.zeros_like(features, dtype=torch.float32)
        kept = []
        for index in range(len(self.sizes) - 1):
            before = (z, v)
            behind = relu_moments(z, v) if index else (z, v, v)
            z, v, own = self._linear(index, behind[0], behind[1])
            kept.append((before, behind, (z, v, own)))
        return kept

    def _linear(self, index: int, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the outputs (..., N), and the share of the variance that is the weights' own."""
        mean, covariance = self._mean(index), self._covariance(index)
        z, v = with_one(z), torch.cat([v, torch.zeros_like(v[..., :1])], -1)
        if self.covariance == "diagonal":
            own = (z.square() + v) @ covariance.T
        elif self.covariance == "shared":
            own = ((z @ covariance) * z).sum(-1, keepdim=True) + v @ covariance.diagonal()[:, None]
            own = own.expand(*z.shape[:-1], len(mean))
        else:
            own = torch.einsum("...i,nij,...j->...n", z, covariance, z) + v @ covariance.diagonal(dim1=1, dim2=2).T
        return z @ mean.T, v @ mean.square().T + own, own

    # -- learning ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def filter_step(self, features: Tensor, label: Tensor | int) -> float:
        """Learn one sample; the log-likelihood of its label before that, under the predictive distribution.

        Args:
            features: (inputs,).
            label: a class, or (outputs,) values for a Gaussian likelihood.

        Raises:
            ValueError: a wrong shape, features or label that are not finite, a class out of range; the head stays as
                it is.
        """
        label = self._checked(features, label)
        self._predict()
        kept = self._propagate(features)
        score, target, spread = self._observe(kept[-1][2][0], kept[-1][2][1], label)
        # Below the lowest layer that learns nothing has to arrive.
        lowest = next((index for index, prior in enumerate(self.prior) if prior > 0), len(kept))
        for index in reversed(range(lowest, len(kept))):
            before, behind, (z, v, own) = kept[index]
            new = target, spread
            if index > lowest:
                inputs = self._smooth_inputs(index, behind[0], behind[1], z, v, own, *new)
                target, spread = _back_through_relu(before, behind, inputs)
            self._smooth_weights(index, behind[0], z, v, *new)
        return score

    def _checked(self, features: Tensor, label: Tensor | int) -> Tensor:
        if tuple(features.shape) != (self.sizes[0],) or not torch.isfinite(features).all():
            raise ValueError(
                f"KalmanBayesianHead.filter_step: `features` must be {self.sizes[0]} finite numbers, got shape "
                f"{tuple(features.shape)}{'' if torch.isfinite(features).all() else ' with others among them'}."
            )
        label = torch.as_tensor(label, device=features.device)
        if self.likelihood == "gaussian":
            if tuple(label.shape) != (self.sizes[-1],) or not torch.isfinite(label).all():
                raise ValueError(
                    f"KalmanBayesianHead.filter_step: `label` must be {self.sizes[-1]} finite numbers, got {label!r}."
                )
            return label.float()
        if label.shape != () or label.is_floating_point() or not 0 <= int(label) < self.sizes[-1]:
            raise ValueError(
                f"KalmanBayesianHead.filter_step: `label` must be a class from 0 to {self.sizes[-1] - 1}, got "
                f"{label!r}."
            )
        return label

    def _predict(self) -> None:
        for index, prior in enumerate(self.prior):
            scale, shift = passage_of_time(prior, self.process_noise, self.forgetting, self.decay)
            if prior == 0 or (scale, shift) == (1.0, 0.0):
                continue
            own = self._covariance(index)
            if self.covariance == "diagonal":
                own.mul_(scale).add_(shift)
                own.clamp_(max=prior) if self.forgetting < 1 else None
                continue
            own.mul_(scale).diagonal(dim1=-2, dim2=-1).add_(shift)
            if self.forgetting < 1:
                cap_variances(own, prior)

    def _observe(self, z: Tensor, v: Tensor, label: Tensor) -> tuple[float, Tensor, Tensor]:
        """Log-likelihood of the label, and the outputs' corrected means and variances."""
        floor = v.clamp(min=1e-12)
        if self.likelihood == "gaussian":
            error, total = label - z, v + self.noise_variance
            score = -0.5 * (error.square() / total + (2 * math.pi * total).log()).sum().item()
            inflation = self._gate((error.square() / total).sum().item(), len(z))
            gain = v / (v + inflation * self.noise_variance)
            return score, z + self._limited(gain * error, v), v - gain * v
        p = z.softmax(-1)
        predictive = softmax_moments(z, v, self.softmax_order)[0]
        score = log_of(predictive[label]).item()
        error = -p
        error[label] += 1
        if self.output == "fixed_noise":
            jacobian = p.diag() - torch.outer(p, p)
            inner = (jacobian * v) @ jacobian + self.noise_variance * torch.eye(len(p), device=p.device)
            solved = torch.linalg.solve(inner, torch.cat([error[:, None], jacobian * v], 1))
            step, removed = v * (jacobian @ solved[:, 0]), v * (jacobian * solved[:, 1:].T).sum(1)
            return score, z + self._limited(step, v), (v - removed).clamp(min=0)
        loss, entropy, variance = log_loss_innovation(z[None], label[None]).tolist()
        weight = 1 / self._gate((loss - entropy) ** 2 / max(variance, 1e-6), 1)
        mean, spread = self._corrected(z, floor, label, weight)
        return score, z + self._limited(mean - z, v), torch.minimum(spread, floor)

    def _corrected(self, z: Tensor, v: Tensor, label: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Mean and variances of the outputs behind a categorical observation that counts `weight` times."""

        def fit(a: Tensor) -> float:
            return (weight * a.log_softmax(-1)[label] - ((a - z).square() / v).sum() / 2).item()

        a = z
        for _ in range(self.iterations):
            p = a.softmax(-1)
            slope = (z - a) / v - weight * p
            slope[label] += weight
            step, spread = _categorical_solve(p, v, slope, weight)
            if self.iterations == 1:
                return a + step, spread
            # The fit is concave: halved, a Newton step improves it.
            size, before, gain = 1.0, fit(a), (slope @ step).item()
            while fit(a + size * step) < before + 1e-4 * size * gain and size > 1e-6:
                size /= 2
            a = a + size * step
            if gain < 1e-6:
                break
        return a, _categorical_solve(a.softmax(-1), v, torch.zeros_like(a), weight)[1]

    def _gate(self, square: float, degrees: int) -> float:
        if self.gate is None:
            return 1.0
        return max(1.0, square / self._bounds[degrees])

    def _limited(self, step: Tensor, v: Tensor) -> Tensor:
        if self.max_step is None:
            return step
        limit = self.max_step * v.sqrt()
        return step.clamp(-limit, limit)

    def _smooth_weights(self, index: int, mu: Tensor, z: Tensor, v: Tensor, target: Tensor, spread: Tensor) -> None:
        if self.prior[index] == 0:
            return
        mean, covariance, inputs = self._mean(index), self._covariance(index), with_one(mu)
        safe = v.clamp(min=1e-12)
        delta, change = (target - z) / safe, (spread - v).clamp(max=0) / safe.square()
        if self.covariance == "diagonal":
            crossed = covariance * inputs
            mean.add_(crossed * delta[:, None])
            covariance.add_(crossed.square() * change[:, None]).clamp_(min=0)
        elif self.covariance == "shared":
            crossed = covariance @ inputs
            mean.add_(torch.outer(delta, crossed))
            covariance.add_(change.mean() * torch.outer(crossed, crossed))
            covariance.copy_((covariance + covariance.T) / 2)
        else:
            crossed = covariance @ inputs
            mean.add_(crossed * delta[:, None])
            covariance.add_(change[:, None, None] * crossed[:, :, None] * crossed[:, None, :])
            covariance.copy_((covariance + covariance.mT) / 2)

    def _smooth_inputs(
        self, index: int, mu: Tensor, var: Tensor, z: Tensor, v: Tensor, own: Tensor, target: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, safe = self._mean(index)[:, :-1], v.clamp(min=1e-12)
        if self.smoothing == "sums":
            crossed = weights * var
            shift = ((target - z) / safe) @ crossed
            change = (spread - v).clamp(max=0) / safe.square()
            return mu + shift, (var + change @ crossed.square()).clamp(min=0)
        new = spread.clamp(min=1e-12)
        told = (1 / new - 1 / safe).clamp(min=0)
        seen = 1 + told * own
        # In units of the inputs' deviations, so that inputs without variance are no exception.
        scaled = weights * var.sqrt()
        information = scaled.T @ (scaled * (told / seen)[:, None])
        information.diagonal().add_(1)
        lower = torch.linalg.cholesky(information)
        message = scaled.T @ ((target - z) / (new * seen))
        shift = torch.cholesky_solve(message[:, None], lower)[:, 0]
        inverse = torch.cholesky_inverse(lower).diagonal()
        return mu + var.sqrt() * shift, var * inverse.clamp(0, 1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for index in range(len(self.sizes) - 1):
            saved = state_dict.get(f"{prefix}covariance_{index}")
            if saved is None or saved.shape != self._covariance(index).shape:
                continue
            lowest = saved.min() if self.covariance == "diagonal" else torch.linalg.eigvalsh(saved.double()).min()
            if not torch.isfinite(saved).all() or lowest < -1e-5 * saved.abs().max():
                raise ValueError(
                    f"KalmanBayesianHead: `{prefix}covariance_{index}` must be a finite covariance, got one with "
                    f"lowest eigenvalue {float(lowest):.3g}; the head stays as it is."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _categorical_solve(p: Tensor, v: Tensor, right: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """A^{-1} right and the diagonal of A^{-1} for A = diag(1/v) + w (diag p - p p^T).

    A^{-1} = d + w (d p)(d p)^T / (1 - w p^T d p) with d = 1 / (1/v + w p); as p sums to 1 the denominator is
    sum_i p_i / (1 + w p_i v_i), which does not cancel.
    """
    shrink = 1 + weight * p * v
    d = v / shrink
    turned, rest = d * p, weight / (p / shrink).sum()
    return d * right + turned * (rest * (turned @ right)), d + rest * turned.square()


def _back_through_relu(before: _Pair, behind: _Triple, corrected: _Pair) -> _Pair:
    """Corrected moments before a ReLU from those behind it; nothing comes back where it lets nothing through."""
    mean, variance, cross = behind
    gain = torch.where(variance > 1e-12, cross / variance.clamp(min=1e-12), torch.zeros_like(variance))
    target = before[0] + gain * (corrected[0] - mean)
    spread = (before[1] + gain.square() * (corrected[1] - variance)).clamp(min=0)
    return target, torch.minimum(spread, before[1])


def log_of(probabilities: Tensor) -> Tensor:
    """Logarithms of probabilities, of 1e-30 where they have underflowed."""
    return probabilities.clamp(min=1e-30).log()


def with_one(z: Tensor) -> Tensor:
    """Inputs with a constant 1 behind them, for the bias."""
    return torch.cat([z, torch.ones_like(z[..., :1])], -1)
