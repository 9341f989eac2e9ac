import copy

import pytest
import torch
import transformers
from packaging import version
from tiny import OPENING, SHAPES, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

# Older sliding-window layers of the host record one call at a time.
SLIDES_AND_RECORDS = version.parse(transformers.__version__) >= version.parse("5.23")
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(params=SHAPES)
def model(request):
    model = tiny_model(SHAPES[request.param])
    model.generation_config.eos_token_id = None
    return model


def test_greedy_with_and_without_cache(model):
    ids = tokens(2, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("beams", [3, 5])
def test_beam_search_reorders_the_states(model, beams):
    ids = tokens(2, 9)
    options = {"num_beams": beams, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_sampling_with_and_without_cache(model):
    ids, options = tokens(2, 9), {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    torch.manual_seed(3)
    cached = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, use_cache=False, **options), cached)


@pytest.mark.parametrize("chunk", [1, 3, 4, 5])
def test_chunked_prefill(model, chunk):
    ids = tokens(2, 9)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **GREEDY), model.generate(ids, **GREEDY))


def test_batch_of_different_lengths_is_each_on_its_own(model):
    short, long = tokens(1, 5, seed=1), tokens(1, 11, seed=2)
    batch = torch.cat([torch.nn.functional.pad(short, (6, 0)), long])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(short), (6, 0)), torch.ones_like(long)])
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[:1, 11:], model.generate(short, **GREEDY)[:, 5:])
    assert torch.equal(together[1:], model.generate(long, **GREEDY))


def test_continuation_from_a_returned_cache(model):
    ids = tokens(1, 9)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([first.sequences, tokens(1, 6, seed=9)], 1)
    continued = model.generate(more, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(continued, model.generate(more, **GREEDY))


def test_user_made_and_static_caches(model):
    ids = tokens(2, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65])
def test_prefill_and_steps_equal_one_forward(model, length):
    ids = tokens(2, length + 4)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :length], use_cache=True)
        logits = [out.logits]
        for t in range(length, length + 4):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=2e-5)


def test_left_padded_continuation_with_a_past():
    """A second turn of different lengths: padding sits between the past and the new tokens."""
    model = tiny_model(OPENING)
    first, second = tokens(2, 6), tokens(2, 5, seed=4)
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        turn = torch.cat([torch.nn.functional.pad(second[:1, 2:], (2, 0)), second[1:]])
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[0, 6:8] = 0
        positions = (mask.cumsum(-1) - 1)[:, 6:]
        together = model(turn, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        alone = model(torch.cat([first[:1], second[:1, 2:]], 1)).logits[:, 6:]
    torch.testing.assert_close(together[:1, 2:], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("lookup", [2, 5, 10])
def test_prompt_lookup_is_greedy(model, lookup):
    # A repetitive prompt, so that candidates are found, and partly accepted.
    ids = tokens(1, 7).repeat(1, 4)
    expected = model.generate(ids, do_sample=False, max_new_tokens=40)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=40, prompt_lookup_num_tokens=lookup), expected
    )


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_decoding_is_greedy(model, schedule):
    ids = tokens(1, 9)
    expected = model.generate(ids, do_sample=False, max_new_tokens=40)
    own = model if SLIDES_AND_RECORDS or "sliding_attention" not in model.config.layer_types else tiny_model(OPENING)
    for draft in (own, tiny_model(SHAPES["kla pure"], seed=1), tiny_model(SHAPES["gka opening"], seed=2)):
        draft = copy.deepcopy(draft)
        draft.generation_config.num_assistant_tokens = 4
        draft.generation_config.num_assistant_tokens_schedule = schedule
        draft.generation_config.assistant_confidence_threshold = 0.0
        found = model.generate(ids, do_sample=False, max_new_tokens=40, assistant_model=draft)
        assert torch.equal(found, expected)


def word_level(words):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w9"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_assisted_decoding_with_another_tokenizer_is_greedy(model):
    special, words = ["<pad>", "<s>", "</s>"], [f"w{i}" for i in range(58)]
    own, other = word_level([*special, *words]), word_level([*special, "more", "words", *words[::-1]])
    ids = tokens(1, 9)
    expected = model.generate(ids, **GREEDY)
    for name in ("kla pure", "gka opening"):
        draft = tiny_model(SHAPES[name], seed=1, vocab_size=63)
        draft.generation_config.num_assistant_tokens = 3
        found = model.generate(ids, assistant_model=draft, tokenizer=own, assistant_tokenizer=other, **GREEDY)
        assert torch.equal(found, expected)


def test_a_cache_continues_after_speculation(model):
    if "sliding_attention" in model.config.layer_types and not SLIDES_AND_RECORDS:
        pytest.skip("older sliding-window layers of the host record one call at a time")
    ids = tokens(1, 7).repeat(1, 3)
    out = model.generate(ids, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([out.sequences, tokens(1, 3, seed=4)], 1)
    assert torch.equal(
        model.generate(more, past_key_values=out.past_key_values, **GREEDY), model.generate(more, **GREEDY)
    )
