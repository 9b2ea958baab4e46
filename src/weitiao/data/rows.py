"""A source on disk or on a hub -> rows.

    rows.jsonl, rows.json, rows.csv, rows.parquet ...     ┐
    a folder of such files, a folder of save_to_disk      ├─>  Row(fields, file, line) ...
    owner/name, hub:name, modelscope:owner/name           ┘

What enters is one string, as the user typed it. What leaves is an iterator of rows whose fields stand as they did
in the source: nothing is renamed, filled in or converted here. Each row remembers where it came from, so that whoever
finds a defect later can name the place. Everything but an ordinary .json is streamed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weitiao.errors import RowError, SourceError, nearest


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
    data_set = _data_set(path, split, name)
    if data_set is not None:
        return _at_least_one(path, _numbered(path, data_set))
    files = _files(path, split)
    return _at_least_one(path, (row for file in files for row in _read_file(file, reading)))


def bytes_by_lines(path: str, split: str = "train") -> int | None:
    """How many bytes `Reading` will count, where that is known before: plain files that are read line by line."""
    try:
        place = Path(path).expanduser()
        files = _files(path, split) if place.exists() and not _is_saved(place) else []
    except SourceError:
        return None
    by_lines = files and all(_suffix(file) in BY_LINE for file in files)
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
    if any(path.startswith(prefix) for prefix in HUBS) or _is_hub_id(path):
        return None
    if _is_saved(place):
        return LocalFiles([path], ["saved"], sorted(file for file in place.rglob("*") if file.is_file()))
    names = _files(path, split)
    return LocalFiles(names, [_suffix(name) for name in names], [Path(name).expanduser() for name in names])


def label_names(path: str, split: str = "train", name: str | None = None) -> dict[int, str] | None:
    """What the numbers in column `label` stand for; None unless a hub data set or save_to_disk folder tells."""
    data_set = _data_set(path, split, name)
    label = (getattr(data_set, "features", None) or {}).get("label")
    names = getattr(label, "names", None)
    return dict(enumerate(names)) if names else None


def mix(sources: Sequence[Sequence[Row]], shares: Sequence[float | None], seed: int) -> list[Row]:
    """The rows of several sources, as many as all hold together, source `i` with its share of them.

    Without shares, all rows one after the other. With shares, a source's rows come in a seeded order, and none comes a
    second time before all have come once.
    """
    assert len(sources) == len(shares)
    if all(share is None for share in shares):
        return [row for source in sources for row in source]
    assert all(share is not None and share >= 0 for share in shares) and sum(shares) > 0
    counts = _apportion(shares, sum(map(len, sources)))
    return [
        row
        for i, (source, count) in enumerate(zip(sources, counts, strict=True))
        for row in _draw(source, count, np.random.default_rng([seed, i]))
    ]


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Largest remainder, so that the counts sum to the total: shares 1, 1, 1 of 10 -> 4, 3, 3."""
    quotas = [share / sum(shares) * total for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(source: Sequence[Row], count: int, rng: np.random.Generator) -> list[Row]:
    assert source or not count
    order: list[int] = []
    while len(order) < count:
        order.extend(rng.permutation(len(source)).tolist())
    return [source[i] for i in order[:count]]


# -- Which kind of source is it? ---------------------------------------------------------------------------------------

# Written like a hub's id. Whatever is not (., ~ or / in front, a drive letter, a backslash, two slashes) is a path.
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")

# What file names call the splits; the words are those of the data sets on the hubs.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# Files that lie beside the rows in a data set's folder and describe them.
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def _data_set(path: str, split: str, name: str | None) -> Any | None:
    """The loaded data set (iterable, with features), if `path` names one of a hub or of save_to_disk; else None."""
    prefix = next((prefix for prefix in HUBS if path.startswith(prefix)), None)
    if prefix:
        return HUBS[prefix](path, path.removeprefix(prefix), split, name)
    if _is_saved(Path(path).expanduser()):
        return _load_saved(path, split)
    if _is_hub_id(path):
        return _load_hub(path, path, split, name)
    return None


def _is_hub_id(path: str) -> bool:
    # A path that is missing must be reported as missing, not looked up on the internet under the same name.
    is_local = Path(path).exists() or Path(path.split("/")[0]).exists()
    return bool(HUB_ID.fullmatch(path)) and not _suffix(path) and not is_local


def _is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _suffix(file: str) -> str:
    """The suffix that READERS knows (`.jsonl.gz` included), or an empty string."""
    return next((suffix for suffix in READERS if file.lower().endswith(suffix)), "")


def _files(path: str, split: str) -> list[str]:
    """The files that `path` stands for, written as the user would."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_in(path, split)
    if not place.exists():
        raise _missing(path)
    if not _suffix(path):
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
    names_rows = (p for p in places if _suffix(p.name) and p.name not in NOT_ROWS and not p.name.startswith("."))
    return sorted(place for place in names_rows if place.is_file())


def _of_split(path: str, names: list[str], split: str) -> list[str]:
    """The files whose name says this split. A name that says none is for training, as on the hubs.

    Without this, a folder with train.jsonl and test.jsonl would be trained on its own test.
    """
    splits = {name: _split_said(name) for name in names}
    wanted = [name for name in names if splits[name] == SPLIT_WORDS.get(split, split)]
    if not wanted:
        raise _no_such_split(path, split, sorted(set(splits.values())))
    return wanted


def _split_said(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _no_such_split(path: str, split: str, there: Sequence[str]) -> SourceError:
    return SourceError(
        f"{path} has no split {split!r}.", f"There: {', '.join(there)}.", nearest(split, there) or "Name one of those."
    )


def _missing(path: str) -> SourceError:
    place = Path(path).expanduser()
    if "://" in path:
        return SourceError(f"{path}: a web address is not read.", "", "Download it, and give the path of the file.")
    if not place.parent.is_dir():
        return SourceError(f"{path}: no such file; nor is there a folder {place.parent}.", "", "Check the path.")
    shown = (p for p in place.parent.iterdir() if not p.name.startswith("."))
    siblings = sorted(p.name for p in shown if p.is_dir() or _suffix(p.name))
    holds = f"The folder holds: {', '.join(siblings[:8])}." if siblings else ""
    cure = nearest(place.name, siblings) or "Check the path."
    hub = f" For a data set on a hub write hub:{path}" if re.fullmatch(r"[A-Za-z0-9][\w./-]*", path) else ""
    return SourceError(f"{path}: no such file or folder.", holds, cure + ("" if _suffix(path) else hub))


def where_of(file: str, line: int) -> str:
    return f"{file}:{line}" if _suffix(file).removesuffix(".gz") in BY_LINE else f"{file}, row {line}"


def place_of(where: str, files: Mapping[str, int]) -> tuple[int, int]:
    """`rows.jsonl:12` -> (the file's number, 12)

    Raises:
        KeyError: it is none of these files.
    """
    file, line = re.fullmatch(r"(.*?)(?::|, row )(\d+)", where, re.DOTALL).groups()
    return files[file], int(line)


def _at_least_one(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise RowError(f"{path} holds no rows.", "Expected at least one.", "Check that it is the right one, and whole.")


def _as_row(fields: Any, file: str, line: int) -> Row:
    if not isinstance(fields, dict):
        raise RowError(
            f"{where_of(file, line)} is {JSON_NAMES[type(fields)]}: {_excerpt(json.dumps(fields, ensure_ascii=False))}",
            'Expected an object with named fields, such as {"instruction": "...", "output": "..."}.',
            "Give the values names, or remove the row." + _one_list_hint(isinstance(fields, list), file, line),
        )
    return Row(fields, file, line)


JSON_NAMES = {
    list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false", type(None): "null",
}  # fmt: skip


# -- Files -------------------------------------------------------------------------------------------------------------


def _read_file(file: str, reading: Reading) -> Iterator[Row]:
    try:
        yield from READERS[_suffix(file)](file, reading)
    except RowError as error:
        reading.broken(error)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"{file} cannot be unpacked: {error}"
        raise SourceError(found, "Expected a whole gzip file.", "Fetch it again.") from error
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"{file} cannot be read: {reason}", "", "Check the file and its rights.") from error


def _open(file: str) -> Any:
    return (gzip.open if file.lower().endswith(".gz") else open)(Path(file).expanduser(), "rb")


def read_lines(file: str, reading: Reading | None = None) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of a text file, told in one message where it isn't UTF-8. Only \\n ends a line; str would split at U+0085 and U+2028 inside values."""
    for number, raw in _raw_lines(file, reading or Reading()):
        yield number, _decode(raw, file, number)


def _raw_lines(file: str, reading: Reading) -> Iterator[tuple[int, bytes]]:
    with _open(file) as stream:
        for number, raw in enumerate(stream, start=1):
            reading.bytes += len(raw)
            yield number, raw


def _read_jsonl(file: str, reading: Reading) -> Iterator[Row]:
    for line, raw in _raw_lines(file, reading):
        try:
            text = _decode(raw, file, line)
            row = _as_row(_parse(text, file, line), file, line) if text.strip() else None
        except RowError as error:
            reading.broken(error)
            continue
        if row:
            yield row


def _read_json(file: str, reading: Reading) -> Iterator[Row]:
    with _open(file) as stream:
        text = _decode(stream.read(), file, 1)
    if _holdsread_lines(text):
        # Numbered by row, not by line: `where` must be right for a .json whatever it holds.
        texts = [(line, row) for line, row in enumerate(text.split("\n"), start=1) if row.strip()]
        rows = (_parse(row, file, line) for line, row in texts)
    else:
        rows = _rows_within(_parse(text, file, 1), file) if text.strip() else []
    return (_as_row(fields, file, number) for number, fields in enumerate(rows, start=1))


def _holdsread_lines(text: str) -> bool:
    """True for JSON lines under the name .json: several objects, the first of which ends where its line ends."""
    first, _, rest = text.lstrip().partition("\n")
    if first[:1] != "{" or not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows_within(content: Any, file: str) -> list[Any]:
    """The rows of a JSON file: a list; the only list of objects inside an object; or an object of columns."""
    if isinstance(content, list):
        return content
    values = content if isinstance(content, dict) else {}
    lists = [key for key, value in values.items() if _is_objects(value)]
    if len(lists) == 1 and (len(values) == 1 or not _is_columns(values)):
        return values[lists[0]]
    if _is_columns(values) and len(lists) < len(values):
        return [dict(zip(values, cells, strict=True)) for cells in zip(*values.values(), strict=True)]
    inside = f"an object with {', '.join(map(repr, list(values)[:8]))}" if values else "no list"
    raise RowError(
        f"{file} holds {inside}{f'; {len(lists)} of these are lists of rows' if len(lists) > 1 else ''}.",
        'Expected a list of objects; an object with one such list, as {"data": [...]}; or columns of equal length.',
        "Write the rows as one list, or one object a line into a .jsonl file.",
    )


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_columns(values: dict[str, Any]) -> bool:
    return all(isinstance(value, list) for value in values.values()) and len(set(map(len, values.values()))) == 1


def _parse(text: str, file: str, line: int) -> Any:
    """JSON text that starts at `line` of `file` -> its value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason, at = error.msg, min(error.pos, len(text.rstrip()))  # a text that breaks off, breaks off on its last line
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 2,000 nested brackets
        reason, at = str(error), 0
    start = text.rfind("\n", 0, at) + 1
    broken = text[start:].partition("\n")[0]
    raise RowError(
        f"{file}:{line + text.count(chr(10), 0, at)}, column {at - start + 1}, is not JSON ({reason}): "
        f"{_excerpt(broken, at - start)}",
        "Expected JSON: double quotes around names and text, no comma after the last item.",
        "Mend or remove this row." + _one_list_hint(text.lstrip()[:1] == "[", file, line),
    )


def _one_list_hint(is_list: bool, file: str, line: int) -> str:
    is_misnamed = is_list and line == 1 and READERS[_suffix(file)] is _read_jsonl
    return " If the whole file is one JSON list, let its name end in .json." if is_misnamed else ""


def _excerpt(text: str, at: int = 0, width: int = 60) -> str:
    """`width` characters around place `at`."""
    start = max(0, at - width // 2)
    end = start + width
    return ("…" if start else "") + text[start:end].strip() + ("…" if end < len(text.rstrip()) else "")


def _read_csv(file: str, reading: Reading, delimiter: str) -> Iterator[Row]:
    delimiter = _delimiter(file, delimiter)
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is less than one long conversation
    # strict: a quote that is never closed is an error, instead of one cell that swallows the rest of the file.
    reader = csv.reader((text for _, text in read_lines(file, reading)), delimiter=delimiter, strict=True)
    header: list[str] = []
    for line, cells in _records(reader, file):
        if not header:
            header = _checked_header(cells, file, line)
        elif len(cells) != len(header):
            reading.broken(RowError(
                f"{file}:{line} has {_count(len(cells), 'cell')}, the header has {len(header)}: "
                f"{_excerpt(delimiter.join(cells))}",
                f"Expected {', '.join(header)}.",
                'Put a cell that holds a separator or a line end in double quotes, and write " inside it twice.',
            ))
        else:
            yield Row(dict(zip(header, cells, strict=True)), file, line)


def _delimiter(file: str, usual: str) -> str:
    """Spreadsheets of half of Europe write `;` into a .csv."""
    _, header = next(read_lines(file), (0, ""))
    return ";" if usual == "," and "," not in header and ";" in header else usual


def _records(reader: Any, file: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record starts, cells), without blank lines."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RowError(
                f"{file}:{line}: the record that starts on this line cannot be read, nor what is behind it ({error}).",
                "Expected cells in double quotes to be closed, and the lines to end in \\n.",
                'Close the quotes, and write " inside a quoted cell twice.',
            ) from error
        if cells:
            yield line, cells


def _checked_header(cells: list[str], file: str, line: int) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise RowError(
            f"{file}:{line}: the header has {', '.join(map(repr, twice))} more than once.",
            "Expected a header row that names each column differently.",
            "Rename the columns; if the file has no header row, write one.",
        )
    return cells


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read_parquet(file: str, reading: Reading) -> Iterator[Row]:
    pyarrow, parquet = _require("pyarrow", "datasets"), _require("pyarrow.parquet", "datasets")
    with _open(file) as stream, _arrow_errors(pyarrow, file):
        yield from _rows_of_batches(parquet.ParquetFile(stream).iter_batches(batch_size=1000), file)


def _read_arrow(file: str, reading: Reading) -> Iterator[Row]:
    pyarrow, ipc = _require("pyarrow", "datasets"), _require("pyarrow.ipc", "datasets")
    with _open(file) as stream, _arrow_errors(pyarrow, file):
        # Two layouts share the suffix: a file with an index at its end (Feather), and a stream (what datasets writes).
        is_indexed = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_indexed:
            reader = ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(stream))
        yield from _rows_of_batches(batches, file)


def _rows_of_batches(batches: Iterator[Any], file: str) -> Iterator[Row]:
    fields = (fields for batch in batches for fields in batch.to_pylist())
    return (Row(row, file, number) for number, row in enumerate(fields, start=1))


@contextlib.contextmanager
def _arrow_errors(pyarrow: Any, file: str) -> Iterator[None]:
    try:
        yield
    except pyarrow.ArrowException as error:
        raise SourceError(
            f"{file} cannot be read: {_first_line(error)}",
            f"Expected a whole {_suffix(file)} file.",
            "Fetch or write it again; a Git LFS pointer of a few lines is not the file itself.",
        ) from error


# The suffix decides. A file that is packed has the same reader, because _open unpacks it.
READERS: dict[str, Callable[[str, Reading], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl.gz": _read_jsonl,
    ".ndjson.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": partial(_read_csv, delimiter=","),
    ".tsv.gz": partial(_read_csv, delimiter="\t"),
}
BY_LINE = {".jsonl", ".ndjson", ".csv", ".tsv"}


# -- Text that is not UTF-8 --------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def _decode(raw: bytes, file: str, line: int) -> str:
    """Bytes that start at `line` of `file` -> text."""
    raw = raw.removeprefix(BOM) if line == 1 else raw
    try:
        if not _is_utf16(raw):
            return raw.decode("utf-8")
        at = 0 if raw[:2] in UTF16_MARKS else raw.index(0)
    except UnicodeDecodeError as error:
        at = error.start
    line += raw.count(b"\n", 0, at)
    byte = at - raw.rfind(b"\n", 0, at)  # from 1, within the line
    encoding = _likely_encoding(raw)
    if encoding:
        cause, cure = f"the likely encoding is {encoding}", f"Convert it: {_iconv(file, encoding)}"
    else:
        cause = "the text around it is UTF-8, so something was damaged here"
        cure = f"Fetch the file again, or drop what is broken: {_iconv(file, 'utf-8', '-c ')}"
    place = f"line {line}, byte {byte} is 0x{raw[at]:02x}"
    raise RowError(f"{file} is not UTF-8: {place}; {cause}.", "Expected a text file in UTF-8.", cure)


def _is_utf16(raw: bytes) -> bool:
    # Without its mark, UTF-16 shows in the zero bytes: every second one of ASCII. Such bytes are valid UTF-8, alas.
    return raw[:2] in UTF16_MARKS or raw.count(0) * 4 > len(raw)


def _likely_encoding(raw: bytes) -> str:
    """The encoding of bytes that are not UTF-8; empty if they are UTF-8 but for some broken ones."""
    if raw[:2] in UTF16_MARKS:
        return "utf-16"
    if 0 in raw:
        return "utf-16le" if raw.index(0) % 2 else "utf-16be"  # "{" is 7b 00 or 00 7b
    text = raw.decode("utf-8", errors="replace")
    broken = text.count("\ufffd")
    if sum(character > "\x7f" for character in text) > 2 * broken:
        return ""
    return "gb18030" if _is_gb18030(raw) else "cp1252"


def _is_gb18030(raw: bytes) -> bool:
    # "für" in cp1252 decodes too (fc 72 is a rare character), but there the high bytes stand alone between ASCII.
    runs = re.findall(rb"[\x80-\xff]+", raw)
    try:
        return bool(raw.decode("gb18030")) and sum(len(run) == 1 for run in runs) * 2 < len(runs)
    except UnicodeDecodeError:
        return False


def _iconv(file: str, encoding: str, option: str = "") -> str:
    suffix = _suffix(file).removesuffix(".gz")
    stem = Path(file).name[: -len(_suffix(file))]
    unpack, source = ("gunzip -c " + file + " | ", "") if file.lower().endswith(".gz") else ("", f" {file}")
    return f"{unpack}iconv {option}-f {encoding} -t utf-8{source} > {stem}.utf8{suffix}"


# -- Data sets: hubs, and folders of save_to_disk ----------------------------------------------------------------------


def _numbered(path: str, data_set: Any) -> Iterator[Row]:
    # A saved data set may remember set_format("torch"), and would then give tensors in place of its own values.
    plain = data_set.with_format(None) if hasattr(data_set, "with_format") else data_set
    return (Row(dict(fields), path, number) for number, fields in enumerate(plain, start=1))


def _load_saved(path: str, split: str) -> Any:
    datasets = _require("datasets", "datasets")
    try:
        saved = datasets.load_from_disk(str(Path(path).expanduser()))
    except Exception as error:
        raise SourceError(
            f"{path} cannot be read: {_first_line(error)}",
            "Expected a whole folder written by save_to_disk, by this version of datasets or an older one.",
            "Upgrade datasets (pip install -U datasets), or write the folder again.",
        ) from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise _no_such_split(path, split, list(saved))
    return saved[split]


def _load_hub(path: str, set_id: str, split: str, name: str | None) -> Any:
    datasets = _require("datasets", "datasets")
    with _hub_errors(path, set_id), _cache_only_if_unreachable(datasets, set_id):
        return datasets.load_dataset(set_id, name, split=split)


def _load_modelscope(path: str, set_id: str, split: str, name: str | None) -> Any:
    modelscope = _require("modelscope.msdatasets", "modelscope,datasets")
    with _hub_errors(path, set_id):
        loaded = modelscope.MsDataset.load(set_id, subset_name=name, split=split)
    # Its own wrapper holds the data set that knows its features; newer versions hand that over directly.
    return getattr(loaded, "ds_instance", loaded)


HUBS: dict[str, Callable[[str, str, str, str | None], Any]] = {"hub:": _load_hub, "modelscope:": _load_modelscope}


@contextlib.contextmanager
def _cache_only_if_unreachable(datasets: Any, set_id: str) -> Iterator[None]:
    """Ask the hub once. Out of its reach, datasets would retry for half a minute before it looks into its cache."""
    unreachable = _why_unreachable(set_id)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or bool(unreachable)
    try:
        yield
    except ConnectionError as error:
        # datasets would say that the offline mode is on, which is our doing.
        raise ConnectionError(unreachable or _first_line(error)) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _why_unreachable(set_id: str) -> str:
    """What keeps the hub from answering; empty if it answers."""
    hub = importlib.import_module("huggingface_hub")
    try:
        hub.HfApi().dataset_info(set_id, timeout=10)
    except hub.errors.HfHubHTTPError:  # an answer, if an unwelcome one: load_dataset tells what it means
        return ""
    except Exception as error:
        return f"the hub cannot be reached ({_first_line(error)})"
    return ""


@contextlib.contextmanager
def _hub_errors(path: str, set_id: str) -> Iterator[None]:
    """Whatever a hub's client raises (every version its own kinds) -> one SourceError."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        expected, next_step = next(cure for kind, cure in HUB_CURES.items() if kind in kinds)
        taken = " No file or folder here has this name, so it was taken for a data set on the hub." * (path == set_id)
        raise SourceError(
            f"{path} cannot be loaded: {type(error).__name__}: {_first_line(error)}",
            expected + taken,
            next_step.format(set_id=set_id),
        ) from error


_FETCH = (
    "Download it where there is a network (hf download --repo-type dataset {set_id} --local-dir rows) and give that "
    "folder; or set HF_ENDPOINT to a mirror; or take modelscope:owner/name."
)
# The first kind that the error is one of. The names are those of datasets, which need not be installed.
HUB_CURES = {
    "DatasetNotFoundError": (
        "Expected a public data set, or one that your account may read.",
        "Check the spelling; for a private or gated one, ask for access on its page and run: hf auth login",
    ),
    "ValueError": (
        "Expected a split and a configuration that the data set has.",
        "Name one of those in the message.",
    ),
    "Exception": ("Expected a hub that answers, or a data set that was fetched before.", _FETCH),
}


def _require(module: str, extras: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SourceError(
            f"Reading this needs the package {package}, which cannot be imported ({error}).",
            "",
            f'Run: pip install "weitiao[{extras}]"',
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
