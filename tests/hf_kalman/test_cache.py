import copy

import pytest
import torch
import transformers
from packaging import version
from tiny import HYBRID, HYBRIDS, KLA_HYBRID, PURE, PURES, SHAPES, tiny_config, tiny_model, tokens
from transformers import DynamicCache

from hf_kalman import KalmanCacheLayer
from hf_kalman.cache import cache_bytes


def filled(layer_types=HYBRID, length=9, **fields):
    model = tiny_model(layer_types, **fields)
    cache = model(tokens(2, length), use_cache=True).past_key_values
    return model, cache


def test_the_cache_stays_the_hosts_own_class():
    _, cache = filled()
    assert type(cache) is DynamicCache
    assert [isinstance(layer, KalmanCacheLayer) for layer in cache.layers] == [False, True, False, True]


@pytest.mark.parametrize("layer_types", SHAPES.values(), ids=SHAPES)
def test_length_is_counted_with_and_without_attention_layers(layer_types):
    model, cache = filled(layer_types)
    assert cache.get_seq_length() == 9
    model(tokens(2, 4), past_key_values=cache)
    assert cache.get_seq_length() == 13
    assert cache.layers[1].get_max_length() == -1


def test_a_mixer_without_convolution_context_keeps_its_state():
    model = tiny_model(PURE, linear_conv_kernel_dim=1)
    ids = tokens(2, 12)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    out = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids).logits[:, 9:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", HYBRIDS)
def test_batch_methods(family):
    model, _ = filled(HYBRIDS[family])
    ids, following = tokens(2, 9), tokens(2, 3, seed=5)
    rows = torch.tensor([1, 0, 1])

    def continued(change):
        cache = model(ids, use_cache=True).past_key_values
        change(cache)
        return cache

    with torch.no_grad():
        whole = model(torch.cat([ids, following], 1)).logits[:, 9:]
        reordered = continued(lambda c: c.reorder_cache(torch.tensor([1, 0])))
        torch.testing.assert_close(model(following.flip(0), past_key_values=reordered).logits, whole.flip(0))
        selected = continued(lambda c: c.batch_select_indices(rows))
        torch.testing.assert_close(model(following[rows], past_key_values=selected).logits, whole[rows])
        repeated = continued(lambda c: c.batch_repeat_interleave(2))
        twice = following.repeat_interleave(2, 0)
        torch.testing.assert_close(model(twice, past_key_values=repeated).logits, whole.repeat_interleave(2, 0))


@pytest.mark.parametrize("family", PURES)
def test_reset_forgets_and_keeps_addresses(family):
    model, cache = filled(PURES[family])
    addresses = pointers(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(2, 5)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert addresses == pointers(cache)


def test_crop_beyond_what_was_recorded_raises_and_says_what_works():
    model, cache = filled(PURE)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="last 0 tokens, .*run the shorter sequence again"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(tokens(2, 3), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="last 3 tokens, which have been recorded, got -4"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="got 2"):
        cache.layers[0].crop(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match="last 0 tokens"):
        cache.crop(-1)


def skip_where_sliding_layers_record_one_call(name, calls):
    if "hybrid" in name and calls > 1 and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("older sliding-window layers of the host record one call at a time")


def pointers(cache):
    return [s.data_ptr() for s in cache.layers[0].recurrent_states.values() if s is not None]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("calls", [(5,), (1, 1, 1, 1), (3, 1, 2), (70, 1, 4), (2, 66, 3)])
def test_crop_goes_back_exactly(name, calls):
    skip_where_sliding_layers_record_one_call(name, len(calls))
    model, ids = tiny_model(SHAPES[name]), tokens(2, 100)
    last = tokens(2, 4, seed=3)
    for removed in sorted({1, 2, calls[-1], min(5, sum(calls)), min(64, sum(calls) - 1)}):
        with torch.no_grad():
            cache = model(ids[:, :9], use_cache=True).past_key_values
            cache.activate_past_recording()
            end = 9
            for count in calls:
                model(ids[:, end : end + count], past_key_values=cache)
                end += count
            addresses = pointers(cache) if "pure" in name else []
            cache.crop(-removed)
            kept = ids[:, : end - removed]
            assert cache.get_seq_length() == kept.shape[1]
            found = model(last, past_key_values=cache).logits
            # And a second time: what was run again has been recorded again.
            cache.crop(-4)
            again = model(last, past_key_values=cache).logits
            expected = model(torch.cat([kept, last], 1)).logits[:, -4:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=2e-5)
        if addresses:
            assert addresses == pointers(cache)


@pytest.mark.parametrize("name", SHAPES)
def test_a_copied_cache_goes_back_on_its_own(name):
    skip_where_sliding_layers_record_one_call(name, 2)
    model, ids = tiny_model(SHAPES[name]), tokens(2, 20)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[:, 9:15], past_key_values=cache)
        copied = copy.deepcopy(cache)
        copied.crop(-3)
        assert (copied.get_seq_length(), cache.get_seq_length()) == (12, 15)
        whole = model(ids).logits
        for start, which in ((12, copied), (15, cache)):
            found = model(ids[:, start:], past_key_values=which).logits
            torch.testing.assert_close(found, whole[:, start:], rtol=1e-4, atol=2e-5)


def test_a_recording_layer_forgets_what_is_old():
    model, cache = filled(PURE)
    cache.activate_past_recording()
    for _ in range(200):
        model(tokens(2, 1), past_key_values=cache)
    recorded = sum(stretch.tokens for stretch in cache.layers[0].stretches)
    assert 64 <= recorded <= 128
    cache.crop(-64)
    assert cache.get_seq_length() == 9 + 200 - 64


def test_guesses_of_several_tokens_keep_few_copies_and_run_little_again():
    model, cache = filled(PURE)
    cache.activate_past_recording()
    for _ in range(60):
        model(tokens(2, 4), past_key_values=cache)
        assert len(cache.layers[0].stretches) <= 5
    assert 64 <= sum(stretch.tokens for stretch in cache.layers[0].stretches) <= 200
    lengths = []
    model.model.layers[0].mixer.q_proj.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    cache.crop(-1)
    assert lengths == [3]
    cache.crop(-60)
    assert cache.get_seq_length() == 9 + 240 - 61 and len(lengths) == 2


def test_foreign_caches_are_refused():
    model, _ = filled()
    with pytest.raises(ValueError, match=r"must hold one entry per layer \(4\), got 0"):
        model(tokens(2, 3), past_key_values=DynamicCache())
    other = DynamicCache(config=tiny_config(["full_attention"] * 4))
    with pytest.raises(ValueError, match="linear-attention entry for layer 1"):
        model(tokens(2, 3), past_key_values=other)


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        (HYBRID, {}),
        (HYBRID, {"use_local_values": True, "use_value_conv": False}),
        (HYBRID, {"linear_conv_kernel_dim": 1}),
        (KLA_HYBRID, {}),
        (KLA_HYBRID, {"linear_conv_kernel_dim": 0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_what_a_cache_holds(kinds, fields, dtype):
    model = tiny_model(kinds, **fields).to(dtype)
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    held = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, KalmanCacheLayer):
            tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        held += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    assert cache_bytes(model.config, 20, dtype) == held


@pytest.mark.parametrize("name", ["gka pure", "gka hybrid", "kla pure", "kla hybrid"])
def test_caches_that_do_not_fit_are_refused_and_stay_as_they_were(name):
    kinds = SHAPES[name]
    model, cache = filled(kinds)
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match="`past_key_values` holds 2 sequences, but the input has 3; use a new cache"):
        model(tokens(3, 4), past_key_values=cache)
    other = SHAPES[name.replace("gka", "???").replace("kla", "gka").replace("???", "kla")]
    for stranger in (tiny_model(other), tiny_model(kinds, hidden_size=64)):
        with pytest.raises(ValueError, match=f"its states are of a kalman_{kinds.family} model with layers of another"):
            stranger(tokens(2, 4), past_key_values=cache)
    longer = tiny_model(type(kinds)(list(kinds) * 2, kinds.family))
    with pytest.raises(ValueError, match=rf"must hold one entry per layer \({2 * len(kinds)}\), got {len(kinds)}"):
        longer(tokens(2, 4), past_key_values=cache)
    assert cache.get_seq_length() == length
    model(tokens(2, 4), past_key_values=cache)


@pytest.mark.parametrize("name", ["gka pure", "gka hybrid", "kla pure", "kla hybrid"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 9)}, r"`attention_mask` must have shape \(2, 8\).* got \(2, 9\)"),
        ({"attention_mask": torch.ones(3, 8)}, r"`attention_mask` must have shape \(2, 8\).* got \(3, 8\)"),
        ({"position_ids": torch.zeros(2, 7, dtype=torch.long)}, r"`position_ids` must have shape \(2, 8\)"),
        ({"seq_idx": torch.zeros(2, 7, dtype=torch.int32)}, r"`seq_idx` must have shape \(2, 8\), got \(2, 7\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "`cu_seq_lens_q` is of sequences packed into one row"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(SHAPES[name])(tokens(2, 8), **given)


@pytest.mark.parametrize("name", ["gka pure", "kla pure"])
def test_packed_lengths_that_do_not_sum_up_are_refused(name):
    with pytest.raises(ValueError, match=r"`cu_seqlens` must rise from 0 to the length 8, got \[0, 3, 9\]"):
        tiny_model(SHAPES[name])(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 9]))
