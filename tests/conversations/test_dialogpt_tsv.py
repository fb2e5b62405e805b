"""DialoGPT TSV: turns, weights, and what is no conversation."""

from pathlib import Path

import pytest

from dialogpt_ds.conversations.conversation import Record, RejectedRecordError, Turn
from dialogpt_ds.conversations.formats.dialogpt_tsv import DialogptTsv, has_weights
from dialogpt_ds.conversations.inputs import open_evaluation, open_inputs
from dialogpt_ds.errors import UserError


def turns(line: str, weighted: bool) -> list[Turn]:
    return DialogptTsv(weighted).read(Record(1, line.encode())).turns


def test_turns_are_separated_by_eos_and_the_last_comes_after_the_tab() -> None:
    assert turns("1.0 a EOS 0.0 b EOS 1.0 c\t1.0 d", weighted=True) == [
        Turn("a", 1.0), Turn("b", 0.0), Turn("c", 1.0), Turn("d", 1.0)
    ]  # fmt: skip


def test_a_first_of_three_columns_is_an_id() -> None:
    assert turns("t3_abc\t1.0 a\t1.0 b", weighted=True) == [Turn("a", 1.0), Turn("b", 1.0)]


def test_a_number_that_belongs_to_the_text_stays_in_it() -> None:
    assert turns("25 of your choice\t3.5 stars", weighted=False) == [Turn("25 of your choice"), Turn("3.5 stars")]
    assert turns("1.0 25 of your choice\t0.5 3.5 stars", weighted=True) == [
        Turn("25 of your choice", 1.0),
        Turn("3.5 stars", 0.5),
    ]


def test_an_empty_turn_does_not_lose_the_conversation() -> None:
    assert turns("1.0 a EOS 1.0 \t1.0 c", weighted=True) == [Turn("a", 1.0), Turn("", 1.0), Turn("c", 1.0)]
    assert turns("1.0 a EOS 1.0\t1.0 c", weighted=True) == [Turn("a", 1.0), Turn("", 1.0), Turn("c", 1.0)]


def test_other_languages_and_unicode_separators_stay_as_they_are() -> None:
    text = "naïve 你好\u2028\x85\x0b привет"
    assert turns(f"1.0 {text}\t1.0 {text}", weighted=True) == [Turn(text, 1.0)] * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b"1.0 alone", "no tab between source and target"),
        (b"a\tb\t1.0 c\t1.0 d", "more than three columns"),
        (b"1.0 a EOS b\t1.0 c", "turn without a weight"),
        (b"1.0 a\t-1.0 c", "turn without a weight"),
        (b"1.0 a\tnan c", "turn without a weight"),
        (b"1.0 a\xff\t1.0 b", "not UTF-8"),
    ],
)
def test_a_record_that_cannot_be_read_is_rejected_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(RejectedRecordError, match=reason):
        DialogptTsv(weighted=True).read(Record(1, line))


def test_weights_are_decided_for_the_file_as_a_whole() -> None:
    weighted = [b"1.0 a EOS 0.0 b\t1.0 c"] * 20
    plain = [b"1.0 is a number EOS what\tindeed"] + [b"how are you\tfine"] * 20
    assert has_weights(weighted, "f")
    assert has_weights([*weighted, b"1.0 a\tc"], "f"), "one turn without must not turn every weight into text"
    assert not has_weights(plain, "f")


def test_an_undecidable_file_is_an_error_that_says_how_to_decide() -> None:
    with pytest.raises(UserError, match=r"4 of the first 8 turns begin with a weight.*--turn_weights yes"):
        has_weights([b"1.0 a\t1.0 b", b"a\tb"] * 2, "f")


def test_the_decision_is_stated(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("1.0 a\t1.0 b\n")
    assert open_inputs([str(file)], "auto", "auto")[0].describe().endswith("DialoGPT TSV, turns with weights")
    assert open_inputs([str(file)], "auto", "no")[0].describe().endswith("DialoGPT TSV, turns without weights")


def test_compressed_input_is_read_like_plain(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    from backports import zstd

    content = b"1.0 a\t1.0 b\r\n1.0 c\t1.0 d"
    for suffix, module in {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstd}.items():
        file = tmp_path / f"a.tsv{suffix}"
        file.write_bytes(module.compress(content[:20]) + module.compress(content[20:]))  # type: ignore[attr-defined]
        source = open_inputs([str(file)], "auto", "auto")[0]
        assert [source.read(record).turns[1].text for record in source.records()] == ["b", "d"]


def test_a_truncated_compressed_file_is_an_error(tmp_path: Path) -> None:
    import gzip
    import random

    from backports import zstd

    file = tmp_path / "a.tsv.gz"
    random.seed(0)
    text = "".join(f"1.0 {random.random()}\t1.0 {random.random()}\n" for _ in range(60_000))
    file.write_bytes(gzip.compress(text.encode())[:-100_000])
    source = open_inputs([str(file)], "auto", "yes")[0]
    with pytest.raises(UserError, match="can't be read to its end"):
        list(source.records())
    short = tmp_path / "short.tsv.zst"
    short.write_bytes(zstd.compress(text.encode())[:-100_000])
    with pytest.raises(UserError, match=r"short.tsv.zst can't be read to its end"):
        list(open_inputs([str(short)], "auto", "yes")[0].records())


def test_an_evaluation_file_is_a_source_with_references_or_the_training_format(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_bytes(b"how  are EOS you\tfine\tso  so\r\nalone\n")
    source = open_evaluation(str(file), normalize=True)
    records = list(source.records())
    assert [[turn.text for turn in source.read(r).turns] for r in records[:2]] == [
        ["how are", "you", "fine"],
        ["how are", "you", "so so"],
    ]
    with pytest.raises(RejectedRecordError, match="no tab"):
        source.read(records[2])
    file.write_bytes(b"1.0 a EOS 0.0 b  c\t1.0 d\n")
    source = open_evaluation(str(file), normalize=False)
    assert source.read(next(source.records())).turns == [Turn("a", 1.0), Turn("b  c", 0.0), Turn("d", 1.0)]
