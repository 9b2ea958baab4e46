"""Many rows, encoded by several processes and gathered in flat arrays; then cut to the longest row in force.

    chunks of rows -> (several processes) Parts -> Gathered, nothing cut -> the columns of StoredRows

What is long, ids and what was said, goes into files where there is a folder for them, and is mapped from there. Rows that are
cut are few, so they are made again one by one and put behind the others; all that fit stay where they stand.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.data.conversation import Conversation
from weitiao.data.encoded import encode_rows, labelled, read_row
from weitiao.data.formats import row_weight
from weitiao.data.labels import Labels
from weitiao.data.rows.row import Row, where_of
from weitiao.data.stored import COLUMNS, conversation_of, said_by
from weitiao.data.templates import Template
from weitiao.data.tokens import EncodedTurn, cut_front, examples
from weitiao.settings.data import DataSettings

if TYPE_CHECKING:
    from weitiao.data.survey import Survey

LONG = ("ids", "said")  # columns that go into files
TURNS = {"given": np.int32, "size": np.int64, "weight": np.float32}  # an item a turn: tokens of its prompt, of all; how much it is learned
ROWS = {"file": np.int32, "line": np.int64, "turns": np.int64, "said_size": np.int64}  # an item a row


@dataclass(frozen=True)
class Skipped:
    where: str
    reason: str


@dataclass(eq=False)
class Part:
    """What some rows come to. columns: of those that can teach. skipped: (file, line, reason) of the others."""

    rows: int
    files: list[str]
    columns: dict[str, np.ndarray]
    skipped: list[tuple[int, int, str]]
    survey: Survey | None


@dataclass(frozen=True, eq=False)
class Encoder:
    """Some rows -> a Part, in any process. labels: what rows are classified as. survey: an empty one, if notes are to be taken."""

    settings: DataSettings
    template: Template
    model_limit: int
    labels: Labels | None
    survey: Survey | None

    def __call__(self, rows: Sequence[Row], formats: Sequence[str], is_new: Sequence[bool]) -> Part:
        said = [read_row(row, format, self.settings) for row, format in zip(rows, formats, strict=True)]
        survey = None if self.survey is None else self.survey.another()
        files: dict[str, int] = {}
        found: dict[str, list[Any]] = {name: [] for name in ("ids", "said", *TURNS, *ROWS)}
        skipped = []
        for one, new in zip(encode_rows(said, self.template, self.model_limit, self.labels is not None), is_new, strict=True):
            one = labelled(one, self.labels) if self.labels else one
            if survey is not None and new:
                survey.add(one)
            file, line = files.setdefault(one.row.file, len(files)), one.row.line
            if one.reason:
                skipped.append((file, line, one.reason))
                continue
            weight, text = row_weight(one.row, self.settings), said_by(one.conversation)
            found["said"].append(text)
            for name, value in (("file", file), ("line", line), ("turns", len(one.turns)), ("said_size", len(text))):
                found[name].append(value)
            for turn in one.turns:
                found["ids"] += (turn.prompt, turn.answer, turn.stop)
                found["given"].append(len(turn.prompt))
                found["size"].append(len(turn))
                found["weight"].append(turn.weight * weight)
        if survey is not None:
            survey.sketch_all()  # it may go to another process, without what was said
        columns = {name: np.array(found[name], dtype) for name, dtype in (TURNS | ROWS).items()}
        columns["ids"] = np.concatenate(found["ids"]) if found["ids"] else np.zeros(0, np.int32)
        columns["said"] = np.frombuffer(b"".join(found["said"]), np.uint8)
        return Part(len(rows), list(files), columns, skipped, survey)


@dataclass(eq=False)
class Gathered:
    """Parts in their order. folder: where the long columns go; in memory without one. files: names by their number."""

    folder: Path | None
    files: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    skipped: list[tuple[int, int, str]] = field(default_factory=list)
    columns: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in TURNS | ROWS})

    def __post_init__(self) -> None:
        self.long = {name: open(self.folder / name, "w+b") if self.folder else io.BytesIO() for name in LONG}

    def add(self, part: Part) -> None:
        files = np.array([self.files.setdefault(file, len(self.files)) for file in part.files], np.int32)
        self.rows += part.rows
        self.skipped += [(int(files[file]), line, reason) for file, line, reason in part.skipped]
        for name, stream in self.long.items():
            stream.write(part.columns[name].data)
        for name, parts in self.columns.items():
            parts.append(files[part.columns[name]] if name == "file" else part.columns[name])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.columns[name]) if self.columns[name] else np.zeros(0, (TURNS | ROWS)[name])

    def where(self, file: int, line: int) -> str:
        return where_of(list(self.files)[file], line)

    def mapped(self, name: str) -> np.ndarray:
        """A long column as it stands now."""
        stream, dtype = self.long[name], COLUMNS[name]
        stream.flush()
        if self.folder is None:
            return np.frombuffer(stream.getvalue(), dtype)
        return np.memmap(stream, dtype, "r").view(np.ndarray) if stream.tell() else np.zeros(0, dtype)

    def long_columns(self) -> dict[str, np.ndarray]:
        """All is written."""
        columns = {name: self.mapped(name) for name in self.long}
        for stream in self.long.values():
            stream.close()
        return columns


@dataclass(frozen=True, eq=False)
class Fitted:
    """columns: those of StoredRows, the long ones left out. skipped: those that lose their answer, (file, line, reason)."""

    columns: dict[str, np.ndarray]
    skipped: list[tuple[int, int, str]]
    cut: int


def longest_turns(read: Gathered, labels: Labels | None) -> np.ndarray:
    """int64 [rows]: what each takes uncut; before any label the same room is left, so that no prompt's length tells its label."""
    turns = read.column("turns")
    sizes = read.column("given") + labels.longest if labels else read.column("size")
    return np.maximum.reduceat(sizes.astype(np.int64), _first(turns)[:-1]) if len(turns) else np.zeros(0, np.int64)


