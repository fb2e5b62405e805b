"""Questions put to a model before it trains, answered by running it on a few tokens instead of by its name."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from dialogpt_ds.errors import UserError

TOLERANCE = 1e-4
"""Logits that differ by less are equal, in fp32."""


def takes(model: Any, argument: str) -> bool:
    """Return whether a model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def check_model(model: Any, name: str, packing: bool, turn_ids: bool) -> None:
    """Check that a model can be trained on rows of several examples, and on turn numbers where they are asked for.

    Args:
        model: built, in fp32 on the CPU.
        name: as the command line has it.
        packing: whether examples share rows.
        turn_ids: whether turn numbers are fed as token types.

    Raises:
        UserError: it can't; says why and the way out.
    """
    if turn_ids and not takes(model, "token_type_ids"):
        raise UserError(f"--no_token_id False feeds turn numbers as token types, which model {name!r} does not take: leave it out")
    if packing and not keeps_examples_apart(model):
        raise UserError(
            f"in model {name!r} ({model.config.model_type}) the examples of a row would see each other: it does not restart where "
            "position_ids restart. Give --packing False, which puts each example in a row of its own"
        )


def keeps_examples_apart(model: Any) -> bool:
    """Compare two examples in one row with each in a row of its own."""
    if not takes(model, "position_ids"):
        return False
    device = next(model.parameters()).device
    first, second = (torch.tensor([ids], device=device) % model.config.vocab_size for ids in ([5, 3, 8, 1], [2, 7, 4]))
    row = torch.cat([first, second], dim=1)
    places = torch.cat([torch.arange(n, device=device) for n in (first.shape[1], second.shape[1])]).unsqueeze(0)
    with _quiet(model):
        apart = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], dim=1)
        together = model(input_ids=row, position_ids=places, attention_mask=None, use_cache=False).logits
    return torch.allclose(apart, together, rtol=TOLERANCE, atol=TOLERANCE)


def head_is_linear(model: Any) -> bool:
    """Compare the short way to the logits with the model's own on two tokens; scaled or capped logits differ."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        return False
    with _quiet(model):
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        short = functional.linear(hidden, head.weight, getattr(head, "bias", None))
        return torch.allclose(short, model(input_ids=ids, use_cache=False).logits, rtol=TOLERANCE, atol=TOLERANCE)


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
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
