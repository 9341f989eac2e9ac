"""Peak memory of one full training step (all parameters, AdamW, float32) of SmolLM2-135M with 6 GKA layers on a CPU.

The weights are random: only their shapes matter here.
"""

import argparse
import resource
from pathlib import Path

import torch
from record import RESULTS, environment, timed, write
from transformers import LlamaConfig, LlamaForCausalLM

from kalman_conversion import swap_attention

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="training_memory")
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = [6, 7, 16, 21, 25, 27]
    model = swap_attention(LlamaForCausalLM(LlamaConfig(**SMOLLM2)), layers=layers, share_weights=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, options.tokens))

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = timed(step, repeats=options.steps, warmup=1)
    result = {
        "what": __doc__.splitlines()[0],
        "environment": environment(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers_swapped": layers,
        "tokens": options.tokens,
        "step": times,
        "peak_process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }
    write(options.name, result, options.output)
    print(result)


if __name__ == "__main__":
    main()
