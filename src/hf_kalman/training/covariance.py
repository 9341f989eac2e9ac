r"""What a filter believes about one parameter tensor: covariance structures with one interface.

For parameters theta ~ N(m, P) and observations whose log-likelihood has the gradient g (summed over the observations)
and the Fisher information Q^T Q, with rows q of Q a factor of it (sampled-label gradients; for a Gaussian observation
y = H theta + noise of covariance R, Q = R^{-1/2} H):

    predict   P <- (gamma^2 P + (1 - gamma^2) P_0) / lambda + q I        gamma^2 = 1 - decay
    update    P <- (P^{-1} + Q^T Q)^{-1},   theta <- theta + P g

The gain of a Kalman filter is K = P H^T R^{-1} with the updated P, so that P g = K (y - H theta): the innovation form
and this one are the same step. [standard filtering theory; for exponential families: Ollivier, arXiv 1703.00209]

States are float32 whatever the parameter's dtype (float64 on request), for a covariance in 16 bits loses its sign.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "STRUCTURES",
    "ColumnBlockCovariance",
    "Covariance",
    "DiagonalCovariance",
    "FullCovariance",
    "KroneckerCovariance",
    "LowRankCovariance",
    "RowBlockCovariance",
]


# How far above the prior's a variance of `LowRankCovariance` may rise.
_CEILING = 100.0


def passage_of_time(prior: Any, process_noise: float, forgetting: float, decay: float) -> tuple[float, Any]:
    """(a, b) of P <- a P + b I = ((1 - decay) P + decay P_0) / forgetting + process_noise, for P_0 = `prior` I."""
    return (1 - decay) / forgetting, decay * prior / forgetting + process_noise


def cap_variances(covariance: Tensor, prior: float) -> None:
    """Shrink, in place, directions of (..., n, n) in which a variance exceeds the prior's; it stays positive."""
    over = (prior / covariance.diagonal(dim1=-2, dim2=-1)).clamp(max=1).sqrt()
    covariance.mul_(over[..., :, None] * over[..., None, :])


