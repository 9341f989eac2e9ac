"""Speed and memory of the Gated KalmaNet kernels on a GPU, beside `mesa_net` of flash-linear-attention in one process.

    python benchmarks/gka_gpu.py [--sections prefill decode scaling ceilings kernels]

Sections that are not named stay as the file has them, each with the environment that it was measured in.

`mesa_net` (fla-core 0.6.0, the same ridge regression with a fixed ridge and 30 conjugate-gradient steps) takes part
when it is installed. Forward is timed without gradients, forward+backward with gradients of every input but the state.
`kernels` has the time of every kernel and the bytes that it cannot avoid in it, to compare with `ceilings`.
"""

import argparse
import contextlib
import importlib.metadata
import time
from functools import partial
from pathlib import Path

import torch
from gpu_timing import ceilings, clock_mhz, extra_memory, milliseconds, plot_scaling, replayed
from record import RESULTS, continued, environment, write

from kalman_kernels import GKASolver, GKAState, gated_kalmanet, gated_kalmanet_step
from kalman_kernels.gka import MixerInputs, MixerOptions, gka_mixer_step
from kalman_kernels.gka.mixer import REPLACED

SECTIONS = ("ceilings", "decode", "kernels", "prefill", "scaling")
# (B, T, H, D)
PREFILL = [(8, 2048, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128)]
OTHER = [(8, 2048, 32, 128), (8, 2048, 16, 64), (8, 2048, 9, 64)]
DECAYS = (0.9, 0.99, 0.999)
DECODE = [
    (1, 16, 128),
    (8, 16, 128),
    (64, 16, 128),
    (256, 16, 128),
    (1024, 16, 128),
    (1, 9, 64),
    (64, 9, 64),
    (256, 9, 64),
]
SCALING = [2**n for n in range(11, 21)]
# Tensors of the size of the queries, and chunks' states of one kind, that kernels of one forward and backward pass read
# or write at least once, all calls together.
NEEDED = {
    "walk": (4, 4),
    "solve": (8, 2),
    "read": (5, 1),
    "adjoint_read": (6, 1),
    "adjoint_query": (5, 0),
    "adjoint_walk": (5, 2),
    "adjoint_gram": (5, 1),
    "adjoint_value": (8, 1),
}
CHUNK = 64


