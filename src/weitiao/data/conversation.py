"""Who speaks, and what of it is learned: the one shape that every format of rows is turned into."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """weight: how much this message counts in the loss; only an assistant's can be above 0."""

    role: Role
    content: str
    weight: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """A row as messages. is_label: the answer is a row's label, one of a few words."""

    messages: tuple[Message, ...]
    is_label: bool = False
    tools: tuple[Any, ...] = field(default=())

    def turns(self) -> list[int]:
        """Where the messages stand that are learned: the assistant's, with a weight, after something to answer."""
        return [
            i for i, message in enumerate(self.messages)
            if message.role == "assistant" and message.weight > 0 and any(m.role != "system" for m in self.messages[:i])
        ]

    def opened_by(self, system: str) -> Conversation:
        return replace(self, messages=(Message("system", system), *self.messages))

    def first_turns(self, count: int) -> Conversation:
        """The conversation up to its count-th learned turn."""
        return replace(self, messages=self.messages[: self.turns()[count - 1] + 1])

    def answered(self, answer: str) -> Conversation:
        """The same up to its last learned turn, with another answer there."""
        last = self.turns()[-1]
        return replace(self, messages=(*self.messages[:last], replace(self.messages[last], content=answer)))

    def as_dicts(self, stop: int | None = None) -> list[dict[str, str]]:
        """The first `stop` messages as chat templates take them."""
        return [{"role": m.role, "content": m.content} for m in self.messages[:stop]]
