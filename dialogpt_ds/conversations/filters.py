"""Leaving conversations out by what is in them: the rules of DialoGPT's data that make sense on text, each off by
default.

Zhang et al. 2020, section 2, name URLs, a word three times in a row, and brackets or other markup; over-long words were
left out of their data too. Their rules that need word lists (rare, offensive and bland language) are not here.
"""

import re
from collections.abc import Callable
from typing import Literal

from dialogpt_ds.conversations.conversation import Conversation

FilterName = Literal["urls", "repeated_words", "long_words", "markup"]
LONG_WORD = 30
"""Letters and digits of the longest word that is kept. Scripts that write without spaces have no such words."""

_URL = re.compile(r"(?:https?://|www\.)\S|\b\w[\w.-]*\.(?:com|org|net|edu|gov|io)/\S", re.IGNORECASE)
_REPEATED = re.compile(r"\b(\w+)(?:\W+\1\b){2}", re.IGNORECASE)
_LONG = re.compile(rf"[0-9A-Za-zÀ-ɏͰ-ϿЀ-ӿ_]{{{LONG_WORD + 1}}}")
_MARKUP = re.compile(r"[\[\]]|</?[a-zA-Z][^<>]*>|&(?:[a-z]+|#\d+);")

PATTERNS: dict[str, re.Pattern[str]] = {
    "urls": _URL,
    "repeated_words": _REPEATED,
    "long_words": _LONG,
    "markup": _MARKUP,
}
"""A conversation goes where any of its turns matches."""

RULES = ("", "min_turns", "max_turns", *PATTERNS)
"""All rules by number; 0 is none."""


def make_filter(names: list[str], min_turns: int, max_turns: int | None) -> Callable[[Conversation], str | None]:
    """Return a function that says by which rule a conversation is left out, the first in this order, or None."""
    rules = [(name, PATTERNS[name]) for name in names]

    def rule_of(conversation: Conversation) -> str | None:
        if len(conversation.turns) < min_turns:
            return "min_turns"
        if max_turns is not None and len(conversation.turns) > max_turns:
            return "max_turns"
        for name, pattern in rules:
            if any(pattern.search(turn.text) for turn in conversation.turns):
                return name
        return None

    return rule_of
