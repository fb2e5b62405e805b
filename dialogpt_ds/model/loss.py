"""The loss of a dialogue model: the head at target positions only, weighted by turn, reduced in fp32."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dialogpt_ds.model.probe import head_is_linear, takes
from dialogpt_ds.order.batches import IGNORED_LABEL, MicroBatch

Tensors = dict[str, torch.Tensor]


def to_tensors(micro_batch: MicroBatch, device: torch.device | str, turn_ids: bool = False) -> Tensors:
    """Return a micro-batch as tensors on `device`; with `turn_ids` also DialoGPT's turn numbers as token types."""
    arrays = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "target_places": micro_batch.target_places,
        "labels": micro_batch.labels,
        "weights": micro_batch.weights,
    }
    if turn_ids:
        arrays["token_type_ids"] = micro_batch.turn_ids
    return {name: torch.as_tensor(array).to(device, non_blocking=True) for name, array in arrays.items()}


class TargetLoss(nn.Module):
    """Wraps a causal language model of transformers and returns sums over targets instead of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
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
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of weight * nll, sum of nll without weights), fp32 scalars in nats; the second carries no gradient.

        Args:
            input_ids: [rows, row_length].
            position_ids: [rows, row_length]; restarts mark the examples, which transformers then keeps apart.
            target_places: [targets], places in the flattened rows whose output predicts a target.
            labels: [targets], IGNORED_LABEL where there is none.
            weights: [targets], 0 where there is none.
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
            head = self.model.get_output_embeddings()
            logits = functional.linear(hidden.flatten(0, 1)[target_places], head.weight, head.bias)
        else:
            logits = self.model(**inputs).logits.flatten(0, 1)[target_places]
        nll = functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED_LABEL)
        return (nll * weights).sum(), nll.detach().sum()
