"""What --dry_run says that a run needs, beside what it takes."""

import re
import sys
from typing import Any

from tests.gpu.common import ON_GPU, ROOT, TRAIN, Done, Job, checked, run_jobs, shards, work
from tests.gpu.drive import results

MODELS = {"117M": 20, "345M": 10} if ON_GPU else {"tiny": 2}
MOST = 0.1
"""Share by which the estimate may be off."""


def main() -> None:
    """Make dry runs, and compare with the peak of tests.gpu.speed, else with that of the dry run's own two steps."""
    jobs = []
    for name, rows in MODELS.items():
        command = [
            sys.executable, TRAIN, "--model", name, "--train_input_file", str(shards("long")), "--skip_eval",
            "--output_dir", str(work() / f"dry-{name}"), "--deepspeed_config",
            str(ROOT / "ds_configs" / "zero1_bf16.json"), "--train_batch_size", str(rows),
            "--gradient_accumulation_steps", "1", "--wandb_mode", "disabled", "--dry_run",
        ]  # fmt: skip
        jobs.append(Job(f"dry-{name}", command))
    done = run_jobs(jobs, 60 if ON_GPU else 150)
    peaks = {line["check"]: line.get("peak_gib") for line in results()}
    for name in MODELS:
        with checked(f"memory.{name}") as details:
            details |= said(done[f"dry-{name}"])
            details["measured_gib"] = peaks.get(f"speed.{name}.default") or details["of_two_steps_gib"]
            if ON_GPU:
                details["ratio"] = round(details["estimated_gib"] / details["measured_gib"], 3)
                assert abs(details["ratio"] - 1) <= MOST, (
                    f"the estimate is {details['ratio']:.2f} of what was measured: {details}"
                )


def said(done: Done) -> dict[str, Any]:
    """Return the figures of a dry run: what its own row of the table comes to, and the most that its process used.

    CUDA's own memory is in the table, but not in what PyTorch counts.
    """
    text = done.expect().output
    own = next((line for line in text.splitlines() if "<- this run" in line), "")
    figures = [float(figure.replace(",", "")) for figure in re.findall(r"\d[\d,]*\.\d+", own)]
    of_cuda, most = re.search(r"([\d.]+) are for CUDA", text), re.search(r"at most ([\d.,]+) GiB", text)
    assert len(figures) == 4, f"no row of the table with four figures is marked: {text[-1_500:]}"
    assert of_cuda, text[-1_500:]
    assert most, text[-1_500:]
    weights, with_micro_batch, whole, _ = figures
    return {
        "weights_gib": weights,
        "with_micro_batch_gib": with_micro_batch,
        "estimated_gib": round(whole - float(of_cuda[1]), 3),
        "of_two_steps_gib": float(most[1].replace(",", "")),
    }


if __name__ == "__main__":
    main()
