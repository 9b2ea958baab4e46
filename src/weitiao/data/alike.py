"""Which rows repeat an earlier one, or say nearly the same? Pure functions of texts, hashes and sketches.

    texts -> hashes of their runs of 5 characters -> a sketch of 32 bytes each -> for each row, the place of an earlier one like it, or -1

Near duplicates are found by MinHash (Broder 1997) over runs of 5 characters, one permutation with empty bins filled from the
next one (Shrivastava and Li 2014), of which a byte a bin is kept (b-bit MinHash, Li and König 2010): 32 bytes a row, in
4 bands of 8. Rows that share a band are compared byte by byte; what most rows share, such as an instruction, is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from weitiao.data.conversation import Conversation

NOT_LETTERS = re.compile(r"[\W\d_]+")
NO_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())  # the same, ten times as fast
MOST_CHARACTERS = 20_000  # of a conversation that are looked at
GRAM = 5
BINS, ALIKE = 32, 28  # 28 of 32 bytes alike: rows that share about nine of ten runs of characters
EDGES = np.arange(BINS, dtype=np.uint32) << np.uint32(27)
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1], np.uint32)
NO_SKETCH = bytes(BINS)


def loose(conversation: Conversation) -> str:
    """What is said, without case, digits, punctuation and spaces."""
    said = "\n".join(m.content for m in conversation.messages if m.role != "system")
    said = said[:MOST_CHARACTERS].casefold()
    return said.encode().translate(None, NO_ASCII_LETTERS).decode() if said.isascii() else NOT_LETTERS.sub("", said)


def grams(text: str) -> np.ndarray:
    """A hash of each run of 5 characters, uint32."""
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    if len(letters) < GRAM:
        return np.zeros(0, np.uint32)
    last = len(letters) - GRAM + 1
    mixed = letters[:last] * FACTORS[0]
    for i in range(1, GRAM):
        mixed = (mixed ^ (mixed >> np.uint32(13))) + letters[i : last + i] * FACTORS[i]
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    mixed *= np.uint32(0x297A2D39)
    return mixed ^ (mixed >> np.uint32(15))


def sketches_of(texts: Sequence[str], frequent: np.ndarray) -> bytes:
    """A sketch each. Their runs are hashed together, and those across the end of a text left out: short ones cost most by their number."""
    hashes = grams("".join(texts))
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return b"".join([sketch(hashes[end - len(text) : max(end - GRAM + 1, end - len(text))], frequent) for text, end in zip(texts, ends, strict=True)])


def sketch(hashes: np.ndarray, frequent: np.ndarray) -> bytes:
    """32 bytes, of which two texts share as large a part as of their runs of characters; 0s for a text too short to tell."""
    if len(frequent) and len(hashes):
        hashes = hashes[frequent[np.searchsorted(frequent, hashes) % len(frequent)] != hashes]
    if len(hashes) < BINS // 2:
        return NO_SKETCH
    hashes = np.sort(hashes)
    least = np.searchsorted(hashes, EDGES)  # the least hash of each bin; of an empty one, that of the next
    least[least == len(hashes)] = 0
    return (hashes[least] & np.uint32(255)).astype(np.uint8).tobytes()


def frequent_grams(texts: Iterable[str], least: int = 16, share: float = 0.1) -> np.ndarray:
    """The runs of characters that more than a tenth of the texts have, sorted: an instruction that all share."""
    each = [np.unique(grams(text)) for text in texts]
    if len(each) < least:
        return np.zeros(0, np.uint32)
    found, counts = np.unique(np.concatenate(each), return_counts=True)
    return found[counts >= max(least, share * len(each))]


def digest(*parts: bytes) -> int:
    told = hashlib.blake2b(digest_size=8)
    for part in parts:
        told.update(part)
    return int.from_bytes(told.digest(), "little")


def earlier_equal(values: np.ndarray) -> np.ndarray:
    """The place of the first equal value before each; -1 for the first ones. [7, 8, 7, 7] -> [-1, -1, 0, 0]"""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, bool)
    heads = order[np.maximum.accumulate(np.where(begins, np.arange(len(values)), 0))] if len(values) else order
    found = np.full(len(values), -1, np.int64)
    found[order[~begins]] = heads[~begins]
    return found


def first_among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The place of each value's first occurrence in `known`, or -1."""
    if not len(known):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], values), len(known) - 1)
    return np.where(known[order][at] == values, order[at], -1)


def nearly_earlier(texts: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    """The place of an earlier row that says nearly the same; -1 for the others.

    texts: a hash of each text without case, digits, punctuation and spaces. sketches: uint8 [rows, 32].
    """
    found = earlier_equal(texts)
    told = np.flatnonzero(sketches.any(1))
    for band in sketches[told].view(np.uint64).T if len(told) else ():
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        heads = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        befores = np.concatenate([[0], order[:-1]])
        later = ~begins
        for others in (heads, befores):  # the first of its group, and its neighbour there
            mine, theirs = told[order[later]], told[others[later]]
            alike = (sketches[mine] == sketches[theirs]).sum(1) >= ALIKE
            mine, theirs = mine[alike], theirs[alike]
            new = found[mine] < 0
            found[mine[new]] = theirs[new]
    return found