class Covariance(ABC):
    """Belief about one parameter tensor: the interface of all structures.

    Args:
        shape: of the parameter.
        variance: P_0, prior variance of each entry, in squared units of the parameter; > 0.
        device: where the state is kept.
        dtype: of the state, torch.float32 or torch.float64.

    Raises:
        ValueError: `variance` is not a positive number, or `dtype` is too narrow.
    """

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        variance: float,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not variance > 0 or not math.isfinite(variance):
            raise ValueError(f"{type(self).__name__}: `variance` must be > 0, got {variance!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{type(self).__name__}: `dtype` must be torch.float32 or torch.float64, got {dtype}.")
        self.shape, self.prior_variance = torch.Size(shape), variance
        self.prior: Tensor | None = None
        self.options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.factors: list[Tensor] = []

    def predict(self, process_noise: float = 0.0, forgetting: float = 1.0, decay: float = 0.0) -> None:
        """Let time pass: P <- ((1 - decay) P + decay P_0) / forgetting + process_noise.

        Args:
            process_noise: variance that a step adds, in squared units of the parameter; >= 0. In the long run a step is
                then that of RMSprop with learning rate sqrt(process_noise).
            forgetting: lambda in (0, 1]: weight of the past after a step. Without information P grows without bound.
            decay: in [0, 1]: how far P goes back to the prior's in a step; bounded on both sides.

        Raises:
            ValueError: an argument is out of its range.
        """
        for name, value, fits in (
            ("process_noise", process_noise, process_noise >= 0),
            ("forgetting", forgetting, 0 < forgetting <= 1),
            ("decay", decay, 0 <= decay <= 1),
        ):
            if not fits:
                raise ValueError(f"{type(self).__name__}.predict: `{name}` is out of its range, got {value!r}.")
        prior = self.prior_variance if self.prior is None or not decay else self.prior
        scale, shift = passage_of_time(prior, process_noise, forgetting, decay)
        if isinstance(shift, Tensor) or (scale, shift) != (1.0, 0.0):
            self._predict(scale, shift)

    @torch.no_grad()
    def restart(self, variance: Tensor) -> None:
        """Begin again at a diagonal prior with a variance of each entry's own.

        Args:
            variance: P_0 in the parameter's shape, > 0.

        Raises:
            ValueError: another shape.
        """
        if variance.shape != self.shape:
            raise ValueError(
                f"{type(self).__name__}.restart: `variance` must have shape {tuple(self.shape)}, got "
                f"{tuple(variance.shape)}."
            )
        self.prior = variance.detach().to(**self.options).clone()
        self._restart(self.prior)

    @torch.no_grad()
    def inflate(self, factor: float) -> None:
        """P <- factor P; the prior stays what it is."""
        if factor != 1:
            self._predict(factor, 0.0)

    def accumulate(self, factor: Tensor) -> None:
        """Take in rows of a Fisher factor, of one observation or of many: they count at the next update.

        Args:
            factor: (k, *shape), any float dtype; rows of Q, each in units of one over the parameter's.

        Raises:
            ValueError: another shape.
        """
        if factor.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(
                f"{type(self).__name__}.accumulate: `factor` must have shape (k, {wanted}), got {tuple(factor.shape)}."
            )
        self.factors.append(factor.detach().to(**self.options))

    @torch.no_grad()
    def observe(self, left: Tensor, right: Tensor) -> None:
        """Take in at once the rows left_k right_k^T of a Fisher factor of a matrix: one observation each.

        Args:
            left: (k, rows), any float dtype.
            right: (k, columns).

        Raises:
            ValueError: other shapes.
        """
        if len(self.shape) != 2 or (left.shape[1:], right.shape[1:]) != (self.shape[:1], self.shape[1:]):
            raise ValueError(
                f"{type(self).__name__}.observe: `left` and `right` must be rows of the two sides of "
                f"{tuple(self.shape)}, got {tuple(left.shape)} and {tuple(right.shape)}."
            )
        self._observe(left.detach().to(**self.options), right.detach().to(**self.options))

    def _observe(self, left: Tensor, right: Tensor) -> None:
        self._update(left[:, :, None] * right[:, None, :])

    @torch.no_grad()
    def update(self, gradient: Tensor) -> Tensor:
        """Take in what was accumulated; the step P g, in the state's dtype.

        Args:
            gradient: g, gradient of the summed log-likelihood, of the parameter's shape.

        Raises:
            ValueError: another shape.
        """
        if gradient.shape != self.shape:
            raise ValueError(
                f"{type(self).__name__}.update: `gradient` must have shape {tuple(self.shape)}, got "
                f"{tuple(gradient.shape)}."
            )
        if self.factors:
            if len(rows := torch.cat(self.factors)):
                self._update(rows)
            self.factors = []
        return self.times(gradient.detach().to(**self.options))

    @abstractmethod
    def _predict(self, scale: float, shift: float | Tensor) -> None:
        """P <- scale P + shift I, or + diag(shift) for a shift of the parameter's shape."""

    @abstractmethod
    def _restart(self, variance: Tensor) -> None:
        """P <- diag(variance) for a variance of the parameter's shape."""

    @abstractmethod
    def _update(self, factor: Tensor) -> None:
        """P^{-1} <- P^{-1} + Q^T Q for Q (k, *shape)."""

    @abstractmethod
    def times(self, vector: Tensor) -> Tensor:
        """P v for v of the parameter's shape."""

    @abstractmethod
    def variances(self) -> Tensor:
        """The diagonal of P, in the parameter's shape."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that the belief consists of, by name; they are changed in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, accumulated factors included."""
        own = {name: tensor.clone() for name, tensor in self.state().items()}
        pending = torch.cat(self.factors) if self.factors else torch.empty(0, *self.shape, **self.options)
        prior = {} if self.prior is None else {"prior": self.prior.clone()}
        return {**own, **prior, "factors": pending}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state, bit for bit.

        Raises:
            ValueError: it is the state of another structure or shape.
        """
        own = self.state()
        if state.keys() - {"prior"} != {*own, "factors"} or any(state[n].shape != own[n].shape for n in own):
            found = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: `state` must hold "
                f"{ {name: tuple(tensor.shape) for name, tensor in own.items()} } and factors, got {found}."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.prior = state["prior"].to(**self.options).clone() if "prior" in state else None
        self.factors = [state["factors"].to(**self.options)] if len(state["factors"]) else []


class FullCovariance(Covariance):
    """Every entry with every other: n^2 numbers, for small heads. Updates in Joseph's form, which keeps P positive."""

    def __init__(self, shape, variance: float, **options) -> None:
        super().__init__(shape, variance, **options)
        self.covariance = variance * torch.eye(self.shape.numel(), **self.options)

    def _predict(self, scale: float, shift: float | Tensor) -> None:
        self.covariance.mul_(scale).diagonal().add_(shift.flatten() if isinstance(shift, Tensor) else shift)

    def _restart(self, variance: Tensor) -> None:
        self.covariance.copy_(variance.flatten().diag())

    def _update(self, factor: Tensor) -> None:
        self.covariance.copy_(_joseph(self.covariance, factor.flatten(1)))

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        return (self.covariance @ vector.flatten()).view(self.shape)

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        return self.covariance.diagonal().clone().view(self.shape)

    def state(self) -> dict[str, Tensor]:
        """See `Covariance.state`."""
        return {"covariance": self.covariance}


