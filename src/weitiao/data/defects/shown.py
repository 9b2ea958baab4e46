"""What was met in a text, as a person can read it: on one line, with a little of what stands about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

AROUND = 20  # characters shown on either side of what is met


def shown(text: str) -> str:
    """On one line, each character that cannot be seen by its number: `well U+0085 then`."""
    return "".join(character if _is_seen(character) else " " if character in "\n\r\t" else f"[{code_of(character)}]" for character in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or character == "\u3000"


def code_of(character: str) -> str:
    return f"U+{ord(character):04X}"


def around(text: str, start: int, end: int) -> str:
    """text[start:end] with a little of what stands about it."""
    end = min(end, start + 2 * AROUND)
    front, back = max(start - AROUND, 0), min(end + AROUND, len(text))
    return f"'{'…' if front else ''}{shown(text[front:back])}{'…' if back < len(text) else ''}'"


def beginning(text: str, most: int = 2 * AROUND) -> str:
    return around(text, 0, most) if len(text) > most else f"'{shown(text)}'"


def first_met(pattern: re.Pattern[str], texts: Sequence[str]) -> tuple[re.Match[str], str] | None:
    return next(((found, text) for text in texts if (found := pattern.search(text))), None)


def first_of(pattern: re.Pattern[str], texts: Sequence[str]) -> str | None:
    found = first_met(pattern, texts)
    return around(found[1], found[0].start(), found[0].end()) if found else None
