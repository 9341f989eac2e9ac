import pytest
import torch

from kalman_kernels import Segments


def test_the_three_ways_of_packing_agree():
    expected = torch.zeros(1, 7, dtype=torch.bool)
    expected[0, [3, 4]] = True
    ways = (
        Segments.from_cu_seqlens(torch.tensor([0, 3, 4, 7], dtype=torch.int32), 7),
        Segments.from_segment_ids(torch.tensor([[0, 0, 0, 1, 2, 2, 2]])),
        Segments.from_position_ids(torch.tensor([[0, 1, 2, 0, 0, 1, 2]])),
    )
    for segments in ways:
        assert torch.equal(segments.reset, expected)
        assert segments.valid is None
    assert torch.equal(ways[0].numbers(), torch.tensor([[0, 0, 0, 1, 2, 2, 2]]))


def test_mask():
    segments = Segments.from_mask(torch.tensor([[0, 1, 1]]))
    assert torch.equal(segments.valid, torch.tensor([[False, True, True]]))
    assert segments.numbers() is None


@pytest.mark.parametrize("offsets", [[0, 3, 6], [1, 7], [0, 5, 3, 7]])
def test_offsets_that_do_not_span_the_row(offsets):
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to the length 7"):
        Segments.from_cu_seqlens(torch.tensor(offsets), 7)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (Segments.from_mask, "attention_mask"),
        (Segments.from_segment_ids, "segment_ids"),
        (Segments.from_position_ids, "position_ids"),
        (lambda t: Segments.from_cu_seqlens(t[None, None], 3), "cu_seqlens"),
    ],
)
def test_refuses_other_shapes(build, name):
    with pytest.raises(ValueError, match=name):
        build(torch.zeros(3, dtype=torch.int64))
