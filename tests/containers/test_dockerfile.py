"""The Dockerfile and .dockerignore: what hadolint says, and what this project asks of its images. No image is built
here."""

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dialogpt_ds.launching.needed_ops import needed_ops
from dialogpt_ds.launching.stoppable import STOP_SECONDS
from tests.conftest import ROOT
from tests.containers.dockerfile import Dockerfile, assignments, build_context, clone_files, filled_in, ignored
from tests.ranks.launch import BIN

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FILE = Dockerfile(TEXT)
IMAGES = ("train", "sshd")
"""Stages that are for use; the others are for these."""
EVERYTHING = [one for stage in FILE.stages.values() for one in stage.instructions]
CONTEXT = build_context()
PATTERNS = (ROOT / ".dockerignore").read_text(encoding="utf-8")


def named(name: str) -> list[str]:
    return [one.text for one in EVERYTHING if one.name == name]


def environment_of(stage: str) -> dict[str, str]:
    """Return ENV of a stage, as `NAME: value` with the values of variables filled in."""
    values: dict[str, str] = {}
    for one in FILE.lineage(stage):
        for instruction in one.instructions:
            if instruction.name == "ENV":
                values |= assignments(filled_in(instruction.text, values))
    return values


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [BIN / "hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hadolint_would_find_something() -> None:
    worse = TEXT.replace("USER ${UID}", "USER root").replace("rm -rf /var/lib/apt/lists/*", "true")
    done = subprocess.run(
        [BIN / "hadolint", "--format", "json", "-"], input=worse, capture_output=True, text=True, timeout=60
    )
    assert {"DL3002", "DL3009"} <= {one["code"] for one in json.loads(done.stdout)}


def test_a_rule_is_ignored_for_a_reason_alone() -> None:
    lines = TEXT.splitlines()
    ignoring = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
    assert {lines[number] for number in ignoring} == {"# hadolint ignore=DL3008"}
    assert re.search(r"# Ubuntu's archive keeps the latest release .*\n# hadolint ignore=DL3008", TEXT)


def test_the_plain_build_makes_the_training_image_and_sshd_is_a_target() -> None:
    assert set(IMAGES) <= FILE.stages.keys()
    assert list(FILE.stages)[-1] == "train"


def test_bases_are_one_release_of_cuda_pinned_to_the_patch() -> None:
    bases = {stage.base for stage in FILE.stages.values()} - FILE.stages.keys()
    release = f"{FILE.default('CUDA')}-{{}}-ubuntu{FILE.default('UBUNTU')}"
    assert bases == {f"nvidia/cuda:{release.format(flavour)}" for flavour in (FILE.default("FLAVOUR"), "devel")}
    assert re.fullmatch(r"\d+\.\d+\.\d+", FILE.default("CUDA"))
    in_comments = set(
        re.findall(r"nvidia/cuda:[\w.-]+", "\n".join(line for line in TEXT.splitlines() if line.startswith("#")))
    )
    assert in_comments <= bases


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_without_rights_named_by_number(image: str) -> None:
    user = FILE.inherited(image, "USER")
    assert user is not None
    assert filled_in(user.text, FILE.arguments) == FILE.default("UID")
    assert int(FILE.default("UID")) >= 1000


@pytest.mark.parametrize("image", IMAGES)
def test_the_first_process_is_the_one_that_turns_sigterm_into_a_checkpoint(image: str) -> None:
    entry, command = FILE.inherited(image, "ENTRYPOINT"), FILE.inherited(image, "CMD")
    assert entry is not None
    assert command is not None
    assert entry.text.startswith("["), "a shell in between would keep the signal to itself"
    program, script = entry.words()
    assert program.startswith("/opt/venv/bin/")
    assert "/opt/venv/bin" in environment_of(image)["PATH"]
    assert script.removeprefix("/workspace/") in CONTEXT
    for word in command.words():
        assert "/" not in word or word in CONTEXT


def test_there_is_no_health_check_no_download_and_no_secret() -> None:
    assert not {"HEALTHCHECK", "ADD", "MAINTAINER"} & {one.name for one in EVERYTHING}
    assert not re.search(r"https?://", "\n".join(named("RUN") + named("COPY")))
    names = {
        name for kind in ("ARG", "ENV") for text in named(kind) for name in (*assignments(text), text.split("=")[0])
    }
    assert not {name for name in names if re.search(r"KEY|TOKEN|SECRET|PASSW", name)}
    ssh_server = next(text for text in named("RUN") if "openssh-server" in text)
    assert "/etc/ssh/ssh_host_*" in ssh_server, "the package makes host keys, and the layer would keep them"


def test_what_is_copied_is_in_the_build_context() -> None:
    for one in EVERYTHING:
        if one.name == "COPY" and not one.option("from"):
            for source in one.words()[:-1]:
                assert source == "." or source in CONTEXT, source


def test_the_build_context_is_what_a_run_needs_of_a_fresh_clone() -> None:
    left_out = set(clone_files()) - set(CONTEXT)
    kept_out = {path for path in left_out if not path.startswith(("tests/", ".ci/"))}
    assert kept_out == {".dockerignore", ".gitignore", "Dockerfile"}
    assert {path.split("/")[0] for path in CONTEXT if "/" in path} == {
        "dialogpt_ds",
        "ds_configs",
        "launch",
        "preprocess",
    }
    assert sum((ROOT / path).stat().st_size for path in CONTEXT) < 2_000_000


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/HEAD",
            ".venv/bin/python",
            "models/run/checkpoints/latest",
            "shards/train/shard-000000.tar",
            "wandb/run/logs",
        ),
        *(
            "dialogpt_ds/__pycache__/errors.cpython-311.pyc",
            "dialogpt_ds.egg-info/PKG-INFO",
            ".env",
            "launch/.deepspeed_env",
        ),
        *(".netrc", "keys/authorized_keys", "launch/id_ed25519", "server.pem"),
    ],
)
def test_what_lies_beside_a_clone_stays_out(path: str) -> None:
    assert ignored(path, PATTERNS)