def problem(batch, length, heads, width, decay, dtype=torch.bfloat16, seed=0):
    """Unit queries and keys, decays around `decay` (exponents .5 to 1.5 of it), random mixture and gate."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32)

    def uniform():
        return torch.rand(batch, length, heads, generator=generator, device="cuda")

    unit = torch.nn.functional.normalize
    query, key = (unit(normal(batch, length, heads, width), dim=-1).to(dtype) for _ in range(2))
    value = normal(batch, length, heads, width).to(dtype)
    log_decay = torch.tensor(decay).log().item() * (0.5 + uniform())
    return [query, key, value, log_decay, uniform(), uniform()]


def ours(tensors, solver):
    query, key, value, log_decay, mix, gate = tensors
    return gated_kalmanet(query, key, value, log_decay, mix, input_gate=gate, solver=solver)[0]


def mesa():
    try:
        from fla.ops.mesa_net import chunk_mesa_net
    except ImportError:
        return None

    def call(tensors):
        query, key, value, log_decay, _, gate = tensors
        ridge = torch.full(query.shape[2:], 0.25, device="cuda")
        return chunk_mesa_net(query, key, value, log_decay, gate, ridge, max_CG_iteration=30)[0]

    return call


def measured(call, tensors):
    """Times and memory of forward, and of forward and backward."""
    started = time.perf_counter()
    leaves = [t.clone().requires_grad_() for t in tensors]
    cotangent = torch.randn_like(call(leaves))

    def both():
        outputs = call(leaves)
        torch.autograd.grad(outputs, leaves, cotangent, allow_unused=True)

    def forward():
        with torch.no_grad():
            call(leaves)

    both()
    forward()
    torch.cuda.synchronize()
    first = round(time.perf_counter() - started, 2)
    return {
        "first_call_s": first,
        "forward": {**milliseconds(forward), "extra_mib": extra_memory(forward)},
        "forward_backward": {**milliseconds(both), "extra_mib": extra_memory(both)},
    }


def prefill(rows, save):
    peer = mesa()
    for shape in [*PREFILL, *OTHER]:
        for decay in DECAYS if shape in PREFILL[:1] else DECAYS[1:]:
            tensors = problem(*shape, decay)
            cases = {"cg 20": lambda t: ours(t, GKASolver("cg", 20))}
            if decay == 0.99:
                cases["chebyshev 30"] = lambda t: ours(t, GKASolver("chebyshev", 30))
                if peer is not None and shape in PREFILL:
                    cases["mesa_net 30"] = peer
            for name, call in cases.items():
                row = {"shape": shape, "decay": decay, "case": name, **measured(call, tensors)}
                rows.append(row)
                save()
                print(
                    f"{shape} {decay} {name}: {row['forward']['median_ms']} ms {row['forward']['extra_mib']} MiB, "
                    f"{row['forward_backward']['median_ms']} ms {row['forward_backward']['extra_mib']} MiB, first call "
                    f"{row['first_call_s']} s",
                    flush=True,
                )


def ratios(rows):
    """Times and memory of the peer over ours, by shape and decay."""
    out = []
    peers = {tuple(r["shape"]): r for r in rows if r["case"].startswith("mesa_net")}
    for row in rows:
        peer = peers.get(tuple(row["shape"]))
        if peer is None or row is peer:
            continue
        out.append(
            {
                "shape": row["shape"],
                "decay": row["decay"],
                "case": row["case"],
                **{
                    f"{kind}_speedup": round(peer[kind]["median_ms"] / row[kind]["median_ms"], 2)
                    for kind in ("forward", "forward_backward")
                },
                "memory_ratio": round(row["forward_backward"]["extra_mib"] / peer["forward_backward"]["extra_mib"], 3),
            }
        )
    return out


def settled(batch, heads, width):
    """The states that 2,048 tokens left, the same for every row of the batch."""
    *tensors, gate = problem(1, 2048, heads, width, 0.99)
    state = gated_kalmanet(*tensors, input_gate=gate, solver=GKASolver("cg", 0))[1]
    return GKAState(*(part.expand(batch, -1, -1, -1).contiguous() for part in state))


# As logits of the input gate and of what decays, and as the gate itself: nothing is added, nothing decays. Replays of a
# step then meet the same states, and the solve its ordinary difficulty: a token that comes again and again would leave
# states of rank one, which conjugate gradients solve in two iterations.
CLOSED, CLOSED_GATE = -30.0, 1e-6


def mixer_inputs(batch, heads, width, tokens=1, state=None, dtype=torch.bfloat16, taps=4):
    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    channels, state = heads * width, state or settled(batch, heads, width)
    closed = torch.full((batch, tokens, heads), CLOSED, device="cuda", dtype=dtype)
    return MixerInputs(
        *(normal(batch, tokens, heads, width) for _ in range(3)),
        closed,
        normal(batch, tokens, heads),
        closed,
        normal(batch, tokens, heads, width),
        *(normal(batch, channels, taps - 1) for _ in range(3)),
        *(normal(channels, taps) for _ in range(3)),
        torch.zeros(heads, device="cuda"),
        torch.full((heads,), -4.0, device="cuda"),
        torch.ones(width, device="cuda", dtype=dtype),
        *state,
        None,
    )


def step_inputs(batch, length, heads, width):
    """(query, key, value, log_decay, mix), gate."""
    query, key, value, log_decay, mix, gate = problem(batch, length, heads, width, 0.99)
    return (query, key, value, torch.zeros_like(log_decay), mix), torch.full_like(gate, CLOSED_GATE)


def size(*tensors):
    """Bytes of tensors."""
    return sum(t.nbytes for t in tensors if t is not None)


def decode(rows, save, copy_tb_per_s=None):
    solver = GKASolver("cg", 20)
    for batch, heads, width in DECODE:
        inputs = mixer_inputs(batch, heads, width)
        state = GKAState(inputs.key_gram, inputs.value_key)
        moved, output = 2 * size(*state), size(inputs.query)
        row = {"batch": batch, "heads": heads, "width": width, "state_bytes_moved": moved}

        def step(count, batch=batch, heads=heads, width=width, state=state, around=moved, output=output):
            tensors, gate = step_inputs(batch, count, heads, width)
            options = {"input_gate": gate, "state": state, "solver": solver, "in_place": True}
            return partial(gated_kalmanet_step, *tensors, **options), around + size(*tensors, gate) + count * output

        options = MixerOptions(True, True, True, width**-0.5, 1e-6)

        def mixer_step(inputs, options=options):
            replaced = (getattr(inputs, name) for name in REPLACED)
            needed = size(*inputs, *replaced) + size(inputs.query)
            return partial(gka_mixer_step, inputs, solver, options), needed

        # Calls and the bytes that they cannot avoid: all that is read and all that is written, what is replaced twice.
        cases = {
            "step": step(1),
            "mixer_step": mixer_step(inputs),
            "step_4_tokens": step(4),
            "mixer_step_4_tokens": mixer_step(mixer_inputs(batch, heads, width, 4, state)),
        }
        for name, (call, needed) in cases.items():
            eager = milliseconds(call)
            graph = replayed(call)
            row[name] = {"eager": eager, "graph": graph, "clock_mhz": clock_mhz(), "bytes_moved": needed}
            row[name]["state_tb_per_s"] = round(moved / graph["median_ms"] / 1e9, 3)
            row[name]["tb_per_s"] = round(needed / graph["median_ms"] / 1e9, 3)
            if copy_tb_per_s:
                row[name]["share_of_copy"] = round(row[name]["tb_per_s"] / copy_tb_per_s, 3)
        rows.append(row)
        save()
        print(
            f"decode {batch}x{heads}x{width}: "
            + ", ".join(
                f"{n} {row[n]['graph']['median_ms'] * 1e3:.1f} us ({row[n]['tb_per_s']} TB/s, "
                f"{row[n].get('share_of_copy')} of a copy, eager {row[n]['eager']['median_ms'] * 1e3:.0f})"
                for n in cases
            ),
            flush=True,
        )


def scaling(rows, save, heads=8, width=128):
    for length in SCALING:
        tensors = problem(1, length, heads, width, 0.99)
        row = {"length": length, "heads": heads, "width": width}
        row.update(measured(lambda t: ours(t, GKASolver("cg", 20)), tensors))
        del tensors
        torch.cuda.empty_cache()
        rows.append(row)
        save()
        print(
            f"T {length}: {row['forward']['median_ms']} / {row['forward_backward']['median_ms']} ms, "
            f"{row['forward_backward']['extra_mib']} MiB",
            flush=True,
        )


def profiled(function, repeats=5):
    """Microseconds of one call's kernels by their names, and how often each is launched."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = {}
    for event in trace.key_averages():
        name = event.key.removesuffix("_kernel")
        # Triton's have plain names, others the whole signature.
        if name != event.key and name.isidentifier():
            times[name] = round(event.device_time_total / repeats, 1), event.count // repeats
    return times


