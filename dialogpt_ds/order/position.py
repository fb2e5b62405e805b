"""Where training is in the endless stream of rows: a few integers, the same on every rank."""

from dataclasses import asdict, dataclass
from typing import Any

from dialogpt_ds.errors import UserError
from dialogpt_ds.order.permutation import ORDER_VERSION


@dataclass(frozen=True)
class OrderKey:
    """Everything that the order is a function of. World size, micro-batches and loader workers are not in it."""

    fingerprint: str
    """Of the shard directory's manifest."""
    seed: int
    row_length: int
    """Tokens of a row."""
    window_blocks: int
    packed: bool
    order_version: int = ORDER_VERSION


@dataclass(frozen=True)
class Position:
    """The next row to be trained on."""

    epoch: int = 0
    """From 0."""
    window: int = 0
    """Window of the epoch."""
    row: int = 0
    """Row of the window."""


def position_state(key: OrderKey, position: Position) -> dict[str, Any]:
    """Return what a checkpoint keeps: plain types."""
    return asdict(key) | asdict(position)


def position_from_state(state: dict[str, Any], key: OrderKey) -> Position:
    """Return the position in a checkpoint, if it belongs to the same order.

    Raises:
        UserError: the order is another one; names each difference and the way out.
    """
    differences = [
        f"{name}: checkpoint {state.get(name)!r}, now {value!r}" for name, value in asdict(key).items() if state.get(name) != value
    ]
    if differences:
        raise UserError(
            "the checkpoint was trained on another order of rows, so its place in it has no meaning here:\n  "
            + "\n  ".join(differences)
            + "\nGive the run the same data, seed, max_seq_length and packing, or start another output_dir "
            "(--init_checkpoint takes the weights along)."
        )
    return Position(state["epoch"], state["window"], state["row"])
