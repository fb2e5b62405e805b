"""Carry out the Dockerfile's steps without a container engine, in a chroot of Debian, and train in it. Run by hand, as
root:

    python -m tests.containers.try_install /tmp/trial --suite bookworm

Every RUN of every stage runs as the stated user with the stated ENV and ARG, every COPY is a copy of what .dockerignore
leaves of a fresh clone. Debian stands in for the CUDA images, so what needs CUDA is left out: DeepSpeed's operators are
built for its CPU accelerator. Everything happens in mount and process namespaces of its own and is unmounted when it
ends; the folder is removed, unless --keep. This machine's settings of pip and apt are used, and go with the folder.
Needs debootstrap, and ten minutes to
half an hour: DeepSpeed's 18 C++ files are compiled one after another.
"""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from tests.containers.dockerfile import ROOT, Dockerfile, Instruction, Stage, assignments, build_context, filled_in

INSTEAD = {"DS_ACCELERATOR": "cpu"}
"""Settings that stand in for CUDA's."""
PROXIES = re.compile(r"PIP_\w+|(?i:https?|no)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE")
SETTINGS = (
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/ssl/certs",
    "/usr/local/share/ca-certificates",
    "/etc/apt",
)
"""This machine's own settings, which the steps need to reach its registries."""


@dataclasses.dataclass
class Image:
    """What a stage has become: a folder, and what holds for the next instruction."""

    folder: Path
    environment: dict[str, str]
    user: str = "0"
    work: str = "/"
    shell: tuple[str, ...] = ("/bin/sh", "-c")


class Trial:
    """The stages, built one after another under one folder."""

    def __init__(self, folder: Path, suite: str, mirror: str) -> None:
        self.file = Dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
        self.folder = folder
        self.suite = suite
        self.mirror = mirror
        self.images: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """Build a stage and those that it needs; prints each step with its time and what it added."""
        if name in self.images:
            return self.images[name]
        stage = self.file.stages[name]
        for other in _needed(stage, self.file):
            self.build(other)
        folder = self.folder / name
        print(f"\n== stage {name}, from {stage.base}", flush=True)
        if stage.base in self.images:
            base = self.images[stage.base]
            image = dataclasses.replace(base, folder=folder, environment=dict(base.environment))
            subprocess.run(["cp", "--archive", base.folder, folder], check=True)
        else:
            image = Image(folder, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
            subprocess.run(["cp", "--archive", self._debian(), folder], check=True)
        arguments: dict[str, str] = {}
        for instruction in stage.instructions:
            self._step(image, instruction, arguments)
        self.images[name] = image
        return image

    def _debian(self) -> Path:
        base = self.folder / "debian"
        if base.is_dir():
            return base
        started = time.monotonic()
        command = ["debootstrap", "--variant=minbase", self.suite, str(base), *([self.mirror] if self.mirror else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"debootstrap {self.suite}: {time.monotonic() - started:.0f} s, {size(base)} MB", flush=True)
        for path in SETTINGS:
            source, target = Path(path), base / path[1:]
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True, ignore_dangling_symlinks=True)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        return base

    def _step(self, image: Image, instruction: Instruction, arguments: dict[str, str]) -> None:
        text = filled_in(instruction.text, arguments | image.environment)
        match instruction.name:
            case "ARG":
                name = instruction.text.split("=")[0]
                value = assignments(instruction.text).get(name) or self.file.arguments.get(name, "")
                arguments[name] = INSTEAD.get(name, value)
            case "ENV":
                given = assignments(text)
                image.environment |= given | {name: value for name, value in INSTEAD.items() if name in given}
            case "USER":
                image.user = text
            case "WORKDIR":
                image.work = text
                (image.folder / text[1:]).mkdir(parents=True, exist_ok=True)
            case "SHELL":
                image.shell = tuple(instruction.words())
            case "COPY":
                self._copy(image, instruction)
            case "RUN":
                self._run(image, instruction, arguments)

    def _copy(self, image: Image, instruction: Instruction) -> None:
        *sources, target = instruction.words()
        to = image.folder / os.path.join(image.work, target)[1:]
        print(f"COPY {' '.join(instruction.flags)} {instruction.text}", flush=True)
        for flag in instruction.option("from"):
            for source in sources:
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "--archive", self.images[flag[""]].folder / source[1:], to], check=True)
            return
        for path in build_context():
            for source in sources:
                if source == "." or path == source:
                    place = to / path if source == "." else to / Path(path).name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / path, place)

    def _run(self, image: Image, instruction: Instruction, arguments: dict[str, str]) -> None:
        mounted = [self._mount(image, options) for options in instruction.option("mount")]
        before, started = size(image.folder), time.monotonic()
        print(f"RUN {instruction.text}", flush=True)
        output = self.folder / "output.txt"
        with open(output, "w", encoding="utf-8") as file:
            code = run(image, [*image.shell, instruction.text], arguments, file).returncode
        for target in mounted:
            subprocess.run(["umount", target], check=True)
            target.rmdir() if target.is_dir() else None
        print(
            f"  -> exit code {code}, {time.monotonic() - started:.0f} s, {size(image.folder) - before:+} MB", flush=True
        )
        if code:
            print("".join(output.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-30:]))
            raise SystemExit(f"a step of the Dockerfile failed with exit code {code}")

    def _mount(self, image: Image, options: dict[str, str]) -> Path:
        target = image.folder / options["target"][1:]
        match options["type"]:
            case "cache":
                source = self.folder / "caches" / options["target"].replace("/", "_")
                source.mkdir(parents=True, exist_ok=True)
            case "bind":
                source = self.images[options["from"]].folder / options["source"][1:]
            case "secret":
                source = Path("/etc") / options["id"]
                source = source if source.is_file() else Path("/dev/null")
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        subprocess.run(["mount", "--bind", source, target], check=True)
        return target


