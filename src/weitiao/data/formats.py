"""A row's fields -> a `Conversation`; and which format is this row?

    instruction   instruction, input (optional), output; system, history as in alpaca files
    completion    prompt, completion (or prompt/response, question/answer, query/response, input/output)
    messages      messages: [{role, content}], content a text or a list of typed parts
    sharegpt      conversations: [{from, value}]
    label         text, label

A format is a row of the table `FORMATS`: the columns that give it away, and a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weitiao.data.conversation import Conversation, Message
from weitiao.data.rows.row import Row
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings


class CannotTeach(Exception):
    """Why nothing can be learned from a row, in a few words."""


@dataclass(frozen=True)
class Format:
    columns: tuple[tuple[str, ...], ...]
    """Columns that all have to be there; any of these gives the format away."""
    convert: Callable[[Mapping[str, Any], DataSettings], Conversation]


def _instruction(fields: Mapping[str, Any], settings: DataSettings) -> Conversation:
    prompt = "\n".join([_text(fields, "instruction"), _text(fields, "input")]).strip()
    return _exchange(prompt, fields.get("output"), _text(fields, "system"), _history(fields.get("history")))


def _history(rounds: Any) -> list[Message]:
    """Earlier rounds, [[question, answer], …]; an answer that is empty stays unlearned."""
    messages = []
    for exchange in rounds or []:
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise CannotTeach("its history is not a list of [question, answer]")
        question, answer = ("" if text is None else _plain(text) for text in exchange)
        messages += [Message("user", question), Message("assistant", answer, 1.0 if answer.strip() else 0.0)]
    return messages


COMPLETION_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output"),
)


def _completion(fields: Mapping[str, Any], settings: DataSettings) -> Conversation:
    question, answer = next(pair for pair in COMPLETION_PAIRS if set(pair) <= set(fields))
    if answer == "output" and _text(fields, "instruction"):  # a file of input and output, where some rows say more
        return _instruction(fields, settings)
    if _is_chat(fields[question]) and _is_chat(fields[answer]):
        return _chat([*({**turn, "loss_weight": 0} for turn in fields[question]), *fields[answer]], fields)
    return _exchange(_text(fields, question), fields[answer], _text(fields, "system"))


def _messages(fields: Mapping[str, Any], settings: DataSettings) -> Conversation:
    return _chat(fields["messages"], fields)


def _sharegpt(fields: Mapping[str, Any], settings: DataSettings) -> Conversation:
    return _chat(fields["conversations"], fields)


def _label(fields: Mapping[str, Any], settings: DataSettings) -> Conversation:
    label = fields["label"]
    if label is None:
        raise CannotTeach("no label")
    if settings.labels and str(label) not in settings.labels:
        raise CannotTeach(f"its label is none of {', '.join(settings.labels)} (data.labels): {str(label)[:40]!r}")
    conversation = _exchange(_text(fields, "text"), settings.labels.get(str(label), str(label)))
    return Conversation(conversation.messages, is_label=True)


FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), _messages),
    "sharegpt": Format((("conversations",),), _sharegpt),
    "instruction": Format((("instruction", "output"),), _instruction),
    "completion": Format(COMPLETION_PAIRS, _completion),
    "label": Format((("text", "label"),), _label),
}

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}


def rename(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give the user's columns the names that formats know: data.columns maps ours to theirs."""
    if not columns:
        return dict(fields)
    renamed = {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
    return {k: v for k, v in fields.items() if k not in columns.values()} | renamed


def detect(rows: Iterable[Row], settings: DataSettings) -> str:
    """The format of a file, told from the columns of the first row that has known ones.

    Raises:
        RowError: no row has columns that any format knows (or that the format asked for needs).
    """
    wanted = FORMATS if settings.format == "auto" else {settings.format: FORMATS[settings.format]}
    first: Row | None = None
    there: set[str] = set()
    for row in rows:
        first = first or row
        there.update(row.fields)
        names = set(rename(row.fields, settings.columns))
        for name, kind in wanted.items():
            if any(set(columns) <= names for columns in kind.columns):
                return name
    assert first is not None, "a source without rows is refused when it is read"
    known = "\n".join(f"  {name:13}{', or '.join(' and '.join(c) for c in kind.columns)}" for name, kind in wanted.items())
    ours = ["instruction", "output"] if "instruction" in wanted else next(iter(wanted.values())).columns[0]
    absent = [theirs for theirs in settings.columns.values() if theirs not in there]
    raise RowError(
        f"{first.where} has the columns {', '.join(map(str, first.fields))}." + (f" data.columns names {', '.join(map(repr, absent))}, which no row has." if absent else ""),
        f"Expected columns of {'one of these formats' if len(wanted) > 1 else 'this format'}:\n{known}",
        f"Rename them, or say which is which: data.columns='{{{', '.join(f'{name}: …' for name in ours)}}}'.",
    )


def convert(row: Row, format: str, settings: DataSettings) -> Conversation:
    """A row as a conversation with at least one turn to learn.

    Raises:
        CannotTeach: it lacks the format's columns, has no answer, or ends on a human turn.
    """
    fields = rename(row.fields, settings.columns)
    kind = FORMATS[format]
    if not any(set(columns) <= set(fields) for columns in kind.columns):
        raise CannotTeach(f"its columns are {', '.join(map(str, fields))}")
    conversation = kind.convert(fields, settings)
    if settings.system and conversation.messages[0].role != "system":
        system = Message("system", settings.system)
        conversation = Conversation((system, *conversation.messages), conversation.is_label, conversation.tools)
    if not conversation.turns():
        unlearned = any(m.role == "assistant" and m.content.strip() and m.weight == 0 for m in conversation.messages)
        raise CannotTeach("no answer with a loss_weight above 0" if unlearned else "no answer")
    texts = [m.content for m in conversation.messages]
    if any(map(_is_broken, texts + [_plain(list(conversation.tools))] * bool(conversation.tools))):
        raise CannotTeach("half of a surrogate pair, which is no text")
    return conversation


def with_answer(fields: Mapping[str, Any], settings: DataSettings) -> dict[str, Any]:
    """A row to be answered, with a stand-in where its answer is missing, so that `convert` reads it as in training."""
    filled = dict(fields)
    for key in ("messages", "conversations"):
        turns = filled.get(key)
        if isinstance(turns, (list, tuple)) and turns and isinstance(turns[-1], Mapping):
            speaker = str(turns[-1].get("role", turns[-1].get("from"))).lower()
            if ROLES.get(speaker) != "assistant":
                filled[key] = [*turns, {"role": "assistant", "content": "?"}]
            return filled
    pairs = (("instruction", "output"), *COMPLETION_PAIRS, ("text", "label"))
    question = next((q for q, _ in pairs if q in filled), None)
    answers = [a for q, a in pairs if q == question]
    if answers and not any(filled.get(a) not in (None, "") for a in answers):
        stand_in = next(iter(settings.labels), "?") if question == "text" else "?"
        filled[next((a for a in answers if a in filled), answers[0])] = stand_in
    return filled


def row_weight(row: Row, settings: DataSettings) -> float:
    """How much a row counts in the loss.

    Raises:
        RowError: the column is missing, or holds no number of 0 or more.
    """
    column = settings.weight_column
    if column is None:
        return 1.0
    if column not in row.fields:
        raise RowError(f"{row.where} has no column {column!r}.", "Expected the weight named by data.weight_column.",
                       f"Its columns are {', '.join(map(str, row.fields))}.")
    try:
        weight = float(row.fields[column])
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise RowError(f"{row.where}: the weight is {row.fields[column]!r}.", "Expected a number of 0 or more.")
    return weight


def _is_broken(text: str) -> bool:
    """JSON can write a lone surrogate, which no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _exchange(prompt: str, answer: Any, system: str = "", history: list[Message] | None = None) -> Conversation:
    if answer is None or not str(_plain(answer)).strip():
        raise CannotTeach("no answer")
    if not prompt.strip():
        raise CannotTeach("no prompt")
    opening = [Message("system", system)] if system else []
    return Conversation((*opening, *(history or []), Message("user", prompt), Message("assistant", _plain(answer), 1.0)))


def _plain(value: Any) -> str:
    """An answer as text; a table or list in a JSON file is written as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "" if value is None else _plain(value)


def _is_chat(value: Any) -> bool:
    """Is it a list of turns? TRL's data sets write prompt and completion so."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _chat(turns: Any, fields: Mapping[str, Any]) -> Conversation:
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            raise CannotTeach("the conversation is a text, not a list") from None
    if not isinstance(turns, (list, tuple)) or not turns:
        raise CannotTeach("no turns")
    messages = [_message(turn) for turn in turns]
    system = _text(fields, "system")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    if messages[-1].role != "assistant":
        raise CannotTeach(f"ends on a {'human' if messages[-1].role == 'user' else messages[-1].role} turn")
    return Conversation(tuple(messages), tools=_tools(fields.get("tools")))


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise CannotTeach(f"a turn is a {type(turn).__name__}, not an object")
    name = turn.get("role", turn.get("from"))
    if str(name).lower() not in ROLES:
        raise CannotTeach(f"unknown speaker {name!r}")
    role = ROLES[str(name).lower()]
    if turn.get("tool_calls"):
        raise CannotTeach("a turn with tool_calls; only their text can be learned, as a turn from function_call")
    content = _content(turn.get("content", turn.get("value")))
    weight = _loss_weight(turn.get("loss_weight", turn.get("weight")))
    return Message(role, content, weight if role == "assistant" and content.strip() else 0.0)


def _loss_weight(value: Any) -> float:
    """How much a message counts in the loss; 1 unless it says otherwise."""
    if value is None:
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise CannotTeach(f"a loss_weight of {value!r}; expected a number of 0 or more")
    return weight


def _content(content: Any) -> str:
    """A message's content: a text, or the texts of its typed parts."""
    if content is None:
        return ""
    if not isinstance(content, (list, tuple)):
        return _plain(content)
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            texts.append(_plain(part))
        elif part.get("type", "text") != "text":
            raise CannotTeach(f"a part of type {part['type']!r}; only text can be learned")
        else:
            texts.append(_text(part, "text" if "text" in part else "value"))
    return "".join(texts)


def _tools(tools: Any) -> tuple[Any, ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise CannotTeach("its tools are no JSON") from None
    return tuple(tools) if isinstance(tools, list) else ()
