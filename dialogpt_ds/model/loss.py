"""The loss of a dialogue model: the head at target positions only, weighted by turn, reduced in fp32."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dialogpt_ds.model.probe import head_is_linear, takes
from dialogpt_ds.order.batches import IGNORED_LABEL, TURN_GROUPS, MicroBatch

CHUNK_TARGETS = 256
"""Targets whose logits are there at a time with a chunked head; a multiple of TARGETS_MULTIPLE."""

Tensors = dict[str, torch.Tensor]


def to_tensors(micro_batch: MicroBatch, device: torch.device | str, turn_ids: bool = False) -> Tensors:
    """Return a micro-batch as tensors on `device`; with `turn_ids` also DialoGPT's turn numbers as token types."""
    arrays = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "target_places": micro_batch.target_places,
        "labels": micro_batch.labels,
        "weights": micro_batch.weights,
        "turn_groups": micro_batch.turn_groups,
    }
    if turn_ids:
        arrays["token_type_ids"] = micro_batch.turn_ids
    return {name: torch.as_tensor(array).to(device, non_blocking=True) for name, array in arrays.items()}


class TargetLoss(nn.Module):
    """Wraps a causal language model of transformers and returns sums over targets instead of logits."""

    def __init__(self, model: Any, chunked_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.chunked_head = chunked_head
        """Whether the logits are computed piece by piece, and again for the backward pass, so that they never are there as a whole."""
        self.head_is_linear = head_is_linear(model)
        """Whether the model's logits are its output embedding applied to its last hidden state, and nothing more."""
        self.takes_positions = takes(model, "position_ids")
        """A model without them has an example in each row."""
        self.in_one_row = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
        """transformers looks for restarting positions before FlashAttention only in a batch of one row."""

    def compile_body(self) -> None:
        """Compile what has the same shape in every step: all but the head, whose number of targets varies."""
        (self.model.base_model if self.head_is_linear else self.model).compile(dynamic=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_places: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        turn_groups: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of weight * nll, a scalar, and sums by group of turns, [2, TURN_GROUPS]: of weight * nll, and of nll.

        All are fp32, in nats; the second tensor carries no gradient.

        Args:
            input_ids: [rows, row_length].
            position_ids: [rows, row_length]; restarts mark the examples, which transformers then keeps apart.
            target_places: [targets], places in the flattened rows whose output predicts a target.
            labels: [targets], IGNORED_LABEL where there is none.
            weights: [targets], 0 where there is none.
            turn_groups: [targets], which of TURN_GROUPS each belongs to.
            token_type_ids: [rows, row_length] or None.
        """
        # attention_mask=None and use_cache=False together with restarting positions: any other combination lets the
        # examples of a row see each other, without a word.
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.in_one_row:
            inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        inputs |= {"attention_mask": None, "use_cache": False}
        if self.head_is_linear:
            hidden = self.model.base_model(**inputs).last_hidden_state
            nll = self._nll_of_hidden(hidden.flatten(0, 1)[target_places], labels)
        else:
            nll = _nll(self.model(**inputs).logits.flatten(0, 1)[target_places], labels)
        weighted = nll * weights
        both = torch.stack([weighted, nll]).detach()
        # No matrix product, which autocast computes in half precision, and in which an infinite loss spoils the other groups.
        by_turn = [torch.where(turn_groups == group, both, 0.0).sum(dim=1) for group in range(len(TURN_GROUPS))]
        return weighted.sum(), torch.stack(by_turn, dim=1)

    def _nll_of_hidden(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return each target's negative log-likelihood, [targets] fp32, from the states that predict them, [targets, width]."""
        head = self.model.get_output_embeddings()
        # Read once: ZeRO-3 gathers the weight here, and ranks differ in their number of pieces.
        weight, bias = head.weight, getattr(head, "bias", None)

        def nll_of(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return _nll(functional.linear(states, weight, bias), ids)

        if not self.chunked_head:
            return nll_of(hidden, labels)
        pieces = zip(hidden.split(CHUNK_TARGETS), labels.split(CHUNK_TARGETS), strict=True)
        # torch's linear_cross_entropy does the same, but rounds each target's loss to half precision where the model computes in it.
        return torch.cat([checkpoint(nll_of, *piece, use_reentrant=False) for piece in pieces])


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each target's negative log-likelihood in fp32: sums of fp16 end at 65,504."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED_LABEL)
