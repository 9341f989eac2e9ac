"""Which attention layers a model misses least, measured: criteria for one layer at a time and for sets."""

# matplotlib is optional and comes without types.
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .heal import heal_rls, layer_errors
from .swap import swap_attention
from .taps import windowed_attention, zeroed_attention
from .verify import perplexity

__all__ = [
    "CRITERIA",
    "choose_layers",
    "plot_ranking",
    "rank_layers",
    "read_ranking",
    "recall_perplexity",
    "swapped_in",
]

# How the layers can be ordered; `greedy` is the one that `--layers auto:COUNT` uses.
CRITERIA = ("greedy", "healed", "recall", "error", "zeroed", "window", "window_recall")


class _Adapter(nn.Module):
    """A mixer with the signature of an attention layer."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        return self.mixer(hidden_states), None


@contextmanager
def swapped_in(teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Within this context the teacher has the student's mixers in the given layers."""
    kept = {index: teacher.model.layers[index].self_attn for index in layers}
    try:
        for index in layers:
            teacher.model.layers[index].self_attn = _Adapter(student.model.layers[index].mixer)
        yield
    finally:
        for index, attention in kept.items():
            teacher.model.layers[index].self_attn = attention


def recall_perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 1) -> float:
    """Perplexity of text that stands in the context already: the first half of each window, repeated.

    Args:
        model: a causal LM.
        windows: (N, T) tokens.
        batch_size: windows read at once.
    """
    half = windows[:, : windows.shape[1] // 2]
    return perplexity(model, torch.cat([half, half], dim=1), batch_size=batch_size, skip=half.shape[1])


def rank_layers(
    teacher: PreTrainedModel,
    windows: Tensor,
    selection: Tensor,
    *,
    count: int,
    mixer: Literal["gka", "kla"] = "gka",
    keep: Sequence[int] = (0, 1),
    window: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    **mixer_fields,
) -> dict[str, Any]:
    """Measure every layer of a model alone, and greedily together.

    All layers are healed once by recursive least squares on the teacher's hidden states. Then, on other text:

        zeroed          perplexity with the layer's attention output set to zero
        window          perplexity with the layer's attention cut to the last `window` tokens, and
        window_recall   perplexity of repeated text likewise: the published criterion, at our size [arXiv 2605.08301]
        error           relative error of the healed mixer on its layer
        healed          perplexity with the healed mixer in the layer's place
        recall          perplexity of repeated text likewise
        greedy          `healed` times `recall`, but every layer is judged together with those chosen before it

    Args:
        teacher: a model that can be converted.
        windows: (N, T) tokens for least squares; the first of them is held out for `error`.
        selection: (M, T) tokens for everything else; neither healing nor test text.
        count: layers that the greedy criterion chooses.
        mixer: see `swap_attention`.
        keep: layers that are never chosen by it; the first ones hold a model together.
        window: tokens that `window` leaves to see; a sixteenth of T when None.
        batch_size: windows of `selection` read at once.
        progress: whether to show progress bars.
        mixer_fields: see `swap_attention`.

    Returns:
        {"teacher": {"perplexity", "recall"}, "layers": {index: {criterion: value}},
        "greedy": [[index, perplexity, recall]]} and what was measured on; JSON-serialisable. Lower is better.

    Raises:
        ValueError: fewer than `count` layers are free, or too little text.
    """
    total = teacher.config.num_hidden_layers
    free = [index for index in range(total) if index not in keep]
    if not 1 <= count <= len(free):
        raise ValueError(f"rank_layers: `count` must be from 1 to {len(free)}, the layers not in `keep`, got {count}.")
    if len(windows) < 2:
        raise ValueError(f"rank_layers: `windows` must hold at least 2 windows, got {len(windows)}.")
    window = max(1, selection.shape[1] // 16) if window is None else window
    student = swap_attention(teacher, mixer, "all", share_weights=True, **mixer_fields).eval()
    heal_rls(student, teacher, windows[1:], progress=progress)
    errors = layer_errors(student, teacher, windows[:1])

    def measure(context, function: Callable[..., float]) -> float:
        with context:
            return function(teacher, selection, batch_size=batch_size)

    @functools.cache
    def healed(*indices: int) -> tuple[float, float]:
        with swapped_in(teacher, student, indices):
            found = [f(teacher, selection, batch_size=batch_size) for f in (perplexity, recall_perplexity)]
        return found[0], found[1]

    layers = {}
    for index in tqdm(range(total), desc="single layers", unit="layer", disable=not progress):
        cut = [index]
        layers[index] = {
            "zeroed": measure(zeroed_attention(teacher, cut), perplexity),
            "window": measure(windowed_attention(teacher, cut, window), perplexity),
            "window_recall": measure(windowed_attention(teacher, cut, window), recall_perplexity),
            "error": errors[index],
            "healed": healed(index)[0],
            "recall": healed(index)[1],
        }
    chosen, path = [], []
    for _ in tqdm(range(count), desc="greedy", unit="layer", disable=not progress):
        trials = {index: healed(*chosen, index) for index in free if index not in chosen}
        chosen.append(min(trials, key=lambda index: trials[index][0] * trials[index][1]))
        path.append([chosen[-1], *trials[chosen[-1]]])
    return {
        "mixer": mixer,
        "keep": list(keep),
        "window": window,
        "rls_tokens": windows[1:].numel(),
        "selection_tokens": selection.numel(),
        "teacher": {
            "perplexity": perplexity(teacher, selection, batch_size=batch_size),
            "recall": recall_perplexity(teacher, selection, batch_size),
        },
        "layers": layers,
        "greedy": path,
    }


def choose_layers(ranking: dict[str, Any], count: int, criterion: str = "greedy") -> list[int]:
    """The `count` layers that a ranking of `rank_layers` says are missed least, in the order of the layers.

    Raises:
        ValueError: an unknown criterion, or more layers than it has ranked.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"choose_layers: `criterion` must be one of {CRITERIA}, got {criterion!r}.")
    if criterion == "greedy":
        order = [int(index) for index, *_ in ranking["greedy"]]
    else:
        free = [int(index) for index in ranking["layers"] if int(index) not in ranking["keep"]]
        scores = {int(index): values for index, values in ranking["layers"].items()}
        order = sorted(free, key=lambda index: scores[index][criterion])
    if not 1 <= count <= len(order):
        raise ValueError(f"choose_layers: {criterion} has ranked {len(order)} layers, `count` {count} is out of range.")
    return sorted(order[:count])


def read_ranking(path: str | Path) -> dict[str, Any]:
    """A ranking from the file that `kalman-convert select` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no ranking.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_ranking: `ranking` {str(path)!r} does not exist.")
    try:
        ranking = json.loads(path.read_text(encoding="utf-8"))
        missing = {"layers", "greedy", "keep"} - ranking.keys()
    except (ValueError, AttributeError):
        ranking, missing = {}, {"layers"}
    if missing:
        raise ValueError(f"read_ranking: `ranking` {str(path)!r} is not what `kalman-convert select` writes.") from None
    return ranking


def plot_ranking(ranking: dict[str, Any], path: str | Path) -> bool:
    """Draw every criterion over the layers into `path`; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {int(index): values for index, values in ranking["layers"].items()}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for criterion in ("zeroed", "window", "healed", "recall", "window_recall"):
        reference = ranking["teacher"]["recall" if criterion.endswith("recall") else "perplexity"]
        left.plot(list(rows), [v[criterion] / reference for v in rows.values()], marker=".", label=criterion)
    left.set(xlabel="layer", ylabel="perplexity, times the teacher's", yscale="log")
    left.legend(fontsize=7)
    numbers = range(1, len(ranking["greedy"]) + 1)
    for column, (name, style) in enumerate((("perplexity", "k-o"), ("recall", "k--s")), 1):
        values = [row[column] / ranking["teacher"][name] for row in ranking["greedy"]]
        right.plot(numbers, values, style, label=name)
    for number, (index, value, _) in zip(numbers, ranking["greedy"], strict=True):
        height = value / ranking["teacher"]["perplexity"]
        right.annotate(str(index), (number, height), fontsize=7, xytext=(0, 5), textcoords="offset points")
    right.set(xlabel="layers swapped, greedily; numbers are the layers", ylabel="times the teacher's", yscale="log")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
