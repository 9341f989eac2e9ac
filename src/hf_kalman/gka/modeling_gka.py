"""Gated KalmaNet models (arXiv 2511.21016), pure and hybrid."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

import math

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

from kalman_kernels import GKASolver, GKAState, Segments, causal_conv
from kalman_kernels.gka import MixerInputs, MixerOptions, gka_mixer_step, serves_mixer_step
from kalman_kernels.layers import GatedKalmaNet, GatedRMSNorm
from kalman_kernels.numerics import EPSILON, unit_norm, widen

from ..decoder import (
    DecoderAttention,
    DecoderGenerationMixin,
    DecoderLayer,
    DecoderPreTrainedModel,
    build_decoder,
    run_decoder,
)
from ..layers import ShortConvolution, check_count, exchangeable, inverse_softplus
from .configuration_gka import GKAConfig, check_tolerance

__all__ = [
    "GKAForCausalLM",
    "GKAForQuestionAnswering",
    "GKAForSequenceClassification",
    "GKAForTokenClassification",
    "GKAMixer",
    "GKAModel",
    "GKAPreTrainedModel",
]


class LowRankLinear(nn.Module):
    """linearB(SiLU(linearA(x))): the learned part of a key/value head expansion."""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.linearA = nn.Linear(inputs, rank, bias=False)
        self.linearB = nn.Linear(rank, outputs, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.linearB(F.silu(self.linearA(hidden_states)))


@exchangeable("GatedRMSNorm")
class MixerNorm(GatedRMSNorm):
    """RMSNorm(x) * weight * SiLU(gate), in at least float32; of (..., width) and a gate of the same shape or None."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps


@exchangeable("GatedKalmaNet")
class Operator(GatedKalmaNet):
    """The operator of a mixer."""


