"""What waits for a GPU machine works: the same script and checks, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.gpu import drive
from tests.ranks.launch import clean_environment

ON_A_MACHINE = 540
"""Seconds that all limits of run.sh come to at most: a machine is lent for ten minutes."""
CHECKS = {
    "environment": ["environment.versions", "environment.peaks"],
    "loss": [
        *(f"loss.{way}.{precision}" for precision in ("bf16", "fp16") for way in ("sdpa", "varlen", "eager")),
        *(f"loss.isolation.{way}" for way in ("sdpa.fp32", "eager.fp32", "varlen.bf16", "varlen.fp16")),
        "loss.gelu_fp16",
        *(f"loss.{what}.{precision}" for precision in ("bf16", "fp16") for what in ("padded_head", "compiled")),
    ],
    "stages": [
        *(
            f"stages.{again}zero{way}"
            for again in ("", "resume.")
            for way in ("1-bf16", "2-fp16", "3-bf16", "2-offload-bf16")
        ),
        "stages.convert.zero1-bf16-to-zero3-bf16",
        "stages.convert.zero3-bf16-to-zero1-bf16",
        "stages.export.zero1-bf16",
        "stages.export.zero3-bf16",
    ],
    "waits": ["waits.zero1", "waits.zero3"],
    "repeat": ["repeat.usual", "repeat.deterministic", "repeat.deterministic_resume"],
    "two_on_one": ["two_on_one.zero3", "two_on_one.killed"],
    "speed.tiny": [
        f"speed.tiny.{variant}"
        for variant in ("default", "attention_by_mask", "head_not_padded", "loss_not_compiled", "gelu_not_fused")
    ],
    "memory": ["memory.tiny"],
    "compiled": ["speed.tiny.torch_compile"],
}
"""What each group tells on a CPU."""


def rehearse(
    script: str, out: Path, *checks: str, timeout: float
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    environment = clean_environment() | {"DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tests" / "gpu" / script), *checks]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return done, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_all_checks_for_one_gpu_pass_on_a_cpu(tmp_path: Path) -> None:
    there = (
        "--deterministic"
        in subprocess.run(
            [sys.executable, ROOT / "launch" / "train.py", "--help"], capture_output=True, text=True
        ).stdout
    )
    lacking = set() if there else {"repeat.deterministic", "repeat.deterministic_resume"}
    done, lines = rehearse("run.sh", tmp_path / "out", timeout=1_500)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-5_000:]
    assert [line["check"] for line in lines] == [name for names in CHECKS.values() for name in names]
    assert {line["check"] for line in lines if line["ok"] is None} == lacking, "a CPU can do the others"
    assert f"{len(lines)} checks, 0 failed, {len(lacking)} left out" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3, "few files, which a machine gives back"


def test_a_check_that_fails_hangs_or_ends_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        drive, "ONE", tuple(drive.Check(name, ("faults", name), 2.0) for name in ("hangs", "ends", "fails", "passes"))
    )
    monkeypatch.setattr(drive, "PATIENCE", 5)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert drive.main(["one"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["check"], line["ok"]) for line in lines] == [
        ("hangs", False),
        ("ends", False),
        ("fails.here", False),
        ("passes", True),
    ]
    assert "took longer than its 10 s" in lines[0]["error"]
    assert "before the end" in lines[0]["error"]
    assert "ended with -9" in lines[1]["error"]
    assert "AssertionError: 1 is not 2" in lines[2]["error"]
    assert "4 checks, 3 failed, 0 left out" in capsys.readouterr().out


def test_the_limits_together_fit_into_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "from tests.gpu.drive import ONE, TWO; print(sum(c.limit for c in ONE), sum(c.limit for c in TWO), "
        "len({c.name for c in ONE}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", words],
        env=os.environ | {"DEVICE": "cuda", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert float(found[0]) <= ON_A_MACHINE
    assert float(found[1]) <= 300
    assert int(found[2]) == 12


def test_an_unknown_check_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive.main(["one", "los"]) == 2
    assert "no check los; there are data, environment, loss" in capsys.readouterr().err


@pytest.mark.slow
def test_all_checks_for_two_gpus_pass_with_two_processes_on_a_cpu(tmp_path: Path) -> None:
    done, lines = rehearse("two.sh", tmp_path / "out", timeout=1_500)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out" / "log.txt").read_text()[-5_000:]
    overlaps = [
        f"two.overlap_{overlap}.bucket_{bucket}" for overlap in ("off", "on") for bucket in (1_000_000, 250_000)
    ]
    assert [line["check"] for line in lines] == ["two.zero2", "two.zero3", *overlaps, "two.hang"]
    assert all(line["ok"] for line in lines)
