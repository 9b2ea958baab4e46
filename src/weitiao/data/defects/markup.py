"""What is written for programs and not for people: HTML, escaped line breaks, special tokens, markers of turns, code fences."""

from __future__ import annotations

import re

from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.defects.shown import AROUND, first_of, shown
from weitiao.data.findings import Kind

HTML = re.compile(r"&(?:amp|nbsp|lt|gt|quot|apos|#\d{2,6}|#x[\da-fA-F]{2,5});|</?(?:br|p|div|span|font|strong|em|b|i|u|h[1-6])(?: [^<>]*)?/?>")
CODE = re.compile(r"```|<html|<!DOCTYPE|<body", re.IGNORECASE)


def _html(read: Read) -> str | None:
    """In answers; where one is about HTML, or is code, it belongs there."""
    answers = [answer for _, answer in read.exchanges if HTML.search(answer) and not CODE.search(answer)]
    return first_of(HTML, answers) if answers and "html" not in read.whole.lower() else None


ESCAPED_BREAK = re.compile(r"(?<!\\)\\(?:r\\)?n(?![a-z])")  # no \nabla, no C:\new


def _escaped_breaks(read: Read) -> str | None:
    texts = [text for text in read.texts if "\n" not in text.strip() and text[:1] not in "{[" and not re.search(r"['\"`$]", text)]
    return first_of(ESCAPED_BREAK, texts)


# What templates write themselves.
SPECIAL = re.compile(
    r"[<\[](?:\|[a-zA-Z_0-9]{2,28}\|>|/?s>|/?INST\]|</?SYS>>|(?:start|end)_of_turn>|(?:eod|eos|bos|pad|unk|sep)>|(?:gMASK|sMASK|CLS|SEP|PAD|UNK)\]"
    r"|｜[^｜<>]{2,28}｜>)"
)
MARKER = re.compile(
    r"^(?:(?:Human|Assistant|USER|ASSISTANT):|#{2,3} ?(?:Response|Instruction|Human|Assistant|指令|回答)[:：])", re.MULTILINE,
)
MARKER_PIECES = ("Human:", "Assistant:", "USER:", "ASSISTANT:", "##")


def _special(read: Read) -> str | None:
    return first_of(SPECIAL, read.texts)


def _marker(read: Read) -> str | None:
    return first_of(MARKER, [answer for _, answer in read.exchanges])


FENCE = re.compile(r"^[ \t>]*```", re.MULTILINE)


def _open_fence(read: Read) -> str | None:
    return next((f"'…{shown(a[-2 * AROUND:])}'" for _, a in read.exchanges if a.count("```") % 2 and FENCE.search(a)), None)


FAMILIES = (
    Family(lambda read: ";" in read.whole or ">" in read.whole, {
        "html": (Kind(
            "note", f"{SEVERAL} have leftovers of HTML in their answers: {{detail}}.",
            "The model will write them too. html.unescape(text) turns &amp; back; take tags out, or leave them if answers are to be HTML."), _html),
    }),
    Family(lambda read: ">" in read.whole or "]" in read.whole, {
        "special_tokens": (Kind(
            "warning", f"{SEVERAL} spell special tokens in their text: {{detail}}.",
            "A tokenizer that knows one reads it as such: it ends the answer early or begins another turn. Take it out, unless it is "
            "meant; rows that were written for a template already want data.template=plain."), _special),
    }),
    Family(lambda read: "\\n" in read.whole, {
        "escaped_breaks": (Kind(
            "warning", f"{SEVERAL} spell line breaks as a backslash and n: {{detail}}.",
            "They were escaped twice. text.replace('\\\\n', '\\n') gives line breaks."), _escaped_breaks),
    }),
    Family(lambda read: "```" in read.whole, {
        "open_fence": (Kind(
            "note", f"{SEVERAL} have an answer that opens a code block (```) and does not close it: {{detail}}.",
            "The answer may be cut off. Close the block, or write the answer again."), _open_fence),
    }),
    Family(lambda read: any(piece in read.whole for piece in MARKER_PIECES), {
        "role_markers": (Kind(
            "warning", f"{SEVERAL} have a line in their answer that begins as a turn of a template does: {{detail}}.",
            "The model learns to go on with the next turn by itself. Split such rows into turns (messages), or take the rest out."), _marker),
    }),
)
