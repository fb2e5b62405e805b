"""The cost model: what a micro-batch does on a GPU is counted without one, stays within budgets, and is near to
published figures."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dialogpt_ds.errors import UserError
from dialogpt_ds.model.activation import fuse_activations, recompute_activations
from dialogpt_ds.model.attention import Isolation, isolation_of
from dialogpt_ds.model.calibration import HIGHEST, LOWEST, PUBLISHED, Published, dense_trace, modelled, preset_config
from dialogpt_ds.model.flops import peak_by_name
from dialogpt_ds.model.gpu_specs import FLASH_TILE, GPUS, gpu_of, link_of
from dialogpt_ds.model.loss import Planned, TargetLoss
from dialogpt_ds.model.micro_batch_trace import Trace, planned_loss, trace
from dialogpt_ds.model.presets import VOCABULARY
from dialogpt_ds.model.roofline import category_of, cost_of
from dialogpt_ds.model.saved_bytes import activations_measured
from dialogpt_ds.model.workload import Workload

GPU, CPU = torch.device("cuda"), torch.device("cpu")
EXAMPLE, TARGETS = 41, 0.6
"""Tokens of an example of DialoGPT's data, and the share of them that are targets."""


@functools.cache
def traced(
    model: str, rows: int, isolation: Isolation = "varlen", chunked: bool = False, checkpointed: bool = False
) -> Trace:
    loss = planned_loss(preset_config(model), torch.bfloat16, Planned(GPU, isolation), chunked, checkpointed)
    return trace(loss, Workload.of_equal_examples(rows, 512, EXAMPLE, TARGETS))


dense = functools.cache(dense_trace)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("isolation", ["varlen", "flash", "mask", "positions"])
def test_everything_that_a_micro_batch_touches_is_on_one_device(isolation: Isolation, chunked: bool) -> None:
    found = traced("117M", 20, isolation, chunked)
    assert {device for call in found.calls for device in call.devices} == {"meta"}
    assert len(found.forward) > 100
    assert len(found.backward) > 200


def test_the_host_never_waits_for_a_number_but_where_transformers_looks_for_packed_rows() -> None:
    waits = {isolation: traced("117M", 20, isolation).waits for isolation in ("varlen", "flash", "mask", "positions")}
    assert waits == {"varlen": 0, "flash": 1, "mask": 0, "positions": 1}


def test_the_budget_of_117m_in_kernels_and_bytes() -> None:
    """A new kernel in each layer, a copy of the logits or of a layer's states fails this; a saving should lower it."""
    found = traced("117M", 20)
    layers = traced("762M", 5)
    a_layer = (len(layers.calls) - len(found.calls)) / (36 - 12)
    moved = sum(call.num_bytes for call in found.calls) / found.workload.tokens
    assert len(found.calls) <= 404
    assert a_layer <= 31
    assert sum(found.kept.values()) <= 3.45 * 2**30
    assert found.peak <= 3.62 * 2**30
    assert moved <= 2.72e6


def test_only_what_a_layer_needs_is_kept_for_its_backward_pass() -> None:
    """16 numbers of a token for each of its width: what goes into two norms (2) and comes out (2), queries, keys and
    values (3), what attention gives (1), what goes into the activation and comes out (8). Beside them two statistics of
    a norm, and attention's."""
    found = traced("762M", 5)
    of_layers = sum(found.kept.values()) - found.workload.num_targets * (VOCABULARY + 47) * 2
    assert 16 * 36 * 2_560 * 1_280 * 2 < of_layers <= 16.2 * 36 * 2_560 * 1_280 * 2


def test_a_chunked_head_keeps_no_logits_and_checkpoints_keep_inputs_of_layers() -> None:
    logits = 6_144 * (VOCABULARY + 47) * 2
    options = [(False, False), (True, False), (False, True)]
    usual, chunked, checkpointed = (sum(traced("117M", 20, "varlen", *option).kept.values()) for option in options)
    assert usual - chunked == pytest.approx(logits, rel=0.01)
    assert checkpointed < 1.1 * (logits + 12 * 10_240 * 768 * 2)
    assert traced("117M", 20, "varlen", True, True).peak < 0.9 * 2**30


