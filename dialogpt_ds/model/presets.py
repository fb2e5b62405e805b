"""Model shapes by name."""

from dataclasses import dataclass

VOCABULARY = 50_257
POSITIONS = 1_024


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
