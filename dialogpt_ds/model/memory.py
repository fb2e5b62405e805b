"""What a run needs of memory for the model's states, by ZeRO stage."""

from dataclasses import dataclass

import torch

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.hardware import peak_memory


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
        return layout_name(self.stage, self.optimizer_offloaded, self.weights_offloaded)


def layout_name(stage: int, optimizer_offloaded: bool = False, weights_offloaded: bool = False) -> str:
    """Return how a ZeRO stage with its offload is called."""
    where = ", optimizer and weights on the host" if weights_offloaded else ", optimizer on the host" * optimizer_offloaded
    return f"ZeRO-{stage}{where}"


def model_states(num_parameters: int, largest_layer: int, gpus_per_host: int, hosts: int, precision: Precision) -> list[States]:
    """Return what each ZeRO stage needs, with and without offload.

    Stages 2 and 3 in half precision are DeepSpeed's own estimates. It has none for stages 0 and 1 and for fp32; there a parameter has 2
    bytes of weight and 2 of gradient, and 16 of fp32 gradient, master weight and Adam's moments, of which ZeRO divides the last 16
    (stage 1), 18 (stage 2) or all (Rajbhandari et al. 2020, section 3, and DeepSpeed's estimator for the fp32 gradient). In fp32
    they are 4, 4, and 12 of master weight and moments; stage 0 needs no master weight then.

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
    weight, gradient, state = (4, 4, 12) if precision == "fp32" else (2, 2, 16)
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
            p, largest_layer, gpus_per_host, hosts, cpu_offload=optimizer, cpu_offload_params=parameters, zero_init=False
        )
        found.append(States(3, int(device), int(host), optimizer, parameters))
    return found


def largest_layer(model: torch.nn.Module) -> int:
    """Return the parameters of the module that has most of its own."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def peak_of_this_process(device: torch.device) -> int:
    """Return the most memory used so far, bytes: of the GPU, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
