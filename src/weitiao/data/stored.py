"""Rows that can teach, as flat arrays: in memory, or mapped from files. A row is made an object when it is asked for.

    ids      3 7 7 5 2 | 3 9 4 2 | 3 7 7 6 2        one path after the other
    begin    0           5         9                of each path, its slice of ids ...
    end      5           9         14
    start    3           2         3                ... and the place in it from which it is learned ...
    weight   1.0         1.0       0.5              ... with this weight
    first    0           1         2         3      row r has the paths first[r]..first[r + 1] - 1

What was said stands beside them as JSON, a row after the other, for those who ask questions or show rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from weitiao.data.conversation import Conversation, Message
from weitiao.data.rows.row import where_of
from weitiao.trie import Example

# What a file of each holds.
COLUMNS = {
    "ids": np.int32, "begin": np.int64, "end": np.int64, "start": np.int32, "weight": np.float32, "first": np.int64,
    "file": np.int32, "line": np.int64, "turns": np.int32, "said": np.uint8, "said_begin": np.int64, "said_end": np.int64,
}


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """A row that can teach: where it stands, what was said, and its paths (one for each learned turn)."""

    where: str
    conversation: Conversation
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class StoredRows(Sequence[TrainingRow]):
    """columns: the arrays of COLUMNS. files: the names that column file counts. chosen: int64, the rows of this sequence."""

    columns: Mapping[str, np.ndarray]
    files: tuple[str, ...]
    chosen: np.ndarray

    @classmethod
    def all(cls, columns: Mapping[str, np.ndarray], files: Sequence[str]) -> StoredRows:
        return cls(columns, tuple(files), np.arange(len(columns["line"])))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.of(i)
        row = int(self.chosen[i])
        return TrainingRow(self._where(row), self._conversation(row), self._examples(row))

    @classmethod
    def none(cls) -> StoredRows:
        return cls.all({name: np.zeros(int(name == "first"), dtype) for name, dtype in COLUMNS.items()}, ())

    def of(self, which: np.ndarray | slice) -> StoredRows:
        return replace(self, chosen=self.chosen[which])

    def _where(self, row: int) -> str:
        return where_of(self.files[self.columns["file"][row]], int(self.columns["line"][row]))

    def _conversation(self, row: int) -> Conversation:
        said = self.columns["said"][self.columns["said_begin"][row] : self.columns["said_end"][row]]
        return conversation_of(said.tobytes()).first_turns(int(self.columns["turns"][row]))

    def _examples(self, row: int) -> tuple[Example, ...]:
        first = self.columns["first"]
        return tuple(self._example(path, row) for path in range(int(first[row]), int(first[row + 1])))

    def _example(self, path: int, row: int) -> Example:
        columns = self.columns
        ids = columns["ids"][columns["begin"][path] : columns["end"][path]]
        weights = np.zeros(len(ids), np.float32)
        weights[columns["start"][path] :] = columns["weight"][path]
        return Example(ids, weights, row)

    # ------------------------------------------------------------------------------------ of all rows, without making them

    @cached_property
    def paths(self) -> Paths:
        """Their paths alone."""
        return Paths(self)

    @cached_property
    def examples(self) -> Examples:
        """Their paths, one after the other."""
        return Examples(self)

    @cached_property
    def path_numbers(self) -> np.ndarray:
        """int64 [paths], in the order of the rows."""
        first = self.columns["first"]
        return _runs(first[self.chosen], first[self.chosen + 1] - first[self.chosen])

    @cached_property
    def path_rows(self) -> np.ndarray:
        """int64 [paths]: the row that each belongs to."""
        first = self.columns["first"]
        return np.repeat(self.chosen, first[self.chosen + 1] - first[self.chosen])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [paths]: tokens of each."""
        return self.columns["end"][self.path_numbers] - self.columns["begin"][self.path_numbers]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def learned_tokens(self) -> int:
        return int((self.lengths - self.columns["start"][self.path_numbers]).sum())

    def digest(self) -> str:
        """sha256 of each path's ids, then its weights, in order."""
        told = hashlib.sha256()
        self.tell(told)
        return told.hexdigest()

    def tell(self, told: Any) -> None:
        """The same to a hash that has been told other rows before."""
        ids = self.columns["ids"]
        paths = (self.columns[name][self.path_numbers].tolist() for name in ("begin", "end", "start", "weight"))
        for begin, end, start, weight in zip(*paths, strict=True):
            weights = np.zeros(end - begin, np.float32)
            weights[start:] = weight
            told.update(ids[begin:end])
            told.update(weights)

    def first_outside(self, vocabulary: int) -> tuple[str, int] | None:
        """(where the first row stands that has an id of `vocabulary` or more, its highest id)"""
        ids = self.columns["ids"]
        if not len(self) or ids.max(initial=0) < vocabulary:
            return None
        for row in self.chosen.tolist():
            for path in self._examples(row):
                if (highest := int(path.ids.max())) >= vocabulary:
                    return self._where(row), highest
        return None

    def places(self) -> np.ndarray:
        """int64 [rows]: a number for the place where each row stands, from 0 as they come; a row that was drawn twice has one."""
        places = np.stack([self.columns["file"][self.chosen].astype(np.int64), self.columns["line"][self.chosen]], 1)
        _, first, each = np.unique(places, axis=0, return_index=True, return_inverse=True)
        number = np.empty(len(first), np.int64)
        number[np.argsort(first, kind="stable")] = np.arange(len(first))
        return number[each.reshape(-1)]


@dataclass(frozen=True, eq=False)
class Paths(Sequence[tuple[Example, ...]]):
    """Of each row its paths."""

    rows: StoredRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows._examples(int(self.rows.chosen[i]))

    @cached_property
    def tokens(self) -> np.ndarray:
        """int64 [rows]"""
        first, chosen = self.rows.columns["first"], self.rows.chosen
        ends = np.concatenate([[0], np.cumsum(self.rows.lengths)])
        paths = np.cumsum(first[chosen + 1] - first[chosen])
        return np.diff(ends[paths], prepend=0)

    @property
    def longest(self) -> int:
        return int(self.rows.lengths.max())


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """The paths of all rows."""

    rows: StoredRows

    def __len__(self) -> int:
        return len(self.rows.path_numbers)

    def __getitem__(self, i):
        return self.rows._example(int(self.rows.path_numbers[i]), int(self.rows.path_rows[i]))


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts 3 9, lengths 2 3 -> 3 4 9 10 11"""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


# ------------------------------------------------------------------------------------------------ what was said, as JSON


WRITE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes one a call


def said_by(conversation: Conversation) -> bytes:
    messages = [(m.role, m.content, m.weight) for m in conversation.messages]
    return WRITE([messages, conversation.is_label, conversation.tools]).encode()


def conversation_of(said: bytes) -> Conversation:
    messages, is_label, tools = json.loads(said)
    return Conversation(tuple(Message(*message) for message in messages), is_label, tuple(tools))
