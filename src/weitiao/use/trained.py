"""A run folder -> the model that was trained, ready to answer: base, method, weights and template, none typed twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from weitiao.config import Settings
from weitiao.data.templates import Template
from weitiao.errors import RunError
from weitiao.model import load as loading
from weitiao.model.methods import METHODS
from weitiao.model.source import resolve
from weitiao.screen import Screen
from weitiao.train.folder import RunFolder, open_run
from weitiao.train.loss import learn_on_tries


@dataclass(eq=False)
class Trained:
    run: RunFolder
    weights: Path
    settings: Settings
    base: Path
    template: Template
    method: ModuleType
    model: torch.nn.Module
    compute: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.compute, enabled=self.compute is torch.bfloat16)


def open_trained(path: str, screen: Screen, dtype: torch.dtype | None = None) -> Trained:
    """Load RUN or RUN/checkpoints/N in eval mode, in the precision it was trained in unless `dtype` says otherwise.

    Raises:
        RunError: no such run, nothing learned yet, or a template that was changed since.
    """
    run, weights = open_run(path)
    settings = run.settings()
    base = resolve(settings.model.name, revision=settings.model.revision, notify=screen.tell)
    template = stored_template(run, loading.load_tokenizer(base, settings.model))
    compute = loading.compute_dtype(settings.training.precision)
    method = METHODS[settings.method.name]
    held = dtype or loading.weight_dtype(settings.model.dtype, method.TRAINS_ALL, compute)
    model = loading.load_model(base, settings.model, held)
    learn_on_tries(model)
    model = method.attach(model, settings.method, settings.training.seed)
    try:
        method.load(model, weights / method.FOLDER)
    except (OSError, SafetensorError, RuntimeError, AssertionError) as error:
        steps = ", ".join(str(c.step) for c in run.checkpoints())
        raise RunError(f"What was learned cannot be read from {weights / method.FOLDER}: {str(error).splitlines()[0]}",
                       "Expected the files as training left them.",
                       f"Use a checkpoint: {run.path}/checkpoints/N, N one of {steps}.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(run, weights, settings, base, template, method, model.to(device).eval(), compute)


def stored_template(run: RunFolder, tokenizer: Any) -> Template:
    """The template that the run was trained with, to the letter."""
    facts = run.read_json("template.json")
    source = (run.path / "template.jinja").read_text("utf-8")
    template = Template(tokenizer, facts["name"], source, facts["stop_id"], facts["begins_with_bos"])
    if template.hash != facts["sha256"]:
        raise RunError(f"{run.path}/template.jinja is not the template that the run was trained with.",
                       f"Expected the hash {facts['sha256'][:12]}…, found {template.hash[:12]}….",
                       "Bring the file back; another prompt than in training gives other answers.")
    return template
