"""Rows -> paths as a person reads them: whose tokens are computed already, what is given, what is learned.

    rows.jsonl:1    system question answer      given, learned
    rows.jsonl:2    system question answer      shared with rows.jsonl:1, given, learned

A token is shared where an earlier path of those shown has it behind the same tokens: one node of the trie, computed once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from weitiao.data.stored import TrainingRow
from weitiao.data.spelling import Piece, Spelling, seen
from weitiao.trie import Example, build_with_paths

Kind = Literal["shared", "given", "learned"]
LOOKED_AT = 3000  # rows, for two that share much


@dataclass(frozen=True, eq=False)
class Path:
    """One learned turn of a row. turn: from 1, of `turns`. shared: how many first tokens an earlier path, `owner`, has too.

    where: the row's place, without the folder that all rows shown have.
    """

    row: TrainingRow
    where: str
    turn: int
    turns: int
    example: Example
    shared: int
    owner: Path | None

    @property
    def learned(self) -> int:
        return int((self.example.weights > 0).sum())

    @property
    def given(self) -> int:
        """How many tokens stand before the first learned one."""
        return int(np.argmax(self.example.weights > 0))

    def name_for(self, reader: Path) -> str:
        """What it is called in another path: `turn 1` in the same row, else its place."""
        if reader.row is self.row:
            return f"turn {self.turn}"
        return (f"turn {self.turn} of " if self.turns > 1 else "") + self.where

    def stretches(self, spelling: Spelling) -> list[Stretch]:
        """All of its pieces, in runs of one kind and weight."""
        return [
            Stretch(kind, tuple(pieces), weight)
            for (kind, weight), pieces in groupby(spelling.pieces(self.example.ids), key=self._kind)
        ]

    def _kind(self, piece: Piece) -> tuple[Kind, float]:
        weight = float(self.example.weights[piece.stop - 1])
        if weight > 0:
            return "learned", weight
        return ("shared" if piece.stop <= self.shared else "given"), 0.0


@dataclass(frozen=True)
class Stretch:
    kind: Kind
    pieces: tuple[Piece, ...]
    weight: float

    def __len__(self) -> int:
        """Tokens, of which a piece may have several."""
        return sum(len(piece.ids) for piece in self.pieces)

    def folded(self, most: int) -> tuple[tuple[Piece, ...], int, tuple[Piece, ...]]:
        """(first pieces, tokens between, last pieces): all of them first, unless that is more than `most` and worth a fold."""
        half = most // 2
        hidden = self.pieces[half : len(self.pieces) - half]
        tokens = sum(len(piece.ids) for piece in hidden)
        if len(self.pieces) <= most or tokens < 4:
            return self.pieces, 0, ()
        return self.pieces[:half], tokens, self.pieces[len(self.pieces) - half :]


@dataclass(frozen=True)
class Totals:
    rows: int
    tokens: int
    learned: int
    nodes: int

    def text(self) -> str:
        computed = f"{self.nodes:,} nodes in the place of {self.tokens:,} tokens (1 / {self.tokens / max(self.nodes, 1):.2f})"
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}: {computed}, {self.learned:,} learned."


def paths_of(rows: Sequence[TrainingRow]) -> tuple[list[list[Path]], Totals]:
    """(for each row its paths, what all of them are together)"""
    examples = [example for row in rows for example in row.examples]
    trie, nodes = build_with_paths(examples)
    first = np.full(len(trie), -1)  # the path that has a node first
    folder = common_folder([row.where for row in rows])
    flat: list[Path] = []
    by_row: list[list[Path]] = []
    for row in rows:
        for turn, example in enumerate(row.examples, 1):
            path = nodes[len(flat)]
            shared = int((first[path] >= 0).sum())
            owner = flat[first[path[shared - 1]]] if shared else None
            first[path[shared:]] = len(flat)
            flat.append(Path(row, seen_place(row.where[folder:]), turn, len(row.examples), example, shared, owner))
        by_row.append(flat[len(flat) - len(row.examples) :])
    return by_row, Totals(len(rows), sum(map(len, examples)), sum(path.learned for path in flat), trie.computed)


def common_folder(places: Sequence[str]) -> int:
    """How many characters of each name the same folder: 5 in `data/rows.jsonl:1`, `data/more/rows.jsonl:1`."""
    same = os.path.commonprefix([place.replace("\\", "/") for place in places])
    return same.rfind("/") + 1


def row_header(paths: Sequence[Path], spelling: Spelling, stop_id: int) -> str:
    """`rows.jsonl:12 · 356 tokens, 212 of them shared with rows.jsonl:3, 41 learned · ends with <|im_end|>`"""
    where = paths[0].where
    if len(paths) == 1:
        return f"{where} · {path_header(paths[0])} · {_ending(paths[0], spelling, stop_id)}"
    tokens, shared, learned = (sum(values) for values in zip(*((len(p.example), p.shared, p.learned) for p in paths), strict=True))
    counts = f"{len(paths)} turns, each with all before it · {tokens:,} tokens, {shared:,} of them shared, {learned:,} learned"
    return f"{where} · {counts} · {_ending(paths[-1], spelling, stop_id)}"


def turn_header(path: Path) -> str:
    return f"turn {path.turn} of {path.turns} · {path_header(path)}"


def path_header(path: Path) -> str:
    """`356 tokens, 212 of them shared with rows.jsonl:3, 41 learned`"""
    shared = f"{path.shared:,} of them shared with {path.owner.name_for(path)}" if path.owner else ""
    counted = (f"{len(path.example):,} tokens", shared, f"{path.learned:,} learned{_weights(path.example)}")
    return ", ".join(part for part in counted if part)


def shared_note(path: Path, stretch: Stretch) -> str:
    return f"⋮ {len(stretch):,} tokens shared with {path.owner.name_for(path)}" if path.owner else ""


def _weights(example: Example) -> str:
    """Said where it is not 1."""
    weights = sorted({float(w) for w in example.weights if w > 0})
    if weights == [1.0]:
        return ""
    return " with weight " + " to ".join(f"{w:.3g}" for w in dict.fromkeys((weights[0], weights[-1])))


def _ending(path: Path, spelling: Spelling, stop_id: int) -> str:
    last = spelling.pieces(path.example.ids[path.given :])[-1]
    if path.example.ids[-1] != stop_id and path.row.conversation.is_label:
        return f"its label alone is learned: {seen(last.text)}"
    return f"ends with {seen(last.text)}"


def seen_place(where: str) -> str:
    """A place, whose file's name may hold anything; its spaces are its own."""
    return "".join(c if c == " " else seen(c) for c in where)


def choose(rows: Sequence[TrainingRow], count: int, looked_at: int = LOOKED_AT) -> list[TrainingRow]:
    """The first `count` rows; and, where they share little, the two that share most of a prompt among the first few thousand."""
    known = list(rows[: max(count, looked_at)])  # made once: a row is told from others by being the same object
    chosen = known[:count]
    if best := _most_sharing(known[:looked_at]):
        shown = _most_sharing(chosen)
        if not shown or _shared_given(best) > 2 * _shared_given(shown):
            chosen += [row for row in (best.owner.row, best.row) if all(row is not other for other in chosen)]
    return chosen


def _most_sharing(rows: Sequence[TrainingRow]) -> Path | None:
    """A row that repeats another is none of them: it has nothing of its own to show."""
    firsts = [paths[0] for paths in paths_of(rows)[0]]
    found = [path for path in firsts if path.owner and path.shared < len(path.example)]
    return max(found, key=_shared_given, default=None)


def _shared_given(path: Path) -> int:
    return min(path.shared, path.given)
