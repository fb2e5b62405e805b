"""Prints how many threads DeepSpeed's Adam for the host has in a rank of a run on GPUs, on a host with 12 cores, after
a step of it.

A path as argument: of another copy of OpenMP's library, loaded late, as an extension does where PyTorch's copy has a
name of its own.
"""

import ctypes
import json
import os
import sys

import torch

from dialogpt_ds.distributed.cores import loaded_libraries
from dialogpt_ds.distributed.world import prepare_cpu, prepare_environment, world_from_environment


def main() -> None:
    """Step once."""
    os.sched_getaffinity = lambda _: set(range(12))
    os.environ["DS_ACCELERATOR"] = "cuda"
    world = world_from_environment()
    prepare_environment(world)
    prepare_cpu(world, offloads=True)
    os.environ["DS_ACCELERATOR"] = "cpu"  # what follows needs no GPU
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    for path in sys.argv[1:]:
        ctypes.CDLL(path)
    weight = torch.nn.Parameter(torch.ones(1_000))
    weight.grad = torch.ones_like(weight)
    DeepSpeedCPUAdam([weight], lr=0.1).step()
    threads = [ctypes.CDLL(path).omp_get_max_threads() for path in loaded_libraries()]
    print(json.dumps({"torch": torch.get_num_threads(), "libraries": sorted(threads)}))


if __name__ == "__main__":
    main()
