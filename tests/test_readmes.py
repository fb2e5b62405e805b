"""Every README: its links lead somewhere, its commands can be read and name options that there are, its files are
there."""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dialogpt_ds.commands import dashboard, export, fetch_models, import_pkl, plot, replies
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.doctor.configuration import DoctorArguments
from dialogpt_ds.preprocessing.arguments import ShardArguments
from dialogpt_ds.preprocessing.inspect import InspectArguments
from tests.conftest import ROOT

READMES = sorted(
    path for path in ROOT.rglob("README.md") if not re.match(r"\.|build/|demo_output/", str(path.relative_to(ROOT)))
)
MOST_LINES = 220
"""Of README.md itself."""
COMMANDS = {
    "launch/train.py": TrainingArguments,
    "launch/doctor.py": DoctorArguments,
    "launch/export.py": export.ExportArguments,
    "launch/import_pkl.py": import_pkl.ImportArguments,
    "launch/fetch_models.py": fetch_models.FetchArguments,
    "launch/plot.py": plot.PlotArguments,
    "launch/replies.py": replies.ReplyArguments,
    "launch/wandb_dashboard.py": dashboard.DashboardArguments,
    "preprocess/make_shards.py": ShardArguments,
    "preprocess/inspect_shards.py": InspectArguments,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
MADE = {"tests/gpu/out"}
"""What a command makes."""
OURS = re.compile(r"(?<![\w./-])(?:launch|preprocess|tests|ds_configs|dialogpt_ds)/[\w./-]*[\w]")


def blocks_of(readme: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [body for name, body in FENCE.findall(readme.read_text(encoding="utf-8")) if name == language]


def anchors_of(readme: Path) -> set[str]:
    """Return what a link may name of a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", readme.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(block: str) -> Iterator[list[str]]:
    """Yield the words of each of a block's commands, comments aside."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.fixture(params=READMES, ids=lambda path: str(path.relative_to(ROOT)))
def readme(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_the_first_page_is_short_and_shows_a_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
    assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG"


def test_links_lead_somewhere(readme: Path) -> None:
    text = FENCE.sub("", readme.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = (readme.parent / name).resolve() if name else readme
        assert page.exists(), target
        assert not anchor or anchor in anchors_of(page), target


def test_every_page_is_linked_from_the_first() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page.name.endswith(".md") and page not in reached:
            reached.add(page)
            targets = [
                target.partition("#")[0]
                for target in LINK.findall(page.read_text(encoding="utf-8"))
                if "://" not in target
            ]
            waiting += [(page.parent / target).resolve() for target in targets if target]
    assert set(READMES) - reached == set()


def test_files_that_are_named_are_there(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    quoted = [
        *IN_BACKTICKS.findall(FENCE.sub("", text)),
        *(line for block in blocks_of(readme, "bash") for line in block.splitlines()),
    ]
    named = {path for words in quoted for path in OURS.findall(words) if not re.search(r"[A-Z]{3}", path)} - MADE
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_commands_can_be_read_and_their_options_are_there(readme: Path) -> None:
    for block in blocks_of(readme, "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        for words in commands_in(block):
            script = next((word for word in words if word in COMMANDS), None)
            if script is None:
                continue
            given = [word for word in words[words.index(script) + 1 :] if word.startswith("--")]
            assert [word for word in given if word.partition("=")[0] not in options_of(COMMANDS[script])] == [], words


def options_of(arguments: type) -> set[str]:
    """Return the options of a command."""
    found = {"--config", "--help"}
    for field in dataclasses.fields(arguments):
        found |= {f"--{field.name}", *field.metadata.get("aliases", ())}
    return found


def test_other_blocks_can_be_read(readme: Path) -> None:
    for block in blocks_of(readme, "python"):
        compile(block, str(readme), "exec")
    for block in blocks_of(readme, "yaml"):
        assert yaml.safe_load(block)


def test_the_tour_names_files_that_are_there_and_a_short_journey() -> None:
    text = (ROOT / "dialogpt_ds" / "README.md").read_text(encoding="utf-8")
    named = [path for path in IN_BACKTICKS.findall(text) if re.fullmatch(r"[\w/]+\.py", path) and "/" in path]
    assert [
        path for path in named if not any((folder / path).is_file() for folder in (ROOT, ROOT / "dialogpt_ds"))
    ] == []
    journey = re.findall(r"^\| \d+ \| `([\w/.]+)` \|", text, re.MULTILINE)
    assert 20 <= len(journey) <= 25
    packages = {path.name for path in (ROOT / "dialogpt_ds").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))
