"""What a run needs of memory and disk, in bytes: states by ZeRO stage, what comes on top of them on a GPU,
checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.hardware import peak_memory
from dialogpt_ds.model.gpu_specs import CONTEXT


def weight_bytes(precision: str) -> int:
    """Return the bytes of a weight in the run's precision."""
    return 4 if precision == "fp32" else 2


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over its GPUs."""

    gpus: int
    gpus_per_host: int
    accumulation: int
    stage: int
    """Of ZeRO."""
    overlaps: bool
    """Whether gradients are reduced while the backward pass goes on."""
    optimizer_on_host: bool
    precision: Precision
    num_parameters: int
    num_tensors: int
    """That hold the parameters."""
    ready_last: int
    """Parameters whose gradient is there only at the backward pass's end: those of the input embedding."""
    bucket: int
    """Numbers that are reduced at a time."""
    sums_in_fp32: bool
    """Whether gradients of several micro-batches are added up in fp32."""
    sends_fp32: bool
    """Whether gradients are reduced in fp32."""

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return weight_bytes(self.precision)


@dataclass(frozen=True)
class States:
    """Bytes of weights, gradients and optimizer state."""

    stage: int
    """Of ZeRO."""
    device: int
    """On each GPU."""
    host: int
    """In each host's memory, all of its processes together."""
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False

    @property
    def name(self) -> str:
        """ZeRO stage and offload."""
        return states_name(self.stage, self.optimizer_offloaded, self.weights_offloaded)

    def in_host_memory(self, processes: int, on_gpu: bool, on_disk: bool) -> int:
        """Return the bytes in a host's memory: on CPUs also what GPUs would have; nothing for what is offloaded to an
        NVMe disk."""
        host = 0 if on_disk else self.host
        return host if on_gpu else max(host, self.device * processes)


def states_name(stage: int, optimizer_offloaded: bool = False, weights_offloaded: bool = False) -> str:
    """Return how a ZeRO stage with its offload is called."""
    where = (
        ", optimizer and weights on the host" if weights_offloaded else ", optimizer on the host" * optimizer_offloaded
    )
    return f"ZeRO-{stage}{where}"


def name_of_run(stage: int, offload: tuple[str, str]) -> str:
    """Return how a run's ZeRO stage is called, with where it keeps optimizer and weights: none (the GPU), cpu or
    nvme."""
    optimizer, weights = offload
    return states_name(stage, optimizer != "none", weights != "none")


def states_of_run(states: Sequence[States], stage: int, offload: tuple[str, str]) -> States | None:
    """Return the states of a run's ZeRO stage and offload among those of all; None where there is no estimate for
    them."""
    return next((state for state in states if state.name == name_of_run(stage, offload)), None)


