"""Batch arithmetic: DialoGPT's two numbers per GPU and DeepSpeed's three, brought together before the engine sees
them."""

from dataclasses import dataclass
from typing import Any

from dialogpt_ds.errors import UserError

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """train = micro * accumulation * world_size, all in rows."""

    micro: int
    """Rows of one forward pass of one rank."""
    accumulation: int
    """Micro-batches of a rank in an optimizer step."""
    world_size: int

    @property
    def train(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.micro * self.accumulation * self.world_size

    def keys(self) -> dict[str, int]:
        """Return DeepSpeed's three keys."""
        return {TRAIN: self.train, MICRO: self.micro, ACCUMULATION: self.accumulation}


def resolve_batch(
    rows_per_gpu: int, accumulation: int, explicit: frozenset[str], deepspeed: dict[str, Any], world_size: int
) -> BatchSizes:
    """Bring the command line and the JSON together.

    The command line's train_batch_size is rows per GPU, so with 2 ranks its 4 is the JSON's 8. Where the JSON has any
    of its three keys, they take the place of the command line's defaults, and what is still missing follows DeepSpeed's
    rules.

    Args:
        rows_per_gpu: train_batch_size of the command line.
        accumulation: gradient_accumulation_steps of the command line.
        explicit: names that the command line gave and did not leave at their defaults.
        deepspeed: the JSON.
        world_size: number of ranks.

    Raises:
        UserError: a contradiction or a division with a rest; shows the numbers and a solution.
    """
    stated = {key: deepspeed[key] for key in (TRAIN, MICRO, ACCUMULATION) if deepspeed.get(key) is not None}
    given = dict(stated)
    asked = {TRAIN: rows_per_gpu * world_size, ACCUMULATION: accumulation}
    for key in (TRAIN, ACCUMULATION):
        if asked[key] < 1:
            raise UserError(f"--{key} must be 1 or more")
        if key in explicit:
            _check_agreement(key, stated, asked, rows_per_gpu, world_size)
            given[key] = asked[key]
    if not stated:
        given = asked
    return _complete(given, asked, world_size)


def _check_agreement(
    key: str, stated: dict[str, int], asked: dict[str, int], rows_per_gpu: int, world_size: int
) -> None:
    if stated.get(key, asked[key]) == asked[key]:
        return
    if key == ACCUMULATION:
        raise UserError(
            f"--{key} {asked[key]} on the command line, {stated[key]} in the DeepSpeed JSON: leave one of them out, or "
            "make them equal"
        )
    fix = (
        f"--{key} {stated[key] // world_size}"
        if stated[key] % world_size == 0
        else f'"{key}": {asked[key]} in the JSON'
    )
    raise UserError(
        f"--{key} {rows_per_gpu} on the command line is per GPU, so {asked[key]} rows on {world_size} GPUs; the "
        f"DeepSpeed JSON "
        f'says "{key}": {stated[key]} in all. Write {fix}, or leave one of them out.'
    )


def _complete(given: dict[str, int], asked: dict[str, int], world_size: int) -> BatchSizes:
    """Fill in what is missing by DeepSpeed's rules, without its silent rounding."""
    train, micro, accumulation = given.get(TRAIN), given.get(MICRO), given.get(ACCUMULATION)
    if train is None and micro is None:
        train = asked[TRAIN]
    if train is None:
        assert micro is not None
        return BatchSizes(micro, accumulation or 1, world_size)
    if micro is None:
        accumulation = accumulation or 1
        micro = train // (world_size * accumulation)
    elif accumulation is None:
        accumulation = train // (world_size * micro)
    if micro < 1 or accumulation < 1 or micro * accumulation * world_size != train:
        raise UserError(_impossible(train, given.get(MICRO), given.get(ACCUMULATION), world_size))
    return BatchSizes(micro, accumulation, world_size)


def _impossible(train: int, micro: int | None, accumulation: int | None, world_size: int) -> str:
    """Say why the numbers can't be met and which would be."""
    parts = [f"{ACCUMULATION} {accumulation}" if accumulation else "", f"{MICRO} {micro}" if micro else ""]
    stated = " and ".join(part for part in parts if part) or "one micro-batch per GPU"
    unit = world_size * (accumulation or 1) * (micro or 1)
    nearest = max(round(train / unit), 1) * unit
    if accumulation and micro:
        nearest = unit
    return (
        f"{train} rows per optimizer step can't be divided over {world_size} GPUs with {stated}: "
        f"{TRAIN} (in all) = {MICRO} * {ACCUMULATION} * GPUs must hold exactly. A solution: {nearest} rows in all, "
        f'so --{TRAIN} {nearest // world_size} per GPU on the command line, or "{TRAIN}": {nearest} in the JSON.'
    )
