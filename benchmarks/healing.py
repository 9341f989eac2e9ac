"""How well healing works: perplexity of zeroed, swapped, least-squares and layerwise-healed models, over tokens."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from record import RESULTS, environment, write
from transformers import AutoTokenizer

from kalman_conversion import (
    heal_layerwise,
    heal_rls,
    layer_errors,
    load_model,
    perplexity,
    read_documents,
    swap_attention,
    token_windows,
)
from kalman_conversion.taps import zeroed_attention

MIXER = {"solver": "cg", "solver_iterations": 20, "use_local_values": True, "key_activation": "identity"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="healing text")
    parser.add_argument("--test-data", required=True)
    parser.add_argument("--selection", type=Path, default=RESULTS / "layer_selection.json")
    parser.add_argument("--criterion", default="greedy")
    parser.add_argument("--counts", type=int, nargs="+", default=[6, 8, 15])
    parser.add_argument("--rls-windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[32, 112], help="of layerwise healing, after rls on 16"
    )
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--ablations", action="store_true", help="initialisations and mixer options at the first count")
    parser.add_argument("--name", default="healing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(options.teacher, torch.float32, device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    most = max(*options.windows, *options.rls_windows)
    windows = token_windows(tokenizer, read_documents(options.data), 1024, most + 4)
    held_out, windows = windows[:4], windows[4:]
    test = token_windows(tokenizer, ["\n".join(read_documents(options.test_data))], 1024, options.test_windows)
    sets = {
        entry["count"]: entry["layers"]
        for entry in json.loads(options.selection.read_text())["sets"]
        if entry["criterion"] == options.criterion
    }
    reference = perplexity(teacher, test)
    rows = []
    header = {
        "what": "SmolLM2-135M-Instruct (de-quantised Q4_1) with GKA layers; WikiText-2 test perplexity, 1,024-token "
        "windows; healing text: Wikipedia articles that share no 8-gram with WikiText-2",
        "environment": environment(device),
        "teacher_perplexity": round(reference, 4),
        "test_tokens": test.numel(),
        "layer_sets": {str(c): sets[c] for c in options.counts},
        "mixer": MIXER,
    }

    def record(count, stage, tokens, seconds, student=None, value=None, **more):
        value = perplexity(student, test) if student is not None else value
        errors = layer_errors(student, teacher, held_out) if student is not None else {}
        mean = sum(errors.values()) / len(errors) if errors else None
        rows.append(
            {
                "layers_swapped": count,
                "stage": stage,
                "tokens": tokens,
                "seconds": round(seconds, 1),
                "perplexity": round(value, 4),
                "ratio_to_teacher": round(value / reference, 4),
                "mean_layer_error": None if mean is None else round(mean, 4),
                **more,
            }
        )
        print(rows[-1], flush=True)
        # After every row: an interrupted run keeps what it measured.
        write(options.name, header | {"rows": rows}, options.output)

    def heal(count, layers, rls, train, name="layerwise", initialisation="identity", **fields):
        mixer = {**MIXER, **fields}
        student = swap_attention(teacher, layers=layers, share_weights=True, initialisation=initialisation, **mixer)
        student.eval()
        if not rls and not train:
            return record(count, name, 0, 0.0, student)
        report, filters = heal_rls(student, teacher, windows[:rls], progress=False)
        if not train:
            return record(count, name, report.tokens, report.seconds, student)
        with tempfile.TemporaryDirectory() as work:
            second = heal_layerwise(
                student, teacher, windows[:train], filters, work=work, forgetting=0.08, save_every=10**6, progress=False
            )
        student.eval()
        return record(count, name, report.tokens + second.tokens, report.seconds + second.seconds, student)

    for count in options.counts:
        layers = sets[count]
        with zeroed_attention(teacher, layers):
            record(count, "zeroed attention", 0, 0.0, value=perplexity(teacher, test))
        heal(count, layers, 0, 0, "swapped, not healed")
        for number in options.rls_windows:
            heal(count, layers, number, 0, "rls")
        for number in options.windows:
            heal(count, layers, 16, number, "layerwise")
    if options.ablations:
        count = options.counts[0]
        base = {"rls": 16, "train": options.windows[0]}
        heal(count, sets[count], **base, name="ablation: reference initialisation", initialisation="reference")
        heal(count, sets[count], **base, name="ablation: no local values", use_local_values=False)
        heal(count, sets[count], **base, name="ablation: linear value path", value_activation="identity")
        heal(count, sets[count], **base, name="ablation: SiLU on queries and keys", key_activation="silu")
        reference_init = {"initialisation": "reference", "use_local_values": False, "key_activation": "silu"}
        heal(count, sets[count], **base, name="ablation: reference layer and initialisation", **reference_init)
        heal(count, sets[count], 0, 0, "swapped, not healed, reference initialisation", **reference_init)


if __name__ == "__main__":
    main()
