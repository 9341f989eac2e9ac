"""Configuration of Gated KalmaNet models."""

# The host types submodules as `Tensor | Module`, fills optional fields after construction and unpacks kwargs loosely.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

from typing import Literal

from huggingface_hub.dataclasses import strict

from ..configuration import DecoderConfig

__all__ = ["GKAConfig", "check_tolerance"]


def check_tolerance(solver_tolerance: float, solver: str) -> None:
    """Raise `ValueError` when a tolerance is out of its range or has no solver to heed it."""
    if not 0 <= solver_tolerance < 1:
        raise ValueError(f"`solver_tolerance` must be >= 0 and < 1, got {solver_tolerance!r}.")
    if solver_tolerance and solver != "cg":
        raise ValueError(f"`solver_tolerance` needs solver='cg', got {solver_tolerance!r} with {solver!r}.")


@strict
class GKAConfig(DecoderConfig):
    r"""Configuration of a decoder whose `linear_attention` layers are Gated KalmaNet (arXiv 2511.21016).

    Fields of the decoder are in `DecoderConfig`; `attention_bias` and `attention_output_bias` hold for GKA mixers, too.
    Defaults build a pure GKA model.

    Args:
        linear_num_query_heads: query heads of a GKA mixer, `num_attention_heads` when None.
        linear_num_key_heads: key heads of a GKA mixer, `num_key_value_heads` when None.
        linear_num_value_heads: value heads of a GKA mixer, `num_key_value_heads` when None.
        linear_key_head_dim: width of query and key heads, `head_dim` when None.
        linear_value_head_dim: width of value heads, `head_dim` when None.
        linear_conv_kernel_dim: taps of the short causal convolutions.
        use_value_conv: whether values, too, pass a convolution.
        key_activation: activation behind the query and key convolutions.
        value_activation: activation behind the value convolution; "identity" keeps the value path linear.
        use_local_values: adds a linear map from the last `linear_conv_kernel_dim` values to the output: what
            attention heads that look at the previous tokens compute. Needs no state beyond the convolution's.
        use_decay: learned forgetting. Without it the state keeps everything.
        decay_key_gram: whether the forgetting also applies to the Gram matrix of the keys.
        use_solution_mix: learned mixture of query and ridge solution; without it the ridge solution alone.
        use_input_gate: learned factor on keys and values, per head.
        use_output_gate: SiLU gate on the normalised read-out.
        scale_output: read-out times `linear_key_head_dim ** -0.5`.
        output_initializer_factor: what leaves a mixer (`o_proj`, `local_proj`) starts from N(0, (factor *
            `initializer_range`)^2). At 1 the read-out's noise drowns the embeddings in the residual stream, and
            training from scratch stands still at first.
        linear_kv_rank: rank of the learned expansion of key and value heads to query heads; none when None.
        linear_kv_residual: whether the residual of that expansion is a learned mixture of heads.
        solver: how the ridge regression is solved: "chebyshev" (the published polynomial), "cg", "exact".
        solver_iterations: products with the Gram matrix. May be changed at any time without reloading; 0 skips the
            solve.
        solver_tolerance: with `solver="cg"`, the relative residual at which a token's solve ends before
            `solver_iterations`; 0 for the data type's own. May be changed at any time.
        ridge_ratio: ridge over Frobenius norm of the Gram matrix. May be changed at any time.
        ridge_gradient: whether gradients flow through the ridge's dependence on the keys.
        implementation: "auto", "triton", "torch" or "reference" implementation of the operators.

    ```python
    >>> from hf_kalman import GKAConfig, GKAForCausalLM

    >>> config = GKAConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                    num_attention_heads=4, layer_types=["full_attention", "linear_attention"])
    >>> model = GKAForCausalLM(config)
    ```
    """

    model_type = "kalman_gka"
    linear_num_query_heads: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    use_value_conv: bool = True
    key_activation: Literal["silu", "identity"] = "silu"
    value_activation: Literal["silu", "identity"] = "silu"
    use_local_values: bool = False
    use_decay: bool = True
    decay_key_gram: bool = True
    use_solution_mix: bool = True
    use_input_gate: bool = True
    use_output_gate: bool = True
    scale_output: bool = True
    output_initializer_factor: float | int = 0.03
    linear_kv_rank: int | None = None
    linear_kv_residual: bool = False
    solver: Literal["chebyshev", "cg", "exact"] = "chebyshev"
    solver_iterations: int = 30
    solver_tolerance: float | int = 0.0
    ridge_ratio: float = 0.02
    ridge_gradient: bool = True
    implementation: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self, **kwargs):
        """Fill in what follows from other fields."""
        self._fill_decoder()
        if self.linear_num_query_heads is None:
            self.linear_num_query_heads = self.num_attention_heads
        if self.linear_num_key_heads is None:
            self.linear_num_key_heads = self.num_key_value_heads
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.num_key_value_heads
        if self.linear_key_head_dim is None:
            self.linear_key_head_dim = self.head_dim
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = self.head_dim
        super().__post_init__(**kwargs)

    @property
    def linear_num_heads(self) -> int:
        """Heads of a GKA mixer after expansion: the largest of query, key and value heads."""
        return max(self.linear_num_query_heads, self.linear_num_key_heads, self.linear_num_value_heads)

    @property
    def number_of_conv_states(self) -> int:
        """Slots of a cache layer: query, key and value convolution contexts; the first two also hold the states."""
        return 3

    def linear_state_bytes(self, itemsize: int) -> int:
        """Bytes of one GKA layer's cache for one sequence; convolution contexts have `itemsize`, states 4 bytes."""
        heads, key_dim, value_dim = self.linear_num_heads, self.linear_key_head_dim, self.linear_value_head_dim
        channels = (self.linear_num_query_heads + self.linear_num_key_heads) * key_dim
        if self.use_value_conv or self.use_local_values:
            channels += self.linear_num_value_heads * value_dim
        context = (self.linear_conv_kernel_dim - 1) * channels * itemsize
        return context + 4 * heads * key_dim * (key_dim + value_dim)

    def validate_architecture(self):
        """Cross-field rules; part of the `@strict` validation."""
        super().validate_architecture()
        self._validate_heads()
        if self.linear_conv_kernel_dim < 1:
            raise ValueError(f"`linear_conv_kernel_dim` must be >= 1, got {self.linear_conv_kernel_dim}.")
        if self.solver_iterations < 0:
            raise ValueError(f"`solver_iterations` must be >= 0, got {self.solver_iterations}.")
        check_tolerance(self.solver_tolerance, self.solver)
        if not self.ridge_ratio > 0:
            raise ValueError(f"`ridge_ratio` must be > 0, got {self.ridge_ratio}.")
        if not self.output_initializer_factor >= 0:
            raise ValueError(f"`output_initializer_factor` must be >= 0, got {self.output_initializer_factor}.")
        if self.linear_kv_rank is not None and self.linear_kv_rank < 1:
            raise ValueError(f"`linear_kv_rank` must be >= 1 or None, got {self.linear_kv_rank}.")
        if self.linear_kv_residual and self.linear_kv_rank is None:
            raise ValueError("`linear_kv_residual` needs `linear_kv_rank`, got linear_kv_rank=None.")

    def _validate_heads(self):
        for field in ("linear_num_query_heads", "linear_num_key_heads", "linear_num_value_heads"):
            if getattr(self, field) < 1 or self.linear_num_heads % getattr(self, field):
                raise ValueError(
                    f"`{field}` must divide the {self.linear_num_heads} heads of a GKA mixer (the largest of its "
                    f"query, key and value heads), got {getattr(self, field)}."
                )
