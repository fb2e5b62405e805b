"""Every format that conversations come in: told from its content, read into turns, and rejected with a reason."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dialogpt_ds.conversations import files
from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn
from dialogpt_ds.conversations.filters import make_filter
from dialogpt_ds.conversations.formats import FORMATS
from dialogpt_ds.conversations.formats.base import Format
from dialogpt_ds.conversations.formats.chat_log import ChatLog
from dialogpt_ds.conversations.formats.jsonl import JsonLines
from dialogpt_ds.conversations.inputs import Input, open_inputs
from dialogpt_ds.conversations.targets import reversed_direction, turn_weights
from dialogpt_ds.errors import UserError
from tests.conftest import ROOT


def opened(tmp_path: Path, name: str, text: str | bytes, **options: object) -> Input:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    (source,) = open_inputs([str(file)], **({"format_name": "auto", "turn_weights": "auto"} | options))  # type: ignore[arg-type]
    return source


def texts(source: Input) -> list[list[str]]:
    return [[turn.text for turn in source.read(record).turns] for record in source.records()]


def learned(source: Input, targets: str = "input") -> list[list[str]]:
    """Return the texts of the turns that are learned."""
    found = []
    for record in source.records():
        conversation = source.read(record)
        weights = turn_weights(conversation, targets, source.format.default_targets, source.persona)  # type: ignore[arg-type]
        found.append([turn.text for turn, weight in zip(conversation.turns, weights, strict=True) if weight > 0])
    return found


MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": [{"type": "text", "text": "See "}, {"text": "you"}]},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def test_json_lines_in_their_shapes(tmp_path: Path) -> None:
    lines = [MESSAGES, SHAREGPT, {"turns": ["a", "b", "c"]}, {"turns": [{"text": "a", "weight": 0}, {"text": "b",
                                                                                                     "weight": 0.5}]},
             {"Context": "a EOS b", "Response": "c", "Knowledge": ""}, {"context": ["a", "b"],
                                                                        "response": "c"}]  # fmt: skip
    source = opened(tmp_path, "a.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert source.describe().endswith("a.jsonl: JSON Lines")
    assert texts(source) == [["Be kind.", "Hi", "Hello", "Bye", "See "
                                                                "you"], ["Hi", "Hello"], ["a", "b", "c"], ["a", "b"],
                                                                ["a", "b", "c"],
                             ["a", "b", "c"]]  # fmt: skip
    assert learned(source) == [["Hello", "See you"], ["Hello"], ["c"], ["b"], ["c"], ["c"]]
    assert learned(source, "all")[0] == ["Hi", "Hello", "Bye", "See you"]
    assert learned(source, "assistant")[2] == [], "nobody is the assistant"
    assert learned(opened(tmp_path, "a.jsonl", json.dumps(MESSAGES), persona="user"))[0] == ["Hi", "Bye"]


def test_a_weight_that_one_turn_has_is_never_ignored(tmp_path: Path) -> None:
    said = [("user", None), ("assistant", 0.5), ("user", None), ("assistant", None), ("assistant", 0)]
    turns = [{"role": role, "content": "x"} | ({} if weight is None else {"weight": weight}) for role, weight in said]
    source = opened(tmp_path, "a.jsonl", json.dumps({"messages": turns}))
    conversation = source.read(next(source.records()))
    assert turn_weights(conversation, "input", source.format.default_targets) == [0.0, 0.5, 0.0, 1.0, 0.0]
    assert turn_weights(conversation, "all", source.format.default_targets) == [0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty line"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "none of the keys"),
        ('{"text": "a"}', "none of the keys"),
        ('{"messages": "a"}', "the turns are not a list"),
        ('{"messages": [3]}', "a turn is neither text nor an object"),
        ('{"messages": [{"role": "user"}]}', "a turn without text"),
        ('{"messages": [{"role": "user", "content": [{"image": "x"}]}]}', "a turn without text"),
        ('{"turns": [{"text": "a", "weight": -1}]}', "a weight that is no number from 0 on"),
        ('{"turns": [{"text": "a", "weight": NaN}]}', "a weight that is no number from 0 on"),
        ('{"Context": 3, "Response": "a"}', "Context or Response is not text"),
        ('{"turns": ["\\ud800"]}', "half of a surrogate pair in it"),
    ],
)
def test_lines_that_are_no_conversation(line: str, reason: str) -> None:
    with pytest.raises(RejectedRecordError, match=reason):
        JsonLines().read(Record(1, line.encode()))


def test_tables_with_a_response_and_contexts_newest_first(tmp_path: Path) -> None:
    text = 'response,context,context/0,context/1\nd,c,b,a\n"quoted, with\nline end ""x""",c,,\n'
    source = opened(tmp_path, "a.csv", text)
    assert "a table with the columns response, context, context/0, context/1" in source.describe()
    assert texts(source) == [["a", "b", "c", "d"], ["c", 'quoted, with\nline end "x"']]
    assert [record.line for record in source.records()] == [2, 3]
    assert learned(source) == [["d"], ['quoted, with\nline end "x"']]
    assert texts(opened(tmp_path, "b.tsv", text.replace(",", "\t").replace("\t with", ", with")))[0] == [
        "a",
        "b",
        "c",
        "d",
    ]


