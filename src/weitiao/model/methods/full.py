"""Full-parameter tuning: every weight is trained, or those that are named; the model itself is what is saved."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import final

from weitiao.config import FullSettings
from weitiao.errors import RunError
from weitiao.model.methods.method import Method


@final
class Full(Method):
    FOLDER = "model"
    TRAINS_ALL = True

    def attach(self, model, settings: FullSettings, seed: int, tokenizer=None):
        model.requires_grad_(True)
        return model

    def save(self, model, folder: Path, base: str) -> None:
        model.save_pretrained(folder)

    def load(self, model, folder: Path) -> None:
        from accelerate import load_checkpoint_in_model

        load_checkpoint_in_model(model, str(folder))
        model.tie_weights()

    @contextmanager
    def untuned(self, model):
        raise RunError("This run trained the base itself.", "Expected an adapter that can be switched off.",
                       "Measure it without --base.")
        yield

    def merge(self, model):
        return model
