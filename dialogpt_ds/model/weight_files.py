"""Files of weights, looked into without running anything that is in them."""

import zipfile
from pathlib import Path
from typing import Any


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
