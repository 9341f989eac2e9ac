"""`kalman_kernels` as a Hub kernel: written to a folder, and put into a model by the `kernels` library."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import kalman_kernels

__all__ = ["KERNEL_LAYERS", "use_kernel", "write_kernel"]

# Names of the layers in mappings; classes of these names are in the kernel's `layers`.
KERNEL_LAYERS = ("GatedKalmaNet", "KalmanLinearAttention", "GatedRMSNorm")
_NAME, _VERSION = "kalman-kernels", 1
_BACKENDS = ("cpu", "cuda")


def write_kernel(folder: str | Path) -> list[Path]:
    """Write a repository of the kernel: `build/torch-cpu` and `build/torch-cuda`, the same Python and Triton in both.

    What kernel-builder makes of `kernels/build.toml` on a machine that has it; this needs nothing.

    Args:
        folder: must not hold a build yet.

    Returns:
        The variants' folders.

    Raises:
        FileExistsError: there is a build.
    """
    build = Path(folder) / "build"
    if build.exists():
        raise FileExistsError(f"write_kernel: `folder` {str(folder)!r} holds a build already; remove it first.")
    source, variants = Path(kalman_kernels.__file__).parent, []
    files = sorted(p for p in source.rglob("*") if p.suffix in (".py", ".md"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]
    for backend in _BACKENDS:
        variant = build / f"torch-{backend}"
        for file in files:
            target = variant / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        metadata = {
            # Becomes the module's name: of this source alone.
            "id": f"_kalman_kernels_{backend}_{digest}",
            "name": _NAME,
            "version": _VERSION,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def use_kernel(model: Any, repository: str | Path, *, training: bool = False, version: int | None = None) -> Any:
    """Let a model's operators be served by a kernel repository, by the `kernels` library itself.

    Independent of the `use_kernels=True` of `from_pretrained`, which wants that version of `kernels` alone which the
    installed transformers names. Single-token steps and short convolutions stay the installed package's.

    Args:
        model: a GKA or KLA model, changed in place.
        repository: folder that `write_kernel` or kernel-builder wrote, or a Hub id.
        training: for training as well, not only for inference.
        version: of a Hub repository.

    Returns:
        The model.

    Raises:
        ImportError: `kernels` is not installed, or too old for this.
        ValueError: the model has no layer that can be exchanged.
    """
    try:
        from kernels import LayerRepository, LocalLayerRepository, Mode, kernelize, use_kernel_mapping
    except ImportError as error:
        raise ImportError(
            "use_kernel: needs the `kernels` library, 0.17 or newer (pip install kernels). transformers' own "
            "use_kernels=True needs the version that it names (pip install 'transformers[kernels]')."
        ) from error
    named = {getattr(module, "kernel_layer_name", None) for module in model.modules()} & {*KERNEL_LAYERS}
    if not named:
        raise ValueError(f"use_kernel: `model` has none of the layers {KERNEL_LAYERS}; is it a GKA or KLA model?")
    local = Path(repository).is_dir()
    mode = Mode.TRAINING if training else Mode.INFERENCE

    def layer(name: str) -> Any:
        if local:
            return LocalLayerRepository(Path(repository), layer_name=name)
        return LayerRepository(str(repository), layer_name=name, version=version)

    device = next(model.parameters()).device.type
    mapping: dict[str, Any] = {name: {device: {mode: layer(name)}} for name in KERNEL_LAYERS}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(model, mode=mode, device=device, use_fallback=False)