def iterations_taken(tensors, ridge=0.02, limit=20, tolerance=1e-6):
    """Mean number of iterations that a chunk's forward solve takes, on the first two heads of the first row.

    Conjugate gradients in float32 on every H_t; a chunk goes on until its last token is done, in rounds of two.
    """
    query, key, _, log_decay, _, gate = (t[0, :, :2].float().transpose(0, 1) for t in tensors)
    key, keep = key * gate[..., None], log_decay.exp()
    heads, length, width = key.shape
    gram, means = torch.zeros(heads, width, width, device=key.device), []
    for start in range(0, length - CHUNK + 1, CHUNK):
        grams = []
        for token in range(start, start + CHUNK):
            k = key[:, token]
            gram = gram * keep[:, token, None, None] + k[:, :, None] * k[:, None, :]
            grams.append(gram)
        grams, residual = torch.stack(grams, 1), query[:, start : start + CHUNK]
        shift = ridge * grams.square().sum((-1, -2)).sqrt()[..., None]
        direction, rr = residual, residual.square().sum(-1, keepdim=True)
        done, count = tolerance * rr, torch.zeros(heads, device=key.device)
        for _ in range(limit):
            busy = (rr > done).any(1)[:, 0]
            count += busy
            image = (grams @ direction[..., None])[..., 0] + shift * direction
            step = torch.where(rr > done, rr / (direction * image).sum(-1, keepdim=True), 0)
            residual = residual - step * image
            following = residual.square().sum(-1, keepdim=True)
            direction, rr = residual + following / rr * direction, following
        means.append((2 * (count / 2).ceil()).mean())
    return round(torch.stack(means).mean().item(), 2)


