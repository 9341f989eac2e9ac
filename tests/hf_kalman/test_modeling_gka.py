import pytest
import torch
from tiny import HYBRID, OPENING, PURE, tiny_config, tiny_model, tokens
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
)

from hf_kalman import GKAForCausalLM
from hf_kalman.gka.modeling_gka import GKAMixer


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
    decay = (-mixer.decay_bias.A_log.exp() * F.softplus(mixer.a_proj(h) + mixer.decay_bias.dt_bias))[0, :, 0]
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


def test_solver_iterations_of_one_call_and_of_all():
    model, ids = tiny_model(solver="chebyshev", solver_iterations=30), tokens(1, 30)
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8}
    with torch.no_grad():
        usual, two = model(ids).logits, model(ids, solver_iterations=2).logits
        assert torch.equal(model(ids).logits, usual) and not torch.equal(two, usual)
        generated = model.generate(ids, solver_iterations=2, **options)
        cached = model(ids[:, :20], use_cache=True, solver_iterations=2).past_key_values
        later = model(ids[:, 20:], past_key_values=cached, solver_iterations=2).logits
        torch.testing.assert_close(later, two[:, 20:], rtol=1e-4, atol=2e-5)
        model.set_solver_iterations(2)
        assert torch.equal(model(ids).logits, two) and model.config.solver_iterations == 2
        assert torch.equal(model.generate(ids, **options), generated)
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match=f"`solver_iterations` must be an integer >= 0, got {wrong}"):
            model(ids, solver_iterations=wrong)
        with pytest.raises(ValueError, match="`solver_iterations` must be"):
            model.set_solver_iterations(wrong)


def test_a_tolerance_from_now_on():
    model, ids = tiny_model(PURE, solver_iterations=30), tokens(2, 20)
    exact = model(ids).logits
    differences = []
    for tolerance in (0.3, 1e-2, 0.0):
        model.set_solver_iterations(30, tolerance)
        differences.append((model(ids).logits - exact).norm().item())
    assert differences[0] > differences[1] > differences[2] == 0
    with pytest.raises(ValueError, match="`solver_tolerance` must be >= 0 and < 1, got 1.5"):
        model.set_solver_iterations(30, 1.5)
    assert model.config.solver_tolerance == 0
    with pytest.raises(Exception, match="`solver_tolerance` needs solver='cg', got 0.1 with 'chebyshev'"):
        tiny_config(PURE, solver="chebyshev", solver_tolerance=0.1)


def test_solver_can_change_without_reloading():
    model, ids = tiny_model(solver="chebyshev", solver_iterations=30), tokens(1, 30)
    with torch.no_grad():
        trained = model(ids).logits
        model.config.solver_iterations = 0
        linear = model(ids).logits
        model.config.solver, model.config.solver_iterations = "exact", 0
        exact = model(ids).logits
    assert (linear - exact).abs().max() > 100 * (trained - exact).abs().max() > 0


def test_default_initialisation_of_decays():
    mixer = tiny_model(PURE, num_attention_heads=64, head_dim=2, num_key_value_heads=64).model.layers[0].mixer
    assert isinstance(mixer, GKAMixer)
    assert mixer.decay_bias.A_log.exp().min() >= 0.01 and mixer.decay_bias.A_log.exp().max() <= 16
    step = F.softplus(mixer.decay_bias.dt_bias)
    assert step.min() > 9e-4 and step.max() < 0.11


@pytest.mark.parametrize("factor", [0, 0.1, 1])
def test_what_leaves_a_mixer_starts_small(factor):
    model = tiny_model(PURE, hidden_size=256, use_local_values=True, output_initializer_factor=factor)
    mixer = model.model.layers[0].mixer
    for weight in (mixer.o_proj.weight, mixer.local_proj.weight):
        assert weight.std().item() == pytest.approx(0.1 * factor, rel=0.05)
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_loaded_outputs_are_not_started_anew(tmp_path):
    model = tiny_model(PURE, output_initializer_factor=1)
    model.save_pretrained(tmp_path)
    again = GKAForCausalLM.from_pretrained(tmp_path, output_initializer_factor=0.1)
    assert torch.equal(again.model.layers[0].mixer.o_proj.weight, model.model.layers[0].mixer.o_proj.weight)


@pytest.mark.parametrize("kinds", [PURE, HYBRID, OPENING], ids=len)
@pytest.mark.parametrize("solver", ["chebyshev", "cg", "exact"])
def test_implementations_agree(kinds, solver):
    ids = tokens(2, 40)
    results = []
    for implementation in ("torch", "reference"):
        model = tiny_model(kinds, solver=solver, solver_iterations=30, implementation=implementation)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for name, gradient in results[0][1].items():
        # The implicit gradient of 30 Chebyshev steps differs from the one through the steps: 8e-3 measured at worst.
        bound = 2e-2 if solver == "chebyshev" else 1e-3
        error = (gradient - results[1][1][name]).norm() / results[1][1][name].norm()
        assert error < bound, (name, error.item())
