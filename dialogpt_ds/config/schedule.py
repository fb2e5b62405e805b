"""Learning-rate schedules by the number of applied steps."""

import math
from typing import Literal

ScheduleName = Literal["noam", "noamwd", "BERT", "None", "cosine"]


def rate(
    name: ScheduleName,
    step: int,
    *,
    learning_rate: float,
    warmup_steps: int,
    warmup_proportion: float,
    num_steps: int,
    width: int,
) -> float:
    """Return the learning rate of a step.

    noam and noamwd keep DialoGPT's scale: learning_rate * 1e4 * d**-0.5 * min(s**-0.5, s * warmup**-1.5) (Vaswani et al. 2017,
    section 5.3); noamwd halves it every 1,000 steps from step 500 on. BERT is linear up over a share of all steps, then
    linear down to 0. cosine is linear up over `warmup_steps`, then a half cosine down to 0 (Loshchilov and Hutter 2017).

    Args:
        name: the schedule.
        step: 1 for the first applied step.
        learning_rate: the scale, and the constant rate of None.
        warmup_steps: of noam, noamwd and cosine.
        warmup_proportion: of BERT.
        num_steps: steps of the whole run.
        width: d, the model's hidden size.
    """
    assert step >= 1, step
    if name == "None":
        return learning_rate
    if name in ("noam", "noamwd"):
        noam = learning_rate * 1e4 * width**-0.5 * min(step**-0.5, step * max(warmup_steps, 1) ** -1.5)
        # DialoGPT: rate ** (max(step - start_step + decay_steps, 0) // decay_steps), with 0.5, 500 and 1,000.
        return noam * 0.5 ** (max(step + 500, 0) // 1_000) if name == "noamwd" else noam
    if name == "BERT":
        done = min(step / max(num_steps, 1), 1.0)
        return learning_rate * (done / warmup_proportion if done < warmup_proportion else 1.0 - done)
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    done = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def peak(name: ScheduleName, **settings: float | int) -> tuple[float, int]:
    """Return the highest rate of a run and the step it is reached at; looks only where a schedule can have its peak."""
    num_steps = int(settings["num_steps"])
    candidates = {1, num_steps, int(settings["warmup_steps"]), int(settings["warmup_proportion"] * num_steps), 499}
    steps = {step + near for step in candidates for near in (-1, 0, 1)}
    rates = {step: rate(name, step, **settings) for step in sorted(steps) if 1 <= step <= max(num_steps, 1)}  # type: ignore[arg-type]
    best = max(rates, key=lambda step: rates[step])
    return rates[best], best
