"""Shapes of a micro-batch, without its numbers."""

from collections import Counter
from dataclasses import dataclass

import torch

from dialogpt_ds.model.gpu_specs import FLASH_TILE
from dialogpt_ds.model.loss import Inputs
from dialogpt_ds.order.batches import TARGETS_MULTIPLE

META = torch.device("meta")


@dataclass(frozen=True)
class Workload:
    """Shapes of a micro-batch."""

    rows: int
    row_length: int
    num_targets: int
    """With those that pad the number."""
    lengths: tuple[int, ...]
    """Tokens of each example; a row's padding counts as one."""
    tokens: int
    """Without padding."""

    @classmethod
    def of_equal_examples(cls, rows: int, row_length: int, example_length: int, target_share: float) -> "Workload":
        """Return full rows of examples of one length (the last of each row is shorter), of whose tokens a share are
        targets."""
        full, rest = divmod(row_length, example_length)
        lengths = ([example_length] * full + [rest] * (rest > 0)) * rows
        num_targets = -(-int(rows * row_length * target_share) // TARGETS_MULTIPLE) * TARGETS_MULTIPLE
        return cls(rows, row_length, num_targets, tuple(lengths), rows * row_length)

    def inputs(self, turn_ids: bool = False) -> Inputs:
        """Return the arguments of TargetLoss, on `meta`; with `turn_ids` also token types."""

        def of(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=META)

        targets = {name: of(self.num_targets) for name in ("target_places", "labels", "turn_groups")}
        of_tokens = ("input_ids", "position_ids", *(("token_type_ids",) if turn_ids else ()))
        tokens = {name: of(self.rows, self.row_length) for name in of_tokens}
        return (
            targets
            | tokens
            | {
                "weights": of(self.num_targets, dtype=torch.float32),
                "example_starts": of(len(self.lengths) + 1, dtype=torch.int32),
                "longest_example": max(self.lengths),
            }
        )

    @property
    def computed_pairs(self) -> int:
        """Pairs of a query and a key that a kernel for sequences of several lengths computes, which it does by whole
        tiles.

        In tiles of 2 x 2 a causal example of 3 tokens takes the pairs of tiles (0, 0), (1, 0), (1, 1): 12 instead of 6.
        """
        queries, keys = FLASH_TILE
        return sum(
            queries * sum(-(-min(end, length) // keys) * keys for end in range(queries, length + queries, queries))
            * number for length, number in Counter(self.lengths).items()
        )  # fmt: skip