class DecayBias(nn.Module):
    """The part of a decay that the input does not decide: log_decay = -exp(A_log) softplus(gate + dt_bias).

    In a module of its own because it stays in float32 whatever the model's dtype, and called a bias because that is
    what optimisers exempt from weight decay by name.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))

    def forward(self, gate: Tensor) -> Tensor:
        """(..., heads) to log decays of the same shape in at least float32."""
        return -widen(self.A_log).exp() * F.softplus(widen(gate) + widen(self.dt_bias))


class GKAMixer(nn.Module):
    """Gated KalmaNet layer: project, convolve, gate, solve the ridge regression, read out.

    q, k, v = unit(SiLU(conv(W h))), unit(SiLU(conv(W h))), act(conv(W h))
    beta = sigmoid(W_b h + b_b)    alpha = sigmoid(W_alpha h + b_alpha)
    log_decay = -exp(A_log) softplus(W_a h + dt_bias)
    o = gated_kalmanet(q, k, v, log_decay, alpha, input_gate=beta)
    out = W_o (RMSNorm(o) * SiLU(W_g h)) [+ W_local (the last K values)]
                                                    [arXiv 2511.21016, section 4; papers' alpha is `solution_mix`]
    """

    def __init__(self, config: GKAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.operator = Operator()
        width, heads, bias = config.hidden_size, config.linear_num_heads, config.attention_bias
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.q_proj = nn.Linear(width, config.linear_num_query_heads * key_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.linear_num_key_heads * key_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.linear_num_value_heads * value_dim, bias=bias)
        self.q_conv1d = ShortConvolution(self.q_proj.out_features, config.linear_conv_kernel_dim)
        self.k_conv1d = ShortConvolution(self.k_proj.out_features, config.linear_conv_kernel_dim)
        if config.use_value_conv:
            self.v_conv1d = ShortConvolution(self.v_proj.out_features, config.linear_conv_kernel_dim)
        if config.use_decay:
            self.a_proj = nn.Linear(width, heads, bias=False)
            self.decay_bias = DecayBias(heads)
        if config.use_input_gate:
            self.b_proj = nn.Linear(width, heads, bias=True)
        if config.use_solution_mix:
            self.alpha_proj = nn.Linear(width, heads, bias=True)
        if config.use_output_gate:
            self.g_proj = nn.Linear(width, heads * value_dim, bias=False)
        self._add_expansion(config)
        self.o_norm = MixerNorm(value_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(heads * value_dim, width, bias=config.attention_output_bias)
        # For `_init_weights`, which the host does not call for modules without parameters of their own, like this one.
        self.o_proj.leaves_mixer = True
        if config.use_local_values:
            self.local_proj = nn.Linear(config.linear_conv_kernel_dim * self.v_proj.out_features, width, bias=False)
            self.local_proj.leaves_mixer = True

    def _add_expansion(self, config: GKAConfig) -> None:
        """Learned expansion of key and value heads to all heads, where the configuration asks for one."""
        heads, rank = config.linear_num_heads, config.linear_kv_rank
        self.expand_key = rank is not None and heads > config.linear_num_key_heads
        self.expand_value = rank is not None and heads > config.linear_num_value_heads
        if self.expand_key:
            self.proj_k = LowRankLinear(self.k_proj.out_features, rank, heads * config.linear_key_head_dim)
        if self.expand_value:
            self.proj_v = LowRankLinear(self.v_proj.out_features, rank, heads * config.linear_value_head_dim)
        if self.expand_key and config.linear_kv_residual:
            self.k_rep = nn.Parameter(torch.zeros(heads, config.linear_num_key_heads))
        if self.expand_value and config.linear_kv_residual:
            self.v_rep = nn.Parameter(torch.zeros(heads, config.linear_num_value_heads))

    @property
    def solver(self) -> GKASolver:
        """The solver that the configuration asks for at this moment."""
        config = self.config
        return GKASolver(
            config.solver, config.solver_iterations, config.ridge_ratio, config.ridge_gradient, config.solver_tolerance
        )

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        past_key_values: Cache | None = None,
        solver_iterations: int | None = None,
    ) -> Tensor:
        """(B, T, hidden) to the same, continuing from and writing to `past_key_values` when it is given.

        `solver_iterations` overrides the configuration's for this call.
        """
        if past_key_values is not None:
            past_key_values.layers[self.layer_idx].remember(
                lambda cache, hidden, cut: self(hidden, cut, cache, solver_iterations),
                self.layer_idx,
                hidden_states,
                segments,
            )
        features, local = self.features(hidden_states, segments, past_key_values, solver_iterations)
        output = self.o_proj(features)
        return output if local is None else output + self.local_proj(local)

    def features(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        past_key_values: Cache | None = None,
        solver_iterations: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the output is linear in: (B, T, H Dv) for `o_proj`, and (B, T, K Gv Dv) for `local_proj` or None."""
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        solver = self.solver
        if solver_iterations is not None:
            solver = solver._replace(iterations=solver_iterations)
        return self._features(hidden_states, segments, layer, solver)

    def _features(
        self, hidden_states: Tensor, segments: Segments | None, layer, solver: GKASolver
    ) -> tuple[Tensor, Tensor | None]:
        """`features`, continuing from and writing to an entry of a cache."""
        if layer is not None and self._steps(hidden_states, segments, layer, solver):
            return self._step(hidden_states, segments, layer, solver)
        slots = [layer.read(slot) for slot in range(3)] if layer is not None else [(None, None)] * 3
        (q_past, gram), (k_past, value_key), (v_past, _) = slots
        activation, width = "silu" if self.config.key_activation == "silu" else None, self.config.linear_key_head_dim
        query, q_past = self._convolve(
            self.q_proj(hidden_states), self.q_conv1d, q_past, segments, activation, unit_width=width
        )
        # A learned expansion comes before the norm.
        key, k_past = self._convolve(
            self.k_proj(hidden_states),
            self.k_conv1d,
            k_past,
            segments,
            activation,
            unit_width=None if self.expand_key else width,
        )
        raw_value = self.v_proj(hidden_states)
        value, local, v_past = self._value(raw_value, v_past, segments)
        query, key = query.unflatten(-1, (-1, width)), key.unflatten(-1, (-1, width))
        query, key, value = self._expand(query, key, value.unflatten(-1, (-1, self.config.linear_value_head_dim)))
        log_decay, key_log_decay = self._log_decay(hidden_states)
        outputs, state = self.operator(
            query,
            unit_norm(key) if self.expand_key else key,
            value,
            log_decay,
            torch.sigmoid(self.alpha_proj(hidden_states)) if self.config.use_solution_mix else None,
            key_log_decay,
            torch.sigmoid(self.b_proj(hidden_states)) + EPSILON if self.config.use_input_gate else None,
            solver,
            None if gram is None else GKAState(gram, value_key),
            segments,
            {"scale": None if self.config.scale_output else 1.0, "implementation": self.config.implementation},
        )
        if layer is not None:
            layer.write(0, q_past, state.key_gram)
            layer.write(1, k_past, state.value_key)
            layer.write(2, v_past, None)
            layer.advance(hidden_states.shape[1])
            if layer.log_decays is not None and log_decay is not None:
                layer.log_decays += [key_log_decay.sum(1), log_decay.sum(1)]
        gate = self.g_proj(hidden_states).view_as(outputs) if self.config.use_output_gate else None
        return self.o_norm(outputs, gate, self.config.implementation).flatten(-2), local

    def _steps(self, hidden_states: Tensor, segments: Segments | None, layer, solver: GKASolver) -> bool:
        """Whether the fused step serves this call: one new token, or a few unpadded ones without `local_proj`."""
        config = self.config
        length, widths = hidden_states.shape[1], (config.linear_key_head_dim, config.linear_value_head_dim)
        plain = not (self.expand_key or self.expand_value) and config.linear_conv_kernel_dim > 1
        return (
            plain
            and (length == 1 or not (config.use_local_values or segments is not None))
            and (segments is None or segments.reset is None)
            and all(layer.has_previous_state[slot] for slot in range(2))
            and serves_mixer_step(hidden_states, *widths, length, solver, config.implementation)
            and self._at_hand(hidden_states.device)
        )

    def _at_hand(self, device: torch.device) -> bool:
        """Whether the weights that the fused step takes from submodules are theirs alone, whole and not offloaded."""
        config = self.config
        convolutions = [self.q_conv1d, self.k_conv1d, *([self.v_conv1d] if config.use_value_conv else [])]
        weights = [module.weight for module in (*convolutions, self.o_norm)]
        weights += [*self.decay_bias.parameters()] if config.use_decay else []
        return all(type(module) is ShortConvolution for module in convolutions) and all(
            type(weight) is nn.Parameter and weight.device == device for weight in weights
        )

    def _step(
        self, hidden_states: Tensor, segments: Segments | None, layer, solver: GKASolver
    ) -> tuple[Tensor, Tensor | None]:
        """`features` through one fused operator, states replaced in place."""
        config = self.config
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        (q_past, gram), (k_past, value_key), (v_past, _) = (layer.read(slot) for slot in range(3))
        value, local = self.v_proj(hidden_states), None
        if config.use_local_values:
            local = torch.cat([v_past, value.transpose(1, 2)], dim=-1).flatten(1)[:, None]
        gate = self.g_proj(hidden_states) if config.use_output_gate else None
        inputs = MixerInputs(
            self.q_proj(hidden_states).unflatten(-1, (-1, key_dim)),
            self.k_proj(hidden_states).unflatten(-1, (-1, key_dim)),
            value.unflatten(-1, (-1, value_dim)),
            self.a_proj(hidden_states) if config.use_decay else None,
            self.alpha_proj(hidden_states) if config.use_solution_mix else None,
            self.b_proj(hidden_states) if config.use_input_gate else None,
            None if gate is None else gate.unflatten(-1, (-1, value_dim)),
            q_past,
            k_past,
            v_past,
            self.q_conv1d.weight[:, 0],
            self.k_conv1d.weight[:, 0],
            self.v_conv1d.weight[:, 0] if config.use_value_conv else None,
            self.decay_bias.A_log if config.use_decay else None,
            self.decay_bias.dt_bias if config.use_decay else None,
            self.o_norm.weight,
            gram,
            value_key,
            None if segments is None or segments.valid is None else segments.valid.to(torch.int8),
        )
        options = MixerOptions(
            config.key_activation == "silu",
            config.value_activation == "silu",
            config.decay_key_gram,
            key_dim**-0.5 if config.scale_output else 1.0,
            config.rms_norm_eps,
        )
        outputs = gka_mixer_step(inputs, solver, options)
        layer.advance(hidden_states.shape[1])
        return outputs.flatten(-2), local

    def _convolve(
        self,
        inputs: Tensor,
        conv: ShortConvolution,
        past: Tensor | None,
        segments: Segments | None,
        activation: str | None,
        unit_width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        return conv(inputs, past, segments, self.config.implementation, activation, unit_width)

    def _value(self, raw: Tensor, past: Tensor | None, segments: Segments | None):
        """Values, the window of raw values for `local_proj`, and the context to carry."""
        config, local, context = self.config, None, None
        activation = "silu" if config.value_activation == "silu" else None
        if config.use_local_values:
            local, context = self._window(raw, past, segments)
        if config.use_value_conv:
            value, context = self._convolve(raw, self.v_conv1d, past, segments, activation)
        else:
            value = raw if activation is None else F.silu(raw)
        return value, local, context

    def _window(self, raw: Tensor, past: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """The last K values of the same sequence as (B, T, K C), oldest first per channel, and the context."""
        taps = self.config.linear_conv_kernel_dim
        if segments is None:
            if past is None:
                line = F.pad(raw, (0, 0, taps - 1, 0))
            else:
                line = torch.cat([past.to(raw.dtype).transpose(1, 2), raw], dim=1)
            return line.unfold(1, taps, 1).flatten(-2), line[:, raw.shape[1] :].transpose(1, 2)
        # Depthwise one-hot taps: every channel of the window is one delayed copy of the values.
        window = torch.eye(taps, dtype=raw.dtype, device=raw.device).repeat(raw.shape[-1], 1)
        wide_past = None if past is None else past.repeat_interleave(taps, dim=1)
        local, wide_past = causal_conv(raw.repeat_interleave(taps, dim=-1), window, wide_past, segments)
        return local, wide_past[:, ::taps]

    def _expand(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query heads to all heads, and the learned expansion of keys and values where there is one."""
        heads = self.config.linear_num_heads
        if query.shape[2] < heads:
            query = query.repeat_interleave(heads // query.shape[2], dim=2)
        if self.expand_key:
            key = self._learned(key, self.proj_k, getattr(self, "k_rep", None))
        if self.expand_value:
            value = self._learned(value, self.proj_v, getattr(self, "v_rep", None))
        return query, key, value

    def _learned(self, heads: Tensor, low_rank: LowRankLinear, mixture: Tensor | None) -> Tensor:
        expanded = low_rank(heads.flatten(-2)).unflatten(-1, (self.config.linear_num_heads, -1))
        if mixture is None:
            return expanded + heads.repeat_interleave(self.config.linear_num_heads // heads.shape[2], dim=2)
        return expanded + torch.einsum("hg,btgd->bthd", mixture.to(heads.dtype), heads)

    def _log_decay(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(value state, Gram matrix) log decays (B, T, H) in at least float32; None for no decay."""
        if not self.config.use_decay:
            return None, None
        log_decay = self.decay_bias(self.a_proj(hidden_states))
        return log_decay, log_decay if self.config.decay_key_gram else torch.zeros_like(log_decay)


class GKADecoderLayer(DecoderLayer):
    """Decoder layer whose `linear_attention` mixer is Gated KalmaNet."""

    mixer_class = GKAMixer


class GKAPreTrainedModel(DecoderPreTrainedModel):
    """Weight initialisation and what the mixers add to the host's feature flags."""

    config: GKAConfig
    _no_split_modules = ["GKADecoderLayer"]
    _keep_in_fp32_modules_strict = ["decay_bias"]
    _can_record_outputs = {"hidden_states": GKADecoderLayer, "attentions": DecoderAttention}

    def set_solver_iterations(self, solver_iterations: int, solver_tolerance: float | None = None) -> None:
        """Change the solver of every mixer from now on, without reloading; `save_pretrained` keeps it.

        Args:
            solver_iterations: as in the configuration.
            solver_tolerance: as in the configuration: fewer iterations where they are not needed; None leaves it.

        Raises:
            ValueError: one of them is out of its range.
        """
        check_count("solver_iterations", solver_iterations)
        if solver_tolerance is not None:
            check_tolerance(solver_tolerance, self.config.solver)
            self.config.solver_tolerance = solver_tolerance
        self.config.solver_iterations = solver_iterations

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "leaves_mixer", False):
            init.normal_(module.weight, std=self.config.output_initializer_factor * self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, GatedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LowRankLinear):
            init.zeros_(module.linearB.weight)
        elif isinstance(module, DecayBias):
            # Drawn in float32 and kept away from 0, so that log never becomes -inf.
            rate = torch.empty_like(module.A_log, dtype=torch.float32).uniform_(0.01, 16)
            init.copy_(module.A_log, rate.log())
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(module.dt_bias, inverse_softplus(step))
        elif isinstance(module, GKAMixer):
            self._init_expansion(module)

    @staticmethod
    def _init_expansion(mixer: GKAMixer) -> None:
        for name, groups in (
            ("k_rep", mixer.config.linear_num_key_heads),
            ("v_rep", mixer.config.linear_num_value_heads),
        ):
            parameter = getattr(mixer, name, None)
            if parameter is not None:
                repeat = torch.eye(groups, device=parameter.device)
                init.copy_(parameter, repeat.repeat_interleave(parameter.shape[0] // groups, dim=0))


class GKAModel(GKAPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: GKAConfig) -> None:
        super().__init__(config)
        build_decoder(self, config, GKADecoderLayer)
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
        solver_iterations: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Arguments as in every decoder of the host library.

        `attention_mask` is a (B, past + T) padding mask, None, or a dict with one mask per kind of layer. Packed rows
        are given by `cu_seq_lens_q`, `seq_idx` or restarting `position_ids`. Any number of tokens may follow a past.
        `solver_iterations` overrides the configuration's for this call: test-time compute.

        Raises:
            ValueError: `solver_iterations` is negative.
        """
        if solver_iterations is not None:
            check_count("solver_iterations", solver_iterations)
            kwargs["mixer_options"] = {"solver_iterations": solver_iterations}
        return run_decoder(
            self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )


class GKAForCausalLM(GKAPreTrainedModel, DecoderGenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GKAConfig) -> None:
        super().__init__(config)
        self.model = GKAModel(config)
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
        solver_iterations: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Arguments as in `GKAModel.forward`; `labels` (B, T) are shifted inside, -100 is ignored.

        `generate`, too, takes `solver_iterations`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            solver_iterations=solver_iterations,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GKAForSequenceClassification(GenericForSequenceClassification, GKAPreTrainedModel):
    """The decoder with a sequence-classification head on the last token."""


class GKAForTokenClassification(GenericForTokenClassification, GKAPreTrainedModel):
    """The decoder with a token-classification head."""


class GKAForQuestionAnswering(GenericForQuestionAnswering, GKAPreTrainedModel):
    """The decoder with a span head."""
