"""Whether bf16 is worth it on a CPU is measured, whatever the CPU's libraries say they support."""

import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dialogpt_ds import matmul
from dialogpt_ds.hardware import CpuRates, bf16_is_fast, device_of_run
from dialogpt_ds.matmul import cpu_rates, measured_rates
from tests.conftest import ROOT


class Clock:
    """Says that products take what it was given, by precision; for ever the last."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds: dict[torch.dtype, Iterator[float]] = {
            getattr(torch, name): itertools.chain(values, itertools.repeat(values[-1]))
            for name, values in seconds.items()
        }
        self.calls = self.threads = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> float:
        self.threads = torch.get_num_threads()
        if len(a) == matmul.TOKENS:
            self.calls += 1
            return next(self.seconds[a.dtype])
        return 1.0


@pytest.fixture
def no_rates_yet() -> Iterator[None]:
    cpu_rates.cache_clear()
    yield
    cpu_rates.cache_clear()


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="oneDNN takes its instructions away by their names on x86 alone"
)
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_bf16_without_instructions_for_it_is_slow_on_this_very_machine(instructions: str) -> None:
    """With AVX512_CORE oneDNN says that it supports bf16."""
    script = "from dialogpt_ds.hardware import CpuRates, bf16_is_fast; print(bf16_is_fast())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )
    assert done.stdout == "False\n", done.stderr


def test_a_product_that_others_disturbed_does_not_count() -> None:
    rates = measured_rates(Clock(float32=[0.04, 0.004, 0.05, 0.006], bfloat16=[0.003, 0.08, 0.09, 0.03]))
    operations = 2 * 256 * 768 * 768
    assert rates == CpuRates(operations / 0.004, operations / 0.003)
    assert rates.bf16_is_fast
    assert not measured_rates(Clock(float32=[0.04, 0.004], bfloat16=[0.09, 0.008])).bf16_is_fast


def test_a_little_less_than_fp32_is_fast_enough() -> None:
    assert CpuRates(fp32=100e9, bf16=85e9).bf16_is_fast
    assert not CpuRates(fp32=119e9, bf16=25e9).bf16_is_fast


def test_very_slow_products_are_not_repeated() -> None:
    clock = Clock(float32=[0.003], bfloat16=[0.6])
    assert not measured_rates(clock).bf16_is_fast
    assert clock.calls == 2


@pytest.mark.usefixtures("no_rates_yet")
def test_it_is_measured_once_and_also_where_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(float32=[0.002], bfloat16=[0.01])
    monkeypatch.setattr(matmul, "seconds_of_product", clock)
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda including_emulation=True: True)
    assert (device_of_run(), bf16_is_fast()) == ("cpu", False), "DS_ACCELERATOR=cpu, which the tests set"
    calls = clock.calls
    assert not bf16_is_fast()
    assert clock.calls == calls > 0
    monkeypatch.delenv("DS_ACCELERATOR")
    assert (device_of_run(), bf16_is_fast()) == ("cuda", True)


@pytest.mark.usefixtures("no_rates_yet")
def test_it_is_measured_on_one_core_and_the_others_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = Clock(float32=[0.002], bfloat16=[0.01]), torch.get_num_threads()
    monkeypatch.setattr(matmul, "seconds_of_product", clock)
    torch.set_num_threads(3)
    try:
        cpu_rates()
        assert (clock.threads, torch.get_num_threads()) == (1, 3)
    finally:
        torch.set_num_threads(before)


def test_without_a_word_and_an_accelerator_a_run_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_of_run() == "cpu"
