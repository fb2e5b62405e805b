"""Equal runs: how far two of them are apart, and that --deterministic makes them, and a resume, the same to the bit."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dialogpt_ds.files import sha256_of_file
from tests.gpu.common import (
    ON_GPU,
    TRAIN,
    Job,
    LeftOutError,
    checked,
    deepspeed_config,
    largest_difference,
    run_jobs,
    steps_of,
    train_command,
    work,
)

OPTION = "--deterministic"
HALF = 3
LIMIT = 40.0 if ON_GPU else 200.0
FIGURES = ("loss", "grad_norm")


def main() -> None:
    """Run pairs, and one resume."""
    there = (
        OPTION in subprocess.run([sys.executable, TRAIN, "--help"], capture_output=True, text=True, check=True).stdout
    )
    words = {"plain": [], "exact": [OPTION]} if there else {"plain": []}
    names = [f"{kind}{number}" for kind in words for number in (1, 2)]
    done = run_jobs([job(name, words[name[:-1]]) for name in names], LIMIT)
    with checked("repeat.usual") as details:
        for name in ("plain1", "plain2"):
            done[name].expect()
        details |= compared(work() / "plain1", work() / "plain2")
        assert details["largest_difference"] < 1e-2, "two equal runs are far apart"
    with checked("repeat.deterministic") as details:
        if not there:
            raise LeftOutError(f"the trainer has no {OPTION}")
        for name in ("exact1", "exact2"):
            done[name].expect()
        details |= compared(work() / "exact1", work() / "exact2")
        assert details["to_the_bit"], "two equal runs differ"
    with checked("repeat.deterministic_resume") as details:
        if not there:
            raise LeftOutError(f"the trainer has no {OPTION}")
        shutil.copytree(work() / "exact1", work() / "resumed")
        again = run_jobs([job("resumed", [OPTION, "--continue_from", str(HALF)])], LIMIT)
        again["resumed"].expect()
        details |= compared(work() / "exact1", work() / "resumed", HALF + 1)
        assert details["to_the_bit"], "a run that went on from a checkpoint differs from one that never stopped"


def job(name: str, options: list[str]) -> Job:
    config = deepspeed_config(name, 1, "bf16")
    return Job(name, train_command(config, work() / name, "--save_step", str(HALF), *options))


def compared(one: Path, other: Path, first: int = 1) -> dict[str, Any]:
    """Compare the figures of each step from one on, and the exported weights."""
    series = [
        [step[name] for number, step in sorted(steps_of(run).items()) if number >= first for name in FIGURES]
        for run in (one, other)
    ]
    weights = [sha256_of_file(run / "model" / "model.safetensors") for run in (one, other)]
    return {
        "largest_difference": largest_difference(*series),
        "to_the_bit": series[0] == series[1] and weights[0] == weights[1],
        "weights_equal": weights[0] == weights[1],
    }


if __name__ == "__main__":
    main()