def _needed(stage: Stage, file: Dockerfile) -> list[str]:
    froms = [option for one in stage.instructions for option in one.option("from") + one.option("mount")]
    names = [stage.base, *(option.get("") or option.get("from", "") for option in froms)]
    return [name for name in names if name in file.stages]


def run(
    image: Image,
    command: list[str],
    arguments: dict[str, str] | None = None,
    output: TextIO | None = None,
    alone: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command in an image as its user, with /proc, /dev and this machine's folders of packages in it; alone:
    without a network."""
    own = {name: value for name, value in os.environ.items() if PROXIES.fullmatch(name)}
    environment = {**own, "DEBIAN_FRONTEND": "noninteractive", **image.environment, **(arguments or {})}
    user = ["setpriv", f"--reuid={image.user}", f"--regid={image.user}", "--clear-groups"] if image.user != "0" else []
    home = {"HOME": "/root" if image.user == "0" else "/home/trainer"}
    mounts = ["/proc", "/sys", "/dev", *package_folders()]
    for path in mounts:
        (image.folder / path[1:]).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind" if path == "/dev" else "--bind", path, image.folder / path[1:]], check=True)
    network = ["unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "bash"] if alone else []
    script = f"cd {image.work} && exec {shlex.join(command)}"
    try:
        return subprocess.run(
            [*network, "chroot", image.folder, *user, "/bin/bash", "-c", script],
            text=True,
            env=environment | home,
            stdout=output,
            stderr=output,
        )
    finally:
        for path in reversed(mounts):
            subprocess.run(["umount", "--recursive", "--lazy", image.folder / path[1:]], check=True)


def package_folders() -> list[str]:
    """Return the folders of packages on this machine that pip's settings name."""
    files = [path for name in ("/etc/pip.conf", "/etc/xdg/pip/pip.conf") if (path := Path(name)).is_file()]
    said = " ".join([path.read_text(encoding="utf-8") for path in files] + [os.environ.get("PIP_FIND_LINKS", "")])
    found = {match.removeprefix("file://") for match in re.findall(r"(?:file://)?(/[\w./-]+)", said)}
    return sorted(path for path in found if os.path.isdir(path) and not path.startswith("/etc"))


def remove(folder: Path) -> None:
    """Remove a folder, unless something of this machine is still mounted in it, as after an interruption: that would go
    too."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    if any(place.startswith(f"{folder}/") for place in mounted):
        print(
            f"{folder} is kept, since something is mounted in it until this command has ended; remove it then",
            file=sys.stderr,
        )
        return
    shutil.rmtree(folder)


def size(folder: Path) -> int:
    """Return what a folder holds, MB."""
    listed = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=1MB", folder], capture_output=True, text=True
    )
    return int(listed.stdout.split()[0])


CHECKS = {
    "train": ("operators", "instructions", "cpu_adam", "default_command", "shards", "two_ranks", "stop_and_go_on"),
    "sshd": ("shards", "over_ssh"),
}
"""What is tried in each image: functions of in_the_image.sh."""


def main() -> int:
    """Build, check, and remove everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder to make, with some 10 GB of space; removed at the end")
    parser.add_argument("--suite", default="bookworm", help="Debian's release; %(default)s has Python 3.11")
    parser.add_argument("--mirror", default="", help="of Debian's packages; debootstrap's own by default")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    arguments = parser.parse_args()
    if "IN_NAMESPACE" not in os.environ:
        again = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            sys.executable,
            "-m",
            __spec__.name,
        ]
        os.execvpe(again[0], again + sys.argv[1:], os.environ | {"IN_NAMESPACE": "1"})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(arguments.folder.resolve(), arguments.suite, arguments.mirror)
    failed = 0
    try:
        for stage, checks in CHECKS.items():
            image = trial.build(stage)
            print(f"\n== {stage}: {size(image.folder)} MB; user {image.user}", flush=True)
            shutil.copy(Path(__file__).with_name("in_the_image.sh"), image.folder / "tmp")
            for check in checks:
                print(f"\n-- {stage}: {check}", flush=True)
                code = run(image, ["bash", "/tmp/in_the_image.sh", check], alone=True).returncode
                print(f"  -> exit code {code}", flush=True)
                failed += code != 0
    finally:
        if not arguments.keep:
            remove(trial.folder)
    print(f"\n{failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
