"""The loss on the GPU, in every way to keep examples apart, against fp32 on the CPU: its value, its gradients, and who
sees whom."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.model import head
from dialogpt_ds.model.activation import fuse_activations
from dialogpt_ds.model.attention import VARLEN, register_varlen, set_attention
from dialogpt_ds.model.flops import DTYPES
from dialogpt_ds.model.loss import Inputs, TargetLoss, to_tensors
from dialogpt_ds.order.batches import IGNORED_LABEL, MicroBatch, RankSlice, rank_step
from dialogpt_ds.order.mixture import Mixture, MixtureKey, MixturePosition
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.order.windows import BLOCKS_PER_WINDOW
from dialogpt_ds.shards.reader import ShardDirectory
from tests.gpu.common import DEVICE, ON_GPU, LeftOutError, checked, shards

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 5e-2
"""Relative; that of the gradient is of the norm over the whole model. Half precision is the larger part of both."""
SCALE = 2.0**12
"""Of the loss before the backward pass, for fp16."""
LAYERS, ROWS, WIDTH = (4, 4, 256) if ON_GPU else (1, 3, 64)
VOCABULARY = 50_257
COLUMNS = VOCABULARY if ON_GPU else 1_003
"""Of the head where it is alone; as odd a number."""


@dataclass(frozen=True)
class Found:
    """What one way to compute the loss gave; all fp32 on the CPU."""

    nll: torch.Tensor
    """[targets]."""
    gradient: torch.Tensor
    """Of the whole model, flat."""
    kernels: list[str]
    """Names of the GPU's kernels for attention."""


def main() -> None:
    """Make the checks."""
    micro_batch = packed_rows()
    reference = found_by(loss_of("sdpa", "fp32", "cpu"), micro_batch, "cpu")
    precisions: tuple[Precision, ...] = ("bf16", "fp16")
    for precision in precisions:
        for way in ("sdpa", VARLEN, "eager"):
            with checked(f"loss.{way}.{precision}") as details:
                details |= compared(way, precision, micro_batch, reference)
    apart: tuple[tuple[str, Precision], ...] = (("sdpa", "fp32"), ("eager", "fp32"), (VARLEN, "bf16"), (VARLEN, "fp16"))
    for way, precision in apart:
        with checked(f"loss.isolation.{way}.{precision}") as details:
            details |= isolated(way, precision, micro_batch)
    with checked("loss.gelu_fp16") as details:
        details |= gelu_in_fp16()
    for precision in precisions:
        with checked(f"loss.padded_head.{precision}") as details:
            details |= padded_head(DTYPES[precision])
        with checked(f"loss.compiled.{precision}") as details:
            details |= compiled(DTYPES[precision])


def packed_rows() -> MicroBatch:
    """Return rows with several examples each."""
    directory = ShardDirectory.open(str(shards("long")), "check")
    length = directory.manifest.max_seq_length
    key = OrderKey(directory.manifest.fingerprint, 42, length, BLOCKS_PER_WINDOW, True)
    batch = Mixture([directory], MixtureKey((key,), (1,)), [()]).batch(MixturePosition.start(), ROWS)
    return rank_step(batch, RankSlice(0, 1, ROWS, 1), length, directory.manifest.eos_id).micro_batches[0]