def test_dockerignore_leaves_out_what_git_does() -> None:
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split():
        assert ignored(line.replace("*", "any").rstrip("/"), PATTERNS), line


def test_dockerignore_is_read_as_the_builder_reads_it() -> None:
    patterns = "# a comment\nshards\n**/__pycache__\n*.pem\ndocs/*\n!docs/kept.md\n"
    for path in ("shards", "shards/a/b", "a/b/__pycache__/c", "__pycache__/c", "a.pem", "docs/other.md"):
        assert ignored(path, patterns), path
    for path in ("dialogpt_ds/preprocessing/make.py", "a/b.pem", "docs/kept.md", "shards.py", "a comment"):
        assert not ignored(path, patterns), path


def test_versions_are_those_that_the_tests_ran_on() -> None:
    pinned = dict(
        re.findall(r"^(\S+)==(\S+)$", (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    ranges = {one.name: one.specifier for one in map(Requirement, setup["options"]["install_requires"].split("\n")[1:])}
    for package, argument in (("torch", "TORCH"), ("deepspeed", "DEEPSPEED")):
        assert FILE.default(argument) == pinned[package]
        assert FILE.default(argument) in ranges[package]
    assert any("--constraint launch/constraints.txt" in text for text in named("RUN"))
    extras = re.search(r'--editable "\.\[([\w,]+)\]"', "\n".join(named("RUN")))
    assert extras is not None
    assert set(extras[1].split(",")) <= set(setup["options.extras_require"])


def test_every_operator_that_a_shipped_configuration_uses_is_built() -> None:
    environment = environment_of("operators")
    assert environment["DS_ACCELERATOR"] == "cuda", (
        "no GPU is visible in a build, and DeepSpeed would take the CPU's operators"
    )
    code = (
        "import json; from deepspeed.ops.op_builder.all_ops import ALL_OPS; print(json.dumps({one.BUILD_VAR: name for "
        "name, one in ALL_OPS.items()}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    operators = json.loads(said.splitlines()[-1])
    built = {operators[name] for name, value in environment.items() if name.startswith("DS_BUILD_") and value == "1"}
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("ds_configs/zero*.json")]
    assert len(configs) >= 6
    used = {op.name for config in configs for op in needed_ops(config, on_gpu=True)}
    assert {"cpu_adam", "async_io"} <= used <= built
    checked = re.search(r"for operator in ([\w ]+);", "\n".join(named("RUN")))
    assert checked is not None
    assert set(checked[1].split()) == built | {"pin_memory"}, "a build that left one out must fail"


def test_the_lines_that_are_replaced_in_deepspeeds_builder_are_there() -> None:
    """DeepSpeed has no setting for the processor, so the Dockerfile edits its source; this is what the edit looks
    for."""
    from deepspeed.ops.op_builder import builder

    source = Path(builder.__file__).read_text(encoding="utf-8")
    assert source.count("'-march=native'") == 1
    assert source.count('"-march=native"') == 2
    assert source.count("-march=native") == 3 + 1, "and once in a message"
    assert source.count("'-D__AVX512__'") == 1
    assert "'-D__AVX256__'" in source


def test_the_comments_give_a_stopped_container_more_time_than_the_ranks_get() -> None:
    assert f"at most {STOP_SECONDS:g} s" in TEXT
    assert all(float(seconds) > STOP_SECONDS for seconds in re.findall(r"--stop-timeout (\d+)", TEXT))


def test_an_unknown_variable_is_empty_and_a_known_one_is_not() -> None:
    small = Dockerfile(
        "ARG A=1\nFROM x:${A} AS one\n# no line\nRUN --mount=type=cache,target=/c a \\\n  # inside\n  b\nFROM "
        "one\nUSER 7\n"
    )
    assert [(stage.name, stage.base) for stage in small.stages.values()] == [("one", "x:1"), ("1", "one")]
    (run,) = small.stages["one"].instructions
    assert (run.words(), run.option("mount")) == (["a", "b"], [{"type": "cache", "target": "/c"}])
    assert small.inherited("1", "USER") == small.stages["1"].instructions[0]
    assert filled_in("$A-${B}-$$C", {"A": "1"}) == "1--$"
