"""Which attention layers of SmolLM2-135M are missed least: every criterion, and the sets that they choose compared.

    python benchmarks/layer_selection.py TEACHER --data HEALING_TEXT --selection-data VALID --test-data TEST

The sets are healed by recursive least squares alone, so that the comparison costs no training.
"""

import argparse
from pathlib import Path

import torch
from quality import wikitext_windows
from record import RESULTS, environment, write
from transformers import AutoTokenizer

from kalman_conversion import heal_rls, load_model, perplexity, read_documents, swap_attention, token_windows
from kalman_conversion.layer_selection import (
    CRITERIA,
    choose_layers,
    plot_ranking,
    rank_layers,
    recall_perplexity,
    swapped_in,
)


def uniform(total, count):
    """Evenly spaced layers."""
    return sorted({int(total / count * (i + 0.5)) for i in range(count)})


def draw(result, folder):
    """Criteria over the layers."""
    plot_ranking(result, folder / "layer_selection.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--selection-data", required=True)
    parser.add_argument("--test-data", required=True)
    parser.add_argument("--rls-windows", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8, help="windows of the selection text")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[6, 8, 15, 22])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = 8 if device == "cuda" else 1
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    windows = token_windows(tokenizer, read_documents(options.data), 1024, options.rls_windows + 1)
    selection = wikitext_windows(tokenizer, options.selection_data, count=options.windows)
    test = wikitext_windows(tokenizer, options.test_data, count=options.test_windows)
    teacher = load_model(options.teacher, torch.float32, device).eval()
    ranking = rank_layers(teacher, windows, selection, count=max(options.counts), batch_size=batch, progress=False)
    student = swap_attention(teacher, layers="all", share_weights=True).eval()
    heal_rls(student, teacher, windows[1:], progress=False)
    sets = []
    for count in options.counts:
        for criterion in (*CRITERIA, "uniform"):
            uniformly = uniform(teacher.config.num_hidden_layers, count)
            layers = uniformly if criterion == "uniform" else choose_layers(ranking, count, criterion)
            row = {"count": count, "criterion": criterion, "layers": layers}
            with swapped_in(teacher, student, layers):
                row["test_perplexity"] = round(perplexity(teacher, test, batch_size=batch), 4)
                row["test_recall_perplexity"] = round(recall_perplexity(teacher, test, batch), 4)
            sets.append(row)
            print(row, flush=True)
    result = {
        "what": "perplexity of SmolLM2-135M-Instruct (de-quantised Q4_1) with layers swapped for GKA, healed by "
        "recursive least squares alone",
        "environment": environment(device),
        "float32_products": "TF32 where the device has it",
        "test_tokens": test.numel(),
        "teacher_test_perplexity": round(perplexity(teacher, test, batch_size=batch), 4),
        "teacher_test_recall_perplexity": round(recall_perplexity(teacher, test, batch), 4),
        **ranking,
        "sets": sets,
    }
    write("layer_selection", result, options.output)
    draw(result, options.output)


if __name__ == "__main__":
    main()
