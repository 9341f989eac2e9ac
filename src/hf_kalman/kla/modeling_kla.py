"""Kalman Linear Attention models (arXiv 2602.10743), pure and hybrid, with their uncertainty."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from kalman_kernels import KLAState, Segments, kalman_linear_attention_step
from kalman_kernels.layers import KalmanLinearAttention
from kalman_kernels.numerics import widen

from ..decoder import (
    DecoderAttention,
    DecoderGenerationMixin,
    DecoderLayer,
    DecoderPreTrainedModel,
    build_decoder,
    run_decoder,
)
from ..layers import ShortConvolution, check_count, exchangeable, inverse_softplus
from .configuration_kla import KLAConfig

__all__ = [
    "KLACausalLMOutputWithPast",
    "KLAForCausalLM",
    "KLAForQuestionAnswering",
    "KLAForSequenceClassification",
    "KLAForTokenClassification",
    "KLAMixer",
    "KLAModel",
    "KLAModelOutputWithPast",
    "KLAPreTrainedModel",
]

# The published implementation's constants: smallest step, smallest raw process noise, smallest norm.
STEP_FLOOR, NOISE_FLOOR, NORM_FLOOR = 1e-7, 1e-7, 1e-12


@dataclass
class KLAModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with what the filters know of their own error.

    Args:
        uncertainties: posterior variance of the output of every KLA layer's mixer, (B, T, hidden) each, float32; None
            unless `output_uncertainty`.
    """

    uncertainties: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class KLACausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with uncertainty.

    Args:
        uncertainties: as in `KLAModelOutputWithPast`.
        predictive_entropy: (B, T) entropy in nats of the marginal token distribution; None unless `marginal_samples`.
    """

    uncertainties: tuple[torch.FloatTensor, ...] | None = None
    predictive_entropy: torch.FloatTensor | None = None


@dataclass
class _Collected:
    """What layers report beside their output."""

    variances: list[Tensor] = field(default_factory=list)
    before_mlp: Tensor | None = None


def _within(value: Tensor, low: float | None, high: float | None) -> Tensor:
    """Clamped, with the gradient of the identity: a parameter beyond a limit can come back."""
    return value + (value.clamp(low, high) - value).detach()


class DynamicsBias(nn.Module):
    """The part of a filter that the input does not decide: its dynamics, and a bias of its observation noise.

    a = exp(-exp(lambda_log) D) ,   p = noise (1 - a^2) / (2 exp(lambda_log)) ,   D = softplus(delta)

    In a module of its own because it stays in float32 whatever the model's dtype, and called a bias because that is
    what optimisers exempt from weight decay by name.
    """

    def __init__(self, config: KLAConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.linear_inner_size, config.linear_state_size
        self.delta = nn.Parameter(torch.zeros(shape))
        self.lambda_log = nn.Parameter(torch.zeros(shape))
        self.noise_name = "process_noise" if config.process_noise_parameterization == "raw" else "process_noise_log"
        if config.process_noise == "learned":
            setattr(self, self.noise_name, nn.Parameter(torch.zeros(shape)))
        elif config.process_noise == "fixed":
            self.register_buffer(self.noise_name, torch.zeros(shape))
        if config.use_observation_bias:
            self.observation_bias = nn.Parameter(torch.zeros(shape[0]))

    def forward(self, log_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., M) from the sensor to the same with its bias; decay and process noise variance of one step, (M, S).

        All in at least float32.
        """
        log_variance = widen(log_variance)
        if self.config.use_observation_bias:
            log_variance = log_variance + self.observation_bias
        rate = widen(self.lambda_log).exp()
        step = F.softplus(widen(self.delta)) + STEP_FLOOR
        decay = torch.exp(-rate * step)
        if self.config.process_noise == "none":
            return log_variance, decay, torch.zeros_like(decay)
        noise = widen(getattr(self, self.noise_name))
        if self.config.process_noise_parameterization == "log":
            noise = noise.exp()
        noise = _within(noise, NOISE_FLOOR, self.config.process_noise_max)
        if self.config.discretization == "zoh":
            return log_variance, decay, noise * step
        return log_variance, decay, noise * -torch.expm1(-2 * rate * step) / (2 * rate)


