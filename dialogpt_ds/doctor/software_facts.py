"""What the Python of this host has: packages and their versions, this package's own code, PyTorch and DeepSpeed at work."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import dialogpt_ds
from dialogpt_ds.doctor.facts import HostGpu, Request
from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.shards.manifest import MANIFEST
from dialogpt_ds.versions import code_sha256, git_revision


def code(request: Request) -> dict[str, Any]:
    """The package's files, and what of the run's other files is there."""
    manifests = {folder: Path(folder, MANIFEST) for folder in request.folders}
    return {
        "executable": sys.executable,
        "folder_is_there": os.path.isdir(request.folder),
        "code": code_sha256(),
        "manifests": {folder: sha256_of_file(file) if file.is_file() else "" for folder, file in manifests.items()},
    }


def packages(request: Request) -> dict[str, Any]:
    """Versions of Python, of this package and of all that it requires."""
    names = [requirement_name(line) for line in required()]
    found = {name: _version(name) for name in names}
    return {"packages": {"python": platform.python_version(), "dialogpt-ds": dialogpt_ds.__version__} | found}


def required() -> list[str]:
    """Return what the package requires without its extras, as lines of PEP 508; nothing where it was not installed."""
    try:
        return [line for line in requires("dialogpt-ds") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def requirement_name(line: str) -> str:
    """Return the name of a requirement."""
    from packaging.requirements import Requirement

    return Requirement(line).name


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def revision(request: Request) -> dict[str, Any]:
    """The commit of the code."""
    found = git_revision()
    return {"revision": found["commit"] if found else ""}


def torch_facts(request: Request) -> dict[str, Any]:
    """CUDA as PyTorch sees it."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "num_visible": 0}
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return found
    if not torch.cuda.is_available():
        return found | {"torch_error": _why_no_cuda()}
    found |= {"num_visible": torch.cuda.device_count(), "architectures": torch.cuda.get_arch_list()}
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return found | {"gpus_of_torch": [HostGpu(p.name, p.total_memory, 0, f"{p.major}.{p.minor}") for p in properties]}


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).partition("\n")[0]
    return "torch.cuda.is_available() is false"


def deepspeed_ops(request: Request) -> dict[str, Any]:
    """DeepSpeed's compiled operations, as its ds_report lists them."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    from dialogpt_ds.launching.op_folder import is_built, op_folder

    fits = accelerator_name == get_accelerator().device_name()
    folder = op_folder()
    return {
        "ops_folder": str(folder),
        "ops_in_folder": sorted(name for name in ALL_OPS if is_built(name, folder)),
        "ops_built": sorted(name for name, built in installed_ops.items() if built and fits),
        "ops_compatible": {name: bool(probe_is_compatible(builder)) for name, builder in ALL_OPS.items()},
    }


def requirements(request: Request) -> dict[str, Any]:
    """Whether the run's precision and offload can be had, as the trainer itself asks it."""
    from dialogpt_ds.errors import UserError
    from dialogpt_ds.training.requirements import check_requirements

    if not request.precision:
        return {}
    try:
        return {"requirement_warning": check_requirements(request.precision, request.deepspeed) or ""}
    except UserError as error:
        return {"requirement_problem": str(error)}
