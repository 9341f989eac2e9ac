"""Gated KalmaNet, one token at a time: the specification (README.md, eqs. 1-6). Any float dtype, no speed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..segments import Segments

__all__ = ["CG_FLOOR", "GKASolver", "GKAState", "gated_kalmanet_reference", "solve_ridge"]

# Conjugate gradients stop for a row whose squared residual is this many squared machine epsilons of the right side's.
CG_FLOOR = 0.01


class GKAState(NamedTuple):
    """What a Gated KalmaNet layer remembers of everything it has read.

    Args:
        key_gram: (B, H, Dk, Dk), the decayed Gram matrix of the keys, H_t of the paper. Symmetric; a gradient with
            respect to it is the symmetric one.
        value_key: (B, H, Dv, Dk), the decayed cross moments of values and keys, U_t of the paper.
    """

    key_gram: Tensor
    value_key: Tensor


class GKASolver(NamedTuple):
    """How x_t = (H_t + lambda_t I)^-1 q_t is computed, lambda_t = ridge_ratio * ||H_t||_F.

    Args:
        method: "chebyshev" is the literal polynomial of arXiv 2511.21016 with `iterations` products after its free
            start (what its checkpoints were trained with); "cg" is conjugate gradients, which reaches the error of 30
            Chebyshev steps in at most 17; "exact" is a direct solve, which ignores `iterations`.
        iterations: matrix-vector products. 0 skips the solve (x_t = q_t): gated linear attention.
        ridge_ratio: lambda_t / ||H_t||_F, > 0. It bounds the condition number by (1 + ridge_ratio) / ridge_ratio.
        ridge_gradient: whether gradients flow through lambda_t's dependence on the keys.
        tolerance: of "cg": a token is done where ||q_t - (H_t + lambda_t I) x_t|| is this fraction of ||q_t||, and the
            solve where all tokens are, within `iterations`. 0 goes on to the rounding errors of the data type. The
            backward pass solves to the same tolerance.
    """

    method: Literal["chebyshev", "cg", "exact"] = "chebyshev"
    iterations: int = 30
    ridge_ratio: float = 0.02
    ridge_gradient: bool = True
    tolerance: float = 0.0

    def squared_tolerance(self, floor: float) -> float:
        """Squared relative residual at which a row stops: no lower than `floor`, what the data type allows."""
        return max(floor, self.tolerance**2)

    def check(self, name: str) -> None:
        """Raise `ValueError` when a field of the solver handed to the operator `name` is out of its range."""
        if self.method not in ("chebyshev", "cg", "exact"):
            raise ValueError(f"{name}: `solver.method` must be 'chebyshev', 'cg' or 'exact', got {self.method!r}.")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"{name}: `solver.iterations` must be an integer >= 0, got {self.iterations!r}.")
        if not self.ridge_ratio > 0:
            raise ValueError(
                f"{name}: `solver.ridge_ratio` must be > 0 (it keeps the solve well conditioned), got "
                f"{self.ridge_ratio!r}."
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"{name}: `solver.tolerance` must be >= 0 and < 1, got {self.tolerance!r}.")
        if self.tolerance and self.method != "cg":
            raise ValueError(
                f"{name}: `solver.tolerance` is of solver.method='cg', got {self.tolerance!r} with {self.method!r}."
            )


def solve_ridge(gram: Tensor, query: Tensor, norm: Tensor, ridge: Tensor, solver: GKASolver) -> Tensor:
    """Solve (gram + ridge I) x = query for gram (..., D, D), query (..., D), norm = ||gram||_F and ridge (...).

    Where `norm` is 0 there is nothing to invert and x is 0.
    """
    if solver.iterations == 0 and solver.method != "exact":
        return query
    empty = (norm == 0)[..., None]
    norm, ridge = norm[..., None], ridge[..., None]

    def product(x: Tensor) -> Tensor:
        return (gram @ x[..., None])[..., 0] + ridge * x

    if solver.method == "exact":
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        shifted = gram + torch.where(empty, 1, ridge)[..., None] * eye
        x = torch.linalg.solve(shifted, query)
    elif solver.method == "chebyshev":
        # Spectrum in [ridge, ridge + norm]; README eq. 5.
        step = 2 / torch.where(empty, 1, 2 * ridge + norm)
        quarter_rho_sq = (step * norm / 4) ** 2
        omega = torch.full_like(norm, 2.0)
        previous, x = torch.zeros_like(query), step * query
        for _ in range(solver.iterations):
            omega = 1 / (1 - quarter_rho_sq * omega)
            following = x - omega * step * (product(x) - query) + (omega - 1) * (x - previous)
            previous, x = x, following
    else:
        x, residual, direction = torch.zeros_like(query), query, query
        rr = (residual * residual).sum(-1, keepdim=True)
        done = solver.squared_tolerance(CG_FLOOR * torch.finfo(rr.dtype).eps ** 2) * rr
        for _ in range(solver.iterations):
            if solver.tolerance and not bool((rr > done).any()):
                break
            image = product(direction)
            curvature = (direction * image).sum(-1, keepdim=True)
            active = (rr > done) & (curvature > 0)
            step = torch.where(active, rr / torch.where(active, curvature, 1), 0)
            x, residual = x + step * direction, residual - step * image
            rr_next = (residual * residual).sum(-1, keepdim=True)
            direction = residual + torch.where(active, rr_next / torch.where(active, rr, 1), 0) * direction
            rr = rr_next
    return torch.where(empty, 0, x)


def gated_kalmanet_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    solution_mix: Tensor | None = None,
    *,
    key_log_decay: Tensor | None = None,
    input_gate: Tensor | None = None,
    solver: GKASolver = GKASolver(),
    scale: float | None = None,
    initial_state: GKAState | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, GKAState]:
    """Arguments, shapes and result as in `gated_kalmanet`; computed in the dtype of `query`."""
    batch, length, heads, width = query.shape
    zeros = query.new_zeros(batch, length, heads)
    ones = torch.ones_like(zeros)
    log_decay = zeros if log_decay is None else log_decay
    key_log_decay = log_decay if key_log_decay is None else key_log_decay
    solution_mix = ones if solution_mix is None else solution_mix
    input_gate = ones if input_gate is None else input_gate
    factor = width**-0.5 if scale is None else scale
    segments = segments or Segments()
    key = key.repeat_interleave(heads // key.shape[2], dim=2) * input_gate[..., None]
    value = value.repeat_interleave(heads // value.shape[2], dim=2) * input_gate[..., None]
    if initial_state is None:
        gram = query.new_zeros(batch, heads, width, width)
        value_key = query.new_zeros(batch, heads, value.shape[-1], width)
    else:
        gram, value_key = initial_state
    out = []
    for t in range(length):
        if segments.reset is not None:
            keep = ~segments.reset[:, t, None, None, None]
            gram, value_key = torch.where(keep, gram, 0), torch.where(keep, value_key, 0)
        q, k, v = query[:, t], key[:, t], value[:, t]
        next_gram = key_log_decay[:, t].exp()[..., None, None] * gram + k[..., :, None] * k[..., None, :]
        next_value_key = log_decay[:, t].exp()[..., None, None] * value_key + v[..., :, None] * k[..., None, :]
        token = None if segments.valid is None else segments.valid[:, t, None, None, None]
        gram = next_gram if token is None else torch.where(token, next_gram, gram)
        value_key = next_value_key if token is None else torch.where(token, next_value_key, value_key)
        squared = (gram * gram).sum((-1, -2))
        # The square root of 0 has no finite gradient; an empty state contributes none.
        norm = torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
        ridge = solver.ridge_ratio * (norm if solver.ridge_gradient else norm.detach())
        x = solve_ridge(gram, q, norm, ridge, solver)
        if solver.method == "cg" and solver.iterations > 0 and torch.is_grad_enabled():
            # Differentiating through conjugate gradients divides by vanishing residuals: the value is theirs, the
            # gradient that of the equation they solve.
            exact = solve_ridge(gram, q, norm, ridge, solver._replace(method="exact"))
            x = exact + (x - exact).detach()
        mixed = q + solution_mix[:, t, :, None] * (x - q)
        y = factor * (value_key @ mixed[..., None])[..., 0]
        out.append(y if token is None else torch.where(token[..., 0], y, 0))
    return torch.stack(out, dim=1), GKAState(gram, value_key)
