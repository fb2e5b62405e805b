"""What a forward pass keeps for its backward pass, measured."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def parts_here(parameters: Iterable[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    """Yield what this rank holds of parameters: whole ones, and the parts that ZeRO-3 keeps of those that are not
    gathered."""
    for parameter in parameters:
        yield parameter.data
        part = getattr(parameter, "ds_tensor", None)
        if part is not None:
            yield part


class SavedBytes:
    """Bytes that a forward pass keeps for its backward pass."""

    def __init__(self) -> None:
        self.by_dtype: Counter[torch.dtype] = Counter()

    @property
    def total(self) -> int:
        """Of all types."""
        return sum(self.by_dtype.values())


@contextmanager
def activations_measured(module: torch.nn.Module) -> Iterator[SavedBytes]:
    """Count, in forward passes inside of the block, what autograd saves that is neither a weight nor counted
    already."""
    parameters = list(module.parameters())
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    stay = {parameter.untyped_storage()._cdata for parameter in parameters if not hasattr(parameter, "ds_tensor")}
    seen: set[int] = set()
    saved = SavedBytes()

    def weights() -> set[int]:
        # Asked each time: ZeRO-3 gives a parameter other memory while it is gathered.
        return stay | {part.untyped_storage()._cdata for part in parts_here(divided)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()._cdata  # its address, which one on the device `meta` has, too
        if place not in seen and place not in weights():
            seen.add(place)
            saved.by_dtype[tensor.dtype] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
