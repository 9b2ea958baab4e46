"""A source on disk or on a hub -> rows.

    rows.jsonl, rows.json, rows.csv, rows.parquet ...     ┐
    a folder of such files, a folder of save_to_disk      ├─>  Row(fields, file, line) ...
    owner/name, hub:name, modelscope:owner/name           ┘

What enters is one string, as the user typed it. What leaves is an iterator of rows whose fields stand as they did
in the source: nothing is renamed, filled in or converted here. Each row remembers where it came from, so that whoever
finds a defect later can name the place. Everything but an ordinary .json is streamed.

    data_sets ── files ── readers ── utf8 ──┐
    mix ────────────────────────────────────┴─ row
    data_sets, readers ── packages
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weitiao.data.rows.data_sets import HUBS, is_hub_id, is_saved, load_data_set, rows_of
from weitiao.data.rows.files import files_of
from weitiao.data.rows.readers import read_file, suffix
from weitiao.data.rows.row import BY_LINE, Reading, Row
from weitiao.errors import RowError, SourceError


def read_rows(path: str, *, split: str = "train", name: str | None = None, reading: Reading | None = None) -> Iterator[Row]:
    """The rows of a source, one after the other.

    Args:
        path: a file, a folder, `owner/name`, `hub:name` or `modelscope:owner/name`.
        split: which part of a hub data set, a save_to_disk folder, or a folder whose file names say `train`, `test` ...
            A single file is read whole.
        name: the configuration (subset) of a hub data set.
        reading: told how far it is, and of broken rows in the place of an error.

    Raises:
        SourceError: at once, when there is no such source.
        RowError: while reading, at the first row that is broken; or when there are no rows.
    """
    reading = reading or Reading()
    data_set = load_data_set(path, split, name)
    if data_set is not None:
        return _at_least_one(path, rows_of(path, data_set))
    files = files_of(path, split)
    return _at_least_one(path, (row for file in files for row in read_file(file, reading)))


def bytes_by_lines(path: str, split: str = "train") -> int | None:
    """How many bytes `Reading` will count, where that is known before: plain files that are read line by line."""
    try:
        place = Path(path).expanduser()
        files = files_of(path, split) if place.exists() and not is_saved(place) else []
    except SourceError:
        return None
    by_lines = files and all(suffix(file) in BY_LINE for file in files)
    return sum(Path(file).expanduser().stat().st_size for file in files) if by_lines else None


@dataclass(frozen=True)
class LocalFiles:
    """names: of the files, as rows bear them; kinds: how each is read. files: those whose content decides the rows."""

    names: list[str]
    kinds: list[str]
    files: list[Path]


def local_files(path: str, split: str = "train") -> LocalFiles | None:
    """What a source is made of here; None for one on a hub.

    Raises:
        SourceError: there is no such source.
    """
    place = Path(path).expanduser()
    if any(path.startswith(prefix) for prefix in HUBS) or is_hub_id(path):
        return None
    if is_saved(place):
        return LocalFiles([path], ["saved"], sorted(file for file in place.rglob("*") if file.is_file()))
    names = files_of(path, split)
    return LocalFiles(names, [suffix(name) for name in names], [Path(name).expanduser() for name in names])


def label_names(path: str, split: str = "train", name: str | None = None) -> dict[int, str] | None:
    """What the numbers in column `label` stand for; None unless a hub data set or save_to_disk folder tells."""
    data_set = load_data_set(path, split, name)
    label = (getattr(data_set, "features", None) or {}).get("label")
    names = getattr(label, "names", None)
    return dict(enumerate(names)) if names else None


def _at_least_one(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise RowError(f"{path} holds no rows.", "Expected at least one.", "Check that it is the right one, and whole.")
