"""Where DeepSpeed's operations are built on first use: a folder for each environment, as two in one rebuild each
other's at every start."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

from dialogpt_ds.files import replace_file, sha256_of_json
from dialogpt_ds.launching.machine_facts import built_ahead, existing_part
from dialogpt_ds.launching.needed_ops import needed_ops, unbuilt
from dialogpt_ds.launching.processes import Environment
from dialogpt_ds.versions import versions

OPS_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Names the folder to torch's extension builder."""
ABOUT = "environment.txt"
"""File in the folder, for a person who wonders whose it is."""
DIGITS = 12
CPU_INFO = Path("/proc/cpuinfo")
CPU_KEYS = ("model name", "CPU implementer", "CPU part", "flags", "Features")
"""Of /proc/cpuinfo on x86 and ARM: operations are built with -march=native, for the processor that builds them."""


def use_own_folder(environment: Environment = os.environ) -> None:
    """Let operations be built in this environment's own folder, where nobody has named one and it can be made."""
    if environment.get(OPS_VARIABLE):
        return
    folder = own_folder(environment)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ABOUT).exists():
            text = "".join(f"{name}: {value}\n" for name, value in _environment_facts().items())
            with replace_file(folder / ABOUT, durable=False) as file:  # of all ranks at once
                file.write(text.encode("utf-8"))
    except OSError:
        return  # then torch's own folder, and its own error where that can't be made either
    if os.access(folder, os.W_OK):
        environment[OPS_VARIABLE] = str(folder)


def own_folder(environment: Environment = os.environ) -> Path | None:
    """Return this environment's folder below the user's cache, whether it exists or not; None for a user without a
    home."""
    cache = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # a relative one is to be ignored (XDG base directories)
        cache = os.path.expanduser("~/.cache")
    return (
        None
        if cache.startswith("~")
        else Path(cache) / "dialogpt_ds" / "ops" / sha256_of_json(_environment_facts())[:DIGITS]
    )


def op_folder(environment: Environment = os.environ) -> Path:
    """Return where this environment's operations are, or would be built: as use_own_folder() decides, without making
    anything."""
    if named := environment.get(OPS_VARIABLE):
        return Path(named)
    own = own_folder(environment)
    if own is not None and os.access(existing_part(own), os.W_OK):
        return own
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def _environment_facts() -> dict[str, str]:
    """Return all that an operation's binary depends on, by name."""
    installed = versions()
    return {
        "prefix": sys.prefix,
        "python": str(sys.implementation.cache_tag),
        "torch": installed["torch"],
        "deepspeed": installed["deepspeed"],
        "C library": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
    } | _cpu_facts()


def _cpu_facts() -> dict[str, str]:
    try:
        first, _, _ = CPU_INFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    except OSError:
        return {"processor": platform.processor()}
    found = dict(line.partition(":")[::2] for line in first.splitlines())
    return {name.strip(): value.strip() for name, value in found.items() if name.strip() in CPU_KEYS}


def is_built(name: str, folder: Path) -> bool:
    """Return whether an operation is in the folder, built with the PyTorch that runs here; another one's is built
    anew."""
    from torch.utils.cpp_extension import include_paths

    # In torch's own folder there is one for Python and CUDA between.
    for place in (folder / name, *folder.glob(f"*/{name}")):
        try:
            orders = (place / "build.ninja").read_text(encoding="utf-8", errors="replace").replace("$ ", " ")
        except OSError:
            continue
        if (place / f"{name}.so").is_file() and f" {include_paths()[0]} " in orders:
            return True
    return False


def build_notice(deepspeed: dict[str, Any], on_gpu: bool) -> str:
    """Return what to say before a run builds operations, which keeps it silent for a while; "" where it has all that it
    uses.

    Args:
        deepspeed: the final configuration.
        on_gpu: whether the run is on GPUs.
    """
    folder = op_folder()
    ops = [op for op in unbuilt(needed_ops(deepspeed, on_gpu), built_ahead(on_gpu)) if not is_built(op.name, folder)]
    if not ops:
        return ""
    what = ", ".join(f"{op.name} ({op.why})" for op in ops)
    return (
        f"DeepSpeed builds {what} now, once for this environment, in {folder}: about a "
        f"minute{' each' if len(ops) > 1 else ''}"
    )