@exchangeable("KalmanLinearAttention")
class Operator(KalmanLinearAttention):
    """The operator of a mixer."""


class KLAMixer(nn.Module):
    """Kalman Linear Attention layer: a scalar Kalman filter per channel and state.

    z, gate = W_in h ,   z = SiLU(conv(z))
    v, log s2, k, q = sensors(z) ,   L = 1 / (softplus(log s2) + s2_min) ,   k, q of norm 1
    a, p from `DynamicsBias`
    y, var = kalman_linear_attention(v, L, k, q, a, p)
    out = W_out ((y + skip z) SiLU(gate)) ,   out_var = (W_out)^2 (var SiLU(gate)^2)      [arXiv 2602.10743, figure 7]
    """

    def __init__(self, config: KLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.operator = Operator()
        width, inner, states, bias = (
            config.hidden_size,
            config.linear_inner_size,
            config.linear_state_size,
            config.linear_bias,
        )
        self.in_proj = nn.Linear(width, 2 * inner if config.use_output_gate else inner, bias=bias)
        if config.linear_conv_kernel_dim:
            self.conv1d = ShortConvolution(inner, config.linear_conv_kernel_dim, bias=True)
        value_width = {"full": inner, "conv": 0}.get(config.value_rank, config.value_rank)
        variance_width = inner if config.variance_rank == "full" else config.variance_rank
        self.sensor_widths = (value_width, variance_width, states, states)
        self.sensor_proj = nn.Linear(inner, sum(self.sensor_widths), bias=bias)
        if isinstance(config.value_rank, int):
            self.value_expand = nn.Linear(value_width, inner, bias=bias)
        if isinstance(config.variance_rank, int):
            self.var_expand = nn.Linear(variance_width, inner, bias=bias)
        self.dynamics_bias = DynamicsBias(config)
        if config.skip != "none":
            self.skip = nn.Parameter(torch.zeros(1 if config.skip == "scalar" else inner))
        self.o_proj = nn.Linear(inner, width, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        past_key_values: Cache | None = None,
        output_uncertainty: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, hidden) to the same, continuing from and writing to `past_key_values` when it is given.

        With `output_uncertainty` also the posterior variance of the output in float32.
        """
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if layer is not None:
            layer.remember(lambda cache, hidden, cut: self(hidden, cut, cache), self.layer_idx, hidden_states, segments)
        features, variance = self._read(hidden_states, segments, layer, output_uncertainty)
        output = self.o_proj(features)
        if variance is None:
            return output
        # Read through the module, which may be sharded, quantised or adapted.
        inputs = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
        weight = self.o_proj(inputs) - self.o_proj(torch.zeros_like(inputs[:1]))
        return output, variance @ widen(weight).square()

    def features(
        self, hidden_states: Tensor, segments: Segments | None = None, past_key_values: Cache | None = None
    ) -> tuple[Tensor, None]:
        """What the output is linear in: (B, T, M) for `o_proj`."""
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        return self._read(hidden_states, segments, layer, False)[0], None

    def _read(
        self, hidden_states: Tensor, segments: Segments | None, layer, uncertain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gated read-out and, where asked for, its variance (B, T, M); continues from and writes to a cache's entry."""
        config = self.config
        inputs, gate = self.in_proj(hidden_states), None
        if config.use_output_gate:
            inputs, gate = inputs.chunk(2, dim=-1)
            gate = F.silu(gate)
        if config.linear_conv_kernel_dim:
            inputs = self._convolve(inputs.contiguous(), segments, layer)
        output, variance = self._filter(inputs, segments, layer, uncertain)
        if layer is not None:
            layer.advance(hidden_states.shape[1])
        if config.skip != "none":
            output = output + self.skip.to(output.dtype) * inputs
        if gate is not None:
            output = output * gate
        if variance is None:
            return output, None
        return output, widen(variance) if gate is None else widen(variance) * widen(gate).square()

    def _convolve(self, inputs: Tensor, segments: Segments | None, layer) -> Tensor:
        past = None if layer is None else layer.read(0)[0]
        inputs, past = self.conv1d(inputs, past, segments, self.config.implementation, "silu")
        if layer is not None:
            layer.write(0, past, None)
        return inputs

    def _filter(
        self, inputs: Tensor, segments: Segments | None, layer, uncertain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Read-out and, where asked for, its variance (B, T, M); reads and writes the belief of `layer`."""
        sensors = self._sensors(inputs)
        options = {
            "decode_from_prior": self.config.decode_from_prior,
            "output_variance": uncertain,
            "implementation": self.config.implementation,
        }
        state = None
        if layer is not None and layer.has_previous_state[1]:
            state = KLAState(*(layer.read(slot)[1] for slot in range(2)))
        if state is not None and not torch.is_grad_enabled():
            return kalman_linear_attention_step(*sensors, state=state, segments=segments, in_place=True, **options)[:2]
        output, variance, state = self.operator(*sensors, state, segments, options)
        if layer is not None:
            layer.write(0, None, state.precision)
            layer.write(1, None, state.information)
        return output, variance

    def _sensors(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the filter takes: value, its precision, key, query, decay, process noise."""
        config = self.config
        value, code, key, query = self.sensor_proj(inputs).split(self.sensor_widths, dim=-1)
        if config.value_rank == "conv":
            value = inputs
        elif hasattr(self, "value_expand"):
            value = self.value_expand(value)
        code = self.var_expand(code) if hasattr(self, "var_expand") else code
        log_variance, decay, process_noise = self.dynamics_bias(code)
        variance = F.softplus(log_variance) + config.observation_variance_min
        if config.observation_variance_max is not None:
            variance = _within(variance, None, config.observation_variance_max)
        key, query = widen(key), widen(query)
        if config.linear_qk_norm:
            key, query = (F.normalize(t, dim=-1, eps=NORM_FLOOR) for t in (key, query))
        return value, 1 / variance, key, query, decay, process_noise


class KLADecoderLayer(DecoderLayer):
    """Decoder layer whose `linear_attention` mixer is Kalman Linear Attention."""

    mixer_class = KLAMixer

    def mix(
        self, hidden_states: Tensor, segments: Segments | None, past_key_values: Cache | None, collect=None
    ) -> Tensor:
        """As in every family; `collect` gathers the posterior variance."""
        arguments = {"segments": segments, "past_key_values": past_key_values}
        if collect is None:
            return self.mixer(hidden_states, **arguments)
        output, variance = self.mixer(hidden_states, output_uncertainty=True, **arguments)
        collect.variances.append(variance)
        return output


class KLAPreTrainedModel(DecoderPreTrainedModel):
    """Weight initialisation and what the mixers add to the host's feature flags."""

    config: KLAConfig
    _no_split_modules = ["KLADecoderLayer"]
    _keep_in_fp32_modules_strict = ["dynamics_bias"]
    _can_record_outputs = {"hidden_states": KLADecoderLayer, "attentions": DecoderAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DynamicsBias):
            self._init_dynamics(module)
        elif isinstance(module, KLAMixer) and module.config.skip != "none":
            init.constant_(module.skip, module.config.skip_init)

    @staticmethod
    def _init_dynamics(dynamics: DynamicsBias) -> None:
        config = dynamics.config
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        step = torch.empty_like(dynamics.delta, dtype=torch.float32).uniform_(low, high).exp()
        init.copy_(dynamics.delta, inverse_softplus(step.clamp_min(config.dt_init_floor)))
        init.zeros_(dynamics.lambda_log)
        if config.process_noise != "none":
            noise = 0.01 if config.process_noise_init is None else config.process_noise_init
            noise = math.log(noise) if config.process_noise_parameterization == "log" else noise
            init.constant_(getattr(dynamics, dynamics.noise_name), noise)
        if config.use_observation_bias:
            # A variance of 1 / S where the sensor says 0.
            init.constant_(dynamics.observation_bias, math.log(math.expm1(1 / config.linear_state_size)))


class KLAModel(KLAPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: KLAConfig) -> None:
        super().__init__(config)
        build_decoder(self, config, KLADecoderLayer)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_uncertainty: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KLAModelOutputWithPast:
        """Arguments as in every decoder of the host library.

        `attention_mask` is a (B, past + T) padding mask, None, or a dict with one mask per kind of layer. Packed rows
        are given by `cu_seq_lens_q`, `seq_idx` or restarting `position_ids`. Any number of tokens may follow a past.
        `output_uncertainty` returns the posterior variance of every KLA layer and token as `uncertainties`.
        """
        collect = (kwargs.get("mixer_options") or {}).get("collect")
        if output_uncertainty and collect is None:
            collect = _Collected()
            kwargs["mixer_options"] = {"collect": collect}
        outputs = run_decoder(
            self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        return KLAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            uncertainties=tuple(collect.variances) if output_uncertainty else None,
        )


class KLAForCausalLM(KLAPreTrainedModel, DecoderGenerationMixin):
    """The decoder with a language-modelling head, and with the Monte-Carlo marginal read-out."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: KLAConfig) -> None:
        super().__init__(config)
        self.model = KLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_uncertainty: bool = False,
        marginal_samples: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KLACausalLMOutputWithPast:
        """Arguments as in `KLAModel.forward`; `labels` (B, T) are shifted inside, -100 is ignored.

        With `marginal_samples` = n > 0 the output of the last layer's filters is drawn n times from their belief (mean
        and variance), and `logits` are the logarithms of the average token probabilities,

            log p(token) = log 1/n sum_i softmax(head(mlp(h + sqrt(var) eps_i)))[token]

        with their entropy in `predictive_entropy`. Draws come from torch's generator. `generate` takes the argument,
        too; the last layer must be a KLA layer.

        Raises:
            ValueError: `marginal_samples` is no count, or the last layer is none of KLA.
        """
        check_count("marginal_samples", marginal_samples)
        if marginal_samples and self.config.layer_types[-1] != "linear_attention":
            raise ValueError(
                f"`marginal_samples={marginal_samples}` needs a KLA layer as the last one, got "
                f"{self.config.layer_types[-1]!r}; use marginal_samples=0."
            )
        if marginal_samples and self.config.norm_placement != "pre":
            raise ValueError(
                f"`marginal_samples={marginal_samples}` needs norm_placement='pre' (a norm behind the filter changes "
                f"its variances), got {self.config.norm_placement!r}; use marginal_samples=0."
            )
        collected = _Collected()
        outputs: KLAModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_uncertainty=output_uncertainty,
            mixer_options={"collect": collected} if marginal_samples else None,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        entropy = None
        if marginal_samples:
            logits, entropy = self._marginal(collected, kept, marginal_samples)
        else:
            logits = self.head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return KLACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            uncertainties=outputs.uncertainties,
            predictive_entropy=entropy,
        )

    def _marginal(self, collected: _Collected, kept, samples: int) -> tuple[Tensor, Tensor]:
        """Log marginal probabilities (B, kept, V) and their entropy, one sample at a time."""
        mean = collected.before_mlp[:, kept]
        spread = collected.variances[-1][:, kept].sqrt() * self.config.residual_multiplier
        total, last = None, list(self.model.layers)[-1]
        for _ in range(samples):
            drawn = mean + (spread * torch.randn_like(spread)).to(mean.dtype)
            hidden_states = self.model.norm(last.feed_forward(drawn))
            logs = torch.log_softmax(self.head(hidden_states).float(), dim=-1)
            total = logs if total is None else torch.logaddexp(total, logs)
        logits = total - math.log(samples)
        return logits, -(logits.exp() * logits).sum(-1)


class KLAForSequenceClassification(GenericForSequenceClassification, KLAPreTrainedModel):
    """The decoder with a sequence-classification head on the last token."""


class KLAForTokenClassification(GenericForTokenClassification, KLAPreTrainedModel):
    """The decoder with a token-classification head."""


class KLAForQuestionAnswering(GenericForQuestionAnswering, KLAPreTrainedModel):
    """The decoder with a span head."""
