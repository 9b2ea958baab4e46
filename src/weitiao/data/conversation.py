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
    """A row as messages. bare_label: the answer is one of a few words, and no stop token is learned after it."""

    messages: tuple[Message, ...]
    bare_label: bool = False
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

    def as_dicts(self, stop: int | None = None) -> list[dict[str, str]]:
        """The first `stop` messages as chat templates take them."""
        return [{"role": m.role, "content": m.content} for m in self.messages[:stop]]
