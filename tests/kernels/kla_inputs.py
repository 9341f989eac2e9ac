import torch

from kalman_kernels import KLAState, Segments, kalman_linear_attention

NAMES = ("value", "value_precision", "key", "query", "decay", "process_noise", "precision", "information")
RESULTS = ("mean", "variance", "final precision", "final information", *NAMES)
KINDS = ("plain", "packed", "padded", "packed+padded")


def make_inputs(length, batch=2, channels=5, states=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(batch, length, channels),
        0.1 + 2 * uniform(batch, length, channels),
        normal(batch, length, states),
        normal(batch, length, states),
        0.7 + 0.3 * uniform(channels, states),
        0.01 + 0.2 * uniform(channels, states),
        0.5 + uniform(batch, channels, states),
        normal(batch, channels, states),
    )
    return [t.to(dtype) for t in tensors]


def make_segments(kind, batch, length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, length, generator=generator) < 0.15
    valid = torch.rand(batch, length, generator=generator) > 0.3
    return {
        "plain": None,
        "packed": Segments(reset=reset),
        "padded": Segments(valid=valid),
        "packed+padded": Segments(reset=reset, valid=valid),
    }[kind]


def call(inputs, **options):
    return kalman_linear_attention(*inputs[:6], initial_state=KLAState(*inputs[6:]), **options)


def differentiated(inputs, **options):
    """Outputs, final state and the eight gradients under fixed random cotangents."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    mean, variance, state = call(leaves, **options)
    results = (mean, variance, *state)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    scalar = sum((a * b).sum() for a, b in zip(results, cotangents, strict=True))
    return [*results, *torch.autograd.grad(scalar, leaves)]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()