def fit(read: Gathered, longest: np.ndarray, limit: int, labels: Labels | None, template: Template, cut: str) -> Fitted:
    """What is left of each row within `limit` tokens. longest: from `longest_turns`. cut: data.cut."""
    turns, given, weight, sizes = (read.column(name) for name in ("turns", "given", "weight", "size"))
    said_sizes, first = read.column("said_size"), _first(turns)
    end, said_end = np.cumsum(sizes), np.cumsum(said_sizes)
    begin, said_begin, start = end - sizes, said_end - said_sizes, np.maximum(given, 1)
    fitting, stays = turns.copy(), np.ones(len(given), bool)
    prompts = {}  # of rows that are too long: tokens of the first prompt
    too_long = np.flatnonzero(longest > limit).tolist()
    ids, said = (read.mapped(name) for name in LONG) if too_long else (given, given)
    behind = len(ids)
    for row in too_long:
        mine = range(int(first[row]), int(first[row + 1]))
        asked = [_turn(ids[begin[i] : end[i]], int(given[i]), float(weight[i]), labels is None) for i in mine]
        if labels and cut != "end":
            conversation = conversation_of(said[said_begin[row] : said_end[row]].tobytes())
            asked = _cut_in_front(conversation, asked, template, limit, labels)
        paths = list(examples(asked, limit, row, 1.0))
        prompts[row], fitting[row] = len(asked[0].prompt), len(paths)
        stays[mine.start + len(paths) : mine.stop] = False
        for i, turn, path in zip(mine, asked, paths):
            start[i] = max(len(turn.prompt), 1)
            if len(path) < sizes[i]:  # what is left of it goes behind all others
                read.long["ids"].write(path.ids.data)
                begin[i], behind = behind, behind + len(path)
                end[i] = behind
    taught = stays & (weight > 0) & (end - begin > start)
    counts = np.add.reduceat(taught.astype(np.int64), first[:-1]) if len(turns) else turns
    kept = counts > 0
    file, line = read.column("file"), read.column("line")
    lost = np.flatnonzero(fitting == 0).tolist()  # a row of weight 0 is none: that is a wish and no defect
    skipped = [(int(file[row]), int(line[row]), f"its answer is cut away: the prompt alone has {prompts[row]} of {limit} tokens") for row in lost]
    columns = {
        "begin": begin[taught], "end": end[taught], "start": start[taught], "weight": weight[taught], "first": _first(counts[kept]),
        "file": file[kept], "line": line[kept], "turns": fitting[kept], "said_begin": said_begin[kept], "said_end": said_end[kept],
    }
    return Fitted({name: column.astype(COLUMNS[name]) for name, column in columns.items()}, skipped, int((longest[kept] > limit).sum()))


def _turn(ids: np.ndarray, given: int, weight: float, stops: bool) -> EncodedTurn:
    last = len(ids) - stops
    return EncodedTurn(ids[:given], ids[given:last], ids[last:], weight)


def _cut_in_front(
    conversation: Conversation, turns: Sequence[EncodedTurn], template: Template, limit: int, labels: Labels,
) -> list[EncodedTurn]:
    """Each turn's prompt without the front of what was said, as far as it must."""
    def fitting(turn: EncodedTurn, place: int) -> EncodedTurn:
        too_much = len(turn.prompt) + labels.longest - limit
        if too_much <= 0:
            return turn
        head = template.head(conversation.as_dicts(place), conversation.tools)
        return replace(turn, prompt=cut_front(turn.prompt, len(turn.prompt) - too_much, head))

    return [fitting(turn, place) for turn, place in zip(turns, conversation.turns())]


def _first(counts: np.ndarray) -> np.ndarray:
    """2 1 3 -> 0 2 3 6"""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
