"""Model shapes by name."""

from collections.abc import Mapping
from dataclasses import dataclass

VOCABULARY = 50_257
POSITIONS = 1_024
HEAD_WIDTH = 64
"""Width of an attention head in every GPT-2 that was released; the weights themselves don't tell it."""


@dataclass(frozen=True)
class Preset:
    """A GPT-2 shape (Radford et al. 2019; DialoGPT, Zhang et al. 2020, table 2 names them by size)."""

    layers: int
    width: int
    heads: int


PRESETS = {
    "117M": Preset(12, 768, 12),
    "345M": Preset(24, 1_024, 16),
    "762M": Preset(36, 1_280, 20),
    "small": Preset(3, 192, 3),
    "tiny": Preset(2, 64, 2),
}
"""DialoGPT's three, and two for work on a CPU: `small` (the demo's, 11 million parameters) and `tiny` (for tests)."""


@dataclass(frozen=True)
class Gpt2Shape:
    """What the tensors of a GPT-2 say about its shape."""

    layers: int
    width: int
    positions: int
    vocabulary: int

    @property
    def preset(self) -> str | None:
        """Name of the preset with these layers and width."""
        return next((name for name, p in PRESETS.items() if (p.layers, p.width) == (self.layers, self.width)), None)

    @property
    def heads(self) -> int:
        """Attention heads: the preset's, else one for each HEAD_WIDTH of the width."""
        return PRESETS[self.preset].heads if self.preset else max(self.width // HEAD_WIDTH, 1)

    def __str__(self) -> str:
        name = f"{self.preset}, " if self.preset else ""
        return (
            f"a GPT-2 ({name}{self.layers} layers, {self.width:,} wide, {self.positions:,} positions, "
            f"{self.vocabulary:,} token ids)"
        )


def gpt2_shape(shapes: Mapping[str, tuple[int, ...]]) -> Gpt2Shape | None:
    """Tell the shape of a GPT-2 from its tensors' names (transformers', with or without `transformer.`) and sizes.

    Returns:
        None where the tensors are of something else.
    """
    plain = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    layers = {name.split(".")[1] for name in plain if name.startswith("h.")}
    tokens, positions = plain.get("wte.weight", ()), plain.get("wpe.weight", ())
    if not layers or len(tokens) != 2 or len(positions) != 2:
        return None
    return Gpt2Shape(len(layers), tokens[1], positions[0], tokens[0])
