"""Questions put to a model before it trains, answered by running it on a few tokens instead of by its name."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dialogpt_ds.errors import UserError

ROUNDING = 1e-5
"""Differences in fp32 that are rounding, as a share of the largest value: two correct computations of a trained model
with logits up to 31 differ by 3e-4."""
LEAK_SHARE = 0.01
"""Examples are apart where what packing changes is less than this share of what a leak changes. Rounding is a
thousandth of it."""
LARGE = 10_000.0
"""Largest number that a model is given for its head's output, to see what it does to logits: caps are tens, trained
logits hundreds."""
NAMED = 3
"""Tensors that a message names."""


def takes(model: Any, argument: str) -> bool:
    """Return whether a model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class Wants:
    """What a run wants of its model."""

    packing: bool = True
    """Examples share rows."""
    turn_ids: bool = False
    """Turn numbers are fed as token types."""
    activation_checkpointing: bool = False
    chunked_head: bool = False


def check_model(model: Any, name: str, wants: Wants) -> None:
    """Check that a model (built, in fp32 on the CPU, called `name` on the command line) can do what a run wants of it.

    Raises:
        UserError: it can't; says why and the way out.
    """
    check_finite(model, name)
    if wants.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--activation_checkpointing: model {name!r} ({model.config.model_type}) does not support it; leave it out"
        )
    if wants.chunked_head and not head_is_linear(model):
        raise UserError(
            f"--chunked_head: the logits of model {name!r} ({model.config.model_type}) are not its output embedding "
            "alone (scaled, capped, ...), so they can't be computed in pieces here; leave it out"
        )
    if wants.turn_ids and not takes(model, "token_type_ids"):
        raise UserError(
            f"--no_token_id False feeds turn numbers as token types, which model {name!r} does not take: leave it out"
        )
    if wants.packing and not keeps_examples_apart(model):
        raise UserError(
            f"in model {name!r} ({model.config.model_type}) the examples of a row would see each other: it does not "
            "restart where position_ids restart. Give --packing False, which puts each example in a row of its own"
        )


def check_finite(model: Any, name: str) -> None:
    """Refuse weights that no training can go on from: whatever else is asked of such a model gets a misleading answer.

    Raises:
        UserError: names the tensors.
    """
    bad = [(tensor, weight) for tensor, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        found = [
            f"{tensor} ({int((~weight.isfinite()).sum()):,} of {weight.numel():,} values)"
            for tensor, weight in bad[:NAMED]
        ]
        more = f" and {len(bad) - NAMED:,} more tensors" if len(bad) > NAMED else ""
        raise UserError(
            f"weights of model {name!r} are not finite: {', '.join(found)}{more}. Either the training that wrote them "
            "diverged, or their file is damaged: take an earlier checkpoint or a fresh copy of the model"
        )


def keeps_examples_apart(model: Any) -> bool:
    """Compare two examples in one row with each in a row of its own, by the measure of what a leak between them
    changes.

    Both differences grow with the model's logits; a leak's is a large part of them, in new and in trained models alike.
    """
    if not takes(model, "position_ids"):
        return False
    with quiet(model):
        packed, leak, rounding = _differences(model)
        if (
            leak * LEAK_SHARE < rounding
        ):  # as where the last matrix of each block starts as zeros: training would open the leak
            with _stirred(model):
                packed, leak, rounding = _differences(model)
    return packed <= max(leak * LEAK_SHARE, rounding)


def _differences(model: Any) -> tuple[float, float, float]:
    """Return by how much logits change at most in a packed row and in one whose examples see each other, and what is
    rounding."""
    device, vocabulary = next(model.parameters()).device, model.config.vocab_size
    row = (torch.arange(1, 8, device=device) * vocabulary // 8).unsqueeze(
        0
    )  # ordinary tokens: spread over the vocabulary
    examples = row.split([4, 3], dim=1)
    places = torch.cat([torch.arange(ids.shape[1], device=device) for ids in examples]).unsqueeze(0)
    apart = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in examples], dim=1)
    together = model(input_ids=row, position_ids=places, attention_mask=None, use_cache=False).logits
    leaking = model(input_ids=row, use_cache=False).logits
    return _difference(together, apart), _difference(leaking, apart), ROUNDING * _largest(apart)


def head_is_linear(model: Any) -> bool:
    """Return whether a model's logits are its output embedding applied to its last hidden state, and nothing more.

    Asked at both ends of the head: what it is given is the last hidden state, and what the model makes of its output is
    the same numbers. They are chosen here, from tiny to far beyond any cap, so the answer does not depend on the size
    of the weights.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        return False
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    chosen: list[torch.Tensor] = []

    def exchange(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        calls.append((inputs[0], output))
        chosen.append(
            torch.linspace(-1, 1, output.numel(), device=output.device)
            .pow(3)
            .mul(LARGE)
            .to(output.dtype)
            .view_as(output)
        )
        return chosen[-1]

    with quiet(model):
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        handle = head.register_forward_hook(exchange)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = functional.linear(hidden, head.weight, getattr(head, "bias", None))
    if len(calls) != 1:
        return False
    given, output = calls[0]
    return _same(given, hidden) and _same(output, expected) and torch.equal(logits.float(), chosen[0].float())


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference; equal infinities, such as of ids that a model never gives, are none."""
    return float((mine - theirs).masked_fill(mine == theirs, 0.0).abs().max())


def _largest(values: torch.Tensor) -> float:
    """Return the largest finite size."""
    return float(values.masked_fill(~values.isfinite(), 0.0).abs().max())


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return mine.shape == theirs.shape and _difference(mine, theirs) <= ROUNDING * _largest(theirs)


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Run a model without dropout and gradients, and with an attention that runs on a CPU."""
    was_training, attention = model.training, getattr(model.config, "_attn_implementation", None)
    needs_gpu = attention is not None and "flash" in attention
    model.eval()
    if needs_gpu:
        model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if needs_gpu:
            model.set_attn_implementation(attention)


@contextmanager
def _stirred(model: Any) -> Iterator[None]:
    """Add noise to every weight, and put the weights back afterwards; torch's own random numbers stay as they were."""
    weights = list(model.parameters())
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise, alpha=weight.shape[-1] ** -0.5 if weight.dim() else 1.0)
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
