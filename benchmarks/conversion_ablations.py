"""What decides how well a conversion heals: one change at a time, at one small budget.

    python benchmarks/conversion_ablations.py TEACHER --data train.jsonl.gz --tests FOLDER --ranking layer_ranking.json

Half of SmolLM2-135M's layers become GKA (KLA where it says so). Quality is perplexity on WikiText-2 valid, LAMBADA and
retrieval on a part of their cases. FOLDER is that of benchmarks/conversion_recipes.py.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from conversion_recipes import Curve, heal
from quality import lambada, retrieval, scores, share, wikitext_windows
from record import RESULTS, environment, write
from transformers import AutoTokenizer

from kalman_conversion import (
    choose_layers,
    load_model,
    perplexity,
    read_documents,
    read_stages,
    swap_attention,
    token_windows,
)
from kalman_conversion.layer_selection import read_ranking, recall_perplexity

COUNT = 15
RLS, LAYERWISE = {"rls": {"tokens": 65536}}, {"layerwise": {"tokens": 131072, "forgetting": 0.08}}
PUBLISHED = {
    "initialisation": "reference",
    "solver": "chebyshev",
    "solver_iterations": 30,
    "use_local_values": False,
    "key_activation": "silu",
    "value_activation": "silu",
}


def fill(name, value):
    """A change of every mixer's parameters of a name after the swap."""

    def change(mixer):
        parameter = mixer.get_parameter(name)
        torch.nn.init.constant_(parameter, value) if value is not None else torch.nn.init.normal_(parameter, 0, 0.02)

    return change


def reference_decay(mixer):
    """The published start of the decays."""
    torch.nn.init.normal_(mixer.a_proj.weight, 0, 0.02)
    with torch.no_grad():
        mixer.decay_bias.A_log.copy_(torch.empty_like(mixer.decay_bias.A_log).uniform_(1e-4, 16).log())
        step = torch.empty_like(mixer.decay_bias.dt_bias).uniform_(-6.9, -2.3).exp()
        mixer.decay_bias.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


def slow_decay(mixer):
    """Half-lives of 64 tokens and more."""
    with torch.no_grad():
        lives = torch.logspace(6, 13, len(mixer.decay_bias.A_log), base=2.0, device=mixer.decay_bias.A_log.device)
        mixer.decay_bias.A_log.copy_((torch.log(torch.tensor(2.0)) / lives / 0.01).log())


