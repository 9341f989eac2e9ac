"""Every way of reading the same tokens gives the same logits: to 1e-5 in float32, to 1e-9 in float64.

In float32 with the weights of a fresh model. With weights five times as large the norm behind a solve amplifies
rounding errors (measured: 9e-5 of logits of 2); float64 shows that there is nothing else.
"""

import pytest
import torch
from tiny import SHAPES, tiny_model, tokens
from torch.nn import functional as F

LENGTH = 130
NAMES = ["gka pure", "gka hybrid", "kla pure", "kla hybrid"]
# 4 taps; chunks of the torch path and the kernels have 64 tokens, the reference goes token by token.
CHUNKS = [1, 2, 3, 4, 5, 63, 64, 65]
WAYS = [
    *((("reference", torch.float32), chunk) for chunk in (1, 4, 65)),
    *((("torch", dtype), chunk) for dtype in (torch.float32, torch.float64) for chunk in CHUNKS),
    *(pytest.param(("triton", torch.float32), chunk, marks=pytest.mark.gpu) for chunk in CHUNKS),
]


@pytest.fixture
def built(request):
    implementation, dtype = request.param
    device = "cuda" if implementation == "triton" else "cpu"

    def build(name):
        # More steps than the width of a head: the solve is exact.
        own = {"solver_iterations": 24} if name.startswith("gka") else {}
        own["initializer_range"] = 0.02 if dtype == torch.float32 else 0.1
        model = tiny_model(SHAPES[name], implementation=implementation, sliding_window=16, **own)
        return model.to(device, dtype), device

    return build


def in_chunks(model, ids, chunk, **extra):
    cache, logits = None, []
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            piece = {
                n: t[:, : start + chunk] if n == "attention_mask" else t[:, start : start + chunk]
                for n, t in extra.items()
            }
            out = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, **piece)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= (1e-5 if found.dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("built", "chunk"), WAYS, indirect=["built"])
def test_chunks_and_steps_are_one_forward(built, name, chunk):
    model, device = built(name)
    ids = tokens(2, LENGTH).to(device)
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(in_chunks(model, ids, chunk), whole)
        # A prompt of `chunk` tokens, then one by one.
        out = model(ids[:, :chunk], use_cache=True)
        for t in range(chunk, chunk + 6):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            assert_close(out.logits[:, 0], whole[:, t])


@pytest.mark.parametrize("name", ["gka pure", "gka opening", "kla pure", "kla opening"])
@pytest.mark.parametrize(("built", "chunk"), WAYS, indirect=["built"])
def test_padded_rows_in_chunks_are_the_plain_rows(built, name, chunk):
    """Left padding in one row, right padding in the other; without sliding layers, whose cache counts padding."""
    model, device = built(name)
    ids, pad = tokens(2, LENGTH - 6).to(device), 6
    padded = torch.stack([F.pad(ids[0], (pad, 0)), F.pad(ids[1], (0, pad))])
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids).logits
    found = in_chunks(model, padded, chunk, attention_mask=mask, position_ids=positions)
    assert_close(found[0, pad:], whole[0])
    assert_close(found[1, :-pad], whole[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("built", "chunk"), WAYS, indirect=["built"])
def test_packed_rows_are_the_rows_alone(built, name, chunk):
    model, device = built(name)
    lengths = [chunk, 5, LENGTH - chunk - 5]
    rows = [tokens(1, n, seed=n).to(device) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows], 1)
        packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    assert_close(packed, alone)
    if "pure" in name:
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(device)
        with torch.no_grad():
            for given in ({"cu_seq_lens_q": ends}, {"seq_idx": numbers}):
                assert_close(model(torch.cat(rows, 1), **given).logits, alone)
