"""Which attention layers a model misses least: several criteria, measured, and the sets that they choose compared.

Criteria, each on text that is neither healing nor test text:
    zeroed     perplexity with the layer's attention output set to zero
    error      relative error of the layer's mixer after recursive least squares
    healed     perplexity with the layer swapped and healed by recursive least squares
    greedy     as `healed`, but every layer is judged together with those chosen before it
    uniform    evenly spaced layers, for comparison
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from record import RESULTS, environment, write
from transformers import AutoTokenizer

from kalman_conversion import (
    heal_rls,
    layer_errors,
    load_model,
    perplexity,
    read_documents,
    swap_attention,
    token_windows,
)
from kalman_conversion.taps import zeroed_attention


@contextlib.contextmanager
def swapped_in(teacher, student, layers):
    """The teacher with the student's mixers in some layers."""
    kept = {}
    for index in layers:
        layer = teacher.model.layers[index]
        kept[index] = layer.self_attn
        layer.self_attn = _Adapter(student.model.layers[index].mixer)
    try:
        yield teacher
    finally:
        for index, attention in kept.items():
            teacher.model.layers[index].self_attn = attention


class _Adapter(torch.nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, **kwargs):
        return self.mixer(hidden_states), None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="healing text")
    parser.add_argument("--selection-data", required=True, help="text for the criteria")
    parser.add_argument("--test-data", required=True, help="text for the final comparison of sets")
    parser.add_argument("--rls-windows", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8, help="windows of the selection text")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[6, 10, 15])
    parser.add_argument("--keep", type=int, nargs="*", default=[0, 1], help="layers that no criterion may choose")
    parser.add_argument("--greedy", type=int, default=15, help="layers that the greedy criterion may choose")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(options.teacher, torch.float32, device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    windows = token_windows(tokenizer, read_documents(options.data), 1024, options.rls_windows + 4)
    selection = token_windows(tokenizer, ["\n".join(read_documents(options.selection_data))], 1024, options.windows)
    test = token_windows(tokenizer, ["\n".join(read_documents(options.test_data))], 1024, options.test_windows)
    count = teacher.config.num_hidden_layers
    mixer = {"solver": "cg", "solver_iterations": 20, "use_local_values": True, "key_activation": "identity"}
    student = swap_attention(teacher, layers="all", share_weights=True, **mixer).eval()
    started = time.monotonic()
    heal_rls(student, teacher, windows[4:])
    seconds = time.monotonic() - started
    errors = layer_errors(student, teacher, windows[:4])

    def healed(layers, text):
        with swapped_in(teacher, student, layers):
            return perplexity(teacher, text)

    def zeroed(layers, text):
        with zeroed_attention(teacher, layers):
            return perplexity(teacher, text)

    single = {
        i: {"zeroed": zeroed([i], selection), "error": errors[i], "healed": healed([i], selection)}
        for i in range(count)
    }
    free = [i for i in range(count) if i not in options.keep]
    orders = {c: sorted(free, key=lambda i, c=c: single[i][c]) for c in ("zeroed", "error", "healed")}
    chosen, path = [], []
    # Only layers that are not hopeless alone are worth trying together.
    candidates = orders["healed"][: options.greedy + 5]
    for _ in range(options.greedy):
        trials = {i: healed([*chosen, i], selection) for i in candidates if i not in chosen}
        best = min(trials, key=trials.get)
        chosen.append(best)
        path.append({"layer": best, "perplexity": trials[best]})
        print("greedy", chosen, round(trials[best], 3), flush=True)
    orders["greedy"] = chosen
    sets = []
    for number in options.counts:
        for criterion, order in orders.items():
            layers = sorted(order[:number])
            sets.append({"count": number, "criterion": criterion, "layers": layers})
        step = count / number
        sets.append(
            {"count": number, "criterion": "uniform", "layers": sorted({int(step * (i + 0.5)) for i in range(number)})}
        )
    for entry in sets:
        entry["selection_perplexity"] = healed(entry["layers"], selection)
        entry["test_perplexity"] = healed(entry["layers"], test)
        entry["test_perplexity_zeroed"] = zeroed(entry["layers"], test)
        print(entry, flush=True)
    write(
        "layer_selection",
        {
            "what": "perplexity of SmolLM2-135M-Instruct (de-quantised Q4_1) with layers swapped for GKA, healed by "
            "recursive least squares alone",
            "environment": environment(device),
            "rls_tokens": windows[4:].numel(),
            "rls_seconds_all_layers": round(seconds, 1),
            "mixer": mixer,
            "kept_layers": options.keep,
            "selection_tokens": selection.numel(),
            "test_tokens": test.numel(),
            "teacher": {"selection": perplexity(teacher, selection), "test": perplexity(teacher, test)},
            "single_layers": single,
            "greedy_path": path,
            "sets": sets,
        },
        options.output,
    )
    print(json.dumps(orders))


if __name__ == "__main__":
    main()
