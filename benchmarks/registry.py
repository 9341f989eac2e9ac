"""Models x tasks x sizes: what the task benchmarks compare, and the one shell that they all live in.

A mixer maps (B, T, width) to the same. `MIXERS` makes them by name: ours, softmax attention, and layers of
`flash-linear-attention` as that library builds them. Keys and state are equal for all recurrent ones but KLA: heads of
`head` key channels and 2 * `head` value channels, or, for GKA and MesaNet, the Gram matrix beside a square state: 2 *
width * head numbers per layer. KLA keeps its published 16 filters for each of its 2 * width channels, two numbers each.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_kalman import GKAConfig, GKAModel, KLAConfig, KLAModel
from hf_kalman.layers import ShortConvolution

HEAD = 64


class Attention(nn.Module):
    """The decoder's softmax attention, rotary, behind the short convolution that all other mixers have."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, width: int) -> None:
        super().__init__()
        self.conv = ShortConvolution(width, 4)
        self.layer, self.rotary = layer, rotary

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        hidden, _ = self.conv(hidden, None, None, "auto")
        places = self.rotary(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        return self.layer(hidden, places)[0]


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060): one group, the recurrence by flash-linear-attention's `simple_gla` kernels.

    S_t = exp(-exp(A_log) d_t) S_{t-1} + d_t x_t B_t^T ,   y_t = S_t C_t + D x_t ,   d_t = softplus(dt_t + dt_bias)
    """

    def __init__(self, width: int, heads: int, states: int, expand: int = 2) -> None:
        super().__init__()
        self.heads, self.states, self.inner = heads, states, expand * width
        self.in_proj = nn.Linear(width, 2 * self.inner + 2 * states + heads, bias=False)
        self.conv = nn.Conv1d(self.inner + 2 * states, self.inner + 2 * states, 4, groups=self.inner + 2 * states)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.skip_bias = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.o_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        from fla.ops.simple_gla import chunk_simple_gla

        sizes = (self.inner, self.inner + 2 * self.states, self.heads)
        gate, mixed, step = self.in_proj(hidden).split(sizes, -1)
        mixed = F.silu(self.conv(F.pad(mixed.transpose(1, 2), (3, 0)))).transpose(1, 2)
        x, b, c = mixed.split((self.inner, self.states, self.states), -1)
        x = x.unflatten(-1, (self.heads, -1))
        b, c = (t[:, :, None].expand(-1, -1, self.heads, -1).contiguous() for t in (b, c))
        step = F.softplus(step.float() + self.dt_bias)
        output = chunk_simple_gla(
            c, b, (x * step[..., None]).to(b.dtype), g=-self.A_log.float().exp() * step, scale=1.0
        )[0]
        output = (output + self.skip_bias[:, None] * x).flatten(-2)
        return self.o_proj(self.norm((output * F.silu(gate)).to(hidden.dtype)))


def without_tuning():
    """Let Triton's autotuned kernels take the first of their configurations; call it before the peers' first use.

    Their tuning takes minutes for each shape and changes no result; where speed is measured they are tuned.
    """
    from triton.runtime.autotuner import Autotuner

    if getattr(Autotuner, "first_only", False):
        return
    original = Autotuner.__init__

    def first(self, fn, arg_names, configs, *arguments, **options):
        original(self, fn, arg_names, configs[:1], *arguments, **options)

    Autotuner.__init__, Autotuner.first_only = first, True


class Peer(nn.Module):
    """A layer of flash-linear-attention; returns its output alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        return self.layer(hidden)[0]


def _ours(config, model, width, head, layers, **fields):
    """A new model of ours, initialised as it initialises itself."""
    return model(
        config(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // head),
            head_dim=head,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **fields,
        )
    )


class ConstantRidge(nn.Module):
    """What stands for the operator of a bare GKA layer: y_t = U_t (H_t + ridge I)^-1 q_t, by MesaNet's kernels."""

    def __init__(self, ridge: float) -> None:
        super().__init__()
        self.ridge = ridge

    def forward(self, query, key, value, log_decay, solution_mix, key_log_decay, input_gate, *_):
        """(outputs, None); all gates have to be absent."""
        from fla.ops.mesa_net import chunk_mesa_net

        if any(gate is not None for gate in (log_decay, solution_mix, key_log_decay, input_gate)):
            raise ValueError("a constant ridge is made for the layer without gates")
        ones = query.new_ones(query.shape[:3])
        zeros = torch.zeros_like(ones, dtype=torch.float32)
        ridge = query.new_full(query.shape[2:], self.ridge, dtype=torch.float32)
        return chunk_mesa_net(query, key, value, zeros, ones, ridge, max_CG_iteration=30)[0], None


def _gka(width, head, layers, constant_ridge=None, **fields):
    fields = {"solver": "cg", "solver_iterations": 20, "output_initializer_factor": 1.0} | fields
    mixers = [layer.mixer for layer in _ours(GKAConfig, GKAModel, width, head, layers, **fields).layers]
    for mixer in mixers if constant_ridge is not None else ():
        mixer.operator = ConstantRidge(constant_ridge)
    return mixers


def _kla(width, head, layers, **fields):
    return [layer.mixer for layer in _ours(KLAConfig, KLAModel, width, head, layers, **fields).layers]


def _attention(width, head, layers, **fields):
    model = _ours(GKAConfig, GKAModel, width, head, layers, layer_types=["full_attention"] * layers, **fields)
    return [Attention(layer.self_attn, model.rotary_emb, width) for layer in model.layers]