def test_a_script_gives_a_persona_its_sliding_history(tmp_path: Path) -> None:
    text = "name,line\nMorty,a\nRick,b\nMorty,c\nRick,d\n"
    source = opened(tmp_path, "a.csv", text, persona="Rick", history=2)
    assert texts(source) == [["a", "b"], ["b", "c", "d"]]
    assert learned(source) == [["b"], ["d"]]
    assert "Rick's turns are learned" in source.describe()
    with pytest.raises(UserError, match="is a script of lines with names: say with --persona NAME"):
        opened(tmp_path, "a.csv", text)


def test_rows_that_are_no_record_are_rejected_and_a_quote_that_never_closes_stops_the_run(tmp_path: Path) -> None:
    source = opened(tmp_path, "a.csv", b'response,context\na\nb,c\n"d"x,e\n\xff,f\ng,h\n')
    found = []
    for record in source.records():
        try:
            found.append([turn.text for turn in source.read(record).turns])
        except RejectedRecordError as error:
            found.append([f"line {record.line}: {error}"])
    assert found == [["line 2: another number of fields than the header"], ["c", "b"], ["line 4: not CSV: ',' expected "
                                                                                        "after "
                                                                                        "'\"'"],
                     ["line 5: not UTF-8"], ["h", "g"]]  # fmt: skip
    with pytest.raises(UserError, match=r"a.csv, line 3: a quote opens in this row and never closes"):
        list(opened(tmp_path, "a.csv", 'response,context\na,b\n"c,d\ne,f\n').records())


def test_chat_logs(tmp_path: Path) -> None:
    text = "\n\nAnn: hi\nBob: hello\nBob: how are you?\n  and she?\n\nAnn: at 12:30\nBob: see http://x.org\r\nAnn:\n"
    source = opened(tmp_path, "log.txt", text)
    assert source.describe().endswith("chat log, NAME: text")
    assert texts(source) == [["hi", "hello how are you? and she?"], ["at 12:30", "see http://x.org", ""]]
    assert [record.line for record in source.records()] == [3, 8]
    assert learned(source) == [["hello how are you? and she?"], ["see http://x.org", ""]]
    assert learned(opened(tmp_path, "log.txt", text, persona="Ann")) == [[], [""]]
    with pytest.raises(RejectedRecordError, match="no name before the first line"):
        ChatLog().read(Record(1, b"hello\nAnn: hi"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "a\tb\n", "DialoGPT TSV, turns without weights"),
        ("a", "1.0 a\t1.0 b\n", "DialoGPT TSV, turns with weights"),
        ("a.txt", json.dumps(SHAREGPT) + "\n", "JSON Lines"),
        ("a.jsonl", "{broken\n" + json.dumps(SHAREGPT) + "\n", "JSON Lines"),
        ("a.csv", "Response;Context\na;b\n", "a table with the columns response, context"),
        ("a.txt", "\ufeffAnn: a\nBob: b\n", "chat log, NAME: text"),
        ("a.json", '{"id": {"messages": [[{"text": "a"}], [{"text": "b"}]]}}', "chitchat-dataset"),
        ("a.json", json.dumps(MESSAGES), "JSON Lines"),
    ],
)
def test_the_format_is_told_from_the_content(tmp_path: Path, name: str, text: str, expected: str) -> None:
    source = opened(tmp_path, name, text)
    assert source.describe().endswith(f"{name}: {expected}")
    assert len(source.read(list(source.records())[-1]).turns) >= 2


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.txt", "just a line\n", {}, "its format is not told by its first 1 lines .first: 'just a line'."),
        ("a.txt", "", {}, "its format is not told"),
        ("a.json", '[\n{"messages": []}\n]\n', {}, "one JSON value over many lines.*jq -c"),
        ("a.csv", "a,b\n", {"format_name": "csv"}, "the first line is no header that is known here: 'a,b'"),
        ("a.tsv", "a\tb\n", {"persona": "Ann"}, "--persona 'Ann': .* does not say who speaks"),
    ],
)
def test_inputs_that_can_not_be_told(
    tmp_path: Path, name: str, text: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, name, text, **options)


