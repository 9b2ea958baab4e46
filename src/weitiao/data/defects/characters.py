"""Text that was read in a wrong encoding, and characters that no text has."""

from __future__ import annotations

import re
from collections.abc import Callable

from weitiao.data import mojibake
from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.defects.shown import around, beginning, code_of, first_met, first_of
from weitiao.data.findings import Kind

# -- encodings ---------------------------------------------------------------------------------------------------------


def _misread(kind: str) -> Callable[[Read], str | None]:
    def look(read: Read) -> str | None:
        if read.misread is None:
            return None
        found, text = read.misread
        if ("mixed_encodings" if found.mixed else found.kind) != kind:
            return None
        return f"{around(text, found.start, found.end)}, where {beginning(text[found.start : found.end])} stands for {beginning(found.meant)}"

    return look


LOST_PIECES = ("\ufffd", "锟斤拷", "烫烫烫", "屯屯屯")  # what stands for it; the same in GBK; memory that was never written
LOST = re.compile("|".join(LOST_PIECES))


def _lost(read: Read) -> str | None:
    return first_of(LOST, read.texts)


# -- characters --------------------------------------------------------------------------------------------------------

# As classes of a pattern.
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
_C1 = r"\x80-\x9f"
_INVISIBLE = "\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(f"{chr(p + 0xFFFE)}-{chr(p + 0xFFFF)}" for p in range(0, 0x110000, 0x10000))
_SURROGATES = "\ud800-\udfff"
ODD = re.compile(f"[{_CONTROLS}{_C1}{_INVISIBLE}{_PRIVATE}{_NONCHARACTERS}{_SURROGATES}]")
C1, INVISIBLE = re.compile(f"[{_C1}]"), re.compile(f"[{_INVISIBLE}]")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdcf\ufe70-\ufefc]")  # scripts in which direction marks have their place
_DIRECTION_MARKS = str.maketrans("", "", "\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069")


def _has_odd(read: Read) -> bool:
    """Nothing that Python calls printable is odd, and that is fast to ask; the pattern has the last word."""
    usual = read.whole.replace("\n", "").replace("\t", "").replace("\u3000", "").replace("\xa0", "")
    return not usual.isprintable() and ODD.search(usual) is not None


def _characters(characters: str) -> Callable[[Read], str | None]:
    pattern = re.compile(f"[{characters}]")
    return lambda read: first_of(pattern, read.texts)


def _c1(read: Read) -> str | None:
    """A C1 control is next to always a byte of cp1252: the character that was meant is told."""
    found = None if read.misread else first_met(C1, read.texts)
    if not found:
        return None
    met, text = found
    meant = met[0].encode("latin-1").decode("cp1252", "ignore")
    return around(text, met.start(), met.end()) + (f", where {code_of(met[0])} stands for {meant}" if meant else "")


def _invisible(read: Read) -> str | None:
    texts = [text.translate(_DIRECTION_MARKS) if RIGHT_TO_LEFT.search(text) else text for text in read.texts]
    return first_of(INVISIBLE, texts)


# -- what is said ------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family(_has_odd, {
        "c1_controls": (Kind(
            "warning", f"{SEVERAL} hold control characters U+0080 to U+009F, bytes of cp1252 that were read as Latin-1: {{detail}}.",
            "Read the source with encoding='cp1252'. If only this file is left, replace each by what it stands for: "
            "bytes([ord(c)]).decode('cp1252')."), _c1),
        "control_characters": (Kind(
            "warning", f"{SEVERAL} hold control characters that no text has: {{detail}}.",
            "Take them out: re.sub(r'[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]', '', text)."), _characters(_CONTROLS)),
        "invisible_characters": (Kind(
            "note", f"{SEVERAL} hold characters that cannot be seen (zero-width, direction marks, a BOM, soft hyphens): {{detail}}.",
            "A model learns to write them, and words with one inside are other tokens. Take them out, unless they are meant."), _invisible),
        "private_use": (Kind(
            "warning", f"{SEVERAL} hold private-use characters, which mean something in one font alone: {{detail}}.",
            "They often come from PDF, Word lists or icon fonts. Replace them by what they show, or take them out."), _characters(_PRIVATE)),
        "noncharacters": (Kind(
            "warning", f"{SEVERAL} hold code points that are no characters: {{detail}}.",
            "They come from a broken conversion. Take them out, or convert the source again."), _characters(_NONCHARACTERS)),
        "lone_surrogates": (Kind(
            "warning", f"{SEVERAL} hold half of a surrogate pair, which is no text, and cannot teach: {{detail}}.",
            "An emoji was cut in two, or written by JSON as one half (\\ud83d). Write the whole pair, or take the half out: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'ignore')."), _characters(_SURROGATES)),
    }),
    Family(lambda read: mojibake.is_suspicious(read.whole), {
        "utf8_as_latin": (Kind(
            "warning", f"{SEVERAL} hold text in UTF-8 that was read as Latin-1 or cp1252, such as {{detail}}.",
            "Write the file again from its source, read with encoding='utf-8'. If only this file is left, "
            "text.encode('cp1252').decode('utf-8') turns each such text back."), _misread("utf8_as_latin")),
        "utf8_as_gbk": (Kind(
            "warning", f"{SEVERAL} hold text in UTF-8 that was read as GBK, such as {{detail}}.",
            "Write the file again from its source, read with encoding='utf-8'. If only this file is left, "
            "text.encode('gb18030').decode('utf-8') turns back what has lost nothing."), _misread("utf8_as_gbk")),
        "gbk_as_latin": (Kind(
            "warning", f"{SEVERAL} hold text in GBK that was read as Latin-1, such as {{detail}}.",
            "Write the file again from its source, read with encoding='gb18030'. If only this file is left, "
            "text.encode('latin-1').decode('gb18030') turns each such text back."), _misread("gbk_as_latin")),
        "mixed_encodings": (Kind(
            "warning", f"{SEVERAL} hold text that was read in a wrong encoding beside text that was read right, such as {{detail}}.",
            "Parts in several encodings were joined: read each part in its own (utf-8, gb18030, cp1252) and join them again. "
            "No one encoding mends the whole file; what is left of such rows can be turned back piece by piece."), _misread("mixed_encodings")),
    }),
    Family(lambda read: not read.whole.isascii() and any(piece in read.whole for piece in LOST_PIECES), {
        "lost_characters": (Kind(
            "warning", f"{SEVERAL} hold replacement characters, where a wrong encoding lost what was written: {{detail}}.",
            "They cannot be turned back. Read the source again in its own encoding, utf-8 or gb18030, without errors='replace' or 'ignore'; "
            "or take these rows out."), _lost),
    }),
)
