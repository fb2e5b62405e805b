"""Each environment builds DeepSpeed's operations in a folder of its own."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dialogpt_ds.launching import op_folder as module
from dialogpt_ds.launching.op_folder import ABOUT, OPS_VARIABLE, build_notice, is_built, op_folder, use_own_folder

OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def chosen(home: Path, **variables: str) -> str | None:
    environment = {"XDG_CACHE_HOME": str(home)} | variables
    use_own_folder(environment)
    return environment.get(OPS_VARIABLE)


def another_prefix(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "prefix", "/another/venv")


def another_processor(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    other = folder / "cpuinfo"
    other.write_text("processor\t: 0\nmodel name\t: Another CPU\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n")
    monkeypatch.setattr(module, "CPU_INFO", other)


def another_deepspeed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    versions = module.versions()
    monkeypatch.setattr(module, "versions", lambda: versions | {"deepspeed": "0.19.9"})


@pytest.mark.parametrize("change", [another_prefix, another_processor, another_deepspeed])
def test_what_another_environment_would_build_has_another_folder(
    change: Callable[[pytest.MonkeyPatch, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = chosen(tmp_path)
    change(monkeypatch, tmp_path)
    others = chosen(tmp_path)
    monkeypatch.undo()
    assert own == chosen(tmp_path) != others
    assert own is not None
    assert Path(own).parent == tmp_path / "dialogpt_ds" / "ops"


def test_the_folder_says_whose_it_is(tmp_path: Path) -> None:
    lines = Path(chosen(tmp_path) or "", ABOUT).read_text().splitlines()
    assert f"prefix: {sys.prefix}" in lines
    assert any(line.startswith("torch: 2.") for line in lines)


def test_a_folder_that_somebody_named_is_kept(tmp_path: Path) -> None:
    assert chosen(tmp_path, **{OPS_VARIABLE: "/scratch/ops"}) == "/scratch/ops"
    assert list(tmp_path.iterdir()) == []
    assert op_folder({OPS_VARIABLE: "/scratch/ops"}) == Path("/scratch/ops")


def test_where_no_folder_can_be_made_torchs_own_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert chosen(file) is None


def test_a_user_without_a_home_has_torchs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert chosen(Path("relative")) is None
    assert list(tmp_path.iterdir()) == []


def test_asking_for_the_folder_makes_nothing(tmp_path: Path) -> None:
    found = op_folder({"XDG_CACHE_HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
    assert str(found) == chosen(tmp_path)


def build(folder: Path, name: str, include: str) -> None:
    """Write what a build by a PyTorch with these headers leaves."""
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.so").touch()
    escaped = include.replace(" ", "$ ")
    (folder / name / "build.ninja").write_text(f"cflags = -DX -isystem {escaped} -isystem {escaped}/torch -O2\n")


def test_what_another_pytorch_built_is_not_built(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    build(tmp_path, "mine", include_paths()[0])
    build(tmp_path, "others", "/another/venv/torch/include")
    build(tmp_path / "py311_cpu", "below", include_paths()[0])
    (tmp_path / "mine_too").mkdir()
    assert [name for name in ("mine", "others", "below", "mine_too") if is_built(name, tmp_path)] == ["mine", "below"]


def test_what_has_to_be_built_is_said_with_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    monkeypatch.setenv(OPS_VARIABLE, str(tmp_path))
    assert build_notice(OFFLOADED, on_gpu=False) == (
        "DeepSpeed builds deepspeed_shm_comm (ranks on a CPU exchange data through shared memory), cpu_adam (the "
        f"optimizer is offloaded to the host) now, once for this environment, in {tmp_path}: about a minute each"
    )
    build(tmp_path, "cpu_adam", include_paths()[0])
    assert build_notice(OFFLOADED, on_gpu=True) == ""
    assert build_notice(OFFLOADED, on_gpu=False).endswith(f", in {tmp_path}: about a minute")
