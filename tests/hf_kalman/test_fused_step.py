"""The fused generation step against the layer's separate operators, in Triton's interpreter or on a GPU."""

import pytest
import torch
from tiny import tiny_model, tokens

triton_step = pytest.importorskip("kalman_kernels.gka.triton_step")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "published": {},
    "converted": {"use_local_values": True, "value_activation": "identity", "key_activation": "identity"},
    "bare": {"use_value_conv": False, "use_output_gate": False, "use_solution_mix": False, "decay_key_gram": False},
    "two taps": {"linear_conv_kernel_dim": 2},
    "five taps": {"linear_conv_kernel_dim": 5, "use_local_values": True},
    # What is convolved belongs to one head each: a single token takes one launch.
    "own heads": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "own heads, converted": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "use_local_values": True,
        "value_activation": "identity",
        "key_activation": "identity",
        "linear_conv_kernel_dim": 3,
    },
    "own heads, shared values": {"linear_num_key_heads": 4, "use_value_conv": False, "use_output_gate": False},
    "own heads, wide values": {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_value_head_dim": 20},
    "wide keys": {"use_decay": False, "use_input_gate": False, "linear_num_query_heads": 2, "linear_num_key_heads": 4},
}


def continued(model, implementation, ids, mask):
    """Logits of single tokens (one is padding in one row), of three at once and of one more, after a padded prefix."""
    model.config.implementation = "torch"
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        model.config.implementation = implementation
        logits = []
        for step, column in enumerate(([1, 1], [1, 0], [1, 1])):
            mask = torch.cat([mask, torch.tensor(column, device=mask.device)[:, None]], dim=1)
            out = model(ids[:, step : step + 1], attention_mask=mask, past_key_values=cache)
            logits.append(out.logits[torch.tensor(column, device=mask.device).bool()].flatten())
        logits += [model(ids[:, a:b], past_key_values=cache).logits.flatten() for a, b in ((3, 6), (6, 7))]
    return torch.cat(logits).double()


# For tokens side by side: every gate there is and none, as many keys as queries and fewer, values wider than keys.
SIDE_BY_SIDE = ("published", "bare", "own heads, wide values", "wide keys")
# Two kernels for a few tokens: one of them for states as wide as high, on a GPU.
SQUARE = {
    width: {"linear_key_head_dim": width, "linear_value_head_dim": width, **SHAPES["own heads"]} for width in (64, 128)
}
INTERPRETED = (
    *((SHAPES[shape], shape, torch.float32, 2e-5, None) for shape in SHAPES),
    *((SHAPES[shape], shape, torch.float16, 1e-2, None) for shape in ("published", "own heads")),
    *((SHAPES[shape], shape, torch.float16, 1e-2, "few") for shape in SIDE_BY_SIDE),
    *((SHAPES[shape], shape, torch.float16, 1e-2, "chunk") for shape in SIDE_BY_SIDE[:2]),
)
COMPILED = (
    *((SHAPES[shape], shape, torch.float32, 2e-5, None) for shape in SHAPES),
    *((SHAPES[shape], shape, torch.float16, 1e-2, way) for way in (None, "few", "chunk") for shape in SHAPES),
    *(
        (options | SQUARE[width], f"own heads, {width} wide", torch.float16, 1e-2, "few")
        for width in SQUARE
        for options in SHAPES.values()
        if "linear_num_query_heads" not in options
    ),
)


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "bound", "crowded", "gpu"),
    [
        *(pytest.param(*case, False, id="-".join(map(str, case[1:]))) for case in INTERPRETED),
        *(pytest.param(*case, True, marks=pytest.mark.gpu) for case in COMPILED),
    ],
)
def test_fused_step_is_the_layer(options, shape, dtype, bound, crowded, gpu, monkeypatch):
    if gpu != torch.cuda.is_available():
        pytest.skip("runs compiled on a GPU, interpreted elsewhere")
    if crowded:
        # As with many rows: several tokens at once, and programs that prepare several rows.
        monkeypatch.setattr(triton_step, "way", lambda length, *_: crowded if length > 1 else "each")
        monkeypatch.setattr(triton_step, "PREPARE_PROGRAMS", 1)
    model = tiny_model(["linear_attention"], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms start at one and hide a weight that is left out.
                parameter += 0.5 * torch.rand_like(parameter)
    model = model.to(DEVICE, dtype)
    ids = tokens(2, 9).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = continued(model, "torch", ids, mask)
    launched, start = [], triton_step._launch
    monkeypatch.setattr(triton_step, "_launch", lambda *a: (launched.append(a[-1]["CONVOLVES"]), start(*a))[1])
    found = continued(model, "triton", ids, mask)
    # Heads that share nothing take one launch for a token.
    alone = shape.startswith("own heads")
    assert launched == [alone, alone, alone, False, alone]
    assert ((found - expected).norm() / expected.norm()).item() <= bound


def test_gradients_through_a_step_are_not_lost():
    model = tiny_model(["linear_attention"], implementation="triton").to(DEVICE)
    model.model.embed_tokens.requires_grad_(False)
    ids = tokens(2, 9).to(DEVICE)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].mixer.q_proj.weight.grad.abs().sum() > 0
