"""Counting how often the host would wait, or waits, for a GPU: by whose code asks the device for a number."""

import collections
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout; tests.conftest would set an environment, which the checks on a GPU have of their own."""
OWNERS = ("dialogpt_ds", "deepspeed", "transformers")
OTHERS = "others"
"""Owner of a wait below which none of OWNERS stands."""
ASKING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::is_nonzero",
)
"""Operations whose result, or its shape, the host has to know."""
When = Callable[..., bool]


class Waits:
    """Numbers of waits by owner and place, as "engine.py train_step"."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def note(self) -> None:
        """Count one of where the program stands."""
        for frame in reversed(traceback.extract_stack()):
            owner = owner_of(Path(frame.filename))
            if owner:
                self.counts[owner, f"{Path(frame.filename).name} {frame.name}"] += 1
                return
        self.counts[OTHERS, "?"] += 1

    def by_owner(self) -> dict[str, dict[str, int]]:
        """Return the numbers of all owners, those with none too."""
        found: dict[str, dict[str, int]] = {owner: {} for owner in (*OWNERS, OTHERS)}
        for (owner, place), count in self.counts.items():
            found[owner][place] = count
        return found


def owner_of(file: Path) -> str | None:
    """Return whose a source file is, whatever the folders are called in which it was installed or checked out."""
    parts = file.relative_to(ROOT).parts if file.is_relative_to(ROOT) else file.parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    return next((name for name in OWNERS if name in parts), None)


@contextmanager
def watched(waits: Waits, owner: Any, name: str, when: When = lambda *_, **__: True) -> Iterator[None]:
    """Count the calls of a function, or those of some arguments."""
    real = getattr(owner, name)

    def wrapper(*positional: Any, **named: Any) -> Any:
        if when(*positional, **named):
            waits.note()
        return real(*positional, **named)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextmanager
def counted_on_cpu(waits: Waits) -> Iterator[None]:
    """Count what would wait: operations by their name, and what is none: a copy from pageable memory, a list of
    numbers, a full stop."""
    from deepspeed.accelerator import get_accelerator

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ASKING:
                waits.note()
            return func(*args, **(kwargs or {}))

    with ExitStack() as stack:
        stack.enter_context(watched(waits, torch, "tensor", lambda *_, **named: named.get("device") is not None))
        stack.enter_context(watched(waits, torch.Tensor, "tolist"))
        stack.enter_context(watched(waits, torch.Tensor, "cpu"))
        stack.enter_context(watched(waits, type(get_accelerator()), "synchronize"))
        stack.enter_context(Mode())
        yield
