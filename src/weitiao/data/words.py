"""Texts -> ids by words, each encoded once: what a byte-level BPE as GPT-2's cuts a text into, cut here and looked up.

    "The cat sat. 猫坐" -> The| cat| sat|.| 猫|坐 -> ids of each, the tokenizer asked for those that were not met before

Such a tokenizer encodes word by word, so a text's ids are those of its words one after the other. Its pattern is written
again for the characters named here; that it reads them alike is asked of the tokenizer itself, and a text that holds any
other character is left to it. Chinese has no spaces, and its words there are clauses that never come twice: they are cut
before each character that no token of the vocabulary joins to what stands before, where no merge can cross.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from weitiao.data.spelling import ALPHABET

MOST_WORDS = 200_000  # that are remembered
MOST_JOINED = 1_000  # Chinese characters that tokens join to what is before; with more of them, words hold too much to come twice

# Classes of a pattern, of characters that have been what they are since Unicode 3.
SPACES = r" \t\n\r\u3000"
DIGITS = "0-9"
LATIN = "A-Za-zÀ-ÖØ-öø-ÿ"
HAN = "\u4e00-\u9fa5"
OTHERS = (
    r"!-/:-@\[-`{-~" "¡-§±·¿×÷" "\u2010-\u2027\u2030-\u205e\u2190-\u22ff\u2500-\u26ff\u3001-\u3003\u3008-\u3020"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\U0001f300-\U0001f64f"
)
EVERY_CHARACTER = "".join(map(chr, range(0x20000)))
HAN_BYTES = re.compile("(?<=.)[ä-é]", re.DOTALL)  # in a stored token: the first byte of such a character, not at the token's front

# What a tokenizer cuts at digits before its words -> the pattern's digits, and what stands behind spaces that all belong together.
BY_DIGITS = {None: (f" ?[{DIGITS}]+", f"[^{SPACES}]"), True: (f"[{DIGITS}]", f"[^{SPACES}{DIGITS}]"), False: (f"[{DIGITS}]+", f"[^{SPACES}{DIGITS}]")}


class Words:
    """The ids of texts that `fits`, as int32 bytes. encode: the tokenizer's own way, for words that are new."""

    def __init__(self, pattern: re.Pattern[str], strange: re.Pattern[str], encode: Callable[[list[str]], list[list[int]]]):
        self.pattern, self.strange, self.encode = pattern, strange, encode
        self.known: dict[str, bytes] = {}

    def fits(self, text: str) -> bool:
        return self.strange.search(text) is None

    def ids(self, texts: Sequence[str]) -> list[bytes]:
        cut = [self.pattern.findall(text) for text in texts]
        if len(self.known) > MOST_WORDS:
            self.known.clear()
        new = list(set().union(*cut) - self.known.keys())
        self.known.update(zip(new, map(as_bytes, self.encode(new)), strict=True))
        known = self.known.__getitem__
        return [b"".join(map(known, words)) for words in cut]


def as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def words_of(tokenizer: Any, encode: Callable[[list[str]], list[list[int]]]) -> Words | None:
    """How this tokenizer cuts words; None if it is not known to do so as GPT-2's."""
    inner = tokenizer.backend_tokenizer
    by_digits = _by_digits(inner)
    if by_digits is None or any(token.normalized for token in tokenizer.added_tokens_decoder.values()):
        return None
    joined = _joined(tokenizer.get_vocab())
    han = HAN if len(joined) <= MOST_JOINED else ""
    if not all(_is_one_word(inner, characters) for characters in (f"{LATIN}{han}", OTHERS, SPACES)):
        return None
    digits, behind = by_digits
    pattern = (
        f" ?[{LATIN}{han}][{LATIN}{''.join(joined) if han else ''}]*|'(?:[stmd]|re|ve|ll)|{digits}| ?[{OTHERS}]+|[{SPACES}]+(?!{behind})|[{SPACES}]+"
    )
    return Words(re.compile(pattern), re.compile(f"[^{SPACES}{DIGITS}{LATIN}{han}{OTHERS}]"), encode)


def _by_digits(inner: Any) -> tuple[str, str] | None:
    """Is it a BPE of bytes, its words cut by GPT-2's pattern? Then how digits are cut."""
    model = inner.model
    if type(model).__name__ != "BPE" or inner.normalizer or inner.pre_tokenizer is None:
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback or model.fuse_unk:
        return None
    steps = json.loads(inner.pre_tokenizer.__getstate__())
    *first, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or not last["use_regex"]:
        return None
    if [step["type"] for step in first] not in ([], ["Digits"]):
        return None
    return BY_DIGITS[first[0]["individual_digits"] if first else None]


def _joined(stored: Sequence[str]) -> list[str]:
    """The Chinese characters that some token joins, whole or in part, to a character before; a space, which begins a word, is none."""
    found = set()
    for token in stored:
        for met in HAN_BYTES.finditer(token):
            if token[: met.start()] != "Ġ" and set(token) <= ALPHABET.keys():
                found.add(bytes(ALPHABET[letter] for letter in token[met.start() : met.start() + 3]))
    return [character for character in map(chr, range(0x4E00, 0x9FA6)) if found and character.encode().startswith(tuple(found))]


def _is_one_word(inner: Any, characters: str) -> bool:
    """Does it take a run of all characters of a class for one word?"""
    run = "".join(re.findall(f"[{characters}]+", EVERY_CHARACTER))
    return len(inner.pre_tokenizer.pre_tokenize_str(run)) == 1
