"""Configuration of Kalman Linear Attention models."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from ..configuration import DecoderConfig

__all__ = ["KLAConfig"]


@strict
class KLAConfig(DecoderConfig):
    r"""Configuration of a decoder whose `linear_attention` layers are Kalman Linear Attention (arXiv 2602.10743).

    Fields of the decoder are in `DecoderConfig`. Defaults build a pure KLA model of the published plain block;
    `value_rank="conv", variance_rank=ceil(hidden_size / 8)` is the published language-model block.

    Args:
        linear_expand: width of a mixer over `hidden_size`.
        linear_inner_size: width of a mixer, `linear_expand * hidden_size` when None.
        linear_state_size: filters per channel. Below 8 the layer degenerates, above 64 more rarely help.
        linear_conv_kernel_dim: taps of the short causal convolution; 0 for none.
        linear_bias: bias in the mixer's projections.
        linear_qk_norm: queries and keys of norm 1.
        value_rank: how values are read off the convolved input: "full", a rank, or "conv" for the input itself.
        variance_rank: how log observation variances are: "full" or a rank.
        discretization: of the prior dz = -a z dt + noise over a step: "ou" (exact) or "zoh" (noise times step).
        process_noise: "learned", "fixed" (a buffer) or "none".
        process_noise_parameterization: whether the stored noise is its logarithm ("log") or itself ("raw"). A raw
            noise below 1e-7 counts as 1e-7 and keeps its gradient.
        process_noise_init: its first value; 0.01 when None.
        process_noise_max: upper limit, none when None.
        observation_variance_min: added to every observation variance.
        observation_variance_max: upper limit, none when None.
        use_observation_bias: a learned bias per channel inside the observation variance's softplus.
        use_output_gate: SiLU gate on the read-out.
        skip: learned factor on the convolved input, added to the read-out: "scalar", "channel" or "none".
        skip_init: its first value.
        decode_from_prior: read out what the filter expects of the next step.
        dt_min: smallest first step size; steps are drawn log-uniformly.
        dt_max: largest first step size.
        dt_init_floor: no first step below.
        implementation: "auto", "triton", "torch" or "reference" implementation of the operators.

    ```python
    >>> from hf_kalman import KLAConfig, KLAForCausalLM

    >>> config = KLAConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                    num_attention_heads=4, layer_types=["full_attention", "linear_attention"])
    >>> model = KLAForCausalLM(config)
    ```
    """

    model_type = "kalman_kla"

    rms_norm_eps: float = 1e-5

    linear_expand: float | int = 2.0
    linear_inner_size: int | None = None
    linear_state_size: int = 16
    linear_conv_kernel_dim: int = 4
    linear_bias: bool = False
    linear_qk_norm: bool = True
    value_rank: int | str = "full"
    variance_rank: int | str = "full"
    discretization: Literal["ou", "zoh"] = "ou"
    process_noise: Literal["learned", "fixed", "none"] = "learned"
    process_noise_parameterization: Literal["log", "raw"] = "log"
    process_noise_init: float | None = None
    process_noise_max: float | None = None
    observation_variance_min: float = 1e-4
    observation_variance_max: float | None = None
    use_observation_bias: bool = False
    use_output_gate: bool = True
    skip: Literal["scalar", "channel", "none"] = "scalar"
    skip_init: float | int = -1.0
    decode_from_prior: bool = False
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    implementation: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self, **kwargs):
        """Fill in what follows from other fields."""
        if self.linear_inner_size is None:
            self.linear_inner_size = int(self.linear_expand * self.hidden_size)
        super().__post_init__(**kwargs)

    @property
    def number_of_conv_states(self) -> int:
        """Slots of a cache layer: precision with the convolution context, and information."""
        return 2

    def linear_state_bytes(self, itemsize: int) -> int:
        """Bytes of one KLA layer's cache for one sequence; the convolution context has `itemsize`, beliefs 4 bytes."""
        context = max(0, self.linear_conv_kernel_dim - 1) * self.linear_inner_size * itemsize
        return context + 2 * 4 * self.linear_inner_size * self.linear_state_size

    def validate_architecture(self):
        """Cross-field rules; part of the `@strict` validation."""
        super().validate_architecture()
        for field in ("linear_inner_size", "linear_state_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be >= 1, got {getattr(self, field)}.")
        if self.linear_conv_kernel_dim < 0:
            raise ValueError(f"`linear_conv_kernel_dim` must be >= 0, got {self.linear_conv_kernel_dim}.")
        for field, words in (("value_rank", ("full", "conv")), ("variance_rank", ("full",))):
            rank = getattr(self, field)
            if rank not in words if isinstance(rank, str) else rank < 1:
                raise ValueError(f"`{field}` must be a rank >= 1 or one of {words}, got {rank!r}.")
        for field in ("process_noise_init", "process_noise_max", "observation_variance_max"):
            value = getattr(self, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{field}` must be > 0 or None, got {value}.")
        if not self.observation_variance_min > 0:
            raise ValueError(f"`observation_variance_min` must be > 0, got {self.observation_variance_min}.")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"`dt_min` must be > 0 and at most dt_max={self.dt_max}, got {self.dt_min}.")
