"""Chats whose turns are out of order, empty, or by a speaker that is not known."""

from __future__ import annotations

from weitiao.data.defects.read import SEVERAL, Family, Read
from weitiao.data.defects.shown import beginning
from weitiao.data.findings import Kind
from weitiao.data.formats import ROLES

MANY_TURNS = 100
SAID_ONCE = {"user": ("user", "human"), "assistant": ("assistant", "gpt", "bot", "chatgpt", "model")}  # tool calls may come in a row


def _unknown_speaker(read: Read) -> str | None:
    return next((f"{turn.speaker!r} in turn {i}" for i, turn in enumerate(read.turns, 1) if turn.role is None), None)


def _same_speaker(read: Read) -> str | None:
    turns = read.turns
    for i in range(1, len(turns)):
        first, second = turns[i - 1], turns[i]
        if first.role == second.role and all(turn.speaker.lower() in SAID_ONCE.get(turn.role or "", ()) for turn in (first, second)):
            return f"turns {i} and {i + 1} are both by {second.speaker}"
    return None


def _begins_with_answer(read: Read) -> str | None:
    first = next((turn for turn in read.turns if turn.role != "system"), None)
    return beginning(first.text) if first and first.role == "assistant" and len(read.turns) > 1 else None


def _system_inside(read: Read) -> str | None:
    inside = (i for i, turn in enumerate(read.turns) if i and turn.role == "system" and read.turns[i - 1].role != "system")
    return next((f"turn {i + 1}: {beginning(read.turns[i].text)}" for i in inside), None)


def _empty_turn(read: Read) -> str | None:
    turns = read.turns
    return next((f"turn {i} of {len(turns)}, by {turn.speaker}" for i, turn in enumerate(turns, 1) if turn.text.strip() == ""), None)


def _ends_on_human(read: Read) -> str | None:
    last = None if "chosen" in read.fields else read.turns[-1]  # the answer may stand beside the turns
    return beginning(last.text) if last and last.role in ("user", "system", "tool") else None


def _many_turns(read: Read) -> str | None:
    return f"{len(read.turns)} turns" if len(read.turns) > MANY_TURNS else None


FAMILIES = (
    Family(lambda read: bool(read.turns), {
        "unknown_speaker": (Kind(
            "warning", f"{SEVERAL} have a turn by a speaker that is not known, and cannot teach: {{detail}}.",
            f"Known are {', '.join(ROLES)}. Rename the speaker in the file."), _unknown_speaker),
        "same_speaker": (Kind(
            "warning", f"{SEVERAL} have two turns in a row by the same speaker: {{detail}}.",
            "A turn between them is missing, or they are one: join them, or take the row out. Some templates refuse such chats."), _same_speaker),
        "begins_with_answer": (Kind(
            "warning", f"{SEVERAL} begin with the assistant, before anything was asked: {{detail}}.",
            "That turn is not learned, and stands before what is. Take it out, or give the question that it answers."), _begins_with_answer),
        "system_inside": (Kind(
            "warning", f"{SEVERAL} have a system text in the middle of a chat: {{detail}}.",
            "Many templates refuse it, or write it at the beginning. Put it first, or make it part of what the user says."), _system_inside),
        "empty_turn": (Kind(
            "warning", f"{SEVERAL} have a turn without any text: {{detail}}.",
            "What follows answers nothing. Fill it in, or end the chat before it."), _empty_turn),
        "ends_on_human": (Kind(
            "warning", f"{SEVERAL} end on a turn that the assistant does not answer: {{detail}}.",
            "Such a chat is left out as a whole. Take its last turn out, and the answers before it are learned."), _ends_on_human),
        "many_turns": (Kind(
            "note", f"{SEVERAL} have more than {MANY_TURNS} turns: {{detail}}.",
            "A chat ends with the last turn that fits data.max_tokens. Split it, if its later turns are to be learned."), _many_turns),
    }),
)
