"""A row read once for all defects: its texts, what is answered to what, and who says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from weitiao.data import mojibake
from weitiao.data.conversation import Conversation
from weitiao.data.defects.json_text import json_defects
from weitiao.data.findings import Kind
from weitiao.data.formats import COMPLETION_PAIRS, ROLES

SEVERAL = "{count} of {rows} rows"


class Turn(NamedTuple):
    """role: None where the speaker is unknown."""

    speaker: str
    role: str | None
    text: str


class Read:
    """A row's texts, and what is met in them.

    texts: what is said. whole: all of it. exchanges: (what stands before it, answer) for every answer in words; labels are none.
    turns: who says what, in a chat.
    """

    def __init__(self, fields: Mapping[str, Any], conversation: Conversation | None):
        self.fields, self.conversation = fields, conversation
        if conversation is not None:
            messages = conversation.messages
            self.texts = [message.content for message in messages]
            self.exchanges = [] if conversation.is_label else [
                (self.texts[i - 1] if i else "", m.content) for i, m in enumerate(messages) if m.role == "assistant"
            ]
        else:
            self.texts = list(_strings(list(fields.values())))
            self.exchanges = _exchanges(fields)
        self.whole = "\n".join(self.texts)
        self.turns = _turns(fields, conversation)

    @cached_property
    def misread(self) -> tuple[mojibake.Misread, str] | None:
        """(the first piece that was read in another encoding, the text it stands in)"""
        return next(((found, text) for text in self.texts if (found := mojibake.misread(text))), None)

    @cached_property
    def broken_json(self) -> dict[str, str]:
        """Defect -> detail, for the first answer that begins as JSON and is none."""
        return next((found for _, answer in self.exchanges if (found := json_defects(answer))), {})


@dataclass(frozen=True)
class Family:
    """Defects that one quick question rules out together.

    Args:
        may_be: may the row have any of them?
        looks: name of a defect -> what to say of it, and how to find it in a row: a short detail of the first thing met, or None.
    """

    may_be: Callable[[Read], bool]
    looks: dict[str, tuple[Kind, Callable[[Read], str | None]]]


ANSWER_PAIRS = (("instruction", "output"), *COMPLETION_PAIRS)


def _exchanges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The answer of a row that could not be converted, if it stands in a column of ours."""
    for question, answer in ANSWER_PAIRS:
        if isinstance(fields.get(answer), str):
            prompt = fields.get(question)
            return [(prompt if isinstance(prompt, str) else "", fields[answer])]
    return []


def _strings(value: Any) -> Iterator[str]:
    """Every text within, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _turns(fields: Mapping[str, Any], conversation: Conversation | None) -> list[Turn]:
    """Who says what, as it stands in the source where that is a list; else as it was converted, if that is a chat."""
    listed = fields.get("messages", fields.get("conversations"))
    if isinstance(listed, (list, tuple)):
        return [_turn(turn) for turn in listed if isinstance(turn, Mapping)]
    messages = conversation.messages if conversation is not None else ()
    return [Turn(m.role, m.role, m.content) for m in messages] if len(messages) > 3 else []


def _turn(turn: Mapping[str, Any]) -> Turn:
    speaker = str(turn.get("role", turn.get("from")))
    said = turn.get("content", turn.get("value"))
    text = said if isinstance(said, str) else "".join(_strings(said)) or ("" if said is None else str(said))
    called = "(calls a tool)" if turn.get("tool_calls") else ""
    return Turn(speaker, ROLES.get(speaker.lower()), text or called)
