"""The head and the loss in one: the product in the weights' precision, everything after it in fp32, and no fp32 copy of
all logits.

What the backward pass needs of the logits it makes in their own memory, piece by piece. A vocabulary of 50,257 is an
odd number of columns, for which Tensor Cores' kernels are slow; with columns of zeros up to a multiple of 64 the
products are the same to the bit, and the stored weights stay as they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from dialogpt_ds.errors import in_a_line
from dialogpt_ds.order.batches import IGNORED_LABEL

GPU_COLUMNS = 64
"""Multiple to which a GPU's head is padded: 128 bytes of half precision, the width of a Tensor Core kernel's loads and
of a cache line."""
GPU_PIECE, CPU_PIECE = 2_048, 256
"""Targets whose logits are there at a time with a chunked head: on a GPU as many as fill it, on a CPU as many as its
caches bear."""
GPU_ROOM, CPU_ROOM = 256 * 2**20, 2 * 2**20
"""Bytes of logits that are in fp32 at a time where nothing is compiled: enough to fill a GPU, or what a core's cache
holds."""


def columns_of(device: torch.device) -> int:
    """Return the multiple to which the head's columns are padded."""
    return GPU_COLUMNS if device.type == "cuda" else 1


def piece_of(device: torch.device) -> int:
    """Return the number of targets whose logits are computed at a time, where they are not to be there as a whole."""
    return GPU_PIECE if device.type == "cuda" else CPU_PIECE


def head_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    piece: int | None,
    columns: int,
) -> torch.Tensor:
    """Return each target's negative log-likelihood under the head's logits, [targets] fp32, in nats; 0 where there is
    no target.

    Args:
        hidden: [targets, width], states that predict the targets.
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        labels: [targets], IGNORED_LABEL where there is none.
        piece: targets whose logits are there at a time, computed again for the backward pass; None: all, kept for it.
        columns: multiple to which the vocabulary is padded for the products.
    """
    kind = autocast_dtype(hidden.device)
    if kind is None:
        return _HeadNll.apply(hidden, weight, bias, labels, piece, columns)
    hidden, weight, bias = hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadNll.apply(hidden, weight, bias, labels, piece, columns)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type in which products are computed where autocast is on; None where it is off, or there is none (on
    `meta`)."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class _HeadNll(torch.autograd.Function):
    """Cross-entropy of a linear head; gradients as of linear(), float(), cross_entropy(): probabilities in fp32,
    rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        piece: int | None,
        columns: int,
    ) -> torch.Tensor:
        kept = piece is None and any(ctx.needs_input_grad[:3])
        padded, padded_bias = _padded(weight, columns), None if bias is None else _padded(bias, columns)
        logits = None
        nll, normalizers = [], []
        for states, ids in _pieces(piece, hidden, labels):
            logits = functional.linear(states, padded, padded_bias)
            found, normalizer = _nll(logits[:, : weight.shape[0]], ids)
            nll.append(found)
            normalizers.append(normalizer)
        ctx.piece, ctx.columns, ctx.has_bias = piece, columns, bias is not None
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(normalizers), logits if kept else None)
        return torch.cat(nll)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, normalizers, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        vocabulary = weight.shape[0]
        padded, padded_bias = _padded(weight, ctx.columns), None if bias is None else _padded(bias, ctx.columns)
        of_hidden, of_weight, of_bias = [], _Sum(), _Sum()
        for states, ids, normalizer, factor in _pieces(ctx.piece, hidden, labels, normalizers, upstream):
            logits = functional.linear(states, padded, padded_bias) if kept is None else kept
            torch.ops.dialogpt_ds.nll_gradient_(logits[:, :vocabulary], ids, normalizer, factor)
            if wants_hidden:
                of_hidden.append(logits @ padded)
            if wants_weight:
                of_weight.add((logits.T @ states)[:vocabulary])
            if wants_bias:
                of_bias.add(logits[:, :vocabulary].sum(0, dtype=torch.float32))
        return (
            torch.cat(of_hidden) if wants_hidden else None,
            of_weight.total(weight.dtype) if wants_weight else None,
            of_bias.total(weight.dtype) if wants_bias else None,
            None,
            None,
            None,
        )


class _Sum:
    """Adds tensors up, in fp32 as soon as there are several: a sum in half precision loses half a percent over 27
    pieces (bf16)."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        if self._sum is not None:
            self._sum += part
        elif self._first is not None:
            self._sum = self._first.float().add_(part)
            self._first = None
        else:
            self._first = part

    def total(self, dtype: torch.dtype) -> torch.Tensor:
        total = self._first if self._sum is None else self._sum
        assert total is not None
        return total.to(dtype)


