"""Training as a user starts it: each ZeRO stage in both half precisions, gone on from a checkpoint, converted,
exported, answering."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.common import (
    DEVICE,
    ON_GPU,
    ROOT,
    TRAIN,
    Done,
    Job,
    LeftOutError,
    checked,
    deepspeed_config,
    largest_difference,
    losses_of,
    run_jobs,
    shards,
    steps_of,
    train_command,
    work,
)

HALF = 3
"""Steps before the checkpoint that is resumed from, and after it."""
RESUMED, CONVERTED, OF_STAGES = 1e-3, 5e-3, 2e-2
"""Largest difference of a loss of about 10: after a resume, in another stage from a checkpoint on, and between stages
from the start."""
CPU = {"device": "cpu"}
OFFLOAD: dict[str, dict[str, Any]] = {
    "": {},
    "-offload": {"offload_optimizer": CPU},
    "-offload-all": {"offload_optimizer": CPU, "offload_param": CPU},
}
PROMPT = "how are you"
LIMIT = 60.0 if ON_GPU else 300.0
"""Seconds of one training."""


@dataclass(frozen=True)
class Way:
    """One way to train."""

    stage: int
    precision: str
    offload: str = ""

    @property
    def name(self) -> str:
        return f"zero{self.stage}{self.offload}-{self.precision}"

    @property
    def output(self) -> Path:
        return work() / self.name

    def job(self, name: str, output: Path, *options: str) -> Job:
        """Return a training of it, of as many steps as all others."""
        config = deepspeed_config(name, self.stage, self.precision, OFFLOAD[self.offload])
        on_cpu = str(ROOT / "tests" / "ranks" / "train_fp16_on_cpu.py")
        script = on_cpu if self.precision == "fp16" and not ON_GPU else TRAIN
        return Job(
            name,
            train_command(
                config, output, "--num_optim_steps", str(2 * HALF), "--save_step", str(HALF), "--sample_max_new_tokens",
                "8", *options, script=script,
            ),
        )  # fmt: skip


ALL = [Way(stage, precision) for stage in range(4) for precision in ("bf16", "fp16")]
WAYS = ALL if ON_GPU else [Way(1, "bf16"), Way(2, "fp16"), Way(3, "bf16")]
OFFLOADED = [Way(2, "bf16", "-offload"), Way(3, "bf16", "-offload-all")] if ON_GPU else [Way(2, "bf16", "-offload")]
ONE, THREE = Way(1, "bf16"), Way(3, "bf16")
CONVERSIONS = [(ONE, THREE), (THREE, ONE)] + (
    [
        (ONE, Way(2, "bf16")),
        (Way(2, "bf16"), ONE),
        (Way(0, "bf16"), THREE),
        (ONE, Way(0, "bf16")),
        (ONE, Way(3, "fp16")),
    ]
    if ON_GPU
    else []
)


def main() -> None:
    """Train all ways, then go on from the checkpoint in the middle of each, in its own stage and in others."""
    with_compiler = [way for way in OFFLOADED if shutil.which("g++")]
    for way in OFFLOADED:
        if way not in with_compiler:
            with checked(f"stages.{way.name}"):
                raise LeftOutError("there is no g++ to build DeepSpeed's Adam for the host with")
    ways = WAYS + with_compiler
    evaluated = [
        "--eval_input_file",
        str(shards("short") / "validation"),
        "--skip_eval",
        "False",
        "--valid_step",
        str(2 * HALF),
    ]
    first = run_jobs(
        [way.job(way.name, way.output, *evaluated, "--sample_prompts", f"[{PROMPT}]") for way in ways], LIMIT
    )
    for way in ways:
        with checked(f"stages.{way.name}") as details:
            details |= trained(way, first[way.name])
    jobs = [*resumes(ways), *conversions(), *exports()]
    after = run_jobs(jobs, LIMIT)
    for way in ways:
        with checked(f"stages.resume.{way.name}") as details:
            details |= gone_on(way, way.output, work() / f"{way.name}-resumed", after[f"{way.name}-resumed"], RESUMED)
    for source, target in CONVERSIONS:
        name = f"{source.name}-to-{target.name}"
        with checked(f"stages.convert.{name}") as details:
            details |= gone_on(target, source.output, work() / name, after[name], CONVERTED)
    for way in (ONE, THREE):
        with checked(f"stages.export.{way.name}") as details:
            details |= exported(way, after[f"{way.name}-export"])


def trained(way: Way, done: Done) -> dict[str, Any]:
    """Look at a run from its start to its end."""
    done.expect()
    losses = losses_of(way.output)
    assert len(losses) == 2 * HALF, losses
    assert losses[-1] < losses[0], f"it learns nothing: {losses}"
    reference = next((other for other in WAYS if other.stage == 0 and other.precision == way.precision), way)
    # Where ZeRO-0 was not run in this precision, or has failed, there is nothing to compare with.
    beside = losses_of(reference.output) if (reference.output / "metrics.jsonl").is_file() else losses
    difference = largest_difference(losses, beside)
    assert difference < OF_STAGES, f"its losses {losses} are not those of {reference.name}, {beside}"
    replies = (way.output / "sample_replies.txt").read_text(encoding="utf-8")
    assert PROMPT in replies, replies
    step = steps_of(way.output)[2 * HALF]
    return {
        "losses": losses,
        "beside_zero0": difference,
        "run_seconds": done.seconds,
        "step_seconds": step["seconds_per_step"],
    }


def resumes(ways: list[Way]) -> Iterator[Job]:
    """Yield trainings from the middle on, in copies of the runs' folders."""
    for way in ways:
        if (way.output / "checkpoints").is_dir():
            yield gone_on_job(way, way.output, f"{way.name}-resumed")
        else:
            yield failing(f"{way.name}-resumed", "its run has left no checkpoint")


