"""`python -m hf_kalman`: versions, architectures, and which implementation serves each operator here, and why.

`python -m hf_kalman autoload enable|disable|status`: see `hf_kalman.autoload`.
"""

import importlib.metadata
import sys

import torch

from kalman_kernels import conv, gka, kla, norm
from kalman_kernels.dispatch import choose

from . import __version__, autoload
from .registration import ARCHITECTURES


def report() -> str:
    """The text that `python -m hf_kalman` shows."""
    lines = [f"hf_kalman {__version__}, Python {sys.version.split()[0]}"]
    for name in ("torch", "transformers", "triton", "peft", "safetensors", "huggingface-hub", "accelerate"):
        try:
            lines.append(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name} not installed")
    lines.append("architectures")
    for config, models in ARCHITECTURES.items():
        lines.append(f"  {config.model_type}: {', '.join(model.__name__ for model in models.values())}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"implementations on {device.type}")
    operators = {
        "gated_kalmanet": gka.IMPLEMENTATIONS,
        "kalman_linear_attention": kla.IMPLEMENTATIONS,
        "causal_conv": conv.IMPLEMENTATIONS,
        "gated_rms_norm": norm.IMPLEMENTATIONS,
    }
    for name, available in operators.items():
        choice = choose(name, "auto", available, device)
        lines.append(f"  {name}: {choice.implementation} ({choice.reason}); available: {', '.join(available)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The report, or the switch of autoload; the exit status."""
    switches = {"enable": autoload.enable, "disable": autoload.disable, "status": autoload.status}
    if not arguments:
        sys.stdout.write(report() + "\n")
        return 0
    if len(arguments) != 2 or arguments[0] != "autoload" or arguments[1] not in switches:
        sys.stderr.write(f"hf_kalman: nothing, or autoload {'|'.join(switches)}, got {' '.join(arguments)!r}.\n")
        return 2
    try:
        found = switches[arguments[1]]()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf_kalman: {error}\n")
        return 2
    told = {True: "enabled", False: "disabled"}.get(found, f"{arguments[1]}d: {found}")  # pyright: ignore
    sys.stdout.write(f"autoload {told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
