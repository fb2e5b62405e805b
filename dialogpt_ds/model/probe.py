"""Questions put to a model before it trains, answered by running it on a few tokens instead of by its name."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dialogpt_ds.errors import UserError

TOLERANCE = 1e-4
"""Logits that differ by less are equal, in fp32."""
LARGE = 1_000.0
"""Factor by which states are made large, to see whether logits are capped."""


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
    if wants.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"--activation_checkpointing: model {name!r} ({model.config.model_type}) does not support it; leave it out")
    if wants.chunked_head and not head_is_linear(model):
        raise UserError(
            f"--chunked_head: the logits of model {name!r} ({model.config.model_type}) are not its output embedding alone (scaled, capped, "
            "...), so they can't be computed in pieces here; leave it out"
        )
    if wants.turn_ids and not takes(model, "token_type_ids"):
        raise UserError(f"--no_token_id False feeds turn numbers as token types, which model {name!r} does not take: leave it out")
    if wants.packing and not keeps_examples_apart(model):
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
    with quiet(model):
        apart = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], dim=1)
        together = model(input_ids=row, position_ids=places, attention_mask=None, use_cache=False).logits
    return torch.allclose(apart, together, rtol=TOLERANCE, atol=TOLERANCE)


def head_is_linear(model: Any) -> bool:
    """Compare the short way to the logits with the model's own on two tokens; scaled or capped logits differ.

    The head's weights are made large for it: a cap of 30 changes the small logits of a new model by less than rounding.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        return False
    with quiet(model):
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        logits = {}
        for factor in (1.0, LARGE):
            handle = head.register_forward_pre_hook(lambda _, inputs, factor=factor: (inputs[0] * factor,))
            try:
                logits[factor] = model(input_ids=ids, use_cache=False).logits
            finally:
                handle.remove()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    short = {factor: functional.linear(hidden * factor, head.weight, getattr(head, "bias", None)) for factor in logits}
    return all(torch.allclose(short[f], logits[f], rtol=TOLERANCE, atol=TOLERANCE * f) for f in logits)


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
