"""The host's Trainer as every healing stage uses it: its arguments, its optimizer, and where it resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

__all__ = ["HealingTrainer", "TokenWindows", "complete_checkpoint", "flags_kept", "training_arguments"]

# Parameters that shape decays, gates and convolutions: few, and far from where they should be at the start.
SMALL = (
    "A_log",
    "dt_bias",
    "a_proj",
    "b_proj",
    "alpha_proj",
    "conv1d",
    "delta",
    "lambda_log",
    "process_noise",
    "skip",
)


class TokenWindows(torch.utils.data.Dataset):
    """Windows of tokens as a dataset of `input_ids`.

    Args:
        windows: (N, T) tokens.
        labels: whether items have `labels`, too.
        repeated: share of windows, evenly spread, whose second half is replaced by pieces of the first, of 4 to 64
            tokens in random order: what comes next then stands in the context. The same at every epoch.

    Raises:
        ValueError: `repeated` is out of its range.
    """

    def __init__(self, windows: Tensor, labels: bool = False, repeated: float = 0.0) -> None:
        if not 0 <= repeated <= 1:
            raise ValueError(f"`repeated` must be from 0 to 1, got {repeated!r}.")
        self.windows, self.labels, self.repeated = windows, labels, repeated

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        if int((index + 1) * self.repeated) > int(index * self.repeated):
            window = self._pieces(window, index)
        return {"input_ids": window, **({"labels": window} if self.labels else {})}

    @staticmethod
    def _pieces(window: Tensor, index: int) -> Tensor:
        generator, half = torch.Generator().manual_seed(index), len(window) // 2
        pieces, length = [window[:half]], half
        while length < len(window):
            size = int(torch.randint(4, 65, (), generator=generator))
            start = int(torch.randint(0, max(1, half - size + 1), (), generator=generator))
            pieces.append(window[start : min(start + size, half)])
            length += len(pieces[-1])
        return torch.cat(pieces)[: len(window)]


class HealingTrainer(Trainer):
    """`Trainer` with one AdamW whose learning rate can be larger for the mixers, and for their small parameters.

    Args:
        small_factor: times `args.learning_rate` for decays, gates and convolutions.
        mixer_factor: times `args.learning_rate` for all else in the mixers.
    """

    def __init__(self, *args, small_factor: float = 1.0, mixer_factor: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.small_factor, self.mixer_factor = small_factor, mixer_factor

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """AdamW without weight decay on what requires gradients."""
        if self.optimizer is None:
            rate = self.args.learning_rate
            model: nn.Module = args[0] if args and args[0] is not None else self.model  # pyright: ignore
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(rate * self._factor(name), []).append(parameter)
            rows = [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]
            self.optimizer = torch.optim.AdamW(rows, betas=(0.9, 0.95), weight_decay=0.0)
        return self.optimizer

    def _factor(self, name: str) -> float:
        if any(part in name for part in SMALL):
            return self.small_factor
        return self.mixer_factor if ".mixer." in name else 1.0

    def run(self) -> int:
        """Train, from the last complete checkpoint where there is one; the number of tokens behind the run."""
        self.train(resume_from_checkpoint=complete_checkpoint(self.args.output_dir))
        args, windows = self.args, cast(TokenWindows, self.train_dataset).windows
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.state.global_step * rows * windows.shape[1]


def complete_checkpoint(folder: str | Path | None) -> str | None:
    """The newest whole checkpoint of a `Trainer` in `folder`, None where there is none; broken ones are removed.

    A checkpoint is whole when its `trainer_state.json`, which the Trainer writes last, can be read. Older checkpoints
    are deleted by the Trainer only after that.
    """
    found = []
    for path in Path(folder or "").glob("checkpoint-*"):
        try:
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def training_arguments(
    work: str | Path,
    *,
    learning_rate: float,
    batch_size: int,
    epochs: float,
    seed: int,
    warmup_steps: int,
    save_every: int,
    progress: bool,
    device: torch.device,
    more: dict[str, Any],
) -> TrainingArguments:
    """Arguments that all stages share: cosine to 0, clipping at 1, whole checkpoints in `work`; `more` overrides."""
    own = {
        "output_dir": str(work),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps,
        "max_grad_norm": 1.0,
        "save_steps": save_every,
        "save_total_limit": 1,
        "logging_steps": 10,
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": not progress,
    }
    arguments = TrainingArguments(**{**own, **more})
    # One process, one GPU: the host would spread a batch of that size to each GPU that it sees, by threads.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards a model's parameters require gradients as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
