"""Texts -> ids, each piece between special tokens encoded once.

    <|im_start|> user\\nHi. <|im_end|> \\n <|im_start|> assistant\\n        five of these pieces were met in the turn before

A tokenizer cuts a text at its special tokens before anything else, and what stands between them is encoded without a look
at its neighbours. So a chat of n turns, whose prompts hold each other, costs n pieces in the place of n²/2. A tokenizer
that does otherwise (by its own settings, or found by asking it) is called with whole texts. Pieces are cut further, into
words, where that is known to be the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from weitiao.data.words import Words, as_bytes, words_of

MOST_CHARACTERS = 4_000_000  # of pieces that are remembered
PROBES = ("user\nHi there", " a  b ", "\n\nDas weiß", "是的。\n", "12 345", "\t", "e\u0301 x", "A", ".", "it's 'll \n\n x  7", "数据x一个 是é")


class Pieces:
    """The ids of texts, int32, without special tokens of the tokenizer's own adding."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.size = tokenizer, len(tokenizer)
        self.known: dict[str, bytes] = {}
        self.characters = 0
        self.marks = self._marks()
        self.words: Words | None = words_of(tokenizer, self._fast) if self.marks else None
        if self.words and not self._is_alike():
            self.words = None
        if self.marks and not self.words and not self._is_alike():
            self.marks = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if len(self.tokenizer) != self.size:  # tokens were added since
            self.__init__(self.tokenizer)
        if not self.marks or not texts:
            return [np.array(ids, np.int32) for ids in self._whole(texts)]
        cut = [[piece for piece in self.marks.split(text) if piece] for text in texts]
        if self.characters > MOST_CHARACTERS:
            self.known.clear()
            self.characters = 0
        new = list({piece: None for pieces in cut for piece in pieces if piece not in self.known})
        by_words = [piece for piece in new if self.words and self.words.fits(piece) and not self.marks.match(piece)]
        if by_words:
            self.known.update(zip(by_words, self.words.ids(by_words), strict=True))
        others = [piece for piece in new if piece not in self.known]
        self.known.update(zip(others, map(as_bytes, self._fast(others)), strict=True))
        self.characters += sum(map(len, new))
        return [np.frombuffer(b"".join([self.known[piece] for piece in pieces]), np.int32) for pieces in cut]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []

    def _fast(self, texts: list[str]) -> list[list[int]]:
        inner = self.tokenizer.backend_tokenizer
        inner.no_truncation()
        inner.no_padding()
        return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]

    def _marks(self) -> re.Pattern[str] | None:
        """What a text is cut at first: the added tokens that are matched as they stand."""
        if not getattr(self.tokenizer, "is_fast", False) or getattr(self.tokenizer, "split_special_tokens", False):
            return None
        begins = self.tokenizer.backend_tokenizer.pre_tokenizer
        if begins and b'"first"' in begins.__getstate__():  # Metaspace's prepend_scheme: a text's first piece is another
            return None
        added = self.tokenizer.added_tokens_decoder.values()
        if any(token.lstrip or token.rstrip or token.single_word for token in added):
            return None
        marks = sorted((token.content for token in added if not token.normalized), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def _is_alike(self) -> bool:
        """Ask it: are texts cut here what they are whole?"""
        marks = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.normalized][:4]
        texts = [left + mark + right for mark in marks for left in ("", *PROBES) for right in ("", *PROBES)]
        pieces = self.encode(texts)
        self.known.clear()
        return [ids.tolist() for ids in pieces] == self._whole(texts)