class RowBlockCovariance(Covariance):
    """Entries of a row with one another: rows x columns^2 numbers.

    For y = B x with noise that is independent across outputs the rows of B are independent, too: this is then the exact
    filter, and for a LoRA B (columns = rank) a cheap one. A vector has rows of one entry.

    Raises:
        ValueError: the parameter is a single number.
    """

    def __init__(self, shape, variance: float, **options) -> None:
        super().__init__(shape, variance, **options)
        if not self.shape:
            raise ValueError("RowBlockCovariance: `shape` must have at least 1 dimension, got ().")
        rows, width = self.shape[0], self.shape[1:].numel()
        self.covariance = (variance * torch.eye(width, **self.options)).repeat(rows, 1, 1)

    def _predict(self, scale: float, shift: float | Tensor) -> None:
        own = self._blocks(shift) if isinstance(shift, Tensor) else shift
        self.covariance.mul_(scale).diagonal(dim1=-2, dim2=-1).add_(own)

    def _restart(self, variance: Tensor) -> None:
        self.covariance.copy_(torch.diag_embed(self._blocks(variance)))

    def _blocks(self, entries: Tensor) -> Tensor:
        """Entries of a tensor of the parameter's shape, (blocks, entries of a block)."""
        return entries.reshape(len(entries), -1)

    def _update(self, factor: Tensor) -> None:
        self.covariance.copy_(_joseph(self.covariance, factor.view(*factor.shape[:2], -1).transpose(0, 1)))

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        return (self.covariance @ vector.reshape(len(vector), -1, 1)).view(self.shape)

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clone().view(self.shape)

    def state(self) -> dict[str, Tensor]:
        """See `Covariance.state`."""
        return {"covariance": self.covariance}


class ColumnBlockCovariance(RowBlockCovariance):
    """Entries of a column with one another: columns x rows^2 numbers.

    It is to a LoRA A (rows = rank) what `RowBlockCovariance` is to a B.

    Raises:
        ValueError: the parameter has fewer than two dimensions.
    """

    def __init__(self, shape, variance: float, **options) -> None:
        if len(shape) < 2:
            raise ValueError(f"ColumnBlockCovariance: `shape` must have at least 2 dimensions, got {tuple(shape)}.")
        super().__init__((math.prod(shape[1:]), shape[0]), variance, **options)
        self.shape = torch.Size(shape)

    def _blocks(self, entries: Tensor) -> Tensor:
        return entries.flatten(1).T

    def _update(self, factor: Tensor) -> None:
        super()._update(factor.flatten(2).mT)

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        return (self.covariance @ self._blocks(vector)[..., None])[..., 0].T.reshape(self.shape)

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).T.reshape(self.shape)


