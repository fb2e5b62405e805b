"""The output folder: finished, unfinished, another's, or in use; and killed runs that go on to the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.preprocessing import output_folder, parts
from dialogpt_ds.preprocessing.arguments import ShardArguments
from dialogpt_ds.preprocessing.make import make_shards
from tests.conftest import ROOT, write_tsv

SMALL_PARTS = 20_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", SMALL_PARTS)


def make(source: Path | str, output: Path, **options: object) -> list[str]:
    said: list[str] = []
    make_shards(ShardArguments([str(source)], output=str(output), **({"workers": 1} | options)), said.append)  # type: ignore[arg-type]
    return said


def sums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file but the reports, which hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "report.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_folder_is_recognised_and_another_configuration_is_refused(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 50)
    make(source, tmp_path / "out")
    before = sums(tmp_path / "out")
    assert "manifest.json" in before
    assert not any(name.startswith((".lock", "parts")) for name in before)
    assert make(source, tmp_path / "out")[-1].endswith(
        "finished already, from the same inputs with the same options; nothing to do"
    )
    assert sums(tmp_path / "out") == before
    with pytest.raises(
        UserError, match=r"shards of another configuration:\n  max_seq_length: there 128, now 64\n  targets: there"
    ):
        make(source, tmp_path / "out", max_seq_length=64, targets="all")
    write_tsv(source, 51)
    with pytest.raises(UserError, match=r"a.tsv: size there \d+, now \d+"):
        make(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"inputs: there \[.*a.tsv.*\], now \[.*b.tsv"):
        make(write_tsv(tmp_path / "b.tsv", 50), tmp_path / "out")


def test_files_of_something_else_are_never_touched(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 20)
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(UserError, match=r"report.json is there already, and no unfinished run that it could belong to"):
        make(source, tmp_path)
    assert (tmp_path / "report.json").read_text() == "mine"


def test_two_runs_on_one_folder_the_second_stops(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 20)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another run is at work in it"),
    ):
        make(source, tmp_path / "out")
    make(source, tmp_path / "out")


def start(source: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    """Start a real run with small parts, in a process group of its own."""
    program = f"import sys; from dialogpt_ds.preprocessing import parts; parts.PART_BYTES = {SMALL_PARTS}; " \
        "from dialogpt_ds.commands.make_shards import main; sys.exit(main())"  # fmt: skip
    command = [
        sys.executable,
        "-c",
        program,
        "--input",
        str(source),
        "--output",
        str(output),
        "--workers",
        "2",
        *options,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    """kill -9 of all its processes, each time a few parts later, until it is through."""
    import gzip

    plain = write_tsv(tmp_path / "plain.tsv", 3_000)
    source = tmp_path / name
    source.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    make(source, tmp_path / "whole", validation_fraction=0.1, shard_megabytes=1)
    output = tmp_path / "killed"
    finished, kills = 0, 0
    while True:
        process = start(source, output, "--validation_fraction", "0.1", "--shard_megabytes", "1")
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(output.glob("parts/part-*.npz"))) < finished + 8:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        finished = len(list(output.glob("parts/part-*.npz")))
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert kills >= 2
    assert f"going on with an unfinished run, {finished:,} parts of it are there" in said
    assert sums(output) == sums(tmp_path / "whole")


def test_an_interrupted_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 100)
    source.write_text(source.read_text() + "no tab\n" * 50)
    with pytest.raises(RunError, match="50 of 150 records were rejected"):
        make(source, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"holds the unfinished run of another configuration:\n  reverse: there False, now True"
    ):
        make(source, tmp_path / "out", reverse=True)
    said = make(source, tmp_path / "out", max_reject_fraction=0.5)
    assert any("going on with an unfinished run" in line for line in said), "the threshold is no part of the output"


def test_shares_of_the_input_are_merged_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 1_000)
    make(source, tmp_path / "whole", dedupe=True)
    for number in (3, 1):
        said = make(source, tmp_path / "out", dedupe=True, part=f"{number}/3")
        assert f"share {number}/3 is encoded" in said[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"--merge: .*part-000001.npz is missing"):
        make(source, tmp_path / "out", dedupe=True, merge=True)
    make(source, tmp_path / "out", dedupe=True, part="2/3")
    make(source, tmp_path / "out", dedupe=True, merge=True)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_a_worker_that_is_killed_is_reported_and_the_next_run_goes_on(tmp_path: Path) -> None:
    import psutil

    source = write_tsv(tmp_path / "a.tsv", 3_000)
    process = start(source, tmp_path / "out")
    workers: list[psutil.Process] = []
    while process.poll() is None and not list((tmp_path / "out").glob("parts/part-*.npz")):
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    workers[0].kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert "run failed: a worker process ended before its work" in said
    assert "Traceback" not in said
    again = start(source, tmp_path / "out")
    assert again.wait(60) == 0
    make(source, tmp_path / "whole")
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_standard_input_that_changed_is_found_out(tmp_path: Path) -> None:
    text = write_tsv(tmp_path / "a.tsv", 1_000).read_text()
    program = [sys.executable, "-c", "import sys; from dialogpt_ds.commands.make_shards import main; sys.exit(main())"]
    program += ["--input", "-", "--output", str(tmp_path / "out"), "--workers", "1"]
    first = subprocess.run(program, input=text + "no tab\n" * 500, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert first.returncode == 1, first.stderr
    assert "500 of 1,500 records were rejected" in first.stderr
    other = subprocess.run(
        program, input=text.replace("the", "a"), capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert other.returncode == 2, other.stdout + other.stderr
    assert "was made of other text than - gives now" in other.stderr


@pytest.mark.parametrize("dedupe", [False, True])
def test_a_damaged_part_is_named(tmp_path: Path, dedupe: bool) -> None:
    source = write_tsv(tmp_path / "a.tsv", 1_000)
    make(source, tmp_path / "out", dedupe=dedupe, part="1/1")
    part = tmp_path / "out" / "parts" / "part-000001.npz"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-000001.npz is damaged .*; delete it and run the command again"):
        make(source, tmp_path / "out", dedupe=dedupe, merge=True)


def test_dask_makes_the_same_bytes_though_a_worker_is_killed(tmp_path: Path) -> None:
    """A real scheduler and two worker processes; one is killed while there is work."""
    pytest.importorskip("distributed")
    source = write_tsv(tmp_path / "a.tsv", 4_000)
    make(source, tmp_path / "whole")
    file = tmp_path / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical"}
    common: dict = {"env": environment, "cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        str(file),
    ]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1",
              "--no-nanny", "--no-dashboard"]  # fmt: skip
    processes = [subprocess.Popen(scheduler, **common)]
    try:
        deadline = time.monotonic() + 60
        while not file.is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes += [subprocess.Popen(worker, **common) for _ in range(2)]
        address = json.loads(file.read_text())["address"].removeprefix("tcp://")
        # Relative paths, which mean something else where the workers are.
        relative = (Path(os.path.relpath(path, ROOT)) for path in (source, tmp_path / "out"))
        run = start(*relative, "--executor", f"dask://{address}")  # type: ignore[arg-type, misc]
        while run.poll() is None and not list((tmp_path / "out").glob("parts/part-*.npz")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert run.poll() is None, "there is work left"
        processes[1].kill()
        said = run.communicate(timeout=120)[0]
        assert run.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_shares_and_whole_runs_keep_out_of_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "BEGIN_SECONDS", 0.1)
    source = write_tsv(tmp_path / "a.tsv", 20)
    output = tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".lock-part-1-of-2"):
        with pytest.raises(UserError, match=r"another run is at work in it .it holds .*\.lock-part-1-of-2"):
            make(source, output, merge=True)
        make(source, output, part="2/2")
    with FileLock(output / ".lock"), pytest.raises(UserError, match="another run is at work in it"):
        make(source, output, part="1/2")


def test_shares_that_start_together(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 1_000)
    processes = [start(source, tmp_path / "out", "--part", f"{number}/3") for number in (1, 2, 3)]
    for process in processes:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    make(source, tmp_path / "out", merge=True)
    make(source, tmp_path / "whole")
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 4_000)
    process = start(source, tmp_path / "out")
    while process.poll() is None and not list((tmp_path / "out").glob("parts/part-*.npz")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert "run failed: interrupted. Finished parts are kept" in said
    assert "Traceback" not in said
    assert start(source, tmp_path / "out").wait(60) == 0


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk does."""
    source = write_tsv(tmp_path / "a.tsv", 1_000)
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, "
        "signal.SIG_IGN);resource.setrlimit(resource.RLIMIT_FSIZE, (9_000,) * 2);sys.argv[1:] = ['--input', "
        f"{str(source)!r}, '--output', {str(tmp_path / 'out')!r}, '--workers', '2'];from dialogpt_ds.preprocessing "
        f"import parts; parts.PART_BYTES = {SMALL_PARTS};from dialogpt_ds.commands.make_shards import main; "
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "run failed: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    make(source, tmp_path / "out")


def test_wrong_executors(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 5)
    with pytest.raises(UserError, match="--executor 'slurm' is not known: local, or dask://HOST:PORT"):
        make(source, tmp_path / "out", executor="slurm")
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match=r"no Dask scheduler answers at 127\.0\.0\.1:9"):
        make(source, tmp_path / "out", executor="dask://127.0.0.1:9")