def _peers(name, told_head=True, **settings):
    """A maker of layers; `told_head`: whether the layer takes the key width (or has it from width and heads)."""

    def make(width, head, layers, **fields):
        import fla.layers

        own = {"hidden_size": width, "num_heads": max(1, width // head), **settings, **fields}
        own |= {"head_dim": head} if told_head else {}
        return [Peer(getattr(fla.layers, name)(**own)) for _ in range(layers)]

    return make


MIXERS = {
    "attention": _attention,
    "gka": _gka,
    "kla": _kla,
    "mamba2": lambda width, head, layers: [Mamba2(width, max(1, 2 * width // head), head) for _ in range(layers)],
    "gla": _peers("GatedLinearAttention", False, expand_k=1.0, expand_v=2.0, use_short_conv=True),
    "delta_net": _peers("DeltaNet", False, expand_v=2.0),
    "gated_delta_net": _peers("GatedDeltaNet", expand_v=2.0),
    "mesa_net": _peers("MesaNet"),
    "delta_product": _peers("GatedDeltaProduct", expand_v=2.0, num_householder=2, allow_neg_eigval=True),
}
OURS = ("gka", "kla")
MODELS = tuple(name for name in MIXERS if name != "delta_product")
# What KLA starts from; as published it is steps of 0.001 to 0.1 and weights from N(0, 0.02^2).
KLA_STARTS = {
    "steps 0.01 to 1": {"dt_min": 0.01, "dt_max": 1.0},
    "weights 0.1": {"initializer_range": 0.1},
    "steps 0.01 to 1, weights 0.1": {"dt_min": 0.01, "dt_max": 1.0, "initializer_range": 0.1},
    "observation variance 1/16": {"use_observation_bias": True},
}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x)) unless `mlp` is 0."""

    def __init__(self, mixer: nn.Module, width: int, mlp: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width, eps=1e-6), mixer
        self.mlp = mlp
        if mlp:
            self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
            self.up, self.down = nn.Linear(width, 2 * mlp, bias=False), nn.Linear(mlp, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        hidden = hidden + self.mixer(self.mixer_norm(hidden))
        if self.mlp:
            gate, up = self.up(self.mlp_norm(hidden)).chunk(2, -1)
            hidden = hidden + self.down(F.silu(gate) * up)
        return hidden


class TaskModel(nn.Module):
    """Embedding, blocks, norm, head; linear maps start from N(0, 0.02^2), what mixers start specially stays.

    GKA's output projections start as wide as those of all others here, not small.

    `decoded` positions > 0: the task is compression; all of them are read off the last hidden state alone, each by
    a two-layer network that is told the position.
    """

    def __init__(self, mixers, width, vocabulary, mlp, decoded=0, tied=False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(mixer, width, mlp) for mixer in mixers)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if decoded:
            self.positions = nn.Embedding(decoded, width)
            self.decoder = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        ours = {m for mixer in mixers if type(mixer).__module__.startswith("hf_kalman") for m in mixer.modules()}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module not in ours:
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of (B, T) tokens at all positions, or at (B, Q) `positions`."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        if hasattr(self, "decoder"):
            hidden = hidden[:, -1:] + self.positions.weight.to(hidden.dtype)
            hidden = hidden + self.decoder(hidden)
        elif positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.head(hidden)


@torch.no_grad()
def start_outputs(model: nn.Module, factor: float) -> nn.Module:
    """`model`, what its mixers' output projections (named `o_proj`, or marked so) start from multiplied by `factor`."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "o_proj" or getattr(module, "leaves_mixer", False):
            module.weight.mul_(factor)
    return model


def weight_decay_groups(model: nn.Module, decay: float, exempt=("bias", "A_log")) -> list[dict]:
    """Parameter groups for AdamW: `decay` on matrices, none on other shapes and on names with a part in `exempt`."""
    groups = [{"params": [], "weight_decay": decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 2 and not any(part in name for part in exempt)
        groups[0 if plain else 1]["params"].append(parameter)
    return groups


@dataclass(frozen=True)
class Size:
    """A model's size and its training: everything of a cell but the mixer and the task.

    `outputs`: factor on what the mixers' output projections start from.
    """

    width: int = 128
    layers: int = 2
    head: int = HEAD
    mlp: int = 0
    batch: int = 32
    steps: int = 3000
    rates: tuple = (1e-3, 3e-3, 1e-2)
    seeds: int = 3
    autocast: bool = True
    outputs: float = 1.0
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One entry of a study: a mixer on a task at a size; `at`: a part of it, one of its learning rates alone."""

    model: str
    task: str
    size: Size
    label: str = ""
    at: float | None = None

    @property
    def key(self) -> str:
        """What the results call it."""
        names = (self.label or self.model, self.task, f"{self.size.width}x{self.size.layers}")
        return "/".join(names) + ("" if self.at is None else f" at {self.at:g}")

    @property
    def rates(self) -> tuple:
        """Learning rates to train at."""
        return self.size.rates if self.at is None else (self.at,)

    @property
    def parts(self) -> list["Cell"]:
        """The same at each of its rates."""
        return [replace(self, at=rate) for rate in self.size.rates]


def build(cell: Cell, task, seed: int) -> TaskModel:
    """The cell's model, drawn from `seed`; `task` has `vocabulary`, `decoded` and `tied`."""
    torch.manual_seed(seed)
    size = cell.size
    mixers = MIXERS[cell.model](size.width, size.head, size.layers, **size.fields)
    model = TaskModel(mixers, size.width, task.vocabulary, size.mlp, task.decoded, task.tied)
    return model if size.outputs == 1 else start_outputs(model, size.outputs)
