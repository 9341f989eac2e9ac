"""What both families promise: padding, packing, caches, checkpointing, heads, compilation."""

import pytest
import torch
from tiny import HYBRIDS, PURES, SHAPES, tiny_config, tiny_model, tokens
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
)

BOTH = pytest.mark.parametrize("family", ["gka", "kla"])

COMMON = [
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "use_qk_norm": True},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
]
VARIANTS = [
    ("gka", {}),
    ("gka", {"use_value_conv": False}),
    ("gka", {"use_local_values": True}),
    ("gka", {"use_local_values": True, "use_value_conv": False}),
    ("gka", {"key_activation": "identity", "value_activation": "identity"}),
    ("gka", {"use_decay": False}),
    ("gka", {"decay_key_gram": False}),
    ("gka", {"use_solution_mix": False}),
    ("gka", {"use_input_gate": False}),
    ("gka", {"use_output_gate": False}),
    ("gka", {"scale_output": False}),
    ("gka", {"linear_conv_kernel_dim": 1}),
    ("gka", {"linear_num_query_heads": 2, "linear_num_value_heads": 4}),
    ("gka", {"linear_key_head_dim": 5, "linear_value_head_dim": 7}),
    ("gka", {"linear_kv_rank": 3}),
    ("gka", {"linear_kv_rank": 3, "linear_kv_residual": True}),
    ("kla", {}),
    ("kla", {"value_rank": "conv", "variance_rank": 3}),
    ("kla", {"value_rank": 4, "variance_rank": 3, "linear_bias": True}),
    ("kla", {"discretization": "zoh"}),
    ("kla", {"process_noise": "fixed"}),
    ("kla", {"process_noise": "none"}),
    ("kla", {"process_noise_parameterization": "raw"}),
    ("kla", {"process_noise_max": 0.005}),
    ("kla", {"use_observation_bias": True}),
    ("kla", {"observation_variance_max": 0.5}),
    ("kla", {"skip": "channel"}),
    ("kla", {"skip": "none"}),
    ("kla", {"use_output_gate": False}),
    ("kla", {"linear_conv_kernel_dim": 0}),
    ("kla", {"linear_qk_norm": False}),
    ("kla", {"decode_from_prior": True}),
    ("kla", {"linear_inner_size": 20, "linear_state_size": 1}),
    *((family, fields) for family in ("gka", "kla") for fields in COMMON),
]


@pytest.mark.parametrize(("family", "fields"), VARIANTS, ids=str)
def test_every_variant_continues_from_a_cache_saves_and_trains(family, fields, tmp_path):
    model = tiny_model(HYBRIDS[family], **fields)
    ids = tokens(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        pieces = [out.logits]
        for start, stop in ((9, 10), (10, 13), (13, 20)):
            out = model(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    # Float32 noise: 7e-6 as a rule, 4.5e-5 measured without the output gate, where the norm amplifies small read-outs.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, whole)
    model.train()
    model(ids, labels=ids).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A low-rank expansion starts at zero: its first factor learns from the second step on.
    assert [n for n in dead if "linearA" not in n] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing(shape):
    model = tiny_model(SHAPES[shape])
    ids = tokens(1, 12)
    with torch.no_grad():
        plain = model(ids).logits
        for left, right in ((5, 0), (0, 4), (3, 2)):
            padded = F.pad(ids, (left, right))
            mask = F.pad(torch.ones_like(ids), (left, right))
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = model(padded, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(logits[:, left : left + 12], plain, rtol=1e-4, atol=2e-5)


@BOTH
@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packing_isolates(way, family):
    model = tiny_model(PURES[family])
    parts = [tokens(1, n, seed=n) for n in (7, 1, 12)]
    ids = torch.cat(parts, 1)
    lengths = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    arguments = {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 7 + [1] + [2] * 12], dtype=torch.int32)},
        "cu_seq_lens_q": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 12, "max_length_k": 12},
    }[way]
    with torch.no_grad():
        packed = model(ids, use_cache=False, **arguments).logits
        separate = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=2e-5)


@BOTH
def test_flattened_training_has_the_losses_and_gradients_of_single_rows(family):
    model = tiny_model(HYBRIDS[family])
    parts = [tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 12, 9)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": part} for part in parts])
    packed = model(**batch, use_cache=False).loss
    packed.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    count = sum(len(part) - 1 for part in parts)
    total = 0.0
    for part in parts:
        ids = torch.tensor([part])
        if len(part) > 1:
            loss = model(ids, labels=ids, use_cache=False).loss * (len(part) - 1) / count
            loss.backward()
            total += loss.item()
    assert abs(packed.item() - total) < 1e-5
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm()
        assert error <= 1e-4 * parameter.grad.norm() + 1e-6, name


@BOTH
def test_packing_by_positions_isolates_hybrid_models_too(family):
    model = tiny_model(HYBRIDS[family])
    parts = [tokens(1, n, seed=n) for n in (7, 4, 12)]
    positions = torch.cat([torch.arange(n) for n in (7, 4, 12)])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=2e-5)


@BOTH
def test_sharded_files_and_device_map_auto(family, tmp_path):
    model = tiny_model(HYBRIDS[family])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids = tokens(1, 8).to(loaded.device)
    torch.testing.assert_close(loaded(ids).logits.cpu(), model(ids.cpu()).logits, rtol=1e-4, atol=2e-5)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, family):
    ids = tokens(2, 16)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(HYBRIDS[family]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


@BOTH
def test_heads_and_auto_classes(family, tmp_path):
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    config = tiny_config(HYBRIDS[family], num_labels=3)
    assert type(AutoModel.from_config(config)).__name__ == f"{family.upper()}Model"
    for auto, labels in (
        (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}),
        (AutoModelForTokenClassification, {"labels": torch.zeros(2, 7, dtype=torch.long)}),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
        ),
    ):
        model = auto.from_config(config)
        loss = model(ids, attention_mask=mask, **labels).loss
        loss.backward()
        assert torch.isfinite(loss)
        model.eval().save_pretrained(tmp_path / auto.__name__)
        again = auto.from_pretrained(tmp_path / auto.__name__)
        assert torch.equal(again(ids)[0], model(ids)[0])


@BOTH
def test_logits_to_keep_hidden_states_and_attentions(family):
    model = tiny_model(HYBRIDS[family], attn_implementation="eager")
    ids = tokens(2, 9)
    whole = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(whole.hidden_states) == 5
    assert len(whole.attentions) == 2
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole.logits[:, [0, 3]])


@BOTH
def test_num_items_in_batch_reaches_the_loss(family):
    model, ids = tiny_model(HYBRIDS[family]), tokens(2, 9)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=32).loss, mean * 16 / 32)


@BOTH
def test_mask_of_another_shape_is_refused(family):
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 9\)"):
        tiny_model(HYBRIDS[family])(tokens(2, 9), attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        tiny_model(HYBRIDS[family])()


@BOTH
def test_compiles_a_training_step_without_a_graph_break(family):
    model, ids = tiny_model(HYBRIDS[family]).train(), tokens(2, 16)
    eager = model(ids, labels=ids, use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
