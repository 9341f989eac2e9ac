"""Memory and time of converting a checkpoint of 8 B parameters: swap, export and import, each in a process of its own.

    python benchmarks/large_conversion.py WORK_FOLDER

Writes a random bfloat16 checkpoint in the shape of Qwen3-8B (36 layers, 16.4 GB in 5 files) and works on that. Needs
about 51 GB of disk; the folder is removed at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import RESULTS, environment, write
from transformers import AutoModelForCausalLM, Qwen3Config

from kalman_conversion.streaming import NewTensor, write_checkpoint

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
FILES = 5
# The child runs the command and says what it took.
CHILD = """
import json, pathlib, sys, time
from kalman_conversion import cli
def peak():
    # Of this process alone: what getrusage says begins with the parent's.
    line = next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)
started, imports = time.perf_counter(), peak()
status = cli.main(sys.argv[1:])
print(json.dumps({"status": status, "seconds": round(time.perf_counter() - started, 1),
                  "peak_gb": peak(), "imports_gb": imports}))
"""


def random_checkpoint(folder):
    """A sharded checkpoint of the shape, written without holding it."""
    config = Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"])
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(0)
    block = (0.02 * torch.randn(1 << 22)).to(torch.bfloat16)

    def make(shape):
        size = torch.Size(shape).numel()
        return block.repeat(-(-size // len(block)))[:size].view(shape)

    names = list(tensors)
    per_file = -(-len(names) // FILES)
    shards = {}
    for number in range(FILES):
        part = names[number * per_file : (number + 1) * per_file]
        entries = {
            n: NewTensor(torch.bfloat16, tuple(tensors[n].shape), lambda s=tuple(tensors[n].shape): make(s))
            for n in part
        }
        shards[f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"] = entries
    folder.mkdir(parents=True)
    size = write_checkpoint(folder, shards)
    config.save_pretrained(folder)
    return size


def run(*arguments):
    found = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stderr[-2000:])
    return json.loads(found.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    source, ours, theirs, back = (options.work / name for name in ("source", "ours", "theirs", "back"))
    started = time.perf_counter()
    size = random_checkpoint(source)
    result = {"environment": environment(), "shape": SHAPE, "files": FILES, "gigabytes": round(size / 1e9, 2)}
    result["seconds_to_write_the_source"] = round(time.perf_counter() - started, 1)
    swap = ["swap", "--model", source, "--layers", "half", "--initialisation", "reference", "--output", ours]
    result["swap"] = run(*swap)
    print(result["swap"], flush=True)
    shutil.rmtree(source)
    result["export_awslabs"] = run("export-awslabs", "--model", ours, "--output", theirs)
    print(result["export_awslabs"], flush=True)
    result["import_awslabs"] = run("import-awslabs", "--model", theirs, "--output", back)
    print(result["import_awslabs"], flush=True)
    names = sorted(path.name for path in ours.glob("*.safetensors"))
    same = all(subprocess.run(["cmp", "-s", ours / n, back / n]).returncode == 0 for n in names)
    result["round_trip_files_are_equal"] = same
    shutil.rmtree(options.work)
    write("large_conversion", result, options.output)


if __name__ == "__main__":
    main()