def test_patterns_name_files_in_order_and_mistakes_are_said(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.tsv", "c.txt"):
        (tmp_path / name).write_text("a\tb\n")
    assert [Path(name).name for name in files.find_files([str(tmp_path / "*.tsv"), str(tmp_path / "c.txt")])] == [
        "a.tsv",
        "b.tsv",
        "c.txt",
    ]
    with pytest.raises(UserError, match="no file is called so"):
        files.find_files([str(tmp_path / "*.jsonl")])
    with pytest.raises(UserError, match="is a folder; name its files, as in"):
        files.find_files([str(tmp_path)])
    with pytest.raises(UserError, match=r"names '.*a.tsv' twice"):
        files.find_files([str(tmp_path / "a.tsv"), str(tmp_path / "*.tsv")])


def test_standard_input_gives_the_shards_of_the_file(tmp_path: Path) -> None:
    text = "".join(json.dumps({"turns": [f"number {n}", "ünïcödé 你好" * 50]}) + "\n" for n in range(30_000))
    assert len(text) > files.HEAD_BYTES
    (tmp_path / "a.jsonl").write_text(text)
    program = [
        sys.executable,
        "-c",
        "import sys; from dialogpt_ds.commands.make_shards import main; sys.exit(main())",
        "--workers",
        "2",
    ]
    for name, source in (("piped", "-"), ("file", str(tmp_path / "a.jsonl"))):
        command = [*program, "--input", source, "--output", str(tmp_path / name)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
    assert "standard input: JSON Lines" in subprocess.run(
        [*program, "--input", "-", "--output", str(tmp_path / "third")], input=text, capture_output=True, text=True,
        cwd=ROOT, timeout=120
    ).stdout  # fmt: skip
    assert (tmp_path / "piped" / "shard-000000.tar").read_bytes() == (
        tmp_path / "file" / "shard-000000.tar"
    ).read_bytes()
    assert (tmp_path / "piped" / "manifest.json").read_bytes() == (tmp_path / "file" / "manifest.json").read_bytes()


def test_the_head_of_standard_input_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"x" * 5 + b"\n" + b"y" * (files.HEAD_BYTES * 2) + b"\nz"
    monkeypatch.setattr(files, "_stdin", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert files.head_of("-") == b"xxxxx\n"
    assert b"".join(files.open_bytes("-")) == content


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("see https://example.org/a", "urls"),
        ("WWW.x.org", "urls"),
        ("go to example.com/page", "urls"),
        ("no no no", "repeated_words"),
        ("Ha, ha... HA", "repeated_words"),
        ("a" * 31, "long_words"),
        ("x [deleted] y", "markup"),
        ("<b>bold</b>", "markup"),
        ("a &amp; b", "markup"),
        ("no no, never", None),
        ("a < b and b > c", None),
        ("你" * 60, None),
        ("e.g. this and that...", None),
    ],
)
def test_filters(text: str, rule: str | None) -> None:
    rule_of = make_filter(["urls", "repeated_words", "long_words", "markup"], 0, None)
    assert rule_of(Conversation([Turn("fine"), Turn(text)])) == rule
    assert make_filter([], 0, None)(Conversation([Turn(text)])) is None, "each is off by default"
    assert make_filter([], 3, None)(Conversation([Turn(text)] * 2)) == "min_turns"
    assert make_filter([], 0, 2)(Conversation([Turn(text)] * 3)) == "max_turns"


def test_the_reversed_direction_learns_what_was_said_from_the_reply() -> None:
    """A pair is never dropped because its source has weight 0: the source is learned, with its reply's weight."""
    conversation, weights = reversed_direction(Conversation([Turn("a"), Turn("b")]), [0.0, 1.0])
    assert ([turn.text for turn in conversation.turns], weights) == (["b", "a"], [0.0, 1.0])
    conversation, weights = reversed_direction(Conversation([Turn(c) for c in "abcd"]), [0.0, 1.0, 0.0, 0.5])
    assert ([turn.text for turn in conversation.turns], weights) == (["d", "c", "b", "a"], [0.0, 0.5, 0.0, 1.0])
    assert reversed_direction(Conversation(), []) == (Conversation(), [])


def test_a_new_format_is_a_class_and_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slashes(Format):
        name, summary, title, missing = "slashes", "turns between slashes", "turns between slashes", "has no slash"

        @classmethod
        def recognises(cls, head: files.Head) -> bool:
            return " / " in head.first

        def read(self, record: Record) -> Conversation:
            return Conversation([Turn(text) for text in str(record.content, "utf-8").split(" / ")])  # type: ignore[arg-type]

    monkeypatch.setitem(FORMATS, "slashes", Slashes)
    for chosen in ("auto", "slashes"):
        source = opened(tmp_path, "a.txt", "how are you / fine\n", format_name=chosen)
        assert (source.describe(), texts(source)) == (
            f"{tmp_path / 'a.txt'}: turns between slashes",
            [["how are you", "fine"]],
        )
        assert source.facts()["format"] == "slashes"
    with pytest.raises(UserError, match=r", and has no slash\. Name the --format"):
        opened(tmp_path, "a.txt", "just a line\n")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_in_the_table_for_users(name: str) -> None:
    page = (ROOT / "preprocess" / "README.md").read_text(encoding="utf-8")
    assert f"\n| `{name}` |" in page
