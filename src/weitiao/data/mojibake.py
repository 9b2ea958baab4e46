"""Text that was read in another encoding than it was written in: which, where, and what was meant.

    'cafÃ©'     UTF-8 read as Latin-1 or cp1252    -> 'café'
    '浣犲ソ'     UTF-8 read as GBK                  -> '你好'
    'ÄãºÃ'      GBK read as Latin-1                -> '你好'

Bytes of one encoding are seldom valid in another, so what looks suspicious is turned back, and believed if that succeeds and
gives characters that people use. A pattern of bytes finds the suspicious pieces; clean text costs one pass of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Misread:
    """A piece of a text, text[start:end]. mixed: the rest of the text was read right, so no one encoding mends it all."""

    kind: str
    start: int
    end: int
    meant: str
    mixed: bool


def is_suspicious(text: str) -> bool:
    """May there be such a piece? Patterns that begin with a class of characters are fast."""
    return not text.isascii() and (bool(_LATIN_HINT.search(text) or _GBK_HINT.search(text)) or "鈥" in text)


def misread(text: str) -> Misread | None:
    """The first piece that was read in another encoding; None in clean text."""
    if not is_suspicious(text):
        return None
    for kind, (pattern, meant_by, _) in KINDS.items():
        for found in pattern.finditer(text):
            meant = meant_by(found[0])
            if meant is not None:
                return Misread(kind, found.start(), found.end(), meant, _is_mixed(kind, text))
    return None


def _decoded(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


# ------------------------------------------------------------------------------------------------ UTF-8 as Latin-1, cp1252

LATIN = {chr(byte): byte for byte in range(0x80, 0x100)}
LATIN |= {bytes([byte]).decode("cp1252", "ignore"): byte for byte in range(0x80, 0xA0) if bytes([byte]).decode("cp1252", "ignore")}
_FOLLOWING = "".join(re.escape(character) for character, byte in LATIN.items() if byte < 0xC0)
_SEQUENCE = f"[Â-ß][{_FOLLOWING}]|[à-ï][{_FOLLOWING}]{{2}}|[ð-ô][{_FOLLOWING}]{{3}}"
# What clean text has behind a letter: „Spaß“, «bébé»…, VÝŠKA. Alone, such a pair proves nothing.
_NATURAL = set("«»‹›‘’‚“”„…–—•·°²³¹ºª™®©§\xa0\xad" + "ŠŒŽšœžŸƒˆ˜")
_TELLING = re.compile("[ÂÃ][^»”’…]|â€|Ã©")


def _from_latin(piece: str) -> str | None:
    meant = _decoded(bytes(LATIN.get(character, ord(character)) for character in piece), "utf-8")
    if meant is None or any(unicodedata.category(character) in ("Cn", "Co", "Cc") for character in meant):
        return None
    alone = len(meant) == 1 and len(piece) < 4  # four bytes that fit are no chance
    natural = all(character in _NATURAL for character in piece if LATIN.get(character, 0) < 0xC0)
    return None if alone and natural and not _TELLING.match(piece) else meant


# ---------------------------------------------------------------------------------------------------------- UTF-8 as GBK


def _gbk_class(firsts: range | list[int], seconds: range | list[int]) -> str:
    made = (_decoded(bytes([a, b]), "gbk") for a in firsts for b in seconds)
    return "".join(re.escape(character) for character in made if character)


# Two Chinese characters are six bytes of UTF-8, which GBK reads as three of its own:  E4 BD A0 E5 A5 BD -> E4BD A0E5 A5BD
_LEADING, _TRAILING = [*range(0xE2, 0xEA), 0xEF], range(0x80, 0xC0)
_FROM_SIX = (
    f"[{_gbk_class(_LEADING, _TRAILING)}][{_gbk_class(_TRAILING, _LEADING)}][{_gbk_class(_TRAILING, _TRAILING)}]"
)


def _from_gbk(piece: str) -> str | None:
    """A clean word may have such bytes by chance, but then all of its characters are usual ones, or what comes of it is not."""
    meant = _decoded(piece.encode("gbk", "replace"), "utf-8")
    if meant and piece.startswith("鈥"):  # a quotation mark or dash before a letter: 鈥檚 for ’s
        return meant
    if meant is None or not all(_is_usual(character) for character in meant):
        return None
    return None if all(_is_usual(character) for character in piece) else meant


def _is_usual(character: str) -> bool:
    """Of the 3,755 characters of GB 2312's first level, or its punctuation."""
    written = character.encode("gb2312", "ignore")
    return character.isascii() or (len(written) == 2 and (0xB0 <= written[0] <= 0xD7 or (written[0] in (0xA1, 0xA3))))


# ---------------------------------------------------------------------------------------------------------- GBK as Latin-1


def _gbk_from_latin(piece: str) -> str | None:
    meant = _decoded(piece.encode("latin-1"), "gb2312")
    return meant if meant and len(set(piece)) > 2 and all(_is_usual(character) for character in meant) else None


# kind -> pattern of suspicious pieces, what was meant by one, what is left of clean text beside it
KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], str | None], re.Pattern[str]]] = {
    "utf8_as_latin": (re.compile(f"(?:{_SEQUENCE})+"), _from_latin, re.compile(r"[^\W\d_ÂÃâð\x00-\x7f]")),
    "utf8_as_gbk": (re.compile(f"(?:{_FROM_SIX})+|鈥."), _from_gbk, re.compile("[的一是不了在有人我他这中大来上国们个到说你]")),
    "gbk_as_latin": (re.compile(r"(?<![A-Za-zÀ-ÿ])(?:[\xb0-\xd7][\xa1-\xfe]){2,}(?![À-ÿ])"), _gbk_from_latin, re.compile("[\u0100-\U0010ffff]")),
}
_LATIN_HINT, _GBK_HINT = re.compile(f"[\xb0-\xf4][{_FOLLOWING}\xc0-\xfe]"), re.compile(_FROM_SIX)


def _is_mixed(kind: str, text: str) -> bool:
    pattern, meant_by, clean = KINDS[kind]
    rest = pattern.sub(lambda found: found[0] if meant_by(found[0]) is None else " ", text)
    return bool(clean.search(rest))
