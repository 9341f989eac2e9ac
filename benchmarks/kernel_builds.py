"""Compile every Triton kernel for GPUs that need not be there: the operators run on the CPU, no kernel is launched.

    python benchmarks/kernel_builds.py [--capabilities 8.0 9.0] [--brief]

Adds to `results/kernel_builds.json` for the installed Triton and each compute capability how many kernels were built
and which of them takes most shared memory. Fails where a kernel does not compile, and in the end where one takes more
shared memory than a program may have there. `--brief` builds every kernel, and few of them for more than one width and
dtype; these rows are kept apart. Without TRITON_INTERPRET=1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import triton
from record import RESULTS, continued, environment, write
from triton.backends.compiler import GPUTarget

from kalman_kernels import (
    GKASolver,
    KLAState,
    Segments,
    causal_conv,
    dispatch,
    gated_kalmanet,
    gated_kalmanet_step,
    gated_rms_norm,
    kalman_linear_attention,
    kalman_linear_attention_step,
)
from kalman_kernels.gka import GKAState, MixerInputs, MixerOptions, gka_mixer_step
from kalman_kernels.jit import compute_capability

# Bytes of shared memory that a program can have, by compute capability.
SHARED = {8.0: 166_912, 8.9: 101_376, 9.0: 232_448, 10.0: 232_448, 12.0: 101_376}
RUN = triton.runtime.JITFunction.run


class Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # What was built is kept by device.
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def recorded():
    """From here on kernels are built and not launched; returns what was built, by its hash."""
    built = {}

    def build_alone(self, *args, grid, warmup, **kwargs):
        kernel = RUN(self, *args, grid=grid, warmup=True, **kwargs)
        module = self.fn.__module__.removeprefix("kalman_kernels.")
        name = f"{module}.{self.fn.__name__}"
        built[kernel.hash] = {"kernel": name, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
        return kernel

    triton.runtime.JITFunction.run = build_alone
    return built


def differentiated(outputs):
    """Backward through all outputs."""
    sum(t.float().sum() for t in outputs).backward()


def gka(dtype, width, solver, packed=False, length=600):
    batch, heads = 1, 2
    tensors = [torch.rand(batch, length, h, width).to(dtype) for h in (heads, 1, 1)]
    gates = [-torch.rand(batch, length, heads), torch.rand(batch, length, heads), torch.rand(batch, length, heads)]
    decay, mix, gate = gates
    segments = Segments(reset=torch.rand(batch, length) < 0.1) if packed else None
    state = GKAState(*(torch.rand(batch, heads, width, width) for _ in range(2)))
    every = [t.requires_grad_() for t in (*tensors, decay, mix, gate)]
    outputs, after = gated_kalmanet(
        *every[:5],
        input_gate=every[5],
        initial_state=GKAState(*(t.requires_grad_() for t in state)),
        solver=solver,
        segments=segments,
        implementation="triton",
    )
    differentiated([outputs, *after])


def gka_step(dtype, width, solver, tokens, every, batch=1):
    heads = 2
    tensors = [torch.rand(batch, tokens, h, width).to(dtype) for h in (heads, 1, 1)]
    gates = [torch.rand(batch, tokens, heads) for _ in range(3)]
    state = GKAState(*(torch.rand(batch, heads, width, width) for _ in range(2)))
    gated_kalmanet_step(
        *tensors,
        -gates[0],
        gates[1],
        input_gate=gates[2],
        state=state,
        solver=solver,
        every_state=every,
        implementation="triton",
    )


def mixer_step(dtype, width, tokens=1, taps=4, batch=1, shared=False):
    heads = 2
    counts = (heads, 1, 1) if shared else (heads,) * 3

    def random(*shape):
        return torch.rand(*shape).to(dtype)

    inputs = MixerInputs(
        *(random(batch, tokens, count, width) for count in counts),
        *(random(batch, tokens, heads) for _ in range(3)),
        random(batch, tokens, heads, width),
        *(random(batch, count * width, taps - 1) for count in counts),
        *(random(count * width, taps) for count in counts),
        torch.rand(heads),
        torch.rand(heads),
        random(width),
        torch.rand(batch, heads, width, width),
        torch.rand(batch, heads, width, width),
        None,
    )
    gka_mixer_step(inputs, GKASolver("cg", 20), MixerOptions(True, True, True, width**-0.5, 1e-6))


def kla(dtype, channels=64, states=16, length=600):
    batch = 1
    tokens = [torch.rand(batch, length, n).to(dtype) for n in (channels, channels, states, states)]
    dynamics = [torch.rand(channels, states), torch.rand(channels, states)]
    state = KLAState(*(torch.rand(batch, channels, states) for _ in range(2)))
    every = [t.requires_grad_() for t in (*tokens, *dynamics)]
    mean, variance, after = kalman_linear_attention(*every, initial_state=state, implementation="triton")
    differentiated([mean, variance, *after])
    with torch.no_grad():
        kalman_linear_attention_step(*(t[:, :1] for t in tokens), *dynamics, state=state, implementation="triton")


def around(dtype, channels=256, length=300):
    """What surrounds the operators in a layer."""
    inputs, weight = torch.rand(2, length, channels).to(dtype), torch.rand(channels, 4).to(dtype)
    every = [inputs.requires_grad_(), weight.requires_grad_()]
    differentiated([causal_conv(*every, implementation="triton")[0]])
    rows, gate, scale = (torch.rand(*s).to(dtype).requires_grad_() for s in ((2, 9, 128), (2, 9, 128), (128,)))
    differentiated([gated_rms_norm(rows, gate, scale, 1e-6, implementation="triton")])


def build(capability, brief=False):
    """Names, warps and bytes of shared memory of all kernels, built for one compute capability."""
    triton.runtime.driver.set_active(Absent(round(10 * capability)))
    compute_capability.cache_clear()
    built = recorded()
    cg, chebyshev = GKASolver("cg", 20), GKASolver("chebyshev", 30)
    gka(torch.bfloat16, 128, cg)
    # Keys and values that several heads read are prepared by a launch of their own.
    mixer_step(torch.bfloat16, 128, shared=True)
    # So many heads that their tokens are taken side by side, or as a chunk.
    mixer_step(torch.bfloat16, 128, 4, batch=64)
    mixer_step(torch.float16, 64, 8, batch=64)
    gka_step(torch.bfloat16, 128, cg, 4, True, batch=64)
    kla(torch.bfloat16)
    around(torch.bfloat16)
    if brief:
        return list(built.values())
    gka(torch.bfloat16, 64, chebyshev, packed=True)
    gka(torch.float32, 64, cg)
    gka(torch.float32, 128, cg)
    gka_step(torch.bfloat16, 128, cg, 4, True)
    gka_step(torch.bfloat16, 128, cg, 8, True, batch=64)
    gka_step(torch.float32, 64, chebyshev, 1, False)
    # So many that memory is what they wait for; so few that both states are loaded at once; a ridge that takes plain
    # conjugate gradients.
    gka_step(torch.bfloat16, 128, cg, 1, False, batch=256)
    gka_step(torch.float16, 64, cg._replace(ridge_ratio=1e-3), 2, False, batch=40)
    mixer_step(torch.bfloat16, 128)
    mixer_step(torch.float16, 64)
    mixer_step(torch.bfloat16, 64, batch=512)
    mixer_step(torch.float16, 64, 4)
    # Four and two warps a program.
    mixer_step(torch.bfloat16, 64, 2, batch=64)
    mixer_step(torch.bfloat16, 64, 4, batch=128)
    return list(built.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=float, nargs="+", choices=[*SHARED], default=[*SHARED])
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Tensors of the CPU count as the device's.
    dispatch.INTERPRETED = True
    result = continued("kernel_builds", {}, options.output)
    rows = result.setdefault("brief" if options.brief else "builds", {})
    result["environment"] = environment()
    too_large = []
    for capability in options.capabilities:
        kernels = build(capability, options.brief)
        largest = max(kernels, key=lambda kernel: kernel["shared"])
        over = sorted({kernel["kernel"] for kernel in kernels if kernel["shared"] > SHARED[capability]})
        too_large += [f"{name} at capability {capability}" for name in over]
        row = {"builds": len(kernels), "most_shared_bytes": largest["shared"], "by": largest["kernel"]}
        row |= {"too_large": over, "kernels": sorted({kernel["kernel"] for kernel in kernels})}
        row["commit"] = result["environment"]["commit"]
        rows[f"Triton {triton.__version__}, compute capability {capability}"] = row
        print(triton.__version__, capability, row["builds"], largest, over, flush=True)
        write("kernel_builds", result, options.output)
    if too_large:
        sys.exit(f"More shared memory than a program may have: {', '.join(too_large)}")


if __name__ == "__main__":
    # What was built before is built again.
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        main()