def loss_of(way: str, precision: Precision, device: str) -> TargetLoss:
    """Return the loss of a small GPT-2, the same in every call, as the trainer makes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS, n_embd=WIDTH, n_head=WIDTH // 64 or 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    )
    fuse_activations(model)
    if way == VARLEN and ON_GPU:
        set_attention(model, "varlen", precision, 0.0)
    elif way == VARLEN:
        register_varlen()
        model.set_attn_implementation(VARLEN)
    else:
        model.set_attn_implementation(way)
    loss = TargetLoss(model)
    assert loss.isolation == ("varlen" if way == VARLEN else "mask"), loss.isolation
    return loss.to(device, DTYPES[precision])


def found_by(loss: TargetLoss, micro_batch: MicroBatch, device: str) -> Found:
    """Compute forward and backward."""
    inputs = to_tensors(micro_batch, device)
    nll, kernels = with_kernels(lambda: nll_of(loss, inputs))
    gradient = torch.cat([(p.grad.float() / SCALE).flatten().cpu() for p in loss.parameters() if p.grad is not None])
    return Found(nll, gradient, kernels)


def nll_of(loss: TargetLoss, inputs: Inputs) -> torch.Tensor:
    """Return each target's loss, [targets] fp32 on the CPU; the gradients are left in the parameters.

    The loss is a sum of weight * nll, so its gradient after the weights is nll.
    """
    loss.zero_grad()
    weights = inputs["weights"].clone().requires_grad_()
    weighted = loss(**(inputs | {"weights": weights})).weighted
    (weighted * (SCALE / float(inputs["weights"].sum()))).backward()
    assert weights.grad is not None
    return (weights.grad * float(inputs["weights"].sum()) / SCALE).cpu()


def with_kernels(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
    """Do some work, and return what it gave and the names of the kernels for attention that it ran."""
    if not ON_GPU:
        return work(), []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        given = work()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA}
    parts = ("flash", "fmha", "attention", "attn", "softmax")
    return given, sorted(name[:90] for name in names if any(part in name.lower() for part in parts))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of a difference beside that of what is expected; NaN where something is not finite."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compared(way: str, precision: Precision, micro_batch: MicroBatch, reference: Found) -> dict[str, Any]:
    """Compare a way on the device in half precision with fp32 on the CPU."""
    found = found_by(loss_of(way, precision, DEVICE), micro_batch, DEVICE)
    loss, gradient = relative(found.nll, reference.nll), relative(found.gradient, reference.gradient)
    assert loss < LOSS_TOLERANCE, f"the losses differ by {loss:.2e} of their size"
    assert gradient < GRADIENT_TOLERANCE, f"the gradients differ by {gradient:.2e} of their norm"
    if ON_GPU and way == VARLEN:
        assert any("flash" in name.lower() for name in found.kernels), (
            f"no FlashAttention among the kernels: {found.kernels}"
        )
    return {"loss_error": loss, "gradient_error": gradient, "kernels": found.kernels}


def isolated(way: str, precision: Precision, micro_batch: MicroBatch) -> dict[str, Any]:
    """Change the tokens of one example: its own losses must change, and those of all others must stay as they are to
    the bit."""
    loss = loss_of(way, precision, DEVICE)
    inputs = to_tensors(micro_batch, DEVICE)
    places, real = inputs["target_places"].cpu(), inputs["labels"].cpu() != IGNORED_LABEL
    length, starts = inputs["input_ids"].shape[1], micro_batch.example_starts.tolist()

    def targets_in(begin: int, end: int) -> bool:
        return bool((real & (places >= begin) & (places < end)).any())

    begin, end = next(
        (begin, end)
        for begin, end in itertools.pairwise(starts)
        if targets_in(begin, end) and targets_in(end, -(-end // length) * length)
    )  # with another one after it in its row, which would see it
    before = nll_of(loss, inputs)
    changed = inputs["input_ids"].clone().view(-1)
    changed[begin:end] = (changed[begin:end] + 7) % VOCABULARY
    after = nll_of(loss, inputs | {"input_ids": changed.view_as(inputs["input_ids"])})
    own = real & (places >= begin) & (places < end)
    others = real & ~own
    assert (before[own] != after[own]).any(), "another example's tokens change its own losses"
    differ = int((before[others] != after[others]).sum())
    assert differ == 0, f"{differ} of {int(others.sum())} losses of other examples changed"
    return {"examples": len(starts) - 1, "targets": int(real.sum())}


def gelu_in_fp16() -> dict[str, Any]:
    """Large pre-activations in fp16: transformers' own gelu_new has NaN gradients there, the kernel that takes its
    place none."""
    from transformers.activations import NewGELUActivation

    found = {}
    holder = nn.Sequential(NewGELUActivation())
    for name in ("theirs", "ours"):
        x = torch.tensor([-200.0, -1.0, 1.0, 200.0], device=DEVICE, dtype=torch.float16, requires_grad=True)
        y = holder(x)
        y.sum().backward()
        assert x.grad is not None
        found[name] = bool(y.isfinite().all() and x.grad.isfinite().all())
        found[f"{name}_gradient"] = str(x.grad.tolist())
        fuse_activations(holder)
    assert found["ours"], found
    return found


def head_inputs(targets: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states, weight and labels of a head of as many columns as GPT-2's, or fewer."""
    torch.manual_seed(1)
    hidden = torch.randn(targets, WIDTH, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(COLUMNS, WIDTH, device=DEVICE) * 0.1).to(dtype).requires_grad_()
    labels = torch.randint(0, COLUMNS, (targets,), device=DEVICE)
    labels[-3:] = IGNORED_LABEL
    return hidden, weight, labels


def of_the_head(targets: int, dtype: torch.dtype, columns: int) -> list[torch.Tensor]:
    """Return losses and gradients of the head, padded to a multiple of columns."""
    hidden, weight, labels = head_inputs(targets, dtype)
    nll = head.head_nll(hidden, weight, None, labels, None, columns)
    (nll.sum() * 16).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [nll.detach(), hidden.grad, weight.grad]


def padded_head(dtype: torch.dtype) -> dict[str, Any]:
    """Compare the head padded to 64 columns with the head as it is; their products may be summed in another order on a
    GPU."""
    padded, plain = (of_the_head(384, dtype, columns) for columns in (head.GPU_COLUMNS, 1))
    errors = [relative(a, b) for a, b in zip(padded, plain, strict=True)]
    assert max(errors) < LOSS_TOLERANCE, f"losses, gradients of states and of weights differ by {errors}"
    return {"errors": errors, "to_the_bit": all(torch.equal(a, b) for a, b in zip(padded, plain, strict=True))}


def compiled(dtype: torch.dtype) -> dict[str, Any]:
    """Compile the passes over the logits, and compare with those that are not, for several numbers of targets."""
    import time

    started = time.perf_counter()
    problem = head.compile_loss(torch.device(DEVICE), COLUMNS, dtype)
    seconds = time.perf_counter() - started
    if problem and not ON_GPU:
        raise LeftOutError(f"nothing can be compiled here: {problem}")
    assert problem is None, f"it can't be compiled: {problem}"
    fast, graphs, errors = head._compiled, num_graphs(), []
    try:
        for targets in (128, 384, 640):
            found = of_the_head(targets, dtype, head.columns_of(torch.device(DEVICE)))
            head._compiled = None
            expected = of_the_head(targets, dtype, head.columns_of(torch.device(DEVICE)))
            head._compiled = fast
            errors.append(max(relative(a, b) for a, b in zip(found, expected, strict=True)))
    finally:
        head._compiled = None
    assert max(errors) < LOSS_TOLERANCE, f"compiled and not compiled differ by {errors}"
    again = num_graphs() - graphs
    assert again == 0, f"{again} functions were compiled once more for other numbers of targets"
    return {"seconds_to_compile": seconds, "errors": errors}


def num_graphs() -> int:
    """Return the number of functions that were compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    main()
