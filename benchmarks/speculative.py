"""Speculative decoding of a converted model: accepted tokens per step, and time against plain decoding.

    python benchmarks/speculative.py --target HEALED --teacher SMOLLM2 --corpus TEXT --prompts TEXT

The draft is the first and last three layers of the teacher, trained for `--seconds` to give the target's distribution
on a corpus. Prompts of 128 tokens from another text. Greedy in float32, one sequence at a time; the teacher with the
same draft beside it. Results: `results/speculative.json`.
"""

import argparse
import time
from pathlib import Path

import torch
from record import RESULTS, environment, write
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kalman  # noqa: F401
from kalman_conversion.text import read_documents

PROMPT, WINDOW, BATCH = 128, 512, 16


def make_draft(teacher):
    config = type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": 6})
    draft = type(teacher)(config)
    draft.load_state_dict(teacher.state_dict(), strict=False)
    for target, source in zip(draft.model.layers[3:], teacher.model.layers[-3:], strict=True):
        target.load_state_dict(source.state_dict())
    draft.generation_config = teacher.generation_config
    return draft


def distil(draft, target, ids, seconds, device):
    """Train the draft's layers; returns tokens read and the first and last loss."""
    draft.model.embed_tokens.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    generator = torch.Generator().manual_seed(0)
    started, losses, read = time.perf_counter(), [], 0
    while (spent := time.perf_counter() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (len(losses) + 1) / 20) * (1.05 - spent / seconds)
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)].to(device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                wanted = target(batch, use_cache=False).logits.float().log_softmax(-1)
            given = draft(batch, use_cache=False).logits.float().log_softmax(-1)
        loss = F.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        read += batch.numel()
    return {
        "seconds": seconds,
        "tokens": read,
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def decode(model, prompts, new_tokens, device, **options):
    """(sequences, forward passes of the model, seconds), after one warm-up."""
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(0))
    generation = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **options}
    model.generate(prompts[0][None], **{**generation, "max_new_tokens": 8, "min_new_tokens": 8})
    forwards.clear()
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    sequences = [model.generate(prompt[None], **generation)[0].cpu() for prompt in prompts]
    seconds = time.perf_counter() - started
    hook.remove()
    return sequences, len(forwards), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("target", "teacher", "corpus", "prompts"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        for folder in (options.target, options.teacher)
    )
    documents = read_documents(options.corpus)[:20000]
    ids = torch.tensor([i for row in tokenizer(documents)["input_ids"] for i in row])
    draft = make_draft(teacher).to(device)
    trained = distil(draft.train(), target, ids, options.seconds, device)
    draft = draft.eval()
    print(trained, flush=True)
    text = tokenizer(options.prompts.read_text(), return_tensors="pt")["input_ids"][0]
    step = len(text) // options.count
    prompts = [text[i * step : i * step + PROMPT].to(device) for i in range(options.count)]
    result = {
        "environment": environment(device),
        "dtype": "float32",
        "prompts": options.count,
        "prompt_tokens": PROMPT,
        "new_tokens": options.new_tokens,
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in (("target", target), ("draft", draft))},
        "draft": trained,
        "rows": [],
    }
    kinds = {
        "greedy": {},
        "draft, 3 tokens": {"assistant_model": draft, "tokens": 3},
        "draft, 5 tokens": {"assistant_model": draft, "tokens": 5},
        "prompt lookup, 5 tokens": {"prompt_lookup_num_tokens": 5},
    }
    for name, model in (("converted", target), ("teacher", teacher)):
        plain = None
        for kind, extra in kinds.items():
            if "tokens" in extra:
                draft.generation_config.num_assistant_tokens = extra["tokens"]
                draft.generation_config.num_assistant_tokens_schedule = "constant"
                draft.generation_config.assistant_confidence_threshold = 0.0
            arguments = {k: v for k, v in extra.items() if k != "tokens"}
            sequences, forwards, seconds = decode(model, prompts, options.new_tokens, device, **arguments)
            produced = options.count * options.new_tokens
            plain = plain or (sequences, seconds)
            row = {
                "model": name,
                "decoding": kind,
                "tokens_per_forward": produced / forwards,
                "accepted_per_forward": produced / forwards - 1,
                "tokens_per_s": produced / seconds,
                "speedup": plain[1] / seconds,
                "equal_to_greedy": sum(torch.equal(a, b) for a, b in zip(sequences, plain[0], strict=True)),
            }
            result["rows"].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    write("speculative", result, options.output)


if __name__ == "__main__":
    main()
