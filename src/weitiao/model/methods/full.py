"""Full-parameter tuning: every weight is trained, or those that are named; the model itself is what is saved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import final

import torch

from weitiao.errors import RunError, SettingError
from weitiao.model.methods.layers import decoder_layers, final_norm
from weitiao.model.methods.method import Method
from weitiao.settings.methods import FullSettings


@final
class Full(Method):
    """All weights; or the last layers and the norm behind them; or those whose names match a pattern.

    A head that is tied to the embedding is one weight with it under two names: either name trains both.
    """

    FOLDER = "model"
    TRAINS_ALL = True

    def attach(self, model, settings: FullSettings, seed: int, tokenizer=None, examples=()):
        chosen = chosen_parameters(model, settings)
        model.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return model

    def save(self, model, folder: Path, base: str) -> None:
        model.save_pretrained(folder)

    def load(self, model, folder: Path) -> None:
        if hasattr(model, "load_plain"):  # it is saved in another form than it is held in
            model.load_plain(folder)
            return
        from accelerate import load_checkpoint_in_model

        load_checkpoint_in_model(model, str(folder))
        model.tie_weights()

    @contextmanager
    def untuned(self, model) -> Iterator[None]:
        raise RunError("This run trained the base itself.", "Expected an adapter that can be switched off.",
                       "Measure it without --base.")
        yield

    def merge(self, model):
        return model


def chosen_parameters(model: torch.nn.Module, settings: FullSettings) -> dict[str, torch.nn.Parameter]:
    """Name -> weight to train.

    Raises:
        SettingError: a pattern that matches nothing, or more layers than there are.
    """
    # Both names of a tied weight, so that a pattern may call it by either.
    known = dict(model.named_parameters(remove_duplicate=False))
    if settings.last_layers is None and not settings.train:
        return known
    chosen = last_layers(model, settings.last_layers) if settings.last_layers else {}
    for pattern in settings.train:
        matched = {name: p for name, p in known.items() if fnmatchcase(name, pattern)}
        if not matched:
            raise SettingError(f"method.train {pattern!r} matches no weight of the model.",
                               f"Its nearest are {', '.join(nearest_kinds(pattern, known))}.",
                               "A * stands for any letters: '*.mlp.*' is every weight of every MLP.")
        chosen |= matched
    return chosen


def last_layers(model: torch.nn.Module, count: int) -> dict[str, torch.nn.Parameter]:
    """Name -> weight, of the last `count` layers and the norm behind them."""
    name, layers = decoder_layers(model)
    if count > len(layers):
        raise SettingError(f"method.last_layers = {count}, and the model has {len(layers)}.",
                           f"Expected 1 to {len(layers)}.", "To train every weight, leave it out.")
    norm = final_norm(model)
    wanted = {id(p) for module in (*layers[-count:], *([norm] if norm else [])) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def nearest_kinds(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names most like `pattern`, one for all layers: model.layers.*.mlp.down_proj.weight."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return difflib.get_close_matches(pattern, kinds, n=most, cutoff=0.0)
