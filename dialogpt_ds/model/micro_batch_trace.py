"""What a forward and backward pass would do on a device that is not here: every operation, its bytes, and the memory at
each moment.

The model is built on PyTorch's device `meta`, on which tensors have shapes and types but no numbers.
"""

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dialogpt_ds.model.activation import fuse_activations, recompute_activations
from dialogpt_ds.model.attention import VARLEN, register_varlen
from dialogpt_ds.model.loss import Planned, TargetLoss
from dialogpt_ds.model.saved_bytes import activations_measured
from dialogpt_ds.model.workload import META, Workload

WITHOUT_KERNEL = {
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
WRITES_ALONE = {
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones_like",
    "full",
    "full_like",
    "new_full",
    "fill_",
    "zero_",
    "arange",
}
GATHERS = {"embedding", "index", "index_select", "gather"}
"""Read of their first tensor what they write, not all of it."""


def planned_loss(
    config: Any, dtype: torch.dtype, planned: Planned, chunked_head: bool = False, checkpointed: bool = False
) -> TargetLoss:
    """Return a model's loss on `meta`.

    Args:
        config: transformers' configuration.
        dtype: of weights and activations.
        planned: what is known of the model, and the device that is meant.
        chunked_head: as TargetLoss takes it.
        checkpointed: whether layers are computed again for the backward pass.
    """
    from transformers import AutoModelForCausalLM

    implementation = {}
    if planned.isolation in ("varlen", "flash"):
        register_varlen()
        implementation["attn_implementation"] = VARLEN
    elif getattr(config, "_attn_implementation", None) == VARLEN:
        implementation["attn_implementation"] = "sdpa"
    with META:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **implementation)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_registered(planned.device))
    fuse_activations(model)
    if checkpointed:
        recompute_activations(model)
    return TargetLoss(model, chunked_head, planned).train()


@dataclass(frozen=True)
class Call:
    """An operation of PyTorch's that launches a kernel."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    """Of all tensors that go in or come out."""
    dtype: torch.dtype
    operations: float
    """Multiplications and additions of matrix products and attention; 0 for all others."""
    reads: tuple[tuple[int, int], ...]
    """Numbers of memory blocks, and bytes read of each."""
    writes: tuple[tuple[int, int], ...]
    devices: frozenset[str]
    aligned: bool
    """Whether rows of all matrices begin at multiples of 16 bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes read and written."""
        return sum(size for _, size in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Trace:
    """A micro-batch's forward and backward pass."""

    workload: Workload
    forward: list[Call]
    backward: list[Call]
    kept: Counter[torch.dtype]
    """Bytes kept for the backward pass, by type, without weights."""
    peak: int
    """Most bytes at a time in tensors that are no weights, inputs, or finished gradients of weights."""
    waits: int
    """How often the host waits for the device to know a number."""

    @property
    def calls(self) -> list[Call]:
        """Both passes' in their order."""
        return [*self.forward, *self.backward]


def trace(loss: TargetLoss, workload: Workload, turn_ids: bool = False) -> Trace:
    """Run a loss on `meta` forward and backward and write down what happens."""
    recorder = _Recorder(workload)
    handles = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in loss.parameters()]
    try:
        with recorder:
            with activations_measured(loss) as saved:
                weighted = loss(**workload.inputs(turn_ids)).weighted
            forward, recorder.calls = recorder.calls, []
            weighted.backward()
    finally:
        for handle in handles:
            handle.remove()
    return Trace(workload, forward, recorder.calls, saved.by_dtype, recorder.peak, recorder.waits)


def _drop(parameter: torch.Tensor) -> None:
    """Forget a finished gradient, which belongs to the model's states."""
    parameter.grad = None


def _registered(device: torch.device) -> str:
    """Let transformers know its sdpa with the kernel that a device has for it; returns under which name."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(*args: Any, **named: Any) -> Any:
        with _Kernels(device):
            return sdpa_attention_forward(*args, **named)

    name = f"sdpa_planned_{device.type}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class _Kernels(TorchFunctionMode):
    """Lets scaled_dot_product_attention be the kernel that a device has for it; on `meta` PyTorch would take it
    apart."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.on_cpu = device.type == "cpu"

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if enable_gqa:
            shared = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        if self.on_cpu:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _Recorder(TorchDispatchMode):
    """Writes down every call that launches a kernel, and what memory is in use."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.peak = self.waits = 0
        self._pairs = workload.computed_pairs
        self._live = 0
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return 0  # a short cut that depends on numbers is not taken
        out = func(*args, **named)
        into, outcome = _tensors((args, named)), _tensors(out)
        known = {id(tensor.untyped_storage()) for tensor in into}
        for storage in {id(t.untyped_storage()): t.untyped_storage() for t in outcome}.values():
            if id(storage) not in known:
                self._allocated(storage)
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in WITHOUT_KERNEL:
            self.calls.append(self._call(func, name, args, named, out))
        return out

    def _allocated(self, storage: Any) -> None:
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self._live -= size

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            self._numbers[storage] = next(self._next)
        return self._numbers[storage]

    def _call(self, func: Any, name: str, args: Sequence[Any], named: dict[str, Any], out: Any) -> Call:
        into, outcome = _tensors((args, named)), _tensors(out)
        returned = {id(tensor) for tensor in outcome}
        pairs = zip(func._schema.arguments, args, strict=False)
        in_place = [
            value
            for argument, value in pairs
            if argument.is_write and id(value) not in returned and torch.is_tensor(value)
        ]
        written = [*outcome, *in_place]
        if name in WRITES_ALONE:
            read = []
        elif name in GATHERS:
            read = written
        else:
            read = into
        both = [tensor for tensor in (*into, *written) if tensor.dim()]
        return Call(
            name,
            tuple(tuple(tensor.shape) for tensor in both),
            next((t.dtype for t in both if t.is_floating_point()), torch.int64),
            self._operations(func, name, into, args, named, out),
            tuple((self._number(tensor), _bytes_of(tensor)) for tensor in read),
            tuple((self._number(tensor), _bytes_of(tensor)) for tensor in written),
            frozenset(str(tensor.device) for tensor in both),
            all(_is_aligned(tensor) for tensor in both),
        )

    def _operations(self, func: Any, name: str, into: list[torch.Tensor], args: Any, named: Any, out: Any) -> float:
        if "varlen_attn" in name:
            # Two products for each pair forward; backward the first again, and four for the gradients.
            products = 5 if "backward" in name else 2
            return 2.0 * products * self._pairs * into[0].shape[1] * into[0].shape[2]
        count = flop_registry.get(func._overloadpacket)
        return float(count(*args, **named, out_val=out)) if count else 0.0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's numbers; those that stand for several, of an expanded one, are read once."""
    sizes: Iterable[int] = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    number = 1
    for size in sizes:
        number *= size
    return number * tensor.element_size()


def _is_aligned(tensor: torch.Tensor) -> bool:
    return all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride() if stride > 1)