def conversions() -> Iterator[Job]:
    """Yield trainings from the middle of a run of one stage on, in another."""
    for source, target in CONVERSIONS:
        name = f"{source.name}-to-{target.name}"
        if (source.output / "checkpoints").is_dir():
            yield gone_on_job(target, source.output, name)
        else:
            yield failing(name, "the run that it is to be of has left no checkpoint")


def gone_on_job(way: Way, source: Path, name: str) -> Job:
    shutil.copytree(source, work() / name)
    (work() / name / "metrics.jsonl").unlink()
    return way.job(name, work() / name, "--continue_from", str(HALF))


def failing(name: str, why: str) -> Job:
    return Job(name, [sys.executable, "-c", f"raise SystemExit({why!r})"])


def gone_on(way: Way, source: Path, output: Path, done: Done, tolerance: float) -> dict[str, Any]:
    """Compare the steps after the checkpoint with those of the run that went on without a stop."""
    done.expect()
    found, expected = losses_of(output), losses_of(source, HALF + 1)
    difference = largest_difference(found, expected)
    assert difference < tolerance, f"gone on from step {HALF} in {way.name}: {found}; without a stop: {expected}"
    return {"difference": difference, "losses": found, "run_seconds": done.seconds}


def exports() -> Iterator[Job]:
    """Yield exports of the last checkpoints."""
    for way in (ONE, THREE):
        command = [
            sys.executable,
            str(ROOT / "launch" / "export.py"),
            str(way.output),
            str(work() / f"{way.name}-exported"),
        ]
        yield Job(f"{way.name}-export", command)


def exported(way: Way, done: Done) -> dict[str, Any]:
    """Compare what launch/export.py makes of a checkpoint with what the run itself has exported, and compute with
    it."""
    import torch
    from transformers import AutoModelForCausalLM

    done.expect()
    models = [
        AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype="auto")
        for folder in (way.output / "model", work() / f"{way.name}-exported")
    ]
    ours, theirs = (model.state_dict() for model in models)
    assert ours.keys() == theirs.keys()
    differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differ, f"these weights are not the run's own: {differ}"
    with torch.no_grad():
        logits = models[0].to(DEVICE)(input_ids=torch.arange(8, device=DEVICE).unsqueeze(0)).logits
    assert logits.isfinite().all()
    return {"tensors": len(ours), "dtype": str(logits.dtype)}


if __name__ == "__main__":
    main()
