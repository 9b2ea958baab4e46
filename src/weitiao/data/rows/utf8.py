"""A text file, packed or not -> its text; what isn't UTF-8 is told with its place, its likely encoding and how to convert it."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weitiao.data.rows.row import Reading
from weitiao.errors import RowError

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def open_file(file: str) -> Any:
    return (gzip.open if file.lower().endswith(".gz") else open)(Path(file).expanduser(), "rb")


def read_lines(file: str, reading: Reading | None = None) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of a text file, told in one message where it isn't UTF-8. Only \\n ends a line; str would split at U+0085 and U+2028 inside values."""
    for number, raw in raw_lines(file, reading or Reading()):
        yield number, decode(raw, file, number)


def raw_lines(file: str, reading: Reading) -> Iterator[tuple[int, bytes]]:
    with open_file(file) as stream:
        for number, raw in enumerate(stream, start=1):
            reading.bytes += len(raw)
            yield number, raw


def decode(raw: bytes, file: str, line: int) -> str:
    """Bytes that start at `line` of `file` -> text."""
    raw = raw.removeprefix(BOM) if line == 1 else raw
    try:
        if not is_utf16(raw):
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


def is_utf16(raw: bytes) -> bool:
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
    packed = file.lower().endswith(".gz")
    stem, suffix = os.path.splitext(Path(file).name[:-3] if packed else Path(file).name)
    unpack, source = (f"gunzip -c {file} | ", "") if packed else ("", f" {file}")
    return f"{unpack}iconv {option}-f {encoding} -t utf-8{source} > {stem}.utf8{suffix.lower()}"
