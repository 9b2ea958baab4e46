"""A file of rows -> rows, by what its name ends in: JSON lines, JSON, CSV, Parquet, Arrow.

A row that is broken is told with its place, an excerpt and a cure. A file read by lines then goes on behind it.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from weitiao.data.rows.packages import first_line, require_package
from weitiao.data.rows.row import Reading, Row, where_of
from weitiao.data.rows.utf8 import decode, is_utf16, open_file, raw_lines, read_lines
from weitiao.errors import RowError, SourceError


def read_file(file: str, reading: Reading) -> Iterator[Row]:
    try:
        yield from READERS[suffix(file)](file, reading)
    except RowError as error:
        reading.broken(error)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"{file} cannot be unpacked: {error}"
        raise SourceError(found, "Expected a whole gzip file.", "Fetch it again.") from error
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"{file} cannot be read: {reason}", "", "Check the file and its rights.") from error


def suffix(file: str) -> str:
    """The suffix that READERS knows (`.jsonl.gz` included), or an empty string."""
    return next((end for end in READERS if file.lower().endswith(end)), "")


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


# -- JSON lines and JSON -----------------------------------------------------------------------------------------------


def _read_jsonl(file: str, reading: Reading) -> Iterator[Row]:
    for line, raw in raw_lines(file, reading):
        try:
            text = decode(raw, file, line)
            row = _as_row(_parse(text, file, line), file, line) if text.strip() else None
        except RowError as error:
            reading.broken(error)
            if line == 1 and is_utf16(raw):  # and so are the others, whose bytes are out of step with their lines
                return
            continue
        if row:
            yield row


def _read_json(file: str, reading: Reading) -> Iterator[Row]:
    with open_file(file) as stream:
        text = decode(stream.read(), file, 1)
    if _holds_lines(text):
        # Numbered by row, not by line: `where` must be right for a .json whatever it holds.
        texts = [(line, row) for line, row in enumerate(text.split("\n"), start=1) if row.strip()]
        rows = (_parse(row, file, line) for line, row in texts)
    else:
        rows = _rows_within(_parse(text, file, 1), file) if text.strip() else []
    for number, fields in enumerate(rows, start=1):
        try:
            row = _as_row(fields, file, number)
        except RowError as error:
            reading.broken(error)
            continue
        yield row


def _holds_lines(text: str) -> bool:
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
        reason = JSON_REASONS.get(error.msg, error.msg)
        at = min(error.pos, len(text.rstrip()))  # a text that breaks off, breaks off on its last line
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


# What Python's json says, in the words of who looks at the file.
JSON_REASONS = {
    "Invalid control character at": "a tab, a line end or the like inside a text, or a text that is not closed",
    "Unterminated string starting at": "a text that is not closed",
    "Expecting value": "no value of JSON stands here",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name enclosed in double quotes": "a name in double quotes is missing",
    "Illegal trailing comma before end of object": "a comma after the last item",
    "Illegal trailing comma before end of array": "a comma after the last item",
    "Extra data": "there is more behind its end",
    "Invalid \\escape": "a backslash that must be written twice",
    "Invalid \\uXXXX escape": "a \\u without its four digits",
}


def _one_list_hint(is_list: bool, file: str, line: int) -> str:
    is_misnamed = is_list and line == 1 and READERS[suffix(file)] is _read_jsonl
    return " If the whole file is one JSON list, let its name end in .json." if is_misnamed else ""


def _excerpt(text: str, at: int = 0, width: int = 60) -> str:
    """`width` characters around place `at`."""
    start = max(0, at - width // 2)
    end = start + width
    return ("…" if start else "") + text[start:end].strip() + ("…" if end < len(text.rstrip()) else "")


# -- CSV ---------------------------------------------------------------------------------------------------------------


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


# -- Parquet and Arrow -------------------------------------------------------------------------------------------------


def _read_parquet(file: str, reading: Reading) -> Iterator[Row]:
    pyarrow, parquet = require_package("pyarrow", "datasets"), require_package("pyarrow.parquet", "datasets")
    with open_file(file) as stream, _arrow_errors(pyarrow, file):
        yield from _rows_of_batches(parquet.ParquetFile(stream).iter_batches(batch_size=1000), file)


def _read_arrow(file: str, reading: Reading) -> Iterator[Row]:
    pyarrow, ipc = require_package("pyarrow", "datasets"), require_package("pyarrow.ipc", "datasets")
    with open_file(file) as stream, _arrow_errors(pyarrow, file):
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
            f"{file} cannot be read: {first_line(error)}",
            f"Expected a whole {suffix(file)} file.",
            "Fetch or write it again; a Git LFS pointer of a few lines is not the file itself.",
        ) from error


# The suffix decides. A file that is packed has the same reader, because open_file unpacks it.
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
