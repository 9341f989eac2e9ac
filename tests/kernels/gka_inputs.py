"""Random problems, and two oracles that share no recursion with the operator."""

import torch

from kalman_kernels import GKASolver, GKAState, Segments, gated_kalmanet

NAMES = (
    "query",
    "key",
    "value",
    "log_decay",
    "solution_mix",
    "key_log_decay",
    "input_gate",
    "initial_state.key_gram",
    "initial_state.value_key",
)
EXACT = GKASolver("exact")


def make_inputs(
    length, batch=2, heads=4, key_heads=2, value_heads=1, width=8, value_width=6, dtype=torch.float64, seed=0
):
    """Inputs in the order of NAMES: unit queries and keys, separate decays, positive definite initial Gram matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    gates = (batch, length, heads)
    root = normal(batch, heads, width, width)
    tensors = (
        torch.nn.functional.normalize(normal(*gates, width), dim=-1),
        torch.nn.functional.normalize(normal(batch, length, key_heads, width), dim=-1),
        normal(batch, length, value_heads, value_width),
        -0.2 * uniform(*gates),
        uniform(*gates),
        -0.3 * uniform(*gates),
        uniform(*gates),
        root @ root.mT / width,
        normal(batch, heads, value_width, width),
    )
    return [t.to(dtype) for t in tensors]


def call(inputs, solver=EXACT, segments=None, implementation="torch", **overrides):
    arguments = {
        "key_log_decay": inputs[5],
        "input_gate": inputs[6],
        "initial_state": GKAState(inputs[7], inputs[8]),
        **overrides,
    }
    return gated_kalmanet(*inputs[:5], solver=solver, segments=segments, implementation=implementation, **arguments)


def gradients(inputs, cotangents, **options):
    """Gradients of every input; that of the symmetric Gram matrix is symmetrised, as documented."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs, state = call(leaves, **options)
    scalar = sum((a * b).sum() for a, b in zip((outputs, *state), cotangents, strict=True))
    result = list(torch.autograd.grad(scalar, leaves))
    result[7] = (result[7] + result[7].mT) / 2
    return result


def make_cotangents(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, length, heads, _ = inputs[0].shape
    shapes = ((batch, length, heads, inputs[2].shape[-1]), inputs[7].shape, inputs[8].shape)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(inputs[0]) for shape in shapes]


def make_segments(kind, batch, length, seed=2):
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, length, generator=generator) < 0.1
    valid = torch.rand(batch, length, generator=generator) > 0.3
    return {
        "plain": None,
        "packed": Segments(reset=reset),
        "padded": Segments(valid=valid),
        "packed+padded": Segments(reset=reset, valid=valid),
    }[kind]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def least_squares(inputs, b, t, h, ridge_ratio):
    """y at (b, t, h) for solution_mix 1 and one shared decay, as a weighted least-squares problem over the prefix.

    Stacks sqrt(weight) [k_i | v_i] and the square root of the ridge and lets `torch.linalg.lstsq` minimise.
    """
    query, key, value, log_decay, _, _, gate = inputs[:7]
    heads = query.shape[2]
    keys = key[b, : t + 1, h // (heads // key.shape[2])] * gate[b, : t + 1, h, None]
    values = value[b, : t + 1, h // (heads // value.shape[2])] * gate[b, : t + 1, h, None]
    weights = torch.stack([log_decay[b, i + 1 : t + 1, h].sum().exp() for i in range(t + 1)])
    gram = torch.einsum("t,td,te->de", weights, keys, keys)
    ridge = ridge_ratio * torch.linalg.matrix_norm(gram)
    rows = torch.cat([weights.sqrt()[:, None] * keys, ridge.sqrt() * torch.eye(keys.shape[1], dtype=keys.dtype)])
    targets = torch.cat([weights.sqrt()[:, None] * values, values.new_zeros(keys.shape[1], values.shape[1])])
    solution = torch.linalg.lstsq(rows, targets).solution  # (Dk, Dv)
    return query[b, t, h] @ solution, keys, values, weights, ridge
