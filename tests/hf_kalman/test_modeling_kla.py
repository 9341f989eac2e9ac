import math

import pytest
import torch
from tiny import KLA_HYBRID, KLA_OPENING, KLA_PURE, tiny_config, tiny_model, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_kalman import KLAForCausalLM
from hf_kalman.kla.modeling_kla import KLAMixer


def test_mixer_by_its_equations():
    """The layer of papers' figure 7, written out with a textbook Kalman filter (gain and innovation) per filter."""
    config = tiny_config(KLA_PURE, value_rank=4, variance_rank=3, linear_inner_size=6, linear_state_size=2)
    torch.manual_seed(1)
    mixer = KLAForCausalLM(config).model.layers[0].mixer.double()
    h = torch.randn(1, 12, 32, dtype=torch.float64)

    z, gate = mixer.in_proj(h).chunk(2, dim=-1)
    z = F.silu(F.conv1d(F.pad(z.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=6).mT)
    v, code, k, q = mixer.sensor_proj(z).split([4, 3, 2, 2], dim=-1)
    v, noise = mixer.value_expand(v)[0], F.softplus(mixer.var_expand(code))[0] + 1e-4
    k, q = (F.normalize(t, dim=-1)[0] for t in (k, q))
    rate, step = mixer.dynamics_bias.lambda_log.exp(), F.softplus(mixer.dynamics_bias.delta) + 1e-7
    decay = torch.exp(-rate * step)
    p = mixer.dynamics_bias.process_noise_log.exp() / (2 * rate) * (1 - decay**2)
    mean, variance = torch.zeros_like(decay), torch.ones_like(decay)
    read, spread = [], []
    for t in range(12):
        mean, variance = decay * mean, decay**2 * variance + p
        gain = variance * k[t] / (k[t] ** 2 * variance + noise[t, :, None])
        mean = mean + gain * (v[t, :, None] - k[t] * mean)
        variance = (1 - gain * k[t]) * variance
        read.append((q[t] * mean).sum(-1))
        spread.append((q[t] ** 2 * variance).sum(-1))
    gate = F.silu(gate[0])
    expected = mixer.o_proj((torch.stack(read) + mixer.skip * z[0]) * gate)
    expected_variance = (torch.stack(spread) * gate**2) @ mixer.o_proj.weight.square().T
    output, found = mixer(h, output_uncertainty=True)
    torch.testing.assert_close(output[0], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[0], expected_variance, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kinds", [KLA_PURE, KLA_HYBRID], ids=["pure", "hybrid"])
def test_implementations_agree(kinds):
    ids = tokens(2, 40)
    results = []
    for implementation in ("torch", "reference"):
        model = tiny_model(kinds, implementation=implementation)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    for name, gradient in results[0][1].items():
        assert (gradient - results[1][1][name]).norm() <= 1e-4 * gradient.norm(), name


def test_a_noise_below_its_floor_still_learns():
    model = tiny_model(KLA_PURE, process_noise_parameterization="raw", process_noise_max=0.5)
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.dynamics_bias.process_noise[0], mixer.dynamics_bias.process_noise[1] = -0.3, 0.9
    rate, step = mixer.dynamics_bias.lambda_log.exp(), F.softplus(mixer.dynamics_bias.delta) + 1e-7
    factor = (1 - torch.exp(-2 * rate * step)) / (2 * rate)
    noise = mixer.dynamics_bias(torch.zeros(64))[2]
    torch.testing.assert_close(noise[0], 1e-7 * factor[0])
    torch.testing.assert_close(noise[1], 0.5 * factor[1])
    ids = tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    assert (mixer.dynamics_bias.process_noise.grad[:2].abs() > 0).all()


def test_fixed_and_absent_noise():
    fixed, absent = (tiny_model(KLA_PURE, process_noise=kind) for kind in ("fixed", "none"))
    names = {n.rsplit(".", 1)[-1] for n, _ in fixed.named_parameters()}
    assert (
        "process_noise_log" not in names
        and "model.layers.0.mixer.dynamics_bias.process_noise_log" in fixed.state_dict()
    )
    assert fixed.model.layers[0].mixer.dynamics_bias(torch.zeros(64))[2].min() > 0
    assert not any("process_noise" in n for n in absent.state_dict())
    assert absent.model.layers[0].mixer.dynamics_bias(torch.zeros(64))[2].max() == 0


@pytest.mark.parametrize("kinds", [KLA_PURE, KLA_HYBRID, KLA_OPENING], ids=["pure", "hybrid", "opening"])
def test_uncertainty_by_layer_and_token(kinds):
    model, ids = tiny_model(kinds), tokens(2, 20)
    with torch.no_grad():
        plain, out = model(ids), model(ids, output_uncertainty=True)
        step = model(ids[:, :13], use_cache=True, output_uncertainty=True)
        later = model(ids[:, 13:], past_key_values=step.past_key_values, output_uncertainty=True)
    assert plain.uncertainties is None and torch.equal(plain.logits, out.logits)
    assert len(out.uncertainties) == list(kinds).count("linear_attention")
    for whole, first, second in zip(out.uncertainties, step.uncertainties, later.uncertainties, strict=True):
        assert whole.shape == (2, 20, 32) and whole.dtype == torch.float32 and (whole > 0).all()
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-7)
    assert model.model(ids, output_uncertainty=True).uncertainties[0].shape == (2, 20, 32)


def test_uncertainty_survives_gradient_checkpointing():
    model, ids = tiny_model(KLA_PURE).train(), tokens(2, 9)
    expected = model(ids, output_uncertainty=True, use_cache=False).uncertainties
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(ids, labels=ids, output_uncertainty=True, use_cache=False)
    (out.loss + out.uncertainties[0].sum()).backward()
    assert len(out.uncertainties) == 2
    torch.testing.assert_close(out.uncertainties, expected)


def test_marginal_readout_is_the_average_over_the_belief():
    model, ids = tiny_model(KLA_PURE), tokens(2, 9)
    last = model.model.layers[-1]
    with torch.no_grad():
        torch.manual_seed(5)
        out = model(ids, marginal_samples=400, output_uncertainty=True)
        assert out.logits.exp().sum(-1).allclose(torch.ones(2, 9), atol=1e-5)
        entropy = -(out.logits.exp() * out.logits).sum(-1)
        torch.testing.assert_close(out.predictive_entropy, entropy)
        # The same average by hand, from the layer's own mean and variance.
        states = model.model(ids, output_hidden_states=True).hidden_states[-2]
        mixed, variance = last.mixer(last.input_layernorm(states), output_uncertainty=True)
        torch.manual_seed(6)
        total = torch.zeros(2, 9, 61)
        for _ in range(400):
            drawn = states + mixed + variance.sqrt() * torch.randn_like(variance)
            hidden = drawn + last.mlp(last.post_attention_layernorm(drawn))
            total += model.lm_head(model.model.norm(hidden)).softmax(-1) / 400
        # Two averages of 400 draws each.
        assert (out.logits.exp() - total).abs().max() < 0.02
        kept = model(ids, marginal_samples=3, logits_to_keep=2)
        assert kept.logits.shape == (2, 2, 61) and kept.predictive_entropy.shape == (2, 2)


def test_marginal_readout_with_no_variance_is_the_plain_one():
    model, ids = tiny_model(KLA_PURE), tokens(2, 9)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.o_proj.weight.zero_()
        out = model(ids, marginal_samples=2)
        torch.testing.assert_close(out.logits, model(ids).logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
        labels = model(ids, labels=ids, marginal_samples=2).loss
        torch.testing.assert_close(labels, model(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_marginal_readout_in_generate():
    model, ids = tiny_model(KLA_PURE), tokens(2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    out = model.generate(ids, marginal_samples=4, **options)
    for logits in out.logits:
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2), rtol=1e-4, atol=1e-4)
    plain = model.generate(ids, **options)
    assert not torch.equal(plain.logits[0], out.logits[0])


@pytest.mark.parametrize(
    ("kinds", "samples", "message"), [(KLA_PURE, -1, "got -1"), (KLA_OPENING, 4, "full_attention")]
)
def test_marginal_samples_that_cannot_be_drawn_are_refused(kinds, samples, message):
    with pytest.raises(ValueError, match=f"`marginal_samples.*{message}"):
        tiny_model(kinds)(tokens(1, 4), marginal_samples=samples)


def test_bfloat16_keeps_dynamics_and_beliefs_wide(tmp_path):
    tiny_model(KLA_HYBRID, use_observation_bias=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"delta", "lambda_log", "process_noise_log", "observation_bias"}
    out = model(tokens(2, 9), use_cache=True)
    layer = out.past_key_values.layers[1]
    assert {s.dtype for s in layer.recurrent_states.values() if s is not None} == {torch.float32}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(2, 9)).logits
    assert out.logits.dtype == torch.bfloat16
    # bfloat16 weights: measured 1e-2.
    assert ((out.logits.float() - exact).norm() / exact.norm()).item() < 4e-2


def test_gradients_reach_through_a_cached_belief():
    model, ids = tiny_model(KLA_PURE), tokens(2, 10)
    whole = model(ids).logits[:, 6:].square().sum()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    later = model(ids[:, 6:], past_key_values=cache).logits.square().sum()
    later.backward()
    torch.testing.assert_close(later, whole, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_default_initialisation():
    config = tiny_config(KLA_PURE, linear_state_size=16, dt_min=1e-3, dt_max=0.1, use_observation_bias=True)
    torch.manual_seed(0)
    mixer = KLAForCausalLM(config).model.layers[0].mixer
    assert isinstance(mixer, KLAMixer)
    step = F.softplus(mixer.dynamics_bias.delta)
    assert step.min() > 9e-4 and step.max() < 0.11
    assert mixer.skip == -1 and (mixer.dynamics_bias.lambda_log == 0).all()
    torch.testing.assert_close(
        mixer.dynamics_bias.process_noise_log.exp(), torch.full_like(mixer.dynamics_bias.delta, 0.01)
    )
    torch.testing.assert_close(F.softplus(mixer.dynamics_bias.observation_bias), torch.full((64,), 1 / 16))
    assert mixer.conv1d.weight.abs().max() <= 0.5 and math.isclose(mixer.conv1d.bias.abs().max().item(), 0)


def test_meta_device_initialisation_covers_every_weight():
    with torch.device("meta"):
        model = KLAForCausalLM(tiny_config(KLA_HYBRID, value_rank=3, variance_rank=2, linear_bias=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_rank": "half"}, "`value_rank` must be"),
        ({"value_rank": 0}, "`value_rank` must be"),
        ({"variance_rank": "conv"}, "`variance_rank` must be"),
        ({"linear_state_size": 0}, "`linear_state_size` must be >= 1"),
        ({"linear_conv_kernel_dim": -1}, "`linear_conv_kernel_dim` must be >= 0"),
        ({"process_noise_init": 0.0}, "`process_noise_init` must be > 0"),
        ({"observation_variance_max": -1.0}, "`observation_variance_max` must be > 0"),
        ({"observation_variance_min": 0.0}, "`observation_variance_min` must be > 0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "`dt_min` must be > 0 and at most dt_max=0.1"),
        ({"discretization": "bilinear"}, "discretization"),
        ({"num_hidden_layers": 3}, "`layer_types` must name"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(KLA_PURE, **fields)
