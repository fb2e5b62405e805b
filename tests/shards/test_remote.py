"""Remote shards: brought once a node, checked, gone on with where a transfer broke off, bounded, and the same rows as
local ones."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.order.windows import BadBlocksError
from dialogpt_ds.shards import cache as cache_module
from dialogpt_ds.shards import remote
from dialogpt_ds.shards.cache import CacheSettings, CacheUnreachableError
from dialogpt_ds.shards.reader import ShardDirectory
from tests.helpers.damage import damage_member
from tests.helpers.streams import directory_of, epoch_rows, mixture_of
from tests.servers.file_server import FileServer

GIGABYTE = 1_000_000_000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def local(tmp_path: Path) -> ShardDirectory:
    """Twenty-odd shards."""
    return directory_of(tmp_path / "local", 720, 10, 14_000)


@pytest.fixture
def server(local: ShardDirectory) -> Iterator[FileServer]:
    server = FileServer(local.folder)
    yield server
    server.close()


def open_remote(url: str, tmp_path: Path, max_bytes: int = GIGABYTE) -> ShardDirectory:
    return ShardDirectory.open(url, "--train_input_file", CacheSettings(tmp_path / "cache", max_bytes))


def test_remote_shards_give_the_rows_of_local_ones_and_come_once(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    directory = open_remote(server.url, tmp_path)
    assert len(local.manifest.shardlist) > 16, "more than two groups"
    assert epoch_rows(mixture_of([directory]), epochs=2) == epoch_rows(mixture_of([local]), epochs=2)
    again = open_remote(server.url, tmp_path)
    assert epoch_rows(mixture_of([again]), epochs=2) == epoch_rows(mixture_of([local]), epochs=2)
    shards = {name: count for name, count in server.asked.items() if name.endswith(".tar")}
    assert shards == {entry.url: 1 for entry in local.manifest.shardlist}
    assert server.asked["index.npz"] == 1


def _read_everything(url: str, tmp_path: Path) -> None:
    directory = open_remote(url, tmp_path)
    for block in range(directory.num_blocks):
        directory.block(block)


def test_processes_of_a_node_share_one_download(local: ShardDirectory, server: FileServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read_everything, args=(server.url, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert max(count for name, count in server.asked.items() if name.endswith(".tar")) == 1


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_transfer_that_breaks_off_is_gone_on_with(
    local: ShardDirectory, server: FileServer, tmp_path: Path, knows_ranges: bool
) -> None:
    server.knows_ranges = knows_ranges
    server.cut_after["shard-000000.tar"] = 5_000
    directory = open_remote(server.url, tmp_path)
    assert (directory.block(0).tokens == local.block(0).tokens).all()
    assert server.ranges == ["bytes=5000-"]
    assert server.asked["shard-000000.tar"] == (2 if knows_ranges else 3)
    assert (directory.folder / "shard-000000.tar").read_bytes() == (local.folder / "shard-000000.tar").read_bytes()


def test_what_a_killed_process_left_is_never_taken_for_whole(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    directory = open_remote(server.url, tmp_path)
    whole = (local.folder / "shard-000000.tar").read_bytes()
    (directory.folder / "shard-000000.tar.part").write_bytes(whole[:3_000])
    (directory.folder / "shard-000001.tar.part").write_bytes(b"x" * 3_000)
    for block in range(directory.num_blocks):
        assert (directory.block(block).tokens == local.block(block).tokens).all()
    assert server.asked["shard-000000.tar"] == 1, "the half that was there was kept"
    assert server.asked["shard-000001.tar"] == 2, "the wrong half was found by the checksum"


def sizes(folder: Path) -> list[int]:
    """Return the sizes of the shards in a cache, in which the next ones may just be taking the place of others."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return [file.stat().st_size for file in folder.glob("*.tar")]


