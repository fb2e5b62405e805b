"""The loss of a dialogue model: the head at target positions only, weighted by turn, reduced in fp32."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dialogpt_ds.model.attention import Isolation, example_mask, isolation_of, no_mask, varlen_inputs
from dialogpt_ds.model.head import autocast_dtype, columns_of, head_nll, piece_of
from dialogpt_ds.model.probe import head_is_linear, takes
from dialogpt_ds.order.batches import IGNORED_LABEL, TURN_GROUPS, MicroBatch

Inputs = dict[str, Any]


def to_tensors(micro_batch: MicroBatch, device: torch.device | str, turn_ids: bool = False) -> Inputs:
    """Return a micro-batch as tensors on `device`, for TargetLoss; with `turn_ids` also DialoGPT's turn numbers as
    token types."""
    arrays = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "target_places": micro_batch.target_places,
        "labels": micro_batch.labels,
        "weights": micro_batch.weights,
        "turn_groups": micro_batch.turn_groups,
        "example_starts": micro_batch.example_starts,
    }
    if turn_ids:
        arrays["token_type_ids"] = micro_batch.turn_ids
    moved = {name: torch.as_tensor(array).to(device, non_blocking=True) for name, array in arrays.items()}
    return moved | {"longest_example": micro_batch.longest_example}


class LossSums(NamedTuple):
    """Sums over the targets of a micro-batch, fp32, nats; the last two carry no gradient."""

    weighted: torch.Tensor
    """Of weight * nll, a scalar."""
    weighted_by_turn: torch.Tensor
    """The same, [TURN_GROUPS]."""
    nll_by_turn: torch.Tensor
    """Of nll, whatever the weights, [TURN_GROUPS]."""


@dataclass(frozen=True)
class Planned:
    """What is known beforehand of a model on PyTorch's device `meta`, which can't be asked, since it computes
    nothing."""

    device: torch.device
    """Kind of device whose work is to be planned."""
    isolation: Isolation
    head_is_linear: bool = True


class TargetLoss(nn.Module):
    """Wraps a causal language model of transformers and returns sums over targets instead of logits."""

    def __init__(self, model: Any, chunked_head: bool = False, planned: Planned | None = None) -> None:
        """Look at a model, in fp32 on the CPU, with the implementation of attention that it is to be trained with;
        unless it is planned."""
        super().__init__()
        self.model = model
        self.chunked_head = chunked_head
        """Whether the logits are computed piece by piece, and again for the backward pass, so that they never are there
        as a whole."""
        self.head_is_linear = head_is_linear(model) if planned is None else planned.head_is_linear
        """Whether the model's logits are its output embedding applied to its last hidden state, and nothing more."""
        self.takes_positions = takes(model, "position_ids")
        """A model without them has an example in each row."""
        self.isolation: Isolation = isolation_of(model) if planned is None else planned.isolation
        """What keeps the examples of a row apart."""
        self.planned_device = None if planned is None else planned.device
        self.compiled = False

    def compile_body(self) -> None:
        """Compile what has the same shape in every step: all but the head, whose number of targets varies."""
        self.compiled = True
        (self.model.base_model if self.head_is_linear else self.model).compile(dynamic=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_places: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        turn_groups: torch.Tensor,
        example_starts: torch.Tensor,
        longest_example: int,
        token_type_ids: torch.Tensor | None = None,
    ) -> LossSums:
        """Return the sums over the targets.

        Args:
            input_ids: [rows, row_length].
            position_ids: [rows, row_length]; restarts mark the examples, which transformers then keeps apart.
            target_places: [targets], places in the flattened rows whose output predicts a target.
            labels: [targets], IGNORED_LABEL where there is none.
            weights: [targets], 0 where there is none.
            turn_groups: [targets], which of TURN_GROUPS each belongs to.
            example_starts: [examples + 1] int32, where each example begins in the flattened rows (padding is one too),
                and their end.
            longest_example: tokens of the longest.
            token_type_ids: [rows, row_length] or None.
        """
        inputs: Inputs = {"input_ids": input_ids, "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        inputs |= self._apart(position_ids, example_starts, longest_example)
        if self.head_is_linear:
            hidden = self.model.base_model(**inputs).last_hidden_state
            nll = self._nll_of_hidden(hidden.flatten(0, 1)[target_places], labels)
        else:
            nll = _nll(self.model(**inputs).logits.flatten(0, 1)[target_places], labels)
        weighted = nll * weights
        both = torch.stack([weighted, nll]).detach()
        # No matrix product, which autocast computes in half precision, and in which an infinite loss spoils the other
        # groups.
        group = torch.arange(len(TURN_GROUPS), device=turn_groups.device).unsqueeze(1)
        weighted_by_turn, nll_by_turn = torch.where(turn_groups == group, both.unsqueeze(1), 0.0).sum(dim=2)
        return LossSums(weighted.sum(), weighted_by_turn, nll_by_turn)

    def _apart(self, position_ids: torch.Tensor, example_starts: torch.Tensor, longest: int) -> Inputs:
        """Return what keeps the examples of a row from seeing each other, as arguments of the model."""
        if self.isolation == "mask":
            # A mask of truth values would be turned into numbers in every layer, and kept for each one's backward pass.
            # Under autocast sdpa computes in another type than the weights', and so needs it; eager attention only adds
            # numbers.
            by_truth = (
                autocast_dtype(position_ids.device) is not None and self.model.config._attn_implementation == "sdpa"
            )
            kind = torch.bool if by_truth else self.model.get_input_embeddings().weight.dtype
            return {"attention_mask": example_mask(position_ids, kind)}
        if self.isolation in ("varlen", "flash"):
            if self.compiled:
                # One compiled function for every number of examples, and for every longest one.
                torch._dynamo.mark_dynamic(example_starts, 0)
                longest = position_ids.shape[1]
            told = varlen_inputs(example_starts, longest)
            return told | {"attention_mask": no_mask(position_ids.device) if self.isolation == "varlen" else None}
        # attention_mask=None and use_cache=False together with restarting positions: any other combination lets the
        # examples see each other, without a word.
        return {"attention_mask": None}

    def _nll_of_hidden(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return each target's negative log-likelihood, [targets] fp32, from the states that predict them, [targets,
        width]."""
        head = self.model.get_output_embeddings()
        # Read once: ZeRO-3 gathers the weight here, and ranks differ in their number of pieces.
        weight, bias = head.weight, getattr(head, "bias", None)
        in_pieces = (
            self.chunked_head or not torch.is_grad_enabled()
        )  # nothing is kept, so memory need not be taken for all of them
        device = self.planned_device or hidden.device
        return head_nll(hidden, weight, bias, labels, piece_of(device) if in_pieces else None, columns_of(device))


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each target's negative log-likelihood in fp32: sums of fp16 end at 65,504."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED_LABEL)
