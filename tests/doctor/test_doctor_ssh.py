"""The doctor asks another host by ssh, for real: this machine once more, with file systems of its own."""

import sys
from pathlib import Path

import pytest

from dialogpt_ds.distributed.world import free_port
from tests.conftest import ROOT
from tests.doctor.other_host import Examined, Keys, OtherHost, examine

CPU = ("--deepspeed_config", str(ROOT / "ds_configs" / "cpu_fp32.json"), "--wandb_mode", "disabled", "--model", "tiny")


def examine_over_ssh(keys: Keys, folder: Path, *words: str, slots: int = 1) -> Examined:
    hostfile = folder / "hosts"
    hostfile.write_text(f"127.0.0.1 slots={slots}\n")
    return examine(
        *CPU,
        "--hostfile",
        str(hostfile),
        "--ssh_port",
        str(keys.port),
        "--master_port",
        str(free_port()),
        *words,
        **keys.environment(),
    )


def in_the_place_of_this_checkout(other: Path) -> list[str]:
    """Return the commands that put another checkout there, with the same environment of Python where that lies in the
    checkout."""
    python = Path(sys.prefix)
    if not python.is_relative_to(ROOT):
        return [f"mount --bind {other} {ROOT}"]
    place = other / python.relative_to(ROOT)
    place.mkdir(parents=True, exist_ok=True)
    return [f"mount --bind {python} {place}", f"mount --rbind {other} {ROOT}"]


def test_a_host_with_other_code_a_small_shared_memory_and_a_full_disk(
    keys: Keys, other_host: OtherHost, other_checkout: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    other_host.start(
        *in_the_place_of_this_checkout(other_checkout),
        "mount -t tmpfs -o size=64m tmpfs /dev/shm",
        f"mount -t tmpfs -o size=1m tmpfs {output}",
    )
    run = examine_over_ssh(keys, tmp_path, "--output_dir", str(output), slots=2)
    assert run.code == 1, run.output
    assert "1 host answers without a password" in run.found("ok", "ssh")
    code = run.found("problem", "code")
    assert "127.0.0.1: other files in dialogpt_ds" in code
    assert f"way out: bring {ROOT} to one state on every host" in code
    shared = run.found("problem", "/dev/shm")
    assert "/dev/shm has 67 MB free of 67, and 2 ranks on a CPU need 138 MB there" in shared
    assert "docker run --shm-size=1g" in shared
    disk = run.found("problem", "output_dir")
    assert f"{output} has 0.0 GB free, and a single checkpoint takes about 0.1 GB" in disk
    assert "way out: make room, or name a folder on another disk" in disk
    assert list(output.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs tmpfs {root}/dialogpt_ds", "{root} on it holds no code with this doctor"),
        ("mount -t tmpfs tmpfs {above}", "there is no folder {root} on it"),
    ],
)
def test_a_host_without_the_checkout(keys: Keys, other_host: OtherHost, tmp_path: Path, mount: str, words: str) -> None:
    places = {"root": str(ROOT), "above": str(ROOT.parent)}
    other_host.start(mount.format(**places))
    run = examine_over_ssh(keys, tmp_path)
    assert run.code == 1, run.output
    assert words.format(**places) in run.found("problem", "ssh")


@pytest.mark.slow
def test_a_host_that_is_as_it_should_be(keys: Keys, other_host: OtherHost, tmp_path: Path) -> None:
    other_host.start()
    run = examine_over_ssh(keys, tmp_path)
    assert run.code == 0, run.output
    assert run.found("ok", "port").endswith("is free on the first host")