class DiagonalCovariance(Covariance):
    """Every entry on its own: n numbers. Kept as precision, which only ever grows in an update.

    The information of an update is the diagonal of Q^T Q: what maximises the evidence bound among diagonal Gaussians
    (the variational form of the decoupled extended Kalman filter).
    """

    def __init__(self, shape, variance: float, **options) -> None:
        super().__init__(shape, variance, **options)
        self.precision = torch.full(self.shape, 1 / variance, **self.options)

    def _predict(self, scale: float, shift: float | Tensor) -> None:
        self.precision.copy_(1 / (scale / self.precision + shift))

    def _restart(self, variance: Tensor) -> None:
        self.precision.copy_(1 / variance)

    def _update(self, factor: Tensor) -> None:
        self.precision.add_(factor.square().sum(0))

    def _observe(self, left: Tensor, right: Tensor) -> None:
        self.precision.add_(left.square().T @ right.square())

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        return vector / self.precision

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        return 1 / self.precision

    def state(self) -> dict[str, Tensor]:
        """See `Covariance.state`."""
        return {"precision": self.precision}


class KroneckerCovariance(Covariance):
    r"""Entries on their own in a basis that is a Kronecker product: rows^2 + columns^2 + rows x columns numbers.

        precision   Lambda = (U kron V) diag(D) (U kron V)^T       U (rows, rows), V (columns, columns), D > 0
        predict     1/D <- a / D + b                               exact, as the basis stays
        update      D <- D + sum_k (U^T Q_k V)^2                   the diagonal of Q^T Q in this basis
        refresh     U, V <- eigenvectors of sum Q Q^T, sum Q^T Q;  D <- diagonal of Lambda in the new basis

    Where the Fisher information is a Kronecker product its eigenvectors are this basis, and nothing is left out; for
    one number for all entries the basis does not matter. D only grows in an update.
    [eigenvalue-corrected Kronecker factors: George et al., arXiv 1806.03884; the filter on them is ours]

    Args:
        shape: see `Covariance`; all dimensions but the first are one.
        variance: see `Covariance`.
        refresh: updates between two changes of the basis, >= 1.
        options: `device` and `dtype` of `Covariance`.

    Raises:
        ValueError: the parameter is a single number, or `refresh` is below 1.
    """

    def __init__(self, shape, variance: float, *, refresh: int = 50, **options) -> None:
        super().__init__(shape, variance, **options)
        if not self.shape:
            raise ValueError("KroneckerCovariance: `shape` must have at least 1 dimension, got ().")
        if refresh < 1:
            raise ValueError(f"KroneckerCovariance: `refresh` must be at least 1, got {refresh!r}.")
        self.refresh = refresh
        rows, columns = self.shape[0], self.shape[1:].numel()
        self.rows, self.columns = (torch.zeros(n, n, **self.options) for n in (rows, columns))
        self.row_basis, self.column_basis = (torch.eye(n, **self.options) for n in (rows, columns))
        self.precision = torch.full((rows, columns), 1 / variance, **self.options)
        self.updates = torch.zeros((), dtype=self.options["dtype"])

    def _predict(self, scale: float, shift: float | Tensor) -> None:
        if isinstance(shift, Tensor):
            # The diagonal of diag(shift) in this basis.
            shift = self.row_basis.square().T @ shift.reshape(self.precision.shape) @ self.column_basis.square()
        self.precision.copy_(1 / (scale / self.precision + shift))
        # What is forgotten of the precision is forgotten of the basis, too; a prior that returns forgets as much.
        weight = 1 / scale if scale >= 1 else scale
        self.rows.mul_(weight)
        self.columns.mul_(weight)

    def _restart(self, variance: Tensor) -> None:
        for tensor in (self.rows, self.columns, self.updates):
            tensor.zero_()
        for basis in (self.row_basis, self.column_basis):
            basis.copy_(torch.eye(len(basis), **self.options))
        self.precision.copy_(1 / variance.reshape(self.precision.shape))

    def _update(self, factor: Tensor) -> None:
        factor = factor.flatten(2) if factor.dim() > 2 else factor[..., None]
        self.rows.add_((factor @ factor.mT).sum(0))
        self.columns.add_((factor.mT @ factor).sum(0))
        self.precision.add_((self.row_basis.T @ factor @ self.column_basis).square().sum(0))
        self._change_basis()

    def _observe(self, left: Tensor, right: Tensor) -> None:
        self.rows.add_(left.T @ (left * right.square().sum(1, keepdim=True)))
        self.columns.add_(right.T @ (right * left.square().sum(1, keepdim=True)))
        self.precision.add_((left @ self.row_basis).square().T @ (right @ self.column_basis).square())
        self._change_basis()

    def _change_basis(self) -> None:
        self.updates += 1
        if self.updates % self.refresh:
            return
        turns = []
        for basis, products in ((self.row_basis, self.rows), (self.column_basis, self.columns)):
            new = torch.linalg.eigh(products)[1]
            turns.append((new.T @ basis).square())
            basis.copy_(new)
        self.precision.copy_(turns[0] @ self.precision @ turns[1].T)

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        turned = self.row_basis.T @ vector.reshape(self.precision.shape) @ self.column_basis
        return (self.row_basis @ (turned / self.precision) @ self.column_basis.T).view(self.shape)

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        inverse = 1 / self.precision
        return (self.row_basis.square() @ inverse @ self.column_basis.square().T).view(self.shape)

    def state(self) -> dict[str, Tensor]:
        """See `Covariance.state`."""
        names = ("rows", "columns", "row_basis", "column_basis", "precision", "updates")
        return {name: getattr(self, name) for name in names}