def variants(tokens):
    def distil(**settings):
        return {"distil": {"tokens": tokens, "batch_size": 32, **settings}}

    base = [RLS, LAYERWISE, distil()]
    return {
        "base": {},
        "stages: least squares, distil": {"stages": [RLS, distil()]},
        "stages: distil alone": {"stages": [distil()]},
        "stages: least squares, layerwise": {"stages": [RLS, LAYERWISE]},
        "stages: then fine-tuning on text": {
            "stages": [*base, {"finetune": {"tokens": tokens // 2, "batch_size": 32, "learning_rate": 2e-5}}]
        },
        "rate 3e-4": {"stages": [RLS, LAYERWISE, distil(learning_rate=3e-4)]},
        "rate 3e-3": {"stages": [RLS, LAYERWISE, distil(learning_rate=3e-3)]},
        "batch 8 at rate 1e-3": {"stages": [RLS, LAYERWISE, distil(batch_size=8)]},
        "hidden states": {"stages": [RLS, LAYERWISE, distil(logits_weight=0.0, hidden_weight=1.0)]},
        "logits and hidden states": {"stages": [RLS, LAYERWISE, distil(hidden_weight=1.0)]},
        "temperature 2": {"stages": [RLS, LAYERWISE, distil(temperature=2.0)]},
        "top 64 logits": {"stages": [RLS, LAYERWISE, distil(top_k=64)]},
        "everything trained": {"stages": [RLS, LAYERWISE, distil(trained="all", learning_rate=3e-4)]},
        "published layer and start, logits": {"swap": PUBLISHED, "stages": [distil()]},
        "published layer and start, hidden states": {
            "swap": PUBLISHED,
            "stages": [distil(logits_weight=0.0, hidden_weight=1.0)],
        },
        "published layer and start, hidden states, rate 3e-4": {
            "swap": PUBLISHED,
            "stages": [distil(logits_weight=0.0, hidden_weight=1.0, learning_rate=3e-4)],
        },
        "published layer, our start and stages": {"swap": {**PUBLISHED, "initialisation": "identity"}},
        "published layer with local values": {
            "swap": {**PUBLISHED, "initialisation": "identity", "use_local_values": True}
        },
        "start: published decays": {"change": reference_decay},
        "start: slow decays": {"change": slow_decay},
        "start: solution mix 0.1": {"change": fill("alpha_proj.bias", -2.2)},
        "start: solution mix 0.9": {"change": fill("alpha_proj.bias", 2.2)},
        "start: input gate 0.9": {"change": fill("b_proj.bias", 2.2)},
        "start: random output gate": {"change": fill("g_proj.weight", None)},
        "layers: uniform": {"layers": list(range(1, 30, 2))},
        "layers: healed": {"criterion": "healed"},
        "layers: recall": {"criterion": "recall"},
        "layers: zeroed": {"criterion": "zeroed"},
        "layers: window (published criterion)": {"criterion": "window"},
        "layers: window_recall": {"criterion": "window_recall"},
        "repeated pieces in 0.2 of the windows": {"stages": [RLS, LAYERWISE, distil(repeated=0.2)]},
        "repeated pieces, everything trained": {
            "stages": [RLS, LAYERWISE, distil(repeated=0.2, trained="all", learning_rate=3e-4)]
        },
        "kla": {"swap": {"mixer": "kla"}},
        "kla, rate 3e-3": {"swap": {"mixer": "kla"}, "stages": [RLS, LAYERWISE, distil(learning_rate=3e-3)]},
        "kla, distil alone": {"swap": {"mixer": "kla"}, "stages": [distil()]},
    }, base


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--ranking", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4194304, help="of distillation")
    parser.add_argument("--part", default="0/1", help="every N-th variant from K on, as K/N, for several processes")
    parser.add_argument("--only", nargs="+", help="these variants alone")
    parser.add_argument("--name", default="conversion_ablations")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no variant is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    valid = wikitext_windows(tokenizer, options.tests / "wikitext2_valid.txt", count=64)
    windows = token_windows(tokenizer, read_documents(options.data), 1024, options.tokens // 1024)
    words, codes = lambada(options.tests / "lambada_test.jsonl")[:2000], retrieval(16, 200)
    ranking = read_ranking(options.ranking)
    teacher = load_model(options.teacher, torch.float32, device).eval()

    def measured(model):
        model.eval()
        return {
            "perplexity": round(perplexity(model, valid, batch_size=16), 4),
            "recall_perplexity": round(recall_perplexity(model, valid, 16), 4),
            "lambada": share(scores(model, tokenizer, words)),
            "retrieval_16_pairs": share(scores(model, tokenizer, codes)),
        }

    part, parts = map(int, options.part.split("/"))
    name = options.name + (f"_{part}" if parts > 1 else "")
    result = {
        "environment": environment(device),
        "layers": COUNT,
        "distillation_tokens": options.tokens,
        "seed": 0,
        "teacher": measured(teacher),
        "rows": [],
    }
    started = time.perf_counter()
    cases, base = variants(options.tokens)
    for variant in (options.only or list(cases))[part::parts]:
        change = cases[variant]
        if time.perf_counter() - started > options.limit:
            break
        layers = change.get("layers") or choose_layers(ranking, COUNT, change.get("criterion", "greedy"))
        student = swap_attention(teacher, layers=layers, share_weights=True, **change.get("swap", {}))
        torch.manual_seed(0)
        for index in layers if "change" in change else ():
            change["change"](student.model.layers[index].mixer)
        curve = Curve(valid[:16], 10**9)
        stages = read_stages(change.get("stages", base))
        rows = heal(student, teacher, windows, stages, curve)
        row = {
            "variant": variant,
            "layers": layers,
            "tokens": sum(r["tokens"] for r in rows),
            "seconds": round(sum(r["seconds"] for r in rows), 1),
            "tokens_per_s": rows[-1]["tokens_per_s"],
            **measured(student),
        }
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(name, result, options.output)
        del student


if __name__ == "__main__":
    main()
