"""Full-parameter tuning: every weight is trained, and the model itself is what is saved."""

from __future__ import annotations

from pathlib import Path

from weitiao.config import FullSettings

FOLDER = "model"
TRAINS_ALL = True


def attach(model, settings: FullSettings, seed: int):
    model.requires_grad_(True)
    return model


def save(model, folder: Path, base: str) -> None:
    model.save_pretrained(folder)


def load(model, folder: Path) -> None:
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(model, str(folder))
    model.tie_weights()


def merge(model):
    return model
