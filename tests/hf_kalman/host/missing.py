"""What the host's common tests import from files that its source distribution leaves out.

The generation tests are not distributed; those of this repository are in `test_generation.py` and its neighbours.
"""

import multiprocessing
import os
import socket
import sys
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Fields that every configuration takes and gives back.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["Model"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


MIXINS = ("host_tests.test_fsdp_mixin", "host_tests.test_tensor_parallel_mixin")


class ExportTesterMixin:
    """Stands where the host's export tests would."""


class GenerationTesterMixin:
    """Stands where the host's generation tests would."""


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    # The server imports once what every rank needs. It looks for it in the environment's path alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    multiprocessing.set_forkserver_preload(["families", *MIXINS])
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _rank(rank, world_size, port, function, args):
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    _set_rank_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """`run_distributed(2)(function)(*args)` calls function(rank, *args) in so many processes."""

    def wrap(function):
        def run(*args):
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            _start_rank_processes(_rank, (world_size, port, function, args), world_size)

        return run

    return wrap
