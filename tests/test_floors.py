"""A package imports only what stands below it: read from the top, as in dialogpt_ds/README.md."""

import ast
from pathlib import Path

from tests.conftest import ROOT

FLOORS = (
    "commands", "doctor", "training", "dashboard", "replies", "logs", "preprocessing", "export", "checkpoints", "model",
    "plots", "order", "distributed", "launching", "config", "shards", "conversations", "dialogpt_ds",
)  # fmt: skip
"""The last is the modules that belong to no package."""


def package_of(module: str) -> str:
    """Return the package of a module, or of a name in one: dialogpt_ds.order.windows -> order."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / "dialogpt_ds" / parts[1]).is_dir() else parts[0]


def imports_of(file: Path) -> set[str]:
    """Return the packages of ours that a file imports, also inside of functions."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    found = [f"{node.module}.{name.name}" for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names]
    found += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return {package_of(name) for name in found if name.split(".")[0] == "dialogpt_ds"}


def test_no_arrow_runs_up() -> None:
    upward, seen = [], set()
    for file in (ROOT / "dialogpt_ds").rglob("*.py"):
        package = package_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        seen.add(package)
        upward += [
            f"{file.relative_to(ROOT)} imports {other}"
            for other in imports_of(file) - {package}
            if FLOORS.index(other) <= FLOORS.index(package)
        ]
    assert upward == []
    assert seen == set(FLOORS), "a new package has a floor"