def model_states(
    num_parameters: int, largest_layer: int, gpus_per_host: int, hosts: int, precision: Precision
) -> list[States]:
    """Return what each ZeRO stage needs, with and without offload.

    Stages 2 and 3 in half precision are DeepSpeed's own estimates. It has none for stages 0 and 1 and for fp32; there a
    parameter has 2 bytes of weight and 2 of gradient, and 16 of fp32 gradient, master weight and Adam's moments, of
    which ZeRO divides the last 16 (stage 1), 18 (stage 2) or all (Rajbhandari et al. 2020, section 3, and DeepSpeed's
    estimator for the fp32 gradient). In fp32 they are 4, 4, and 12 of master weight and moments; stage 0 needs no
    master weight then.

    Args:
        num_parameters: of the model.
        largest_layer: parameters of the largest module with weights of its own, which ZeRO-3 gathers as a whole.
        gpus_per_host: processes on each host.
        hosts: number of hosts.
        precision: of the run.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    p, n = num_parameters, gpus_per_host * hosts
    weight = gradient = weight_bytes(precision)
    state = 12 if precision == "fp32" else 16
    while_built = 4 * p * gpus_per_host
    """Each process makes the model on the host before it moves."""
    found = [
        States(0, p * (16 if precision == "fp32" else weight + gradient + state), while_built),
        States(1, p * (weight + gradient) + p * state // n, while_built),
    ]
    if precision == "fp32":
        return [
            *found,
            States(2, p * weight + p * (gradient + state) // n, while_built),
            States(3, weight * largest_layer + p * (weight + gradient + state) // n, while_built),
        ]
    for offload in (False, True):
        host, device = estimate_zero2_model_states_mem_needs(p, gpus_per_host, hosts, cpu_offload=offload)
        found.append(States(2, int(device), int(host), offload))
    for optimizer, parameters in ((False, False), (True, False), (True, True)):
        host, device, _ = estimate_zero3_model_states_mem_needs(
            p,
            largest_layer,
            gpus_per_host,
            hosts,
            cpu_offload=optimizer,
            cpu_offload_params=parameters,
            zero_init=False,
        )
        found.append(States(3, int(device), int(host), optimizer, parameters))
    return found


def buffer_bytes(layout: Layout) -> int:
    """Return the bytes that ZeRO needs on a GPU besides the states: buckets, sums in fp32, and the weights that stage 3
    has gathered."""
    size = 4 if layout.sends_fp32 else layout.size
    copy_of_bucket = size * min(layout.bucket, layout.num_parameters) if layout.gpus > 1 else 0
    buckets = 0 if layout.stage == 0 else size * layout.bucket * (2 if layout.overlaps else 1)
    # Up to DeepSpeed's stage3_max_live_parameters, a billion, weights stay from the forward pass to the backward pass.
    gathered = layout.size * min(layout.num_parameters, 10**9) if layout.stage == 3 and layout.gpus > 1 else 0
    own = layout.gpus if layout.stage >= 2 else 1
    sums = 4 * layout.num_parameters // own if layout.sums_in_fp32 and layout.precision != "fp32" else 0
    return buckets + copy_of_bucket + gathered + sums


def bytes_on_gpu(state: States, layout: Layout, micro_batch: int) -> int:
    """Return the bytes that a run needs on each GPU: states, its micro-batch at its peak, ZeRO's buffers, and CUDA's
    own.

    Args:
        state: of a ZeRO stage.
        layout: of the run; the stage is that of `state`.
        micro_batch: bytes of a micro-batch at its peak.
    """
    return int(state.device + micro_batch + buffer_bytes(replace(layout, stage=state.stage)) + CONTEXT)


def checkpoint_bytes(num_parameters: int, precision: str) -> int:
    """Return about what a checkpoint takes: weights in the run's precision, fp32 master weights and Adam's two moments.

    The sizes are those of model_states() less the gradients, which no checkpoint has; measured for 3.4 million
    parameters: 57.7 MB in fp32 and 50.9 in bf16, 3.6 of which are the tokenizer.
    """
    return num_parameters * (weight_bytes(precision) + 12)


def output_bytes(num_parameters: int, precision: str, kept: int) -> int:
    """Return about what a run has in output_dir at most: the checkpoints that are kept, the best, the one being
    written, the model."""
    return checkpoint_bytes(num_parameters, precision) * (kept + 2) + weight_bytes(precision) * num_parameters


def approximate_parameters(config: Any) -> int:
    """Return about how many parameters a causal language model of transformers has, from its configuration: GPT-2's
    exactly.

    A layer of a GPT-2 of width d has 12 d^2 weights and 13 d biases and norms (Radford et al. 2019).
    """
    width, layers = getattr(config, "hidden_size", 0) or 0, getattr(config, "num_hidden_layers", 0) or 0
    tables = (getattr(config, "vocab_size", 0) or 0) * (1 if getattr(config, "tie_word_embeddings", True) else 2)
    if getattr(config, "model_type", "") == "gpt2":
        tables += config.max_position_embeddings
        return width * tables + layers * (12 * width**2 + 13 * width) + 2 * width
    return width * tables + layers * 12 * width**2


def largest_layer(model: torch.nn.Module) -> int:
    """Return the parameters of the module that has most of its own."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def peak_of_this_process(device: torch.device) -> int:
    """Return the most memory used so far, bytes: of the GPU, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
