"""What is asked for: a model by its name, and whom to tell when there is something to wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    name: str
    revision: str | None
    convert_pickle: bool
    notify: Notify
