"""MFU: operations counted by hand, peaks by name."""

import pytest
import torch

from dialogpt_ds.model.flops import Flops, device_peak, flops_of, measured_peak, peak_by_name


def test_the_weights_of_a_gpt2_are_those_of_its_shape() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    # A layer: 12 * 8 * 8 weights of matrices, 13 * 8 of biases and norms; at the end a norm of 2 * 8. The head is the
    # embedding.
    assert flops_of(model) == Flops(2 * (12 * 64 + 13 * 8) + 16, 100 * 8, 2, 8)


def test_a_head_of_its_own_is_no_part_of_the_body() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    flops = flops_of(AutoModelForCausalLM.from_config(config))
    assert flops.head_weights == 800
    assert flops.body_weights == 4 * 64 + 3 * 8 * 16 + 3 * 8, "four projections, three of the MLP, three norms"


def test_operations_by_hand() -> None:
    flops = Flops(body_weights=1_000, head_weights=50, layers=2, width=8)
    assert flops.per_step(tokens=10, targets=3, row_length=16) == 10 * (6 * 1_000 + 12 * 2 * 8 * 16) + 3 * 6 * 50


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA A10G", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4080", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA B200", 2_250),
    ],
)
def test_peaks_by_name(name: str, tera: float | None) -> None:
    assert peak_by_name(name) == (None if tera is None else tera * 1e12)


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), "fp32")
    assert 1e8 < peak.operations_per_second < 1e14
    assert "measured" in str(peak)
    assert measured_peak(torch.device("cpu"), torch.bfloat16) > 0
