"""One row of a source and the place where it stands; and how far a reader of rows is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weitiao.errors import RowError

BY_LINE = (".jsonl", ".ndjson", ".csv", ".tsv")  # files whose places are told by lines, packed or not


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Args:
        fields: the row's values by name, as they stand in the source.
        file: the file (or hub data set) as the user typed it.
        line: from 1. The physical line where the record starts in .jsonl and .csv; the number of the row elsewhere.
    """

    fields: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """`rows.jsonl:12` where lines count, `rows.json, row 12` elsewhere."""
        return where_of(self.file, self.line)


@dataclass
class Reading:
    """How far a reader is, and whom it tells of a row that is broken.

    Args:
        on_error: takes what would be raised; a file read by lines then goes on behind the broken line, another one ends there.
        bytes: how much of the files read by lines is done, unpacked.
    """

    on_error: Callable[[RowError], None] | None = None
    bytes: int = 0

    def broken(self, error: RowError) -> None:
        if self.on_error is None:
            raise error
        self.on_error(error)


def where_of(file: str, line: int) -> str:
    return f"{file}:{line}" if file.lower().removesuffix(".gz").endswith(BY_LINE) else f"{file}, row {line}"


def place_of(where: str, files: Mapping[str, int]) -> tuple[int, int]:
    """`rows.jsonl:12` -> (the file's number, 12)

    Raises:
        KeyError: it is none of these files.
    """
    file, line = re.fullmatch(r"(.*?)(?::|, row )(\d+)", where, re.DOTALL).groups()
    return files[file], int(line)
