import pytest
import torch
from tiny import HYBRID, PURE, SHAPES, tiny_config, tiny_model, tokens
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_kalman import GKAForCausalLM, GKAModel
from hf_kalman.gka.modeling_gka import GKAMixer

VARIANTS = [
    {},
    {"use_value_conv": False},
    {"use_local_values": True},
    {"use_local_values": True, "use_value_conv": False},
    {"key_activation": "identity", "value_activation": "identity"},
    {"use_decay": False},
    {"decay_key_gram": False},
    {"use_solution_mix": False},
    {"use_input_gate": False},
    {"use_output_gate": False},
    {"scale_output": False},
    {"linear_conv_kernel_dim": 1},
    {"linear_num_query_heads": 2, "linear_num_value_heads": 4},
    {"linear_key_head_dim": 5, "linear_value_head_dim": 7},
    {"linear_kv_rank": 3},
    {"linear_kv_rank": 3, "linear_kv_residual": True},
    {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "use_qk_norm": True},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
]


def test_mixer_by_its_equations():
    """The layer of papers' section 4, written out for one head with dense sums."""
    config = tiny_config(PURE, num_attention_heads=1, num_key_value_heads=1, head_dim=6, solver="exact")
    torch.manual_seed(1)
    mixer = GKAForCausalLM(config).model.layers[0].mixer.double()
    h = torch.randn(1, 12, 32, dtype=torch.float64)

    def conv(x, weight):
        return F.conv1d(F.pad(x.mT, (3, 0)), weight, groups=x.shape[-1]).mT

    def unit(x):
        return x / (x.norm(dim=-1, keepdim=True) + 1e-6)

    q = unit(F.silu(conv(mixer.q_proj(h), mixer.q_conv1d.weight)))[0]
    k = unit(F.silu(conv(mixer.k_proj(h), mixer.k_conv1d.weight)))[0]
    v = F.silu(conv(mixer.v_proj(h), mixer.v_conv1d.weight))[0]
    beta = torch.sigmoid(mixer.b_proj(h))[0] + 1e-6
    alpha = torch.sigmoid(mixer.alpha_proj(h))[0]
    decay = (-mixer.A_log.exp() * F.softplus(mixer.a_proj(h) + mixer.dt_bias))[0, :, 0]
    out = []
    for t in range(12):
        keep = torch.stack([decay[i + 1 : t + 1].sum().exp() for i in range(t + 1)])
        keys, values = beta[: t + 1] * k[: t + 1], beta[: t + 1] * v[: t + 1]
        gram, value_key = (keep[:, None] * keys).T @ keys, (keep[:, None] * values).T @ keys
        x = torch.linalg.solve(gram + 0.02 * gram.norm() * torch.eye(6, dtype=gram.dtype), q[t])
        out.append(6**-0.5 * value_key @ (alpha[t] * x + (1 - alpha[t]) * q[t]))
    o = torch.stack(out)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + config.rms_norm_eps) * mixer.o_norm.weight
    expected = mixer.o_proj(o * F.silu(mixer.g_proj(h))[0])
    # Decays and norms are float32 by contract.
    torch.testing.assert_close(mixer(h)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_continues_from_a_cache_saves_and_trains(fields, tmp_path):
    model = tiny_model(HYBRID, **fields)
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
@pytest.mark.parametrize("solver", ["chebyshev", "cg", "exact"])
def test_implementations_agree(shape, solver):
    ids = tokens(2, 40)
    results = []
    for implementation in ("torch", "reference"):
        model = tiny_model(SHAPES[shape], solver=solver, solver_iterations=30, implementation=implementation)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in results[0][1].items():
        # The implicit gradient of 30 Chebyshev steps differs from the one through the steps: 8e-3 measured at worst.
        bound = 2e-2 if solver == "chebyshev" else 1e-3
        error = (gradient - results[1][1][name]).norm() / results[1][1][name].norm()
        assert error < bound, (name, error.item())


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


@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packing_isolates(way):
    model = tiny_model(PURE)
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


def test_packing_by_positions_isolates_hybrid_models_too():
    model = tiny_model(HYBRID)
    parts = [tokens(1, n, seed=n) for n in (7, 4, 12)]
    positions = torch.cat([torch.arange(n) for n in (7, 4, 12)])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=2e-5)


def test_bfloat16_keeps_decays_and_states_wide(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"}
    out = model(tokens(2, 9), use_cache=True)
    layer = out.past_key_values.layers[1]
    assert {s.dtype for s in layer.recurrent_states.values() if s is not None} == {torch.float32}
    assert out.logits.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(2, 9)).logits
    # bfloat16 weights: measured 1.2e-2.
    assert ((out.logits.float() - exact).norm() / exact.norm()).item() < 4e-2


def test_sharded_files_and_device_map_auto(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids = tokens(1, 8).to(loaded.device)
    torch.testing.assert_close(loaded(ids).logits.cpu(), model(ids.cpu()).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids = tokens(2, 16)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_meta_device_initialisation_covers_every_weight(tmp_path):
    with torch.device("meta"):
        model = GKAForCausalLM(tiny_config(linear_kv_rank=2, linear_kv_residual=True, use_local_values=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_heads_and_auto_classes(tmp_path):
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    config = tiny_config(num_labels=3)
    assert isinstance(AutoModel.from_config(config), GKAModel)
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


def test_logits_to_keep_hidden_states_and_attentions():
    model = tiny_model(attn_implementation="eager")
    ids = tokens(2, 9)
    whole = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(whole.hidden_states) == 5
    assert len(whole.attentions) == 2
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole.logits[:, [0, 3]])


def test_num_items_in_batch_reaches_the_loss():
    model, ids = tiny_model(), tokens(2, 9)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=32).loss, mean * 16 / 32)


def test_solver_can_change_without_reloading():
    model, ids = tiny_model(solver="chebyshev", solver_iterations=30), tokens(1, 30)
    with torch.no_grad():
        trained = model(ids).logits
        model.config.solver_iterations = 0
        linear = model(ids).logits
        model.config.solver, model.config.solver_iterations = "exact", 0
        exact = model(ids).logits
    assert (linear - exact).abs().max() > 100 * (trained - exact).abs().max() > 0


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 9\)"):
        tiny_model()(tokens(2, 9), attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        tiny_model()()


def test_compiles_a_training_step_without_a_graph_break():
    model, ids = tiny_model().train(), tokens(2, 16)
    eager = model(ids, labels=ids, use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)


def test_default_initialisation_of_decays():
    mixer = tiny_model(PURE, num_attention_heads=64, head_dim=2, num_key_value_heads=64).model.layers[0].mixer
    assert isinstance(mixer, GKAMixer)
    assert mixer.A_log.exp().min() >= 0.01 and mixer.A_log.exp().max() <= 16
    step = F.softplus(mixer.dt_bias)
    assert step.min() > 9e-4 and step.max() < 0.11
