"""One row on its way: fields -> conversation -> turns -> ids, before anything is cut; or why it cannot teach.

Many rows go together, since a tokenizer that is called once for many texts is several times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from weitiao.data.conversation import Conversation
from weitiao.data.formats import CannotTeach, convert
from weitiao.data.labels import Labels
from weitiao.data.rows.row import Row
from weitiao.data.templates import Template, Turn
from weitiao.data.tokens import EncodedTurn, encode_prompts_alone, encode_turns
from weitiao.errors import TemplateError
from weitiao.settings.data import DataSettings

CHUNK = 256  # rows that are encoded together


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row on its way: as a conversation, then with what is learned of it as ids, before anything is cut.

    reason: why it cannot teach, if it cannot; then there are no turns.
    """

    row: Row
    conversation: Conversation | None
    turns: tuple[EncodedTurn, ...] = ()
    reason: str = ""


def read_row(row: Row, format: str, settings: DataSettings) -> EncodedRow:
    try:
        return EncodedRow(row, convert(row, format, settings))
    except CannotTeach as reason:
        return EncodedRow(row, None, reason=str(reason))


def encode_rows(said: Sequence[EncodedRow], template: Template, model_limit: int, classified: bool) -> list[EncodedRow]:
    """Rows with their ids, the tokenizer called once for the first turns of all, once for the second ones, and so on.

    classified: each row is a prompt alone, since its label is told by ids of its own.
    """
    turns: list[list[EncodedTurn]] = [[] for _ in said]
    reasons = [one.reason for one in said]
    going = {k: _turns_of(one.conversation, template, classified) for k, one in enumerate(said) if not one.reason}
    while going:
        met: dict[int, Turn] = {}
        for k, rest in going.items():
            try:
                met |= {k: turn for turn in islice(rest, 1)}
            except (CannotTeach, TemplateError) as reason:
                reasons[k] = str(reason)
        encode = encode_prompts_alone if classified else encode_turns
        for k, encoded in zip(met, encode(list(met.values()), template), strict=True):
            turns[k].append(encoded)
        # A chat goes on up to where the model's limit ends it; one of 300 turns is not read to its end.
        going = {k: going[k] for k in met if len(turns[k][-1]) <= model_limit}
    return [replace(one, turns=() if reason else tuple(found), reason=reason) for one, found, reason in zip(said, turns, reasons, strict=True)]


def _turns_of(conversation: Conversation, template: Template, classified: bool) -> Iterator[Turn]:
    return _asked(conversation, template) if classified else template.turns(conversation)


def _asked(conversation: Conversation, template: Template) -> Iterator[Turn]:
    """The one prompt of a row with a label."""
    first, *more = conversation.turns()
    if more:
        raise CannotTeach(f"{len(more) + 1} answers in one row, where one label is to be learned")
    yield Turn(template.render(conversation.as_dicts(first), True, conversation.tools), "", conversation.messages[first].weight)


def labelled(one: EncodedRow, labels: Labels) -> EncodedRow:
    """The label's ids behind the one prompt."""
    one = refuse_unknown(one, labels.words)
    return one if one.reason else replace(one, turns=(replace(one.turns[0], answer=labels.of(answer_of(one.conversation))),))


def refuse_unknown(one: EncodedRow, words: Sequence[str]) -> EncodedRow:
    """The row, or why not: its label is another than these."""
    if one.reason or (word := answer_of(one.conversation)) in words:
        return one
    return replace(one, turns=(), reason=f"its label is none of {', '.join(words)}: {_short(word)!r}")


def answer_of(conversation: Conversation) -> str:
    """What is learned first: of a row with a label, its word."""
    return conversation.messages[conversation.turns()[0]].content


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "…"
