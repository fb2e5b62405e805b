"""The balance of a preprocessing run: everything that went in, and where it is now."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.conversations.filters import RULES
from dialogpt_ds.files import replace_text
from dialogpt_ds.preprocessing.parts import Part
from dialogpt_ds.shards.manifest import REPORT

REJECTS = "rejects.jsonl"


@dataclass
class Balance:
    """Counts of one part of the input; parts add up."""

    conversations: int = 0
    """Everything that could be read, what is not written included."""
    duplicates: int = 0
    """Conversations that are equal to an earlier one, where --dedupe leaves them out."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Conversations that are left out, by rule."""
    without_target: int = 0
    """Conversations with no turn to learn: well-formed, counted, not written."""
    empty_turns: int = 0
    """Turns without text: kept in their place as their EOS alone."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records that can't be read as a conversation, by reason."""
    examples: int = 0
    tokens: int = 0
    """Stored tokens; turns that are repeated as context count each time."""
    targets_in: int = 0
    """Tokens, with their EOS, of every turn with weight > 0 that is not the first of its conversation, duplicates and
    filtered aside."""
    targets_written: int = 0
    targets_cut: int = 0
    """Lost ends of targets that alone exceed max_seq_length."""
    turns_cut: int = 0
    """Number of those targets."""
    text_bytes: int = 0
    """UTF-8 bytes of the texts of all turns."""
    text_tokens: int = 0
    """Their tokens, each turn once, without EOS."""
    turns_histogram: Counter[int] = field(default_factory=Counter)
    """Conversations by number of turns."""
    lengths_histogram: Counter[int] = field(default_factory=Counter)
    """Examples by number of tokens."""

    def add(self, other: "Balance") -> None:
        """Add another part's counts to this one's."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)

    @property
    def records(self) -> int:
        """Everything that was read: conversations and rejects."""
        return self.conversations + self.rejects.total()

    def check(self) -> None:
        """Assert the conservation law; a failure is a defect of this program, not of the input."""
        assert self.targets_in == self.targets_written + self.targets_cut, vars(self)
        assert self.examples == self.lengths_histogram.total(), vars(self)

    @classmethod
    def of(cls, part: Part, wanted: np.ndarray, duplicates: np.ndarray) -> "Balance":
        """Count the conversations of a part that are `wanted` ([conversations] bool); of them some may be
        `duplicates`."""
        columns = part.columns
        filtered = wanted & (columns["rule"] > 0)
        twice = wanted & duplicates & ~filtered
        kept = wanted & ~filtered & ~twice

        def total(name: str) -> int:
            return int(columns[name][kept].sum())

        lengths = part.block.example_lengths()[np.repeat(kept, columns["examples"])]
        return cls(
            conversations=int(wanted.sum()),
            duplicates=int(twice.sum()),
            filtered=Counter({RULES[rule]: count for rule, count in _counts(columns["rule"][filtered])}),
            without_target=int((columns["examples"][kept] == 0).sum()),
            empty_turns=total("empty_turns"),
            examples=total("examples"),
            tokens=int(lengths.sum()),
            targets_in=total("targets_in"),
            targets_written=total("targets_written"),
            targets_cut=total("targets_cut"),
            turns_cut=total("turns_cut"),
            text_bytes=total("text_bytes"),
            text_tokens=total("text_tokens"),
            turns_histogram=Counter(dict(_counts(columns["turns"][kept]))),
            lengths_histogram=Counter(dict(_counts(lengths))),
        )

    def to_json(self, seconds: float, peak_memory_bytes: int) -> dict[str, Any]:
        """Return the content of report.json."""
        return {
            "records": self.records,
            "conversations": self.conversations,
            "without_target": self.without_target,
            "empty_turns": self.empty_turns,
            "duplicates": self.duplicates,
            "rejects": dict(sorted(self.rejects.items())),
            "filtered": dict(sorted(self.filtered.items())),
            "examples": self.examples,
            "tokens": self.tokens,
            "target_tokens": {
                "in": self.targets_in,
                "written": self.targets_written,
                "cut": self.targets_cut,
                "turns_cut": self.turns_cut,
            },
            "bytes": self.text_bytes,
            "bytes_per_token": round(self.text_bytes / self.text_tokens, 4) if self.text_tokens else None,
            "histograms": {
                "turns_per_conversation": {str(k): v for k, v in sorted(self.turns_histogram.items())},
                "tokens_per_example": {str(k): v for k, v in sorted(self.lengths_histogram.items())},
            },
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes,
        }

    def lines(self) -> list[str]:
        """Return the balance as a person reads it, one line per account."""
        left_out = self.duplicates + self.filtered.total()
        reasons = [*sorted(self.filtered.items()), *([("duplicates", self.duplicates)] if self.duplicates else [])]
        ratio = f"{self.text_bytes / self.text_tokens:.2f}" if self.text_tokens else "no"
        lines = [
            f"records        {self.records:>13,} = conversations {self.conversations:,} + rejects "
            f"{self.rejects.total():,}",
            f"rejects        {self.rejects.total():>13,}   ({_listed(self.rejects.items())})",
            f"left out       {left_out:>13,}   ({_listed(reasons)})",
            f"without target {self.without_target:>13,}   conversations, counted and not written",
            f"target tokens  {self.targets_in:>13,} = written {self.targets_written:,} + cut {self.targets_cut:,} "
            f"(ends of {self.turns_cut:,} turns longer than the limit)",
            f"examples       {self.examples:>13,}   holding {self.tokens:,} tokens, context included",
            f"text           {self.text_bytes:>13,}   bytes, {ratio} bytes a token",
        ]
        return lines if left_out else [line for line in lines if not line.startswith("left out")]


def _listed(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(items)) or "none"


def _counts(values: np.ndarray) -> list[tuple[int, int]]:
    found, counts = np.unique(values, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Write report.json."""
    replace_text(folder / REPORT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
