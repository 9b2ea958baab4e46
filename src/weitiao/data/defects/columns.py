"""Columns that weitiao does not read, or that hold no text: by the names that people give them, the one that was meant is offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.defects.shown import AROUND, shown
from weitiao.data.findings import Kind
from weitiao.data.formats import FORMATS

# What people call a column, in lower case -> ours. The first that a row has is taken.
ALIASES = {
    "instruction": ("指令", "指示", "任务", "说明", "instruct", "instruction_text", "指令文本", "instrucción", "指図"),
    "input": ("输入", "輸入", "inputs", "上下文", "入力", "entrada", "eingabe"),
    "output": ("输出", "輸出", "回复", "回覆", "outputs", "target", "出力", "salida", "ausgabe", "response_text"),
    "question": ("问题", "問題", "提问", "问", "questions", "q", "質問", "frage", "pregunta"),
    "answer": ("答案", "回答", "答", "解答", "answers", "a", "antwort", "respuesta"),
    "prompt": ("提示", "提示词", "提示詞", "prompts", "user", "human", "query_text"),
    "completion": ("补全", "完成", "completions", "assistant", "gpt", "bot"),
    "messages": ("对话", "對話", "消息", "message", "dialog", "dialogue", "chat"),
    "conversations": ("会话", "會話", "conversation"),
    "text": ("文本", "句子", "内容", "評論", "评论", "sentence", "review", "texto"),
    "label": ("标签", "標籤", "类别", "類別", "labels", "category", "sentiment", "etiqueta"),
}
OURS_BY_ALIAS = {alias: ours for ours, aliases in ALIASES.items() for alias in (ours, *aliases)}
PARTNERS = {"instruction": "output", "question": "answer", "prompt": "completion", "input": "output"}
ANSWERS = ("output", "answer", "completion")


def _foreign_columns(read: Read) -> str | None:
    """Names that mean ours, where the row could not be read by ours."""
    columns: dict[str, str] = {}
    for name in read.fields:
        ours = OURS_BY_ALIAS.get(str(name).strip().lower())
        if ours and ours != name and ours not in columns and ours not in read.fields:
            columns[ours] = str(name)
    if _is_format({}, read.fields):
        return None  # by its names it could be read; something else is wrong with it
    if not _is_format(columns, read.fields):
        columns = _paired(columns, read.fields)
    if columns:
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        return f"{', '.join(map(str, read.fields))}: set data.columns='{{{pairs}}}'"
    strange = [str(name) for name in read.fields if not str(name).isascii()]
    return ", ".join(strange) + ": set data.columns='{instruction: …, output: …}'" if strange else None


def _is_format(columns: Mapping[str, str], fields: Mapping[str, Any]) -> bool:
    """Do the names make a format, with those of `columns` in the place of theirs?"""
    names = (set(fields) - set(columns.values())) | set(columns)
    return any(set(needed) <= names for kind in FORMATS.values() for needed in kind.columns)


def _paired(columns: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, str]:
    """A question and an answer by names of two formats (指令 and 回答), as those of one."""
    theirs = {name: name for name in fields} | dict(columns)
    asked = next((ours for ours in PARTNERS if ours in theirs), None)
    answer = next((theirs[ours] for ours in ANSWERS if ours in theirs), None)
    if asked is None or answer is None:
        return {}
    pair = {asked: theirs[asked], PARTNERS[asked]: answer}
    return {ours: name for ours, name in pair.items() if ours != name}


def _preference(read: Read) -> str | None:
    return "chosen, rejected" if {"chosen", "rejected"} <= set(read.fields) else None


TEXT_COLUMNS = {"instruction", "input", "output", "prompt", "completion", "question", "answer", "query", "response", "text", "system"}


def _not_text(read: Read) -> str | None:
    for name, value in read.fields.items():
        if not isinstance(value, str) and value is not None and name in TEXT_COLUMNS and not _is_chat(value):
            return f"{name} = {shown(str(value))[: 2 * AROUND]} ({type(value).__name__})"
    return None


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(turn, Mapping) and "role" in turn for turn in value)


FAMILIES = (
    Family(lambda read: True, {
        "not_text": (Kind(
            "note", f"{SEVERAL} have a value that is no text where a text belongs: {{detail}}.",
            "It is written as JSON or as Python prints it. Write it as it should be answered: '1.0' is not '1', nor 'True' 'yes'."), _not_text),
    }),
    Family(lambda read: read.conversation is None, {
        "preference": (Kind(
            "warning", f"{SEVERAL} hold a preferred answer and a rejected one, and none by the name of an answer: {{detail}}.",
            "weitiao learns answers, not preferences. Write the preferred one as the last turn of its chat; beside a column of prompts, "
            "data.columns='{completion: chosen}' is enough."), _preference),
        "foreign_columns": (Kind(
            "warning", f"{SEVERAL} cannot teach, since their columns have other names: {{detail}}.",
            "data.columns says which is which, and leaves rows with the usual names as they are; or rename them in the file."), _foreign_columns),
    }),
)
