"""A source of rows -> nothing, or the mistake that its name or a short file gives away.

So a mistyped path is told before a model is looked for and libraries are imported, which takes seconds. What is long, or lies on
a hub, is left to those who read it.
"""

from __future__ import annotations

from weitiao.data.defects import cure_of_columns
from weitiao.data.formats import detect
from weitiao.data.rows import local_files, read_rows
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings, Source

SHORT = 1 << 20  # bytes, which take some ten milliseconds to read
PLAIN = {".jsonl", ".ndjson", ".json", ".csv", ".tsv"}  # others may be long once they are unpacked


def glance(source: Source, settings: DataSettings, read: bool = False) -> None:
    """
    Args:
        read: read short files too, every row of them. What tells all broken rows at once does without.

    Raises:
        SourceError: there is no such source.
        RowError: one of its rows is broken, there are none, or no format knows their columns.
    """
    here = local_files(source.path, source.split)
    if not read or here is None or not PLAIN.issuperset(here.kinds):
        return
    if not all(file.is_file() for file in here.files) or sum(file.stat().st_size for file in here.files) > SHORT:  # a pipe is read once
        return
    first, *rows = read_rows(source.path, split=source.split)
    try:
        detect((first, *rows), settings)
    except RowError as error:
        raise RowError(error.found, error.expected, cure_of_columns(first.fields) or error.next_step) from None
