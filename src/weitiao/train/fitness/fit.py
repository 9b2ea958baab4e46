"""What a check looks at: settings, template, config and, without weights, the model; and how it shows what it found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from weitiao.config import Settings
from weitiao.data.findings import Kind
from weitiao.data.templates import PROBE, Template
from weitiao.errors import TemplateError
from weitiao.model.methods import METHODS
from weitiao.train.loop import Schedule
from weitiao.train.tree import of_config

Facts = dict[str, Any]
ASKED, SAID = ("user", "1"), ("assistant", PROBE)
NO_TEXT = re.compile("[\ufdd0-\ufdef]")  # what a tokenizer's template marks its special tokens with


@dataclass(frozen=True)
class Check:
    """find: what is wrong, as the facts that the kind's sentences name; None if nothing is."""

    kind: Kind
    find: Callable[[Fit], Facts | None]


@dataclass(eq=False)
class Fit:
    """What is looked at. rows: how many there are to learn from, if that is known."""

    settings: Settings
    template: Template
    config: Any
    rows: int | None

    @property
    def tokenizer(self) -> Any:
        return self.template.tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @property
    def trains_all(self) -> bool:
        return METHODS[self.settings.method.name].TRAINS_ALL

    @property
    def checkpoint_type(self) -> torch.dtype | None:
        """In what the checkpoint says that it holds its weights."""
        named = getattr(self.config, "dtype", None)
        return getattr(torch, named) if isinstance(named, str) else named

    @cached_property
    def model(self) -> torch.nn.Module:
        """On the meta device: names and shapes, no numbers. The method's `attach` may change it, so that check comes last."""
        with torch.device("meta"):
            return of_config(self.config, self.settings)

    @cached_property
    def schedule(self) -> Schedule | None:
        training = self.settings.training
        return Schedule(self.rows, training.batch_size, training.seed, training.epochs, training.steps) if self.rows else None

    def written(self, *messages: tuple[str, str], answer_next: bool = False) -> str | None:
        """What the template makes of (role, content) pairs; None where it refuses them."""
        try:
            return self.template.render([{"role": role, "content": content} for role, content in messages], answer_next)
        except TemplateError:
            return None


def shown(text: str, most: int = 60) -> str:
    text = NO_TEXT.sub("", text)
    return repr(text if len(text) <= most else text[:most] + "…")


def ended(text: str, most: int = 60) -> str:
    """Its end, where the marks are that an answer follows."""
    text = NO_TEXT.sub("", text)
    return repr(text if len(text) <= most else "…" + text[-most:])


def listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
