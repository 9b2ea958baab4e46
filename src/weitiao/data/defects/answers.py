"""Answers that are none: what programs write for an empty cell, boilerplate, the prompt once more."""

from __future__ import annotations

import re
import unicodedata

from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.defects.shown import beginning, shown
from weitiao.data.findings import Kind

SHORT = 16  # an answer that may be no answer
# As a cell that was empty is written by who made a text of it; lower-case none may be an answer.
STAND_INS = {"nan", "NaN", "NAN", "None", "null", "NULL", "Null", "N/A", "n/a", "#N/A", "NA", "<NA>", "undefined", "NaT"}


def _stand_in(read: Read) -> str | None:
    return next((f"'{a.strip()}'" for _, a in read.exchanges if a.strip() in STAND_INS), None)


def _no_words(read: Read) -> str | None:
    short = (answer for _, answer in read.exchanges if len(answer) < SHORT)
    return next((f"'{shown(a)}'" for a in short if a and a.strip() not in EMPTY_JSON and all(_is_no_word(c) for c in a)), None)


EMPTY_JSON = {"{}", "[]", '""'}


def _is_no_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZC"  # punctuation, spaces, controls


BOILERPLATE = re.compile(
    r"\s*(?:(?:I'm sorry|I am sorry|Sorry|I apologize|My apologies)[,.]? (?:but )?)?"
    r"(?:As an? (?:AI|artificial intelligence)(?: language| chat)?(?: model| assistant|bot)?(?:,| I\b| (?:developed|created|trained)\b)"
    r"|I(?:'m| am) (?:just |only )?an AI language model|I am ChatGPT"
    r"|(?:很?抱歉|对不起|非常抱歉)?[，,]?(?:作为|我是|我只是)一[个名种款](?:AI|人工智能|大型?语言|语言)(?:语言)?(?:模型|助手|助理))", re.IGNORECASE,
)


def _boilerplate(read: Read) -> str | None:
    return next((beginning(a) for _, a in read.exchanges if BOILERPLATE.match(a)), None)


LEAST_REPEATED = 24  # bytes, which are 8 Chinese characters: less may well be the answer, such as a greeting


def _is_prompt(read: Read) -> str | None:
    return next((beginning(a) for p, a in read.exchanges if a[:4] == p[:4] and a.strip() == p.strip() and _is_long(p)), None)


def _repeats_prompt(read: Read) -> str | None:
    repeats = (a for p, a in read.exchanges if len(a) > len(p) and a.startswith(p) and _is_long(p) and not IN_A_WORD.match(a[len(p) :]))
    return next((beginning(a) for a in repeats), None)


IN_A_WORD = re.compile("[a-zA-Z0-9]")


def _is_long(prompt: str) -> bool:
    return len(prompt.encode(errors="replace")) >= LEAST_REPEATED


FAMILIES = (
    Family(lambda read: any(len(answer) < SHORT for _, answer in read.exchanges), {
        "stand_ins": (Kind(
            "warning", f"{SEVERAL} are answered by what programs write for an empty cell: {{detail}}.",
            "Take these rows out, or fill in their answers; pandas: read_csv(…, keep_default_na=False), dropna()."), _stand_in),
        "no_words": (Kind(
            "warning", f"{SEVERAL} have an answer of nothing but spaces or punctuation: {{detail}}.",
            "Take these rows out, or fill in their answers."), _no_words),
    }),
    Family(lambda read: bool(read.exchanges), {
        "boilerplate": (Kind(
            "note", f"{SEVERAL} have an answer that begins with what assistants say of themselves: {{detail}}.",
            "The model will say so as often. Take these rows out, or cut the opening, unless it is meant."), _boilerplate),
        "answer_is_prompt": (Kind(
            "warning", f"{SEVERAL} are answered by the prompt itself: {{detail}}.",
            "Take these rows out; or see whether two columns were mixed up (data.columns)."), _is_prompt),
        "repeats_prompt": (Kind(
            "warning", f"{SEVERAL} have an answer that begins with the whole prompt: {{detail}}.",
            "The model learns to repeat what it is asked. Cut the prompt off, unless a repetition is meant."), _repeats_prompt),
    }),
)
