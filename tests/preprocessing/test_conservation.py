"""The conservation law, for every input, limit and option, and for anything that can be in a file."""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dialogpt_ds.conversations.formats import FORMATS
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.preprocessing import parts
from dialogpt_ds.preprocessing.arguments import ShardArguments
from dialogpt_ds.preprocessing.dedupe import BUCKETS, duplicates
from dialogpt_ds.preprocessing.make import make_shards
from dialogpt_ds.shards.reader import ShardDirectory
from tests.conftest import write_tsv
from tests.helpers.small_world import byte_tokenizer


def make(output: Path, *inputs: Path, **options: Any) -> dict[str, Any]:
    arguments = {"workers": 1, "max_reject_fraction": 1.0} | options
    make_shards(ShardArguments([str(path) for path in inputs], output=str(output), **arguments), lambda _: None)
    return json.loads((output / "report.json").read_text())


def check_balance(report: dict[str, Any]) -> None:
    assert report["records"] == report["conversations"] + sum(report["rejects"].values())
    targets = report["target_tokens"]
    assert targets["in"] == targets["written"] + targets["cut"]
    assert report["examples"] == sum(report["histograms"]["tokens_per_example"].values())
    kept = report["conversations"] - report["duplicates"] - sum(report["filtered"].values())
    assert kept == sum(report["histograms"]["turns_per_conversation"].values())


@pytest.mark.parametrize("limit", [32, 64, 128])
@pytest.mark.parametrize(
    "options", [{}, {"two_turn": True}, {"reverse": True}, {"targets": "all"}, {"validation_fraction": 0.2}]
)
def test_the_balance_closes_on_real_conversations_with_every_option(
    reddit: Path, tmp_path: Path, limit: int, options: dict[str, Any]
) -> None:
    report = make(tmp_path / "out", reddit, max_seq_length=limit, **options)
    check_balance(report)
    assert report["conversations"] == 1_000
    if set(options) <= {"two_turn", "validation_fraction"}:
        assert report["target_tokens"]["in"] == 21_220, "whatever the context, each target once"


def test_what_is_left_out_is_counted_by_its_rule_and_duplicates_once(reddit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "again.tsv"
    copy.write_bytes(
        reddit.read_bytes() + b"1.0 new\t1.0 one\n" + b"1.0 [x]\t1.0 y\n1.0 a\t1.0 see https://x.org\n" * 2
    )
    whole = make(tmp_path / "whole", reddit)
    report = make(
        tmp_path / "out",
        reddit,
        copy,
        dedupe=True,
        filter=["urls", "markup", "repeated_words", "long_words"],
        max_turns=4,
    )
    check_balance(report)
    assert report["conversations"] == 2_005
    assert (report["filtered"]["urls"], report["filtered"]["markup"]) == (2, 2)
    assert {"repeated_words", "max_turns"} <= set(report["filtered"])
    single = make(
        tmp_path / "single", reddit, dedupe=True, filter=["urls", "markup", "repeated_words", "long_words"], max_turns=4
    )
    assert report["examples"] == single["examples"] + 1
    del report["filtered"]["urls"], report["filtered"]["markup"]
    assert report["filtered"] == {rule: 2 * count for rule, count in single["filtered"].items()}
    assert single["examples"] < whole["examples"]


def test_duplicates_fall_on_one_side_of_the_split(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 300)
    source.write_text(source.read_text() * 2)
    make(tmp_path / "out", source, validation_fraction=0.3)
    seen = {}
    for split in ("train", "validation"):
        directory = ShardDirectory.open(str(tmp_path / "out" / split), "test")
        block = directory.block(0)
        starts = np.concatenate([[0], np.cumsum(block.example_lengths())])
        seen[split] = {block.tokens[a:b].tobytes() for a, b in itertools.pairwise(starts)}
    assert seen["train"]
    assert seen["validation"]
    assert not seen["train"] & seen["validation"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 30), max_size=40), max_size=6))
def test_duplicates_are_what_came_before(tmp_path: Path, arrays: list[list[int]]) -> None:
    digests = [
        np.array([[value * 7 % BUCKETS, value] for value in array], np.uint64).reshape(-1, 2) for array in arrays
    ]
    found = [twice.tolist() for twice in duplicates(digests, tmp_path)]
    seen: set[int] = set()
    expected = []
    for array in arrays:
        expected.append([value in seen or value in array[:place] for place, value in enumerate(array)])
        seen |= set(array)
    assert found == expected


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(str(folder))
    return str(folder)


PIECES = (
    *(
        "1.0 ",
        "0.0 ",
        "0.5",
        " EOS ",
        "\t",
        "\n",
        "\n\n",
        "a",
        "b c",
        '"',
        '""',
        ",",
        "Ann: ",
        "Bob:",
        "{",
        "}",
        "\r\n",
        "\ufeff",
        "你好",
    ),
    *(
        "\u2028",
        "\x00",
        "<|endoftext|>",
        "https://x.org",
        "[",
        "no no no",
        "-1 ",
        "nan ",
        "1e400 ",
        "\\ud800",
        '{"turns": ["a", "b"]}',
    ),
    *('{"messages": [{"role": "assistant", "content": "x"}]}', "response,context\n", "name,line\n"),
)
FUZZED = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map(lambda pieces: "".join(pieces).encode("utf-8")),
    st.binary(max_size=200),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    FUZZED,
    st.sampled_from(("auto", *FORMATS)),
    st.integers(2, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_whatever_is_in_a_file_the_balance_closes_and_nothing_is_a_traceback(
    tmp_path: Path,
    bytes_tokenizer: str,
    content: bytes,
    format_name: str,
    limit: int,
    reverse: bool,
    two_turn: bool,
    dedupe: bool,
    part_bytes: int,
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    source = folder / "input"
    source.write_bytes(content)
    before, parts.PART_BYTES = parts.PART_BYTES, part_bytes
    try:
        report = make(
            folder / "out", source, format=format_name, max_seq_length=limit, reverse=reverse, two_turn=two_turn,
            dedupe=dedupe, tokenizer=bytes_tokenizer,
            persona="Ann" if content.startswith(b"name,line") and format_name in ("auto", "csv") else "",
            filter=["urls", "markup"] if reverse else [],
        )  # fmt: skip
    except UserError:
        assert not (folder / "out" / "manifest.json").exists()
        return
    except RunError:  # no example
        report = json.loads((folder / "out" / "report.json").read_text())
    finally:
        parts.PART_BYTES = before
    check_balance(report)
    rejects = folder / "out" / "rejects.jsonl"
    lines = (
        [json.loads(line) for line in rejects.read_text(encoding="utf-8").split("\n")[:-1]] if rejects.exists() else []
    )
    assert len(lines) == sum(report["rejects"].values())
    assert [reject["line"] for reject in lines] == sorted(reject["line"] for reject in lines)
    if format_name != "auto" and FORMATS[format_name].by_lines:
        assert (
            report["records"] == len(content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"))
            if content
            else True
        )


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 10_000])
def test_where_parts_begin_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    source = write_tsv(tmp_path / "a.tsv", 12)
    source.write_bytes(source.read_bytes() + b"\n\nbroken\n1.0 last\t1.0 line")
    make(tmp_path / "whole", source)
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    make(tmp_path / "parts", source)
    for name in ("manifest.json", "shard-000000.tar", "rejects.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    rejects = [json.loads(line) for line in (tmp_path / "parts" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (13, "empty line"), (14, "empty line"), (15, "no tab between source and target")
    ]  # fmt: skip
