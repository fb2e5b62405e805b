"""Making shards: the format as others read it, the balance, and the same bytes on any number of workers."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.preprocessing.make import ShardArguments, make_shards
from dialogpt_ds.shards.manifest import read_manifest
from dialogpt_ds.shards.reader import DamagedShardError, ShardDirectory
from dialogpt_ds.tokenization import find_tokenizer
from tests.conftest import write_tsv


def make(source: Path, output: Path, **options: object) -> list[str]:
    said: list[str] = []
    make_shards(ShardArguments([str(source)], output=str(output), **({"workers": 1} | options)), said.append)  # type: ignore[arg-type]
    return said


@pytest.mark.parametrize(("limit", "cut", "turns_cut"), [(128, 0, 0), (64, 1, 1), (32, 424, 83)])
def test_the_balance_closes_on_real_conversations(
    reddit: Path, tmp_path: Path, limit: int, cut: int, turns_cut: int
) -> None:
    make(reddit, tmp_path / "out", max_seq_length=limit)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["target_tokens"] == {"in": 21_220, "written": 21_220 - cut, "cut": cut, "turns_cut": turns_cut}
    assert report["records"] == report["conversations"] == 1_000
    manifest = read_manifest(str(tmp_path / "out"), "--output")
    assert manifest.totals["target_tokens"] == 21_220 - cut
    assert (
        manifest.totals["tokens"]
        == report["tokens"]
        == sum(int(k) * v for k, v in report["histograms"]["tokens_per_example"].items())
    )


def test_labels_of_a_worked_example(tmp_path: Path) -> None:
    """`1.0 a EOS 0.0 b EOS 1.0 c <TAB> 1.0 d`: targets are c, its EOS, d and its EOS; a and b never."""
    source = tmp_path / "a.tsv"
    source.write_text("1.0 a EOS 0.0 b EOS 1.0 c\t1.0 d\n")
    make(source, tmp_path / "out")
    block = ShardDirectory.open(str(tmp_path / "out"), "test").block(0)
    a, b, c, d, eos = 64, 65, 66, 67, 50_256
    assert block.tokens.tolist() == [a, eos, b, eos, c, eos, d, eos]
    assert block.turn_lengths.tolist() == [2, 2, 2, 2]
    assert block.turn_weights.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert block.turns_per_example.tolist() == [4]


def test_weights_are_real_weights_and_the_first_turn_has_none(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("2.5 a EOS 0.25 b\t3.0 c\n")
    make(source, tmp_path / "out")
    assert ShardDirectory.open(str(tmp_path / "out"), "test").block(0).turn_weights.tolist() == [0.0, 0.25, 3.0]


def test_an_unweighted_file_learns_its_last_turn_or_all_on_request(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("a EOS b\tc\n")
    make(source, tmp_path / "last")
    make(source, tmp_path / "all", targets="all")
    weights = {n: ShardDirectory.open(str(tmp_path / n), "t").block(0).turn_weights.tolist() for n in ("last", "all")}
    assert weights == {"last": [0, 0, 1], "all": [0, 1, 1]}


def test_a_literal_special_token_is_ordinary_text(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("1.0 a<|endoftext|>b\t1.0 <|endoftext|>\n")
    make(source, tmp_path / "out")
    block = ShardDirectory.open(str(tmp_path / "out"), "test").block(0)
    assert (block.tokens == 50_256).sum() == 2, "one EOS per turn and no more"
    text = find_tokenizer("gpt2").decode(block.tokens[: block.turn_lengths[0] - 1].tolist())
    assert text == "a<|endoftext|>b"


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    make(write_tsv(tmp_path / "a.tsv", 1_500), tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(samples) == manifest["shardlist"][0]["nsamples"] == 2
    assert sum(len(s["turns_per_example.npy"]) for s in samples) == manifest["totals"]["examples"]
    assert samples[0]["tokens.npy"].dtype == np.uint16
    assert samples[0]["turn_weights.npy"].dtype == np.float32
    assert sum(len(s["tokens.npy"]) for s in samples) == manifest["totals"]["tokens"]
    assert all(s["turn_lengths.npy"].sum() == len(s["tokens.npy"]) for s in samples)


def test_the_same_bytes_on_any_number_of_workers_and_across_shards(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 12_000)
    for workers in (1, 3):
        make(source, tmp_path / str(workers), workers=workers, shard_megabytes=1, validation_fraction=0.1)
    one, three = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "13")
    names = [str(p.relative_to(tmp_path / "1")) for p in one]
    assert names == [str(p.relative_to(tmp_path / "3")) for p in three]
    assert "train/shard-000001.tar" in names
    assert "validation/manifest.json" in names
    for a, b in zip(one, three, strict=True):
        assert a.name == "report.json" or a.read_bytes() == b.read_bytes(), a


def test_validation_is_chosen_by_text_so_added_data_moves_nothing(tmp_path: Path) -> None:
    small, large = write_tsv(tmp_path / "s.tsv", 200, seed=1), tmp_path / "l.tsv"
    large.write_text(small.read_text() + write_tsv(tmp_path / "more.tsv", 200, seed=2).read_text())
    tokens = {}
    for name, source in (("small", small), ("large", large)):
        make(source, tmp_path / name, validation_fraction=0.2)
        tokens[name] = ShardDirectory.open(str(tmp_path / name / "validation"), "t").block(0).tokens
    assert 0 < len(tokens["small"]) < len(tokens["large"])
    assert (tokens["large"][: len(tokens["small"])] == tokens["small"]).all()


def test_rejects_are_counted_listed_and_too_many_fail_the_run(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv", 300)
    source.write_bytes(source.read_bytes() + b"1.0 alone\n1.0 a EOS b\t1.0 c\n")
    make(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejects"] == {"no tab between source and target": 1, "turn without a weight": 1}
    assert report["records"] == 302 == report["conversations"] + 2
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["text"]) for r in rejects] == [(301, "1.0 alone"), (302, "1.0 a EOS b\t1.0 c")]
    with pytest.raises(RunError, match=r"2 of 302 records were rejected.*No manifest"):
        make(source, tmp_path / "strict", max_reject_fraction=0.001)
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_a_conversation_without_a_target_is_counted_and_no_reject(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("1.0 a\t0.0 b\n1.0 a\t1.0 b\n")
    make(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["conversations"], report["without_target"], report["examples"], report["rejects"]) == (2, 1, 1, {})


def test_damage_is_found_with_its_place(tmp_path: Path) -> None:
    make(write_tsv(tmp_path / "a.tsv", 50), tmp_path / "out")
    shard = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    directory = ShardDirectory.open(str(tmp_path / "out"), "t")
    with pytest.raises(
        DamagedShardError, match=r"shard-000000.tar, block 0, member 00000000.tokens.npy, offset 0: checksum"
    ):
        directory.block(0)
    shard.write_bytes(bytes(content[:-10_240]))
    with pytest.raises(UserError, match=r"shard-000000.tar has .* bytes, the manifest says"):
        ShardDirectory.open(str(tmp_path / "out"), "t")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 1}, "--max_seq_length 1 is too small"),
        ({"validation_fraction": 1.0}, "--validation_fraction 1.0 is not a share"),
        ({"input": ["/nowhere.tsv"]}, "--input '/nowhere.tsv' is missing"),
        ({"output": ""}, "--output is missing"),
        ({"input": []}, "--input is missing"),
        (
            {"tokenizer": "nobody/nothing"},
            "tokenizer 'nobody/nothing' is neither a local folder nor in the hub's cache",
        ),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    source = write_tsv(tmp_path / "a.tsv", 5)
    arguments = ShardArguments(**({"input": [str(source)], "output": str(tmp_path / "out"), "workers": 1} | options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        make_shards(arguments, lambda _: None)


def test_chitchat_is_read_from_its_package(tmp_path: Path) -> None:
    pytest.importorskip("chitchat_dataset")
    said: list[str] = []
    make_shards(ShardArguments(format="chitchat", output=str(tmp_path / "out"), workers=2), said.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["records"] == report["conversations"] == 7_168
    assert report["target_tokens"]["in"] == report["target_tokens"]["written"] + report["target_tokens"]["cut"]
