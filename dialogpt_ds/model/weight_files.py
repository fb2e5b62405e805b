"""Files of weights, looked into without running anything that is in them."""

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import RunError

OTHER_MODEL = "Its checksum is the hub's, so it was published like this: take another model or another --revision."


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the floating-point tensors of a .safetensors or a pickled file.

    Raises:
        ValueError: something in a pickled file is no tensor.
        Exception: whatever the readers raise for a damaged or hostile file.
    """
    return _safetensors_shapes(path) if path.suffix == ".safetensors" else _pickle_shapes(path)


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the header alone; the library refuses one that does not fit the file's size."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        parts: dict[str, Any] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        return {name: tuple(part.get_shape()) for name, part in parts.items() if "F" in part.get_dtype()}


def _pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read as transformers would: tensors alone. A file of before 2020 can't be mapped, and is read whole."""
    import torch

    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    others = [name for name, tensor in weights.items() if not torch.is_tensor(tensor)]
    if others:
        raise ValueError(f"{others[0]} is no tensor")
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if tensor.is_floating_point()}


def check_weights(folder: Path, names: Sequence[str]) -> int:
    """Open the weights among `names` without running anything that is in them; return their number of parameters.

    A head that is tied to the embedding counts once, and GPT-2's stored masks of attention don't.

    Raises:
        RunError: a file can't be opened in this way, or an index names a file that is not there.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if name.endswith(".index.json"):
            parts = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            if missing := sorted(parts - set(names)):
                raise RunError(f"{path} names {', '.join(missing)}, which the repository does not have. {OTHER_MODEL}")
        elif name.endswith((".safetensors", ".bin")):
            try:
                shapes |= shapes_in(path)
            except Exception as error:  # a damaged or hostile file makes the readers raise anything
                # torch says what it objects to in one line among its advice to load without safety.
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
                detail = f"{type(error).__name__}: {next((line for line in lines if 'GLOBAL' in line), lines[0])}"
                raise RunError(
                    f"{path} can't be opened safely ({detail}), so the model is not used. {OTHER_MODEL}"
                ) from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings", True):
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for name, shape in shapes.items() if not _is_mask(name, shape))


def _is_mask(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".attn.masked_bias") or (name.endswith(".attn.bias") and len(shape) == 4)