def _padded(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a tensor with zeros up to a multiple of `columns` in its first dimension; itself where it needs none."""
    missing = -tensor.shape[0] % columns
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor


def _pieces(piece: int | None, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    if piece is None:
        yield tensors
    else:
        yield from zip(*(tensor.split(piece) for tensor in tensors), strict=True)


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nll, normalizer = torch.ops.dialogpt_ds.nll(logits, labels)
    return nll, normalizer


@torch.library.custom_op("dialogpt_ds::nll", mutates_args=())
def nll_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's loss and the logarithm of its sum of exponentials, both [targets] fp32.

    Args:
        logits: [targets, vocabulary], in any precision.
        labels: [targets], IGNORED_LABEL where there is none.
    """
    if _compiled is not None and logits.device.type == _compiled.device:
        return _compiled.nll(logits, labels)
    parts = [_nll_of(*part) for part in _rows(logits, labels)]
    nll, normalizers = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return nll, normalizers


@nll_of.register_fake
def _(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op("dialogpt_ds::nll_gradient_", mutates_args=("logits",))
def gradient_in_place(
    logits: torch.Tensor, labels: torch.Tensor, normalizers: torch.Tensor, factors: torch.Tensor
) -> None:
    """Write factor * (probabilities - one at the label) over the logits, computed in fp32; 0 where there is no label.

    Args:
        logits: [targets, vocabulary], in any precision.
        labels: [targets], IGNORED_LABEL where there is none.
        normalizers: [targets] fp32, as nll_of() gives them.
        factors: [targets] fp32.
    """
    factors = torch.where(labels == IGNORED_LABEL, 0.0, factors)
    if _compiled is not None and logits.device.type == _compiled.device:
        _compiled.gradient(logits, labels, normalizers, factors)
        return
    for part in _rows(logits, labels, normalizers, factors):
        _gradient_of(*part)


@gradient_in_place.register_fake
def _(logits: torch.Tensor, labels: torch.Tensor, normalizers: torch.Tensor, factors: torch.Tensor) -> None:
    return None


def _nll_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = labels.clamp(min=0).unsqueeze(1)
    exact = logits.float()
    log_probabilities = functional.log_softmax(exact, dim=1).gather(1, places).squeeze(1)
    normalizer = exact.gather(1, places).squeeze(1) - log_probabilities
    return torch.where(labels == IGNORED_LABEL, 0.0, -log_probabilities), normalizer


def _gradient_of(logits: torch.Tensor, labels: torch.Tensor, normalizers: torch.Tensor, factors: torch.Tensor) -> None:
    gradient = logits.float()  # of fp32 it is the same tensor
    gradient.sub_(normalizers.unsqueeze(1)).exp_().mul_(factors.unsqueeze(1))
    gradient.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), factors.neg().unsqueeze(1))
    if gradient is not logits:
        logits.copy_(gradient)


def _gradient_of_whole(
    logits: torch.Tensor, labels: torch.Tensor, normalizers: torch.Tensor, factors: torch.Tensor
) -> None:
    """As _gradient_of(), in a form that a compiler makes one kernel of."""
    at_label = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    probabilities = (logits.float() - normalizers.unsqueeze(1)).exp()
    logits.copy_((probabilities - at_label.to(torch.float32)) * factors.unsqueeze(1))


def _rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield a few rows of each tensor at a time."""
    room = GPU_ROOM if tensors[0].device.type == "cuda" else CPU_ROOM
    rows = max(room // (4 * tensors[0].shape[1]), 1)
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class CompiledLoss:
    """The two passes over the logits, compiled: each is one kernel that reads them once (and writes them once,
    backward)."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._nll = torch.compile(_nll_of, dynamic=False)
        self._gradient = torch.compile(_gradient_of_whole, dynamic=False)

    def nll(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As nll_of()."""
        return self._nll(*_any_number(logits, labels))

    def gradient(self, *tensors: torch.Tensor) -> None:
        """As gradient_in_place()."""
        self._gradient(*_any_number(*tensors))


def _any_number(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Let one compiled function serve every number of targets."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    return tensors


_compiled: CompiledLoss | None = None


@torch.no_grad()  # as in the passes of _HeadNll: what is compiled is compiled for one of the two modes
def compile_loss(device: torch.device, vocabulary: int, kind: torch.dtype) -> str | None:
    """Let the loss on this kind of device be computed by compiled functions, if they can be compiled and are right.

    Args:
        device: where to.
        vocabulary: token ids of the head.
        kind: type of its logits.

    Returns:
        Why it can't be; None where it is. What is used then is slower, and equal.
    """
    global _compiled
    _compiled = None
    steps = torch.linspace(-1, 1, vocabulary, device=device)
    logits = (torch.linspace(-8, 8, 128, device=device).unsqueeze(1) * steps).to(kind)
    logits = _padded(logits.T, columns_of(device)).T.contiguous()[
        :, :vocabulary
    ]  # as it lies in memory after the product
    labels = torch.arange(128, device=device)
    labels[-1] = IGNORED_LABEL
    expected = nll_of(logits, labels)
    mine, theirs = logits.clone(), logits.clone()
    factors = torch.ones(128, device=device)
    _gradient_of(theirs, labels, expected[1], factors)
    from torch._inductor import config

    try:
        # Two kernels need no pool of compilers, which every rank of a host would start.
        with config.patch(compile_threads=1):
            # Through the operations, as a step does it: tensors look different to the compiler outside of them.
            _compiled = CompiledLoss(device.type)
            found = nll_of(logits, labels)
            gradient_in_place(mine, labels, expected[1], factors)
    except Exception as error:  # of a compiler or a driver; what it raises is its own matter
        _compiled = None
        return in_a_line(error)
    pairs = [*zip(found, expected, strict=True), (mine[:-1], theirs[:-1])]
    if not all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4) for a, b in pairs):
        _compiled = None
        return "what was compiled computes something else"
    return None
