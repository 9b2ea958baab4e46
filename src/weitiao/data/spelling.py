"""Ids -> what the tokens spell, for eyes.

    stored       Ġthe        æ ĺ ¯          ▁的       <0xE4> <0xBD> <0xA0>     <|im_end|>
    spelled      " the"      "是", 3 tokens  " 的"     "你", 3 tokens           "<|im_end|>", special

Vocabularies spell in bytes (each byte a letter, as GPT-2's), or in text with ▁ for a space and <0xE4> for a byte. A character
that several tokens share is one piece of them all; bytes that make no character are spelled \\xe4.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "是 是"  # several bytes and a space: told apart by every way to store them
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MARKS = {" ": "·", "\n": "⏎", "\t": "→"}
SELECTORS = "\ufe0e\ufe0f"  # they change how wide the character before them is


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that spell whole characters: one, but for a character that is in parts.

    text: what they spell. start: position of the first one. ids, stored: of each, as the vocabulary has it.
    special: a token with a name, which no characters make up.
    """

    text: str
    start: int
    ids: tuple[int, ...]
    stored: tuple[str, ...]
    special: bool = False

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)


class Spelling:
    """How one tokenizer spells."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @cached_property
    def named(self) -> dict[int, str]:
        """The tokens with a name of their own: a BOS, a role, a stop, what was added."""
        special = {i: self.tokenizer.convert_ids_to_tokens(i) for i in self.tokenizer.all_special_ids}
        return special | {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def in_bytes(self) -> bool:
        """Does each letter of a stored token stand for a byte? Asked by an example."""
        stored = "".join(self.tokenizer.convert_ids_to_tokens(self.tokenizer(PROBE, add_special_tokens=False).input_ids))
        return set(stored) <= ALPHABET.keys() and bytes(ALPHABET[c] for c in stored).strip() == PROBE.encode()

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """A path, in order; no token is left out."""
        ids = [int(i) for i in ids]
        stored = self._stored(ids)
        made: list[Piece] = []
        start = 0
        for named, stop in _runs([i in self.named for i in ids]):
            if named:
                made += [Piece(self.named[ids[t]], t, (ids[t],), (self.named[ids[t]],), True) for t in range(start, stop)]
            else:
                spelled = [self._bytes(ids[t], stored[t]) for t in range(start, stop)]
                for a, b, text in whole_characters(spelled):
                    made.append(Piece(text, start + a, tuple(ids[start + a : start + b]), tuple(stored[start + a : start + b])))
            start = stop
        return made

    def _stored(self, ids: list[int]) -> list[str]:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return [t.decode("utf-8", "backslashreplace") if isinstance(t, bytes) else t or "" for t in tokens]

    def _bytes(self, id: int, stored: str) -> bytes:
        if not stored:
            return f"[{id}]".encode()  # an embedding may have more rows than there are tokens
        if self.in_bytes and set(stored) <= ALPHABET.keys():
            return bytes(ALPHABET[c] for c in stored)
        if byte := BYTE.fullmatch(stored):
            return bytes([int(byte[1], 16)])
        return stored.replace("▁", " ").encode("utf-8", "backslashreplace")


def whole_characters(tokens: Sequence[bytes]) -> Iterator[tuple[int, int, str]]:
    """(first token, one past the last, their text), each the fewest tokens that end with a character.

    [b"a", b"\\xe6\\x98", b"\\xaf"] -> (0, 1, "a"), (1, 3, "是")
    """
    start = 0
    for i, token in enumerate(tokens):
        state, text = _decoded(b"".join(tokens[start : i + 1]))
        if state == "broken" and start < i:  # what was begun before goes on nowhere
            yield from _broken(tokens, start, i)
            start = i
            state, text = _decoded(token)
        if state == "open":
            continue
        yield (start, i + 1, text) if state == "whole" else next(_broken(tokens, i, i + 1))
        start = i + 1
    yield from _broken(tokens, start, len(tokens))


def _broken(tokens: Sequence[bytes], start: int, stop: int) -> Iterator[tuple[int, int, str]]:
    return ((i, i + 1, tokens[i].decode("utf-8", "backslashreplace")) for i in range(start, stop))


def _decoded(spelled: bytes) -> tuple[str, str]:
    """(whole, open or broken; the text so far)"""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(spelled)
    except UnicodeDecodeError:
        return "broken", ""
    return ("open" if decoder.getstate()[0] else "whole"), text


def _runs(flags: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    """(flag, one past the run's end)"""
    for i, flag in enumerate(flags):
        if i + 1 == len(flags) or flags[i + 1] != flag:
            yield flag, i + 1


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: those that can be seen stand for themselves, the others follow from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def visible(text: str) -> list[str]:
    """Each character as it can be seen: · for a space, ⏎, →, an escape such as \\u200b for what has no shape of its own."""
    shown = [_visible(c) for c in text]
    if text and unicodedata.category(text[0]) in ("Mn", "Me", "Mc") and shown[0] == text[0]:
        shown[0] = "◌" + text[0]  # an accent apart from its letter
    return shown


def _visible(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if character.isprintable() and character not in SELECTORS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def seen(text: str) -> str:
    return "".join(visible(text))
