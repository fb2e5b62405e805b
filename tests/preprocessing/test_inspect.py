"""Looking into shard directories: totals, examples, histograms, and every kind of damage with its place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from dialogpt_ds.preprocessing.inspect import examples_as_text, main, spread
from dialogpt_ds.shards.reader import ShardDirectory
from tests.conftest import ROOT
from tests.helpers.damage import damage_member
from tests.helpers.streams import in_small_blocks
from tests.servers.file_server import FileServer


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A copy in several blocks and shards."""
    return in_small_blocks(shards, tmp_path / "data", 50, 60_000).folder


def test_totals_and_examples_turn_by_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--verify", "--show", "3"]) == 0
    said = capsys.readouterr().out
    totals = ShardDirectory.open(str(folder), "test").manifest.totals
    assert f"shards         {totals['shards']} with {totals['blocks']} blocks" in said
    assert f"of them {totals['target_tokens']:,} targets" in said
    assert f"verified       every checksum and count of {totals['blocks']} blocks in {totals['shards']} shards" in said
    assert said.count("\nexample ") == 3
    assert "  context " in said
    assert "  target 1 " in said
    assert "\033[" not in said, "no colours but on a terminal"


def test_colours_tell_targets_from_context(folder: Path) -> None:
    directory = ShardDirectory.open(str(folder), "test")
    lines = list(examples_as_text(directory, spread(directory, 5), colour=True))
    assert all(line.startswith("\033[1;32m") for line in lines if "  target " in line)
    assert all(line.startswith("\033[2m") for line in lines if "  context " in line)
    weights = directory.block(0).examples(0, 1).turn_weights
    assert len([line for line in lines[: len(weights) + 1] if "target" in line]) == (weights > 0).sum()


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_a_real_terminal_gets_colours_unless_it_wants_none(folder: Path, no_colour: str) -> None:
    import os
    import pty

    main_end, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "preprocess" / "inspect_shards.py"), str(folder), "--show", "1"]
    environment = os.environ | {"NO_COLOR": no_colour}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT) as process:
        os.close(terminal)
        said = b""
        while True:
            try:
                piece = os.read(main_end, 4096)
            except OSError:  # how a terminal says that nobody writes to it any more
                break
            said += piece
        assert process.wait(60) == 0
    os.close(main_end)
    assert (b"\033[1;32m  target" in said) == (not no_colour)


def damage(folder: Path, kind: str) -> list[str]:
    """Damage a directory and return what must be said."""
    directory = ShardDirectory.open(str(folder), "test")
    second = folder / "shard-000001.tar"
    block = int((directory.index.shard == 0).sum())
    if kind in ("tokens.npy", "turn_lengths.npy", "turn_weights.npy", "turns_per_example.npy"):
        file, offset = damage_member(directory, block, kind)
        return [f"shard {file}, block {block}, member {block:08d}.{kind}, offset {offset:,}: checksum ", ", expected "]
    if kind == "missing":
        second.unlink()
        return [f"shard {second} is missing, the manifest lists it"]
    content = bytearray(second.read_bytes())
    if kind == "truncated":
        cut = int(directory.index.offset[block + 1]) + 700
        second.write_bytes(content[:cut])
        return [
            f"shard {second} has {cut:,} bytes, the manifest says {len(content):,}",
            f"block {block + 1}, member {block + 1:08d}.tokens.npy, offset {cut - 700:,}: checksum",
            f"the file ends at {cut:,}",
        ]
    if kind == "header":
        content[int(directory.index.offset[block]) + 257] ^= 1
        second.write_bytes(content)
        return [f"block {block}, member tokens.npy, offset {int(directory.index.offset[block]):,}: no tar header"]
    content[-1] ^= 1  # in the zeros behind the last member
    second.write_bytes(content)
    return [f"shard {second}: sha256 ", "its blocks are whole, something between them was altered"]


@pytest.mark.parametrize(
    "kind",
    [
        "tokens.npy",
        "turn_lengths.npy",
        "turn_weights.npy",
        "turns_per_example.npy",
        "missing",
        "truncated",
        "header",
        "padding",
    ],
)
def test_damage_is_found_with_its_place_and_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    expected = damage(folder, kind)
    assert main([str(folder), "--verify"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("run failed: ")
    for fragment in expected:
        assert fragment in said, said
    assert main([str(folder)]) == (1 if kind in ("missing", "truncated") else 0), (
        "without --verify, what a file's size tells"
    )


def test_mistakes(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    (folder / "index.npz").write_bytes(b"x")
    assert main([str(folder)]) == 2
    assert "index.npz is damaged" in capsys.readouterr().err
    assert main([str(folder), "--plot", "a.txt"]) == 2


def test_the_file_draws_histograms(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        str(ROOT / "preprocess" / "inspect_shards.py"),
        str(folder),
        "--plot",
        str(tmp_path / "h.png"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_plain_webdataset_streams_the_shards_over_http(folder: Path) -> None:
    directory = ShardDirectory.open(str(folder), "test")
    server = FileServer(folder)
    try:
        urls = [f"{server.url}/{entry.url}" for entry in directory.manifest.shardlist]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    finally:
        server.close()
    assert len(samples) == directory.num_blocks
    for number, sample in enumerate(samples):
        assert (sample["tokens.npy"] == directory.block(number).tokens).all()


def test_a_copy_elsewhere_is_the_same_directory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert main([str(folder), str(tmp_path / "copy"), "--verify"]) == 0
    prints = [
        line.split("fingerprint ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("folder")
    ]
    assert len(set(prints)) == 1
