"""Compiled and exported models: no recompilation while generating, whole graphs, any length."""

import pytest
import torch
from tiny import SHAPES, tiny_model, tokens
from transformers import StaticCache


class Counter:
    """A backend of torch.compile that counts its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_a_static_cache_compiles_once(name):
    model, prompt, counter, graphs = tiny_model(SHAPES[name]), tokens(2, 5), Counter(), []
    cache = StaticCache(config=model.config, max_cache_len=40)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    sequence = prompt
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache, use_cache=True).logits
        for _ in range(10):
            following = logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, following], dim=1)
            logits = step(following, past_key_values=cache, use_cache=True).logits
            graphs.append(counter.graphs)
        whole = model(sequence, use_cache=False).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
    if "sliding_attention" in model.config.layer_types:
        # The host's sliding layers count in Python: before and after the window is full.
        assert graphs[4:] == [3] * 6
    else:
        assert graphs == [1] * 10


@pytest.mark.parametrize("name", ["gka pure", "gka hybrid", "kla pure", "kla hybrid"])
def test_exported_prefill_takes_any_length(name):
    model = tiny_model(SHAPES[name])

    def inputs(length):
        ids = tokens(2, length, seed=length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    length = torch.export.Dim("length", min=2, max=200)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs(70), strict=False, dynamic_shapes=shapes).module()
        for size in (5, 33, 64, 65, 130):
            expected = model(**inputs(size)).logits
            torch.testing.assert_close(exported(**inputs(size)).logits, expected, rtol=1e-4, atol=2e-5)
