"""Adaptation of SmolLM2-135M by forward passes alone, against the frozen model and against back-propagation.

    python benchmarks/kalman_gradient_free.py MODEL --corpus FOLDER

Stream, splits and figures are those of benchmarks/kalman_streaming.py, one window of 512 tokens a step. Every method's
one hyper-parameter is the best of its grid on the streams for searching. Back-propagation trains the last decoder
layer, or the same d x d map in front of the head, with AdamW. `cost` compares a step with one of LoRA under AdamW.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from kalman_streaming import (
    ORDER,
    SEGMENT,
    WINDOW,
    WORKER,
    adapted,
    best_of,
    figures,
    held_out,
    start,
    stream,
    summary,
)
from record import RESULTS, environment, write

from hf_kalman.training import InnovationTuner
from kalman_kernels.numerics import widen

VARIANCES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
DEEP = tuple(f"model.layers.{i}.mlp.down_proj" for i in (26, 27, 28, 29))
TUNERS = {
    "innovation: head": {"maps": ("head",)},
    "innovation: head, diagonal": {"maps": ("head",), "structure": "diagonal"},
    "innovation: head, least squares": {"maps": ("head",), "rule": "least_squares"},
    "innovation: four layers, identity": {"maps": DEEP},
    "innovation: four layers, statistics": {"maps": DEEP, "carry": "statistics"},
    "innovation: four layers, least squares": {"maps": DEEP, "rule": "least_squares", "carry": "statistics"},
    "innovation: head and four layers": {"maps": ("head", *DEEP)},
}
GRIDS = {
    "frozen": (0.0,),
    **{name: (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if "squares" in name else VARIANCES for name in TUNERS},
    "back-propagation: last layer": RATES,
    "back-propagation: head map": RATES,
}


def half(model):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


class Innovation:
    def __init__(self, model, name, value, seed):
        self.tuner = InnovationTuner(model, variance=value, seed=seed, **TUNERS[name])

    def step(self, ids):
        with half(self.tuner.model):
            report = self.tuner.step(ids)
        return report.loss * report.tokens

    def finish(self):
        return self.tuner.merge()


class BackPropagation:
    """AdamW on the last decoder layer or on a d x d map in front of the head."""

    def __init__(self, model, name, value, seed):
        self.model, width = model, model.config.hidden_size
        self.map = torch.nn.Parameter(torch.zeros(width, width, device=model.device)) if "map" in name else None
        model.requires_grad_(False)
        trained = [self.map] if self.map is not None else list(model.model.layers[-1].parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(trained, lr=value, weight_decay=0.0)

    def step(self, ids):
        with half(self.model):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            if self.map is not None:
                hidden = hidden + hidden @ self.map.T
            logits = self.model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(widen(logits).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() * ids[:, 1:].numel()

    def finish(self):
        if self.map is not None:
            weight = self.model.lm_head.weight.detach()
            self.model.lm_head.weight = torch.nn.Parameter(weight + weight @ self.map.detach())
        return self.model


class Frozen:
    def __init__(self, model, *_):
        self.tuner = InnovationTuner(model)

    def step(self, ids):
        with half(self.tuner.model):
            report = self.tuner.step(ids, learn=False)
        return report.loss * report.tokens

    def finish(self):
        return self.tuner.model


def learner(model, method, value, seed):
    kind = Frozen if method == "frozen" else Innovation if method in TUNERS else BackPropagation
    return kind(model, method, value, seed)


def job(task):
    method, value, seed, search, segment = task
    model, domains = WORKER["model"], WORKER["domains"]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = model.lm_head.weight
    rows, started = stream(domains, seed, segment, search), time.perf_counter()
    own = learner(model, method, value, seed)
    nats = [own.step(window[None].to(model.device)) for _, window, _ in rows]
    seconds = time.perf_counter() - started
    result = {
        "batch": 1,
        "method": method,
        "value": value,
        "seed": seed,
        "search": search,
        **figures(nats, [size for _, _, size in rows], 1, segment),
    }
    if not search:
        result["held_out"] = held_out(own.finish(), domains)
    model.lm_head.weight = tied
    model.requires_grad_(True)
    model.load_state_dict(kept)
    print(
        json.dumps({k: result[k] for k in ("method", "value", "seed", "bits_per_byte")}), round(seconds, 1), flush=True
    )
    return result


def cost(model, length, batch, repeats=12):
    """Median seconds and peak memory of a step, tokens per second; every learner on the same windows."""
    rows, cuda = [], model.device.type == "cuda"
    ids = torch.randint(1000, 40000, (batch, length), device=model.device)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def lora():
        peft_model = adapted(model, 0)
        peft_model.train()
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step():
            with half(model):
                loss = peft_model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, peft_model.unload

    def other(method):
        own = learner(model, method, 1e-5, 0)
        return lambda: own.step(ids), lambda: model.requires_grad_(True)

    methods = ("innovation: head", "innovation: four layers, identity", "back-propagation: last layer", "frozen")
    for name in ("LoRA, AdamW", *methods):
        step, after = lora() if name == "LoRA, AdamW" else other(name)
        times = []
        for number in range(repeats + 3):
            if cuda:
                torch.cuda.synchronize()
                if number == 3:
                    torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[3:])
        cuts = statistics.quantiles(times[3:], n=5)
        row = {"method": name, "batch": batch, "length": length, "seconds": seconds, "p20": cuts[0], "p80": cuts[-1]}
        row["tokens_per_s"] = batch * length / seconds
        if cuda:
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        rows.append(row)
        print(json.dumps(row), flush=True)
        after()
        model.load_state_dict(kept)
        model.zero_grad()
        del step, after
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--methods", nargs="+", default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--segment", type=int, default=SEGMENT[1])
    parser.add_argument("--cost", action="store_true", help="only the cost of steps; run it alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    devices, context = torch.cuda.device_count(), multiprocessing.get_context("spawn")
    result = {
        "model": "SmolLM2-135M-Instruct (de-quantised Q4_1)",
        "environment": environment("cuda" if devices else "cpu"),
        "order": ORDER,
        "window": WINDOW,
        "segment": options.segment,
    }
    if options.cost:
        from kalman_conversion import load_model

        model = load_model(options.model, torch.float32, "cuda" if devices else "cpu")
        base = torch.cuda.memory_allocated() / 2**20 if devices else None
        sizes = ((512, 1), (512, 8), (2048, 8)) if devices else ((128, 1),)
        result["weights_mib"], result["rows"] = base, [row for size in sizes for row in cost(model, *size)]
        write(f"kalman_gradient_free_cost_{'cuda' if devices else 'cpu'}", result, options.output)
        return
    counter = context.Value("i", 0)
    with context.Pool(options.jobs, start, (options.model, options.corpus, devices, counter)) as pool:
        tasks = [(m, v, 0, True, options.segment) for m in options.methods for v in GRIDS[m]]
        result["search"] = list(pool.imap_unordered(job, tasks))
        chosen = {m: best_of([r for r in result["search"] if r["method"] == m]) for m in options.methods}
        tasks = [
            (m, chosen[m], s, False, options.segment) for m in options.methods for s in range(1, options.seeds + 1)
        ]
        result["runs"] = list(pool.imap_unordered(job, tasks))
        result["summary"] = summary(sorted(result["runs"], key=lambda r: options.methods.index(r["method"])))
    write("kalman_gradient_free", result, options.output)
    for row in result["summary"]:
        print(json.dumps({k: row[k] for k in ("method", "value", "bits_per_byte", "deviation")}))


if __name__ == "__main__":
    main()