def kernels(rows, save):
    """What each kernel of a forward and backward pass takes; of the forward solve also its arithmetic."""
    solver = GKASolver("cg", 20)
    for batch, length, heads, width in PREFILL[:2]:
        for decay in DECAYS:
            tensors = [t.requires_grad_() for t in problem(batch, length, heads, width, decay)]
            tokens = 2 * batch * length * heads * width
            states = tokens * width // CHUNK
            times = profiled(lambda t=tensors: ours(t, solver).sum().backward())
            with torch.no_grad():
                forward = profiled(lambda t=tensors: ours(t, solver))["solve"][0]
                iterations = iterations_taken(tensors)
            products = iterations * batch * length * heads * (2 * width * width + 4 * CHUNK * width)
            row = {"shape": (batch, length, heads, width), "decay": decay, "kernels": {}}
            for name, (spent, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
                row["kernels"][name] = {"us": spent, "calls": calls}
                if name in NEEDED:
                    moved = NEEDED[name][0] * tokens + NEEDED[name][1] * states
                    row["kernels"][name] |= {"bytes": moved, "tb_per_s": round(moved / spent / 1e6, 2)}
            row["forward_solve"] = {
                "us": forward,
                "iterations": iterations,
                "tflops": round(products / forward / 1e6, 1),
            }
            rows.append(row)
            save()
            print(row, flush=True)


def tune():
    """Microseconds of every chunk kernel under the launch options worth trying, best first."""
    from kalman_kernels.gka import triton_common

    tensors = [t.requires_grad_() for t in problem(8, 2048, 16, 128, 0.99)]
    times = {name: [] for name in NEEDED}
    for options in (
        {"num_warps": 4},
        {"num_warps": 8},
        {"num_warps": 8, "maxnreg": 128},
        {"num_warps": 4, "maxnreg": 168},
    ):
        triton_common.LAUNCH.update(dict.fromkeys(NEEDED, options))
        found = profiled(lambda: ours(tensors, GKASolver("cg", 20)).sum().backward())
        for name in NEEDED:
            times[name].append((found[name][0], options))
    for name, found in times.items():
        print(name, sorted(found, key=lambda pair: pair[0]))


def tune_step():
    """Microseconds of several tokens by the way they are taken, of one by its layout and how long programs wait."""
    from kalman_kernels.gka import triton_step

    solver, heads, width = GKASolver("cg", 20), 16, 128
    chosen = {name: getattr(triton_step, name) for name in ("way", "turns", "token_layout")}
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count

    def microseconds(call, **changes):
        vars(triton_step).update({name: lambda *_, value=value: value for name, value in changes.items()})
        try:
            return round(1e3 * replayed(call)["median_ms"], 1)
        finally:
            vars(triton_step).update(chosen)

    for batch in (8, 64, 256, 1024):
        state = settled(batch, heads, width)
        for length in (2, 3, 4, 8):
            tensors, gate = step_inputs(batch, length, heads, width)
            call = partial(gated_kalmanet_step, *tensors, input_gate=gate, state=state, solver=solver, in_place=True)
            ways = ("each", "spread", "few", "chunk") if length <= 4 else ("each", "spread", "chunk")
            print(f"{length} tokens of {batch} rows", {way: microseconds(call, way=way) for way in ways}, flush=True)
        mixer = partial(
            gka_mixer_step, mixer_inputs(batch, heads, width), solver, MixerOptions(True, True, True, width**-0.5, 1e-6)
        )
        tensors, gate = step_inputs(batch, 1, heads, width)
        alone = partial(gated_kalmanet_step, *tensors, input_gate=gate, state=state, solver=solver, in_place=True)
        for name, call in (("a mixer's", mixer), ("the operator's", alone)):
            times = {
                (stages, piece, sleeps): microseconds(
                    call,
                    token_layout={"num_warps": 4, "STAGES": stages, "PIECE": piece},
                    turns=(2 * processors, sleeps),
                )
                for stages, piece in ((1, 16), (2, 16), (2, 32))
                for sleeps in (0, 5, 10, 15, 20)
            }
            print(f"{name} token of {batch} rows by (STAGES, PIECE, sleeps)", times, flush=True)


TUNED = {"chunks": tune, "step": tune_step}


def draw(result, folder):
    """Times over the length."""
    plot_scaling(folder / "gka_gpu_scaling.png", result["scaling"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--tune", choices=TUNED, help="print what the options of these kernels cost, measure nothing else"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.tune:
        TUNED[options.tune]()
        return
    now = environment("cuda")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        now["versions"]["fla-core"] = importlib.metadata.version("fla-core")
    settings = {"dtype": "bfloat16", "device": now["device"]}
    empty = {name: {} if name == "ceilings" else [] for name in SECTIONS}
    result = continued("gka_gpu", settings, options.output) or {**settings, "environments": {}, **empty}
    for name in options.sections:
        result["environments"][name], result[name] = now, empty[name]

    def save():
        result["ratios"] = ratios(result["prefill"])
        write("gka_gpu", result, options.output)

    if "ceilings" in options.sections:
        result["ceilings"] = ceilings()
        print(result["ceilings"], flush=True)
    # In one run with the copy, or beside none.
    copied = result["ceilings"]["copy_tb_per_s"] if "ceilings" in options.sections else None
    steps = partial(decode, copy_tb_per_s=copied)
    for name, section in (("decode", steps), ("prefill", prefill), ("scaling", scaling), ("kernels", kernels)):
        if name in options.sections:
            section(result[name], save)
    save()
    for row in result["ratios"]:
        print(row)
    draw(result, options.output)


if __name__ == "__main__":
    main()