def test_the_cache_is_bounded_and_what_was_used_longest_ago_goes(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    directory = open_remote(server.url, tmp_path, max_bytes=local.largest_shards(16))
    expected = epoch_rows(mixture_of([local]))
    assert epoch_rows(mixture_of([directory])) == expected
    kept = sizes(directory.folder)
    assert sum(kept) <= local.largest_shards(16)
    assert len(kept) < len(local.manifest.shardlist)
    assert epoch_rows(mixture_of([open_remote(server.url, tmp_path, local.largest_shards(16))])) == expected


def test_shards_of_the_next_group_come_before_they_are_asked_for(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    directory = open_remote(server.url, tmp_path)
    mixture_of([directory]).streams[0].window_rows(0, 0)
    deadline = time.monotonic() + 30
    while sum(name.endswith(".tar") for name in server.asked) < 16:
        assert time.monotonic() < deadline, server.asked
        time.sleep(0.01)


def test_an_altered_or_missing_shard_is_a_bad_block_and_an_unreachable_server_is_not(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    damage_member(local, 0, "tokens.npy")
    directory = open_remote(server.url, tmp_path)
    block_of = {int(directory.index.shard[block]): block for block in range(directory.num_blocks)}
    (local.folder / "shard-000001.tar").unlink()
    entry = local.manifest.shardlist[0]
    with pytest.raises(BadBlocksError) as caught:
        epoch_rows(mixture_of([directory]))
    problems = {int(directory.index.shard[bad.block]): bad.message for bad in caught.value.blocks}
    for shard in (0, 1):
        if shard not in problems:
            with pytest.raises(RunError) as found:
                directory.block(block_of[shard])
            problems[shard] = str(found.value)
    assert f"{server.url}/shard-000000.tar is not what it should be: its sha256 is" in problems[0]
    assert f"the manifest says {entry.sha256}" in problems[0]
    assert (
        f"{server.url}/shard-000001.tar can't be fetched: the server answered with an error, such as 404 (exit code 22)"
        in problems[1]
    )
    asked = server.asked["shard-000001.tar"]
    with pytest.raises(RunError, match="404"):
        directory.block(block_of[1])
    assert server.asked["shard-000001.tar"] == asked, "not asked for again with every block"
    fresh = open_remote(server.url, tmp_path)
    server.close()
    (directory.folder / "shard-000002.tar").unlink(missing_ok=True)
    with pytest.raises(
        CacheUnreachableError,
        match=r"shard-000002.tar can't be fetched: curl can't connect .*nor can .* be reached at all",
    ):
        fresh.block(block_of[2])


def test_a_place_that_was_mended_is_asked_again_by_the_next_run(
    local: ShardDirectory, server: FileServer, tmp_path: Path
) -> None:
    shard = local.folder / "shard-000000.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(RunError, match="404"):
        open_remote(server.url, tmp_path).block(0)
    shard.write_bytes(content)
    assert len(open_remote(server.url, tmp_path).block(0).tokens)
    assert not list((tmp_path / "cache").rglob(f"*{cache_module.LOST}"))


def test_commands_files_and_buckets(local: ShardDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = open_remote(f"pipe:cat {local.folder}/{{}}", tmp_path)
    assert (piped.block(3).tokens == local.block(3).tokens).all()
    assert ShardDirectory.open(f"file://{local.folder}", "test").folder == local.folder
    fake = tmp_path / "bin" / "aws"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "s3 cp --only-show-errors" ] && exec cat "{local.folder}/${{4#s3://bucket/}}"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    bucket = ShardDirectory.open("s3://bucket", "test", CacheSettings(tmp_path / "other", GIGABYTE))
    assert (bucket.block(3).tokens == local.block(3).tokens).all()


def test_mistakes(local: ShardDirectory, server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--train_input_file '.*/nothing': .*/nothing/manifest.json can't be fetched: .*404"
    ):
        open_remote(f"{server.url}/nothing", tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir '.*cache' can't be written to"):
        open_remote(server.url, tmp_path)
    with pytest.raises(UserError, match="is remote, and this command reads local folders"):
        ShardDirectory.open(server.url, "--eval_input_file")


def test_a_full_disk_is_not_taken_for_damage(
    local: ShardDirectory, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk or a quota does."""
    directory = open_remote(server.url, tmp_path)
    context = multiprocessing.get_context("fork")
    said = context.Queue()

    def read() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096))
        try:
            directory.block(0)
        except RunError as error:
            said.put((type(error).__name__, str(error)))

    process = context.Process(target=read)
    process.start()
    kind, message = said.get(timeout=30)
    process.join(30)
    assert kind == "RunError"
    assert "shard-000000.tar can't be put into" in message
    assert "File too large" in message