@pytest.mark.parametrize(
    ("model", "rows", "gpu", "at_least"),
    [
        ("117M", 20, "A100-40", 200_000),
        ("117M", 20, "H100", 480_000),
        ("345M", 10, "H100", 195_000),
        ("762M", 5, "H100", 98_000),
    ],
)
def test_the_aims_are_met_as_far_as_the_model_knows(model: str, rows: int, gpu: str, at_least: int) -> None:
    cost = cost_of(traced(model, rows), gpu_of(gpu), VOCABULARY)
    assert traced(model, rows).workload.tokens / cost.seconds >= at_least


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p.program} {p.model} {p.gpu}")
def test_published_figures_are_near_to_what_is_modelled(published: Published) -> None:
    ratio = modelled(published, dense(published.model, published.fused_loss)) / published.tokens_per_second
    assert LOWEST <= round(ratio, 2) <= HIGHEST, ratio
    assert 0.6 <= ratio <= 1.4


def test_the_error_that_is_told_is_no_wider_than_it_must_be() -> None:
    ratios = [modelled(p, dense(p.model, p.fused_loss)) / p.tokens_per_second for p in PUBLISHED]
    assert (min(ratios), max(ratios)) == pytest.approx((LOWEST, HIGHEST), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["", "chunked", "checkpointed"])
