"""A model as torch prints it: with its method attached, or before and after, from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weitiao.config import Settings
from weitiao.errors import SourceError
from weitiao.model import load as loading
from weitiao.model.methods import count_parameters, method_of, trainable_summary
from weitiao.model.source import resolve
from weitiao.model.source.wheel import EMBEDDED
from weitiao.screen import Screen
from weitiao.train.loss import learn_on_tries


def show_tree(model: torch.nn.Module, screen: Screen) -> None:
    """As torch prints it: a terminal that is too narrow breaks the lines, and we do not."""
    screen.console.out(repr(model), highlight=False)


def show_without_rows(settings: Settings, screen: Screen | None = None) -> None:
    """The tree before and after the method is attached. No weight is read or made: all of it lies on the meta device.

    Raises:
        SourceError: there is no config.json, or it describes no causal LM.
        SettingError: the method does not suit the model.
    """
    screen = screen or Screen()
    folder = folder_of(settings.model, screen)
    # Only these methods ask it for anything: what tokens to add, and how many a text has.
    asks = settings.tokens.add or getattr(settings.method, "text", None)
    tokenizer = loading.load_tokenizer(folder, settings.model) if asks else None
    method, chosen = method_of(settings, tokenizer), settings.method
    if getattr(chosen, "init", None) == "pissa":
        chosen = chosen.model_copy(update={"init": "zero"})  # other numbers, the same tree
    with torch.device("meta"):
        model = without_weights(folder, settings)
        show_tree(model, screen)
        learn_on_tries(model)
        model = method.attach(model, chosen, settings.training.seed, tokenizer)
    screen.tell(f"\nWith method={settings.method.name}:\n")
    show_tree(model, screen)
    screen.tell(f"\n{trainable_summary(*count_parameters(model))}")
    if settings.model.quantize != "none":
        screen.tell(f"Not quantised here: model.quantize={settings.model.quantize} needs the weights.", style="yellow")


def folder_of(settings: Any, screen: Screen) -> Path:
    """Where config.json is; a folder here needs no weights beside it."""
    folder = Path(settings.name).expanduser()
    if settings.name not in EMBEDDED and (folder / "config.json").is_file():
        return folder
    return resolve(settings.name, revision=settings.revision, notify=screen.tell)


def without_weights(folder: Path, settings: Settings) -> torch.nn.Module:
    return of_config(loading.load_config(folder, settings.model), settings)


def of_config(config: Any, settings: Settings) -> torch.nn.Module:
    """The model that a config describes, with weights made on the device in force.

    Raises:
        SourceError: it describes no causal LM.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=settings.model.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SourceError(f"The config of {settings.model.name} describes no causal language model.",
                          str(error).strip().splitlines()[0][:300]) from error
