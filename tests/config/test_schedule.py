"""Learning-rate schedules against values worked out by hand from DialoGPT's formulas."""

import math
from dataclasses import replace

import pytest

from dialogpt_ds.config.schedule import SCHEDULES, Schedule

DIALOGPT = Schedule("", learning_rate=1e-5, warmup_steps=16_000, warmup_proportion=0.1, num_steps=1_000_000, width=768)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        # 1e-5 * 1e4 * 768**-0.5 = 3.6084392e-3; 16000**-1.5 = 4.9410588e-7; 16000**-0.5 = 7.9056942e-3
        ("noam", 1, 3.6084392e-3 * 4.9410588e-7),
        ("noam", 16_000, 3.6084392e-3 * 7.9056942e-3),
        ("noam", 64_000, 3.6084392e-3 * 7.9056942e-3 / 2),
        ("noamwd", 499, 3.6084392e-3 * 499 * 4.9410588e-7),
        ("noamwd", 500, 3.6084392e-3 * 500 * 4.9410588e-7 / 2),
        ("noamwd", 1_500, 3.6084392e-3 * 1_500 * 4.9410588e-7 / 4),
        ("BERT", 50_000, 0.5e-5),
        ("BERT", 100_000, 0.9e-5),
        ("BERT", 550_000, 0.45e-5),
        ("BERT", 1_000_000, 0.0),
        ("BERT", 1_100_000, 0.0),
        ("None", 1, 1e-5),
        ("None", 999_999, 1e-5),
        ("cosine", 8_000, 0.5e-5),
        ("cosine", 16_000, 1e-5),
        ("cosine", 508_000, 0.5e-5),
        ("cosine", 1_000_000, 0.0),
    ],
)
def test_golden_values(name: str, step: int, expected: float) -> None:
    assert replace(DIALOGPT, name=name).rate(step) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_moves_and_no_step_climbs_uphill(name: str) -> None:
    schedule = replace(DIALOGPT, name=name, num_steps=500, warmup_steps=50)
    rates = [schedule.rate(step) for step in range(1, 520)]
    assert rates[0] > 0
    assert all(value >= 0 and math.isfinite(value) for value in rates)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("noam", 30, 30),
        ("noam", 5_000, 700),
        ("noamwd", 30, 30),
        ("noamwd", 5_000, 499),
        ("BERT", 30, 69),
        ("None", 30, 1),
        ("cosine", 0, 1),
        ("cosine", 30, 30),
    ],
)
def test_the_peak_is_the_highest_rate_of_the_run_and_its_first_step(name: str, warmup: int, expected: int) -> None:
    schedule = replace(DIALOGPT, name=name, num_steps=700, warmup_steps=warmup)
    assert schedule.peak() == (schedule.rate(expected), expected)
