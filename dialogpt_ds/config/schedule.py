"""Learning-rate schedules by the number of applied steps. A new one is a function here, and a line of SCHEDULES."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run, with all that it depends on."""

    name: "ScheduleName"
    learning_rate: float
    """Scale of the schedule, and the constant rate of None."""
    warmup_steps: int
    """Of noam, noamwd and cosine."""
    warmup_proportion: float
    """Of BERT: share of all steps."""
    num_steps: int
    """Of the whole run."""
    width: int
    """d, the model's hidden size."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; 1 is the first that is applied."""
        assert step >= 1, step
        return SCHEDULES[self.name].rate(self, step)

    def peak(self) -> tuple[float, int]:
        """Return the highest rate of the run, and the first step that has it. Looks at every step: half a second for a
        million."""
        at = max(range(1, max(self.num_steps, 1) + 1), key=self.rate)
        return self.rate(at), at

    def __str__(self) -> str:
        warmup = {
            "steps": f", warm-up {self.warmup_steps:,} steps",
            "proportion": f", warm-up {self.warmup_proportion:.0%}",
        }
        return f"{self.name}, learning_rate {self.learning_rate:g}{warmup.get(SCHEDULES[self.name].warmup, '')}"


class ScheduleShape(NamedTuple):
    """What a schedule's name stands for."""

    rate: Callable[[Schedule, int], float]
    """Learning rate of a step, from 1 on."""
    warmup: Literal["steps", "proportion", "none"]
    """Which number of the command line says how long the rate rises."""


def noam(run: Schedule, step: int) -> float:
    """learning_rate * 1e4 * d**-0.5 * min(s**-0.5, s * warmup**-1.5), which is DialoGPT's scale of Vaswani et al. 2017,
    section 5.3."""
    return run.learning_rate * 1e4 * run.width**-0.5 * min(step**-0.5, step * max(run.warmup_steps, 1) ** -1.5)


def noam_with_decay(run: Schedule, step: int) -> float:
    """noam, halved every 1,000 steps from step 500 on.

    DialoGPT: rate ** (max(step - start_step + decay_steps, 0) // decay_steps), with 0.5, 500 and 1,000.
    """
    return noam(run, step) * 0.5 ** (max(step + 500, 0) // 1_000)


def bert(run: Schedule, step: int) -> float:
    """Linear up over a share of all steps, then linear down to 0."""
    done = min(step / max(run.num_steps, 1), 1.0)
    return run.learning_rate * (done / run.warmup_proportion if done < run.warmup_proportion else 1.0 - done)


def constant(run: Schedule, step: int) -> float:
    """The same at every step."""
    return run.learning_rate


def cosine(run: Schedule, step: int) -> float:
    """Linear up over `warmup_steps`, then a half cosine down to 0 (Loshchilov and Hutter 2017)."""
    if step <= run.warmup_steps:
        return run.learning_rate * step / run.warmup_steps
    done = min((step - run.warmup_steps) / max(run.num_steps - run.warmup_steps, 1), 1.0)
    return run.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES = {
    "noam": ScheduleShape(noam, "steps"),
    "noamwd": ScheduleShape(noam_with_decay, "steps"),
    "BERT": ScheduleShape(bert, "proportion"),
    "None": ScheduleShape(constant, "none"),
    "cosine": ScheduleShape(cosine, "steps"),
}
if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(SCHEDULES)]
    """The choices of --lr_schedule."""
