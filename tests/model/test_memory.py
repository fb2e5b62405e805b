"""What a run needs of memory and disk."""

import pytest
import torch

from dialogpt_ds.model.load import find_model
from dialogpt_ds.model.memory import approximate_parameters, checkpoint_bytes, model_states, output_bytes, states_of_run


@pytest.mark.parametrize("name", ["117M", "tiny"])
def test_the_number_of_parameters_is_gpt2s_own(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = find_model(name, 0.0, 0, 0).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert approximate_parameters(config) == sum(p.numel() for p in model.parameters())


def test_a_checkpoint_holds_weights_master_weights_and_two_moments() -> None:
    assert checkpoint_bytes(1_000, "fp16") == 14_000
    assert checkpoint_bytes(1_000, "fp32") == 16_000


def test_output_dir_has_room_for_the_best_the_next_and_the_model() -> None:
    assert output_bytes(1_000, "fp16", kept=3) == 5 * 14_000 + 2_000


def test_a_runs_own_states_are_found_among_all() -> None:
    states = model_states(1_000, 100, 8, 1, "fp16")
    own = states_of_run(states, 3, ("cpu", "nvme"))
    assert own is not None
    assert own.name == "ZeRO-3, optimizer and weights on the host"
    assert states_of_run(states, 1, ("cpu", "none")) is None, "DeepSpeed estimates no offload at this stage"


def test_on_cpus_a_host_has_what_gpus_would_have() -> None:
    states = states_of_run(model_states(1_000, 100, 8, 1, "fp32"), 0, ("none", "none"))
    assert states is not None
    assert states.in_host_memory(8, on_gpu=True, on_disk=False) == states.host == 8 * 4_000
    assert states.in_host_memory(8, on_gpu=False, on_disk=True) == 8 * 16_000