class LowRankCovariance(Covariance):
    r"""Precision of diagonal plus low rank, Y + W W^T with W (n, rank): (rank + 1) n numbers.

        predict   Y' = D / (1 + b D),  W' = (Y'/D) V chol[(I + b V^T (Y'/D) V)^{-1}],  D = Y / a,  V = W / sqrt(a)
        update    [W, Q^T] = U S O^T;  W <- the `rank` largest U S;  Y <- Y + sum of the squares of the others' rows

    for P <- a P + b I. Predicting is exact; updating is until `rank` is used up, and what is cut off stays in the
    diagonal, so that no direction loses its gain. The singular vectors come from the Gram matrix of rank + k columns.
    Under forgetting Y fades where nothing is observed; it stays at 1 / (100 P_0) or more, since P v is a difference of
    terms of the size of 1 / Y. [LO-FI: Chang et al., arXiv 2305.19535]

    Args:
        shape: see `Covariance`.
        variance: see `Covariance`.
        rank: columns of W, >= 1.
        options: `device` and `dtype` of `Covariance`.

    Raises:
        ValueError: `rank` is below 1.
    """

    def __init__(self, shape, variance: float, *, rank: int = 10, **options) -> None:
        super().__init__(shape, variance, **options)
        if rank < 1:
            raise ValueError(f"LowRankCovariance: `rank` must be at least 1, got {rank!r}.")
        size = self.shape.numel()
        self.diagonal = torch.full((size,), 1 / variance, **self.options)
        self.factor = torch.zeros(size, min(rank, size), **self.options)

    def _predict(self, scale: float, shift: float | Tensor) -> None:
        shift = shift.flatten() if isinstance(shift, Tensor) else shift
        if scale == 0:  # All of it is the prior again.
            self.diagonal.copy_(1 / torch.as_tensor(shift))
            self.factor.zero_()
            return
        wide, factor = self.diagonal / scale, self.factor / math.sqrt(scale)
        diagonal = wide / (1 + shift * wide)
        shrunk = (diagonal / wide)[:, None] * factor
        eye = torch.eye(factor.shape[1], **self.options)
        # (L L^T)^{-1} = L^{-T} L^{-1}: the factor of an inverse without the inverse.
        weighted = shift[:, None] * shrunk if isinstance(shift, Tensor) else shift * shrunk
        lower = torch.linalg.cholesky(eye + factor.T @ weighted)
        self.factor.copy_(torch.linalg.solve_triangular(lower, shrunk.T, upper=False).T)
        prior = self.prior_variance if self.prior is None else self.prior.flatten()
        self.diagonal.copy_(torch.maximum(diagonal, 1 / (_CEILING * torch.as_tensor(prior))))

    def _restart(self, variance: Tensor) -> None:
        self.diagonal.copy_(1 / variance.flatten())
        self.factor.zero_()

    def _update(self, factor: Tensor) -> None:
        wide = torch.cat([self.factor, factor.flatten(1).T], dim=1)
        # Columns times an orthogonal matrix: their outer product stays, and they become orthogonal, largest last.
        _, rotation = torch.linalg.eigh(wide.T @ wide)
        wide = wide @ rotation
        rank = self.factor.shape[1]
        self.factor.copy_(wide[:, -rank:])
        self.diagonal.add_(wide[:, :-rank].square().sum(1))

    def times(self, vector: Tensor) -> Tensor:
        """See `Covariance.times`."""
        flat = vector.flatten()
        scaled, lower = self._woodbury()
        inner = torch.cholesky_solve((scaled.T @ flat)[:, None], lower)[:, 0]
        return (flat / self.diagonal - scaled @ inner).view(self.shape)

    def _woodbury(self) -> tuple[Tensor, Tensor]:
        """Y^{-1} W, and the lower Cholesky factor of I + W^T Y^{-1} W."""
        scaled = self.factor / self.diagonal[:, None]
        eye = torch.eye(scaled.shape[1], **self.options)
        return scaled, torch.linalg.cholesky(eye + self.factor.T @ scaled)

    def variances(self) -> Tensor:
        """See `Covariance.variances`."""
        scaled, lower = self._woodbury()
        removed = torch.linalg.solve_triangular(lower, scaled.T, upper=False).square().sum(0)
        return (1 / self.diagonal - removed).view(self.shape)

    def state(self) -> dict[str, Tensor]:
        """See `Covariance.state`."""
        return {"diagonal": self.diagonal, "factor": self.factor}


def _joseph(covariance: Tensor, factor: Tensor) -> Tensor:
    """(P^{-1} + Q^T Q)^{-1} for P (..., n, n) and Q (..., k, n), positive and symmetric whatever the rounding.

    K = P Q^T (I + Q P Q^T)^{-1};  P <- (I - K Q) P (I - K Q)^T + K K^T
    """
    crossed = covariance @ factor.mT
    inner = factor @ crossed
    inner.diagonal(dim1=-2, dim2=-1).add_(1)
    gain = torch.cholesky_solve(crossed.mT, torch.linalg.cholesky(inner)).mT
    left = -gain @ factor
    left.diagonal(dim1=-2, dim2=-1).add_(1)
    updated = left @ covariance @ left.mT + gain @ gain.mT
    return (updated + updated.mT) / 2


STRUCTURES: dict[str, type[Covariance]] = {
    "diagonal": DiagonalCovariance,
    "row_block": RowBlockCovariance,
    "column_block": ColumnBlockCovariance,
    "kronecker": KroneckerCovariance,
    "low_rank": LowRankCovariance,
    "full": FullCovariance,
}
