"""What can be wrong with one row, seen from its text alone: families of defects, each with what to say and how to find it.

    fields of a row, its Conversation (None: it could not be converted) -> a short detail of the first thing met, or None

A row is read once for all of them. What it may have at all is told first, by families (a text with "<" in it, an answer that
begins as JSON): a clean row costs a few passes of a compiled pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weitiao.data.conversation import Conversation
from weitiao.data.defects import answers, characters, chat, columns, json_answers, markup
from weitiao.data.defects.read import Family, Read
from weitiao.data.findings import Kind

# In the order in which they are told of a row.
FAMILIES: tuple[Family, ...] = tuple(family for kin in (columns, characters, markup, answers, json_answers, chat) for family in kin.FAMILIES)
DEFECTS: dict[str, Kind] = {name: kind for family in FAMILIES for name, (kind, _) in family.looks.items()}


def find_all(fields: Mapping[str, Any], conversation: Conversation | None) -> dict[str, str]:
    """Name of a defect -> what was met, of those that the row has."""
    read, met = Read(fields, conversation), {}
    for family in FAMILIES:
        if family.may_be(read):
            for name, (_, look) in family.looks.items():
                detail = look(read)
                if detail is not None:
                    met[name] = detail
    return met


def cure_of_columns(fields: Mapping[str, Any]) -> str:
    """How to say which column of a format that is unknown is which, where their names tell; else nothing."""
    _, _, columns = find_all(fields, None).get("foreign_columns", "").partition(": set ")
    return f"Say which is which: {columns}; or rename them in the file." if columns and "…" not in columns else ""
