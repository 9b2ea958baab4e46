"""The labels of a classification: the words that answer, the ids they are learned and scored as.

    text ids <eos> | pos          the row, its label learned alone
    text ids <eos> | neg, pos     the same prompt scored: of all tokens only the labels' are compared

A label is told by one token, so two words that begin alike would be one label, and accuracy would mean nothing. Such words,
and words of several tokens, are refused unless whole words are scored (data.label_scoring=sequence); then the stop token
belongs to each, so that "不" and "不好" can be told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weitiao.data.conversation import Conversation
from weitiao.data.templates import Template, Turn
from weitiao.data.tokens import encode_turn
from weitiao.errors import RowError
from weitiao.trie import Example

MOST_NAMED = 4  # labels that cannot be told apart


@dataclass(frozen=True, eq=False)
class Labels:
    """words[k] is learned and scored as ids[k], int32; in the order of data.labels, else sorted."""

    words: tuple[str, ...]
    ids: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.words)

    @property
    def longest(self) -> int:
        """How many tokens the longest label has: so many are left for it behind every prompt, whatever its own label."""
        return max(len(ids) for ids in self.ids)

    def of(self, word: str) -> np.ndarray:
        return self.ids[self.words.index(word)]

    def paths(self, prompt: np.ndarray, first: int) -> list[Example]:
        """A prompt (int32 [T]) with each label behind it, of the rows first, first + 1, …"""
        paths = []
        for k, ids in enumerate(self.ids):
            weights = np.zeros(len(prompt) + len(ids), np.float32)
            weights[len(prompt) :] = 1.0
            paths.append(Example(np.concatenate([prompt, ids]), weights, first + k))
        return paths

    def as_dict(self) -> dict[str, list[int]]:
        return {word: ids.tolist() for word, ids in zip(self.words, self.ids, strict=True)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, list[int]] | None) -> Labels | None:
        return cls(tuple(stored), tuple(np.asarray(ids, np.int32) for ids in stored.values())) if stored else None


def prompt_of(example: Example) -> np.ndarray:
    """What stands before the label."""
    return example.ids[: int(np.argmax(example.weights > 0))]


def words_of(conversations: Iterable[Conversation], named: Mapping[str, str]) -> list[str]:
    """The labels' words: data.labels', else those that the rows are answered with."""
    if named:
        return list(dict.fromkeys(named.values()))
    return sorted({c.messages[c.turns()[0]].content for c in conversations})


def encode_labels(words: Sequence[str], asked: Conversation, template: Template, scoring: str) -> Labels:
    """The ids of each word as an answer to one of the rows.

    Args:
        asked: any row that is classified; what stands before the label is the same in all.
        scoring: token or sequence.

    Raises:
        RowError: a label cannot be told by one token.
    """
    ids = []
    for word in words:
        turn: Turn = next(template.turns(asked.answered(word)))
        encoded = encode_turn(turn, template)
        stop = [template.stop_id] if scoring == "sequence" else []
        if not len(encoded.answer):
            raise RowError(f"The label {word!r} has no token.", "Expected a word for each label (data.labels).")
        ids.append(np.concatenate([encoded.answer, np.asarray(stop, np.int32)]))
    labels = Labels(tuple(words), tuple(ids))
    if scoring == "token":
        _refuse_unlike_one_token(labels, template.tokenizer)
    return labels


def _refuse_unlike_one_token(labels: Labels, tokenizer: Any) -> None:
    def piece(token: int) -> str:
        return f"{tokenizer.decode([token])!r} ({token})"

    found = []
    firsts: dict[int, str] = {}
    for word, ids in zip(labels.words, labels.ids, strict=True):
        first = int(ids[0])
        if first in firsts:
            found.append(f"The labels {firsts[first]!r} and {word!r} both begin with the token {piece(first)}: told by one token, they are one label.")
        firsts.setdefault(first, word)
    for word, ids in zip(labels.words, labels.ids, strict=True):
        if len(ids) > 1:
            found.append(f"The label {word!r} has {len(ids)} tokens: {', '.join(piece(int(i)) for i in ids[:6])}{', …' if len(ids) > 6 else ''}.")
    if found:
        raise RowError("\n".join(found[:MOST_NAMED]), "Expected labels that are one token each, no two the same.",
                       "Choose other words, such as data.labels='{0: neg, 1: pos}', score whole words (data.label_scoring=sequence), "
                       "or let them be answered as text (task=answer).")
