"""Ranks other than the first say who they are, line by line."""

import io
import sys

import pytest

from dialogpt_ds.distributed.rank_output import RankStream, mark_lines_of
from dialogpt_ds.distributed.world import World


def test_each_line_has_the_prefix_and_half_lines_wait() -> None:
    below = io.StringIO()
    stream = RankStream(below, "[rank 3] ")
    print("one\ntwo", file=stream)
    stream.write("ha")
    assert below.getvalue() == "[rank 3] one\n[rank 3] two\n"
    stream.write("lf\n")
    assert below.getvalue().endswith("[rank 3] half\n")
    stream.write("the last words")
    stream.close()
    assert below.getvalue().endswith("[rank 3] the last words\n")
    assert not below.closed


def test_rank_0_speaks_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    mark_lines_of(World(0, 2, 0))
    assert sys.stdout is out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    mark_lines_of(World(1, 2, 1))
    print("hello", file=sys.stderr)
    assert err.getvalue() == "[rank 1] hello\n"


def test_with_several_hosts_the_host_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    mark_lines_of(World(9, 16, 1))
    print("hello")
    assert out.getvalue() == f"[rank 9 {socket.gethostname()}] hello\n"
