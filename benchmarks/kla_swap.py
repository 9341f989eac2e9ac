"""KLA layers in SmolLM2-135M: value path seeded from the attention that it replaces against random, healed alike.

    python benchmarks/kla_swap.py TEACHER HEALING_TEXT TEST_TEXT

Each variant swaps the same layers and heals them by recursive least squares alone. Reported are the layers' errors on
held-out windows of the healing text, and perplexity on the test text beside the teacher's.
"""

import argparse
import time
from pathlib import Path

import torch
from record import RESULTS, environment, write
from transformers import AutoTokenizer

from kalman_conversion import heal_rls, load_model, swap_attention
from kalman_conversion.heal import layer_errors
from kalman_conversion.text import read_documents, token_windows
from kalman_conversion.verify import verify

LAYERS = [7, 16, 25]
# The published language-model block for all, so that only the starting weights differ.
BLOCK = {"value_rank": "conv", "variance_rank": 72}
VARIANTS = {
    "seeded": {"initialisation": "identity", **BLOCK},
    "random": {"initialisation": "reference", **BLOCK},
    "seeded, 64 states": {"initialisation": "identity", "linear_state_size": 64, **BLOCK},
    "gka": {"mixer": "gka"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("healing_text", type=Path)
    parser.add_argument("test_text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--test-windows", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    count = options.tokens // 512
    windows = token_windows(tokenizer, read_documents(options.healing_text), 512, count + 4)
    test = token_windows(tokenizer, read_documents(options.test_text), 1024, options.test_windows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(options.teacher, torch.float32, device)
    result = {
        "environment": environment(device),
        "layers": LAYERS,
        "tokens": count * 512,
        "test_tokens": test.numel(),
        "variants": {},
    }
    for name, fields in VARIANTS.items():
        student = swap_attention(teacher, layers=LAYERS, **{"mixer": "kla", **fields}).to(device)
        started = time.perf_counter()
        heal_rls(student, teacher, windows[4:])
        seconds = round(time.perf_counter() - started, 1)
        found = verify(student, teacher, test, 8192)
        result["variants"][name] = {
            "layer_errors": {k: round(v, 4) for k, v in layer_errors(student, teacher, windows[:4]).items()},
            "perplexity": found["perplexity"],
            "healing_s": seconds,
        }
        print(name, result["variants"][name], flush=True)
        write("kla_swap", result, options.output)


if __name__ == "__main__":
    main()
