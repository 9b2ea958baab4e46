"""A path -> the files of rows that it stands for: a file is itself, a folder is those of one split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from weitiao.data.rows.readers import READERS, suffix
from weitiao.errors import SourceError, nearest

# What file names call the splits; the words are those of the data sets on the hubs.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# Files that lie beside the rows in a data set's folder and describe them.
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def files_of(path: str, split: str) -> list[str]:
    """The files that `path` stands for, written as the user would."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_in(path, split)
    if not place.exists():
        raise _missing(path)
    if not suffix(path):
        raise SourceError(
            f"{path}: the name does not say what kind of file this is.",
            f"Expected a name that ends in {', '.join(READERS)}; or a folder of such files.",
            "Rename the file, or save the table as one of these (a spreadsheet: as CSV UTF-8).",
        )
    return [path]


def _files_in(path: str, split: str) -> list[str]:
    folder = Path(path).expanduser()
    # A data set fetched from a hub keeps its files one folder deeper (data/train-00000-of-00001.parquet).
    found = _row_files(folder.glob("*")) or _row_files(folder.rglob("*"))
    names = [file.relative_to(folder).as_posix() for file in found]
    if not names:
        raise SourceError(
            f"{path}: a folder without files of rows.",
            f"Expected files that end in {', '.join(READERS)}.",
            "Give the file itself, or the folder that holds such files.",
        )
    return [str(Path(path) / name) for name in _of_split(path, names, split)]


def _row_files(places: Iterator[Path]) -> list[Path]:
    names_rows = (p for p in places if suffix(p.name) and p.name not in NOT_ROWS and not p.name.startswith("."))
    return sorted(place for place in names_rows if place.is_file())


def _of_split(path: str, names: list[str], split: str) -> list[str]:
    """The files whose name says this split. A name that says none is for training, as on the hubs.

    Without this, a folder with train.jsonl and test.jsonl would be trained on its own test.
    """
    splits = {name: _split_said(name) for name in names}
    wanted = [name for name in names if splits[name] == SPLIT_WORDS.get(split, split)]
    if not wanted:
        raise no_such_split(path, split, sorted(set(splits.values())))
    return wanted


def _split_said(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def no_such_split(path: str, split: str, there: Sequence[str]) -> SourceError:
    return SourceError(
        f"{path} has no split {split!r}.", f"There: {', '.join(there)}.", nearest(split, there) or "Name one of those."
    )


def _stem(name: str) -> str:
    return name[: len(name) - len(suffix(name))]


def _missing(path: str) -> SourceError:
    place = Path(path).expanduser()
    if "://" in path:
        return SourceError(f"{path}: a web address is not read.", "", "Download it, and give the path of the file.")
    if not place.parent.is_dir():
        return SourceError(f"{path}: no such file; nor is there a folder {place.parent}.", "", "Check the path.")
    shown = (p for p in place.parent.iterdir() if not p.name.startswith("."))
    siblings = sorted(p.name for p in shown if p.is_dir() or suffix(p.name))
    holds = f"The folder holds: {', '.join(siblings[:8])}{', …' if len(siblings) > 8 else ''}." if siblings else ""
    stems = {_stem(name) for name in siblings if nearest(_stem(place.name), [_stem(name)])}  # .jsonl alone likens nothing
    cure = nearest(place.name, [name for name in siblings if _stem(name) in stems]) or "Check the path."
    hub = f" For a data set on a hub write hub:{path}" if re.fullmatch(r"[A-Za-z0-9][\w./-]*", path) else ""
    return SourceError(f"{path}: no such file or folder.", holds, cure + ("" if suffix(path) else hub))
