"""The metrics of training runs, read from metrics.jsonl."""

import dataclasses
import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dialogpt_ds.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVERY_STEP_PARTS = ("data", "forward", "backward", "optimizer")
"""Parts of every step; `seconds_NAME` is the time of one step."""
OCCASIONAL_PARTS = ("save", "evaluation", "replies")
"""Parts of some steps; `seconds_NAME` is the time that it took when it happened."""
OTHER = "other"
"""What a step took beyond its named parts."""
_STEP_CLOCK = "seconds_per_step"
_PART_KEYS = tuple(f"seconds_{name}" for name in (*EVERY_STEP_PARTS, *OCCASIONAL_PARTS))
_KEYS = ("loss", "ppl", "eval_loss", "eval_ppl", "lr", "tokens_per_second", "mfu", _STEP_CLOCK, *_PART_KEYS)


class Series(NamedTuple):
    """One metric over the steps; both arrays are empty where it was not logged."""

    steps: np.ndarray
    """Optimizer steps, increasing, `int64`."""
    values: np.ndarray
    """`float64`; NaN and infinity as they were logged."""

    def finite(self) -> "Series":
        """Return the points whose value is a number."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Return the values at `steps`, 0 where there is none."""
        values = np.zeros(len(steps))
        _, wanted, found = np.intersect1d(steps, self.steps, return_indices=True)
        values[wanted] = np.nan_to_num(self.values[found], nan=0.0, posinf=0.0)
        return values


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run logged."""

    name: str
    """Name in the figure and in the table, different from every other run's."""
    last_step: int
    """Last optimizer step with a line in the log."""
    series: dict[str, Series]
    """One entry for every metric that is drawn or compared, logged or not."""
    note: str = ""
    """What the reader has to know about the file, or nothing."""


def read_runs(places: list[str]) -> list[Run]:
    """Read the runs at `places`: output_dir folders of training, or metrics.jsonl files.

    Raises:
        UserError: no such file, the same run twice, nothing logged, or a line that is not a JSON object. A last line
            cut short by a crash is left out; `Run.note` says so.
    """
    paths = [_metrics_path(place) for place in places]
    for place, path in zip(places, paths, strict=True):
        if sum(other.samefile(path) for other in paths) > 1:
            raise UserError(f"RUN {place!r} is given more than once ({path.absolute()}); name every run once")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def seconds_by_part(run: Run) -> dict[str, float]:
    """Return the seconds that the run spent in each logged part, and in `OTHER`; empty where no time was logged."""
    parts = {name: run.series[f"seconds_{name}"] for name in (*EVERY_STEP_PARTS, *OCCASIONAL_PARTS)}
    clock = run.series[_STEP_CLOCK]
    timed = [clock] if len(clock.steps) else [parts[name] for name in EVERY_STEP_PARTS]
    steps = np.unique(np.concatenate([series.steps for series in timed]))
    num_steps = _steps_stood_for(steps)
    seconds = {name: float((parts[name].at(steps) * num_steps).sum()) for name in EVERY_STEP_PARTS}
    seconds |= {name: float(parts[name].finite().values.sum()) for name in OCCASIONAL_PARTS}
    seconds = {name: value for name, value in seconds.items() if len(parts[name].steps)}
    if len(clock.steps):
        named = sum(parts[name].at(steps) * num_steps for name in EVERY_STEP_PARTS)
        named += sum(parts[name].at(steps) for name in OCCASIONAL_PARTS)
        # Step by step, so that a save or an evaluation longer than its step cannot hide what other steps took.
        seconds[OTHER] = float(np.maximum(clock.at(steps) * num_steps - named, 0.0).sum())
    return seconds


def _steps_stood_for(steps: np.ndarray) -> np.ndarray:
    """Return for each logged step the number of steps since the one before, e.g. 10, 20, 25 -> 10, 10, 5.

    The first one takes the gap that follows it where that is smaller: a run may start at a later step than 1,
    e.g. 1001, 1002 -> 1, 1.
    """
    gaps = np.diff(steps, prepend=0)
    if len(gaps) > 1:
        gaps[0] = min(gaps[0], gaps[1])
    return gaps


def _metrics_path(place: str) -> Path:
    path = Path(place).expanduser()
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        looked = file.absolute() if path.is_dir() else f"{path.absolute()}, which does not exist"
        raise UserError(
            f"RUN {place!r}: no {METRICS_FILE} (looked for {looked}); give the output_dir of a training run, or the "
            f"{METRICS_FILE} itself"
        )
    return file


def _names(paths: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell all of them apart: x/a, y/a -> x/a, y/a and x/a, x/b -> a, b."""
    parts = []
    for path in paths:
        place = Path(os.path.abspath(path))  # and not resolve(): a link keeps the name that it was given
        parts.append(place.parent.parts if place.name == METRICS_FILE else place.parts)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> Run:
    columns: dict[str, tuple[array, array]] = {key: (array("q"), array("d")) for key in _KEYS}
    last_step, broken = -1, ""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if broken:  # a line follows, so the broken one is not the torn end of the file
                    raise UserError(f"{broken}; every line must be a JSON object. Repair that line or remove it")
                try:
                    step = _collect(line, columns)
                except (ValueError, OverflowError) as error:
                    broken = f"{path}:{number}: {error}"
                else:
                    last_step = max(last_step, step)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if last_step < 0:
        torn = ", only a line that is cut short" if broken else ""
        raise UserError(f"{path}: no step is logged in it yet{torn}; plot it after the first step of the training")
    note = f"{broken}; the last line was not written to its end and is left out" if broken else ""
    return Run(name, last_step, _with_perplexity({key: _series(*pair) for key, pair in columns.items()}), note)


def _collect(line: bytes, columns: dict[str, tuple[array, array]]) -> int:
    """Add the values of one line to the columns and return its step.

    Raises:
        ValueError: the line is not a JSON object with a step.
        OverflowError: a number in it has too many digits.
    """
    try:
        row: Any = json.loads(line)
    except ValueError as error:  # of the decoder, or of UTF-8
        raise ValueError(f"not JSON ({error})") from error
    step: Any = row.get("step") if isinstance(row, dict) else None
    if not _is_number(step) or step != step // 1 or not 0 <= step < 2**63:
        raise ValueError('not a JSON object with a whole number "step"')
    for key, (steps, values) in columns.items():
        if _is_number(row.get(key)):
            values.append(row[key])  # first, because it may refuse a number that is too long
            steps.append(int(step))
    return int(step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(steps: Iterable[int], values: Iterable[float]) -> Series:
    """Return the points in the order of their steps; where a step was logged again, its last value counts."""
    all_steps, all_values = np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)
    # np.unique gives the first place of each step: seen from the end, that is the last one.
    unique, places = np.unique(all_steps[::-1], return_index=True)
    return Series(unique, all_values[::-1][places])


def _with_perplexity(series: dict[str, Series]) -> dict[str, Series]:
    """Fill in a perplexity that was not logged: ppl = exp(loss)."""
    for loss, perplexity in (("loss", "ppl"), ("eval_loss", "eval_ppl")):
        if not len(series[perplexity].steps):
            with np.errstate(over="ignore"):
                series[perplexity] = Series(series[loss].steps, np.exp(series[loss].values))
    return series