def test_the_bytes_kept_on_meta_are_those_of_a_real_run(dtype: torch.dtype, option: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_layer=3, n_embd=64, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    fuse_activations(model)
    real = TargetLoss(model, option == "chunked").train()
    model.to(dtype)
    if option == "checkpointed":
        recompute_activations(model)
    workload = Workload.of_equal_examples(4, 32, 8, 0.5)
    with activations_measured(real) as measured:
        real(**real_inputs(workload))
    planned = Planned(CPU, isolation_of(GPT2LMHeadModel(config)))
    on_meta = trace(planned_loss(config, dtype, planned, option == "chunked", option == "checkpointed"), workload)
    if dtype == torch.bfloat16:
        # Two statistics of each token and norm, which a CPU keeps in bf16; a GPU, and meta, in fp32. Recomputed ones
        # are not kept.
        statistics = 2 * 4 * 32 * (1 if option == "checkpointed" else 2 * 3 + 1)
        measured.by_dtype[torch.bfloat16] -= 2 * statistics
        measured.by_dtype[torch.float32] += 4 * statistics
    assert on_meta.kept == measured.by_dtype
    assert measured.by_dtype[dtype] > 10_000


def real_inputs(workload: Workload) -> dict[str, Any]:
    starts = torch.tensor([0, *workload.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in workload.lengths]).view(workload.rows, -1)
    some = torch.arange(workload.num_targets)
    return {
        "input_ids": torch.randint(257, positions.shape),
        "position_ids": positions,
        "target_places": some,
        "labels": some % 257,
        "weights": torch.ones(len(some)),
        "turn_groups": torch.zeros_like(some),
        "example_starts": starts,
        "longest_example": max(workload.lengths),
    }


def test_memory_is_free_again_after_a_micro_batch_and_its_peak_is_more_than_what_is_kept() -> None:
    loss = planned_loss(preset_config("tiny"), torch.float16, Planned(GPU, "varlen"))
    workload = Workload.of_equal_examples(4, 128, EXAMPLE, TARGETS)
    first, second = trace(loss, workload), trace(loss, workload)
    assert first.peak == second.peak > sum(first.kept.values()) > 0
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_operations_are_those_of_the_weights() -> None:
    """6 for each weight of a matrix and token: 12 * layers * width^2 in the body, the head's with its padding at
    targets alone."""
    found = traced("117M", 20)
    by_category: Counter[str] = Counter()
    for call in found.calls:
        by_category[category_of(call, VOCABULARY)] += int(call.operations)
    assert by_category["body GEMM"] == 6 * 10_240 * 12 * 12 * 768**2
    assert by_category["head GEMM"] == 6 * 6_144 * 768 * (VOCABULARY + 47)
    assert set(by_category) == {
        "body GEMM",
        "head GEMM",
        "attention",
        "head elementwise",
        "activation",
        "norms",
        "rest",
    }


def test_attention_costs_the_tiles_of_its_examples() -> None:
    assert FLASH_TILE == (128, 64)
    assert Workload.of_equal_examples(1, 64, 64, 1.0).computed_pairs == 128 * 64
    # The first 128 queries see two tiles of keys, the last 22 three.
    assert Workload.of_equal_examples(1, 150, 150, 1.0).computed_pairs == 128 * 128 + 128 * 192
    # 12 whole examples and one of 20 tokens, a tile each.
    assert Workload.of_equal_examples(1, 512, EXAMPLE, 1.0).computed_pairs == 13 * 128 * 64
    a100 = gpu_of("A100-40")
    short, whole = traced("117M", 20), dense("117M", True)
    masked = cost_of(traced("117M", 20, "mask"), a100, VOCABULARY).by_category["attention"]
    assert cost_of(short, a100, VOCABULARY).by_category["attention"] < masked / 3
    assert (
        cost_of(whole, a100, VOCABULARY).by_category["attention"]
        > cost_of(short, a100, VOCABULARY).by_category["attention"]
    )


def test_an_unpadded_head_is_slower() -> None:
    a100 = gpu_of("A100-40")
    padded, whole = (cost_of(dense("117M", True), a100, VOCABULARY), cost_of(odd_head(), a100, VOCABULARY))
    assert whole.by_category["head GEMM"] > 1.5 * padded.by_category["head GEMM"]
    assert whole.by_category["head elementwise"] > 4 * padded.by_category["head elementwise"], "copies in fp32"


@functools.cache
def odd_head() -> Trace:
    planned = Planned(GPU, "varlen", head_is_linear=False)
    return trace(planned_loss(preset_config("117M"), torch.bfloat16, planned), dense("117M", True).workload)


def test_a_compiled_body_has_fewer_kernels_and_moves_less() -> None:
    found, h100 = traced("345M", 10), gpu_of("H100")
    plain, compiled = cost_of(found, h100, VOCABULARY), cost_of(found, h100, VOCABULARY, compiled=True)
    assert compiled.num_kernels < 0.75 * plain.num_kernels
    assert compiled.num_bytes < plain.num_bytes
    assert compiled.gpu_seconds < plain.gpu_seconds
    assert compiled.launch_seconds < plain.launch_seconds / 2


def test_a_small_model_on_a_fast_gpu_is_as_slow_as_its_host() -> None:
    loss = planned_loss(preset_config("tiny"), torch.bfloat16, Planned(GPU, "varlen"))
    cost = cost_of(trace(loss, Workload.of_equal_examples(2, 128, EXAMPLE, TARGETS)), gpu_of("H100"), VOCABULARY)
    assert cost.seconds == cost.launch_seconds > cost.gpu_seconds


def test_fp32_is_counted_with_its_own_peak() -> None:
    workload = Workload.of_equal_examples(20, 512, EXAMPLE, TARGETS)
    single = trace(planned_loss(preset_config("117M"), torch.float32, Planned(GPU, "mask")), workload)
    half = traced("117M", 20, "mask")
    assert 1.9 < sum(single.kept.values()) / sum(half.kept.values()) <= 2.0
    a100 = gpu_of("A100-40")
    slower = (
        cost_of(single, a100, VOCABULARY).by_category["body GEMM"]
        / cost_of(half, a100, VOCABULARY).by_category["body GEMM"]
    )
    assert slower == pytest.approx(312 * 0.65 / (19.5 * 0.8), rel=0.01)


@pytest.mark.parametrize(
    "name", ["A100-40", "a100 40", "A100_40GB", "nvidia a100-40gb", "RTX 3090", "rtx-3090", "RTX4090", "h100"]
)
def test_gpus_are_found_in_any_spelling(name: str) -> None:
    assert (
        gpu_of(name).name.replace("-", "").replace(" ", "").lower()
        in name.replace("-", "").replace(" ", "").replace("_", "").lower()
    )


def test_an_unknown_gpu_names_those_that_are_known() -> None:
    for name in ("A100", "B200", ""):
        with pytest.raises(UserError, match="H100, H200, A100-40, A100-80, V100, T4, L4, RTX 3090, RTX 4090"):
            gpu_of(name)


def test_peaks_are_those_that_mfu_is_measured_against() -> None:
    for gpu in GPUS:
        assert peak_by_name(gpu.name.replace("-", " ")) == gpu.half, gpu.name


def test_links_follow_hosts_and_gpus() -> None:
    assert link_of(gpu_of("A100-40"), 1) == "nvlink"
    assert link_of(gpu_of("A100-40"), 2) == "100gbe"
    assert link_of(gpu_of("T4"), 1) == "pcie"
    assert link_of(gpu_of("H100"), 4, "nvlink") == "nvlink"
    with pytest.raises(UserError, match="--link nvlink: L4 has none"):
        link_of(gpu_of("L4"), 1, "nvlink")
