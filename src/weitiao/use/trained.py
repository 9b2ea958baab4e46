"""A run folder -> the model that was trained, ready to answer: base, method, weights and template, none typed twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from weitiao.config import Settings
from weitiao.data.dataset import Dataset
from weitiao.data.labels import Labels
from weitiao.data.templates import Template
from weitiao.data.tokens import cut_front
from weitiao.errors import OutOfMemory, RunError
from weitiao.model import fused, quantize
from weitiao.model import load as loading
from weitiao.model.methods import METHODS, method_of
from weitiao.model.methods.method import Method
from weitiao.model.source import model_folder
from weitiao.screen import Screen
from weitiao.settings.data import Source
from weitiao.settings.model import ModelSettings
from weitiao.train import memory
from weitiao.train.check import cache_of
from weitiao.train.evaluation import Progress, label_nll, no_progress
from weitiao.train.folder import RunFolder, open_run
from weitiao.train.loss import learn_on_tries


@dataclass(eq=False)
class Trained:
    run: RunFolder
    weights: Path
    settings: Settings
    base: Path
    template: Template
    method: Method
    model: torch.nn.Module
    compute: torch.dtype
    labels: Labels | None  # of a run that classifies

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def row_limit(self) -> int:
        """The longest row, in tokens, beside the places that the method takes."""
        return loading.model_limit(self.model.config) - self.method.virtual_tokens(self.settings.method, self.template.tokenizer)

    def read(self, sources: Sequence[Source], progress: Progress = no_progress, own: bool = False, columns: Mapping[str, str] | None = None) -> Dataset:
        """Rows as the run reads them. own: those it was trained on, which data.weight_column is for. columns: which are which, if not as there."""
        data = self.settings.data if own else self.settings.data.model_copy(update={"weight_column": None}).with_columns(columns)
        return cache_of(data).load(
            sources, data, self.template, self.row_limit, self.model.config.get_text_config().vocab_size, self.settings.training.seed,
            data.max_tokens, "classify" if self.labels else "answer", self.labels, progress=progress,
        )

    def prompt_ids(self, messages: Sequence[dict[str, str]], tools: Sequence[Any] = ()) -> np.ndarray:
        """The ids of a prompt as the run learned from such: before a label, cut in front to the run's longest row."""
        prompt, data = self.template.prompt_ids(messages, tools), self.settings.data
        if self.labels is None or data.cut == "end":
            return prompt
        return cut_front(prompt, min(data.max_tokens, self.row_limit) - self.labels.longest, self.template.head(messages, tools))

    def label_nll(self, prompts: Sequence[np.ndarray], progress: Progress = no_progress) -> np.ndarray:
        """-log p(label | prompt), float64 [prompts, labels]."""
        training = self.settings.training
        return label_nll(self.model, prompts, self.labels, training.layout, training.nodes_per_pass or memory.LEAST_NODES,
                         self.template.pad_id, self.device, self.autocast, progress=progress)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.compute, enabled=loading.is_mixed(self.model, self.compute))


def open_trained(path: str, screen: Screen, base: str = "trained") -> Trained:
    """Load RUN or RUN/checkpoints/N in eval mode.

    base: under what was learned, `trained`: the base as it was in training, weights and precision;
        `original`: in float32, not quantised; `dequantized`: in float32, with the weights that training computed with.

    Raises:
        RunError: no such run, nothing learned yet, or a template that was changed since.
    """
    run, weights = open_run(path)
    settings = run.settings()
    folder = model_folder(settings.model, notify=screen.tell)
    template = stored_template(run, loading.load_tokenizer(folder, settings.model))
    method = method_of(settings, template.tokenizer)
    quantize.refuse_unfit(settings.model, loading.load_config(folder, settings.model), method.TRAINS_ALL)
    device = loading.home(settings.model)
    model, compute = load_base(folder, settings, base, device)
    learn_on_tries(model)
    model = method.attach(model, settings.method, settings.training.seed, template.tokenizer)
    try:
        method.load(model, weights / method.FOLDER)
    except (OSError, SafetensorError, RuntimeError, AssertionError) as error:
        if told := OutOfMemory.of(error):
            raise told from error
        steps = ", ".join(str(c.step) for c in run.checkpoints())
        raise RunError(f"What was learned cannot be read from {weights / method.FOLDER}: {str(error).splitlines()[0]}",
                       "Expected the files as training left them.",
                       f"Use a checkpoint: {run.path}/checkpoints/N, N one of {steps}.") from error
    if base == "trained":
        fused.fuse(model)  # as in training: what is measured then and now is computed alike
    return Trained(run, weights, settings, folder, template, method, loading.place(model, device).eval(), compute,
                   Labels.from_dict(run.read_json("data.json").get("labels")))


def load_base(folder: Path, settings: Settings, base: str, device: torch.device) -> tuple[torch.nn.Module, torch.dtype]:
    """(the model before its method is attached, what it computes in); see `open_trained`."""
    trains_all = METHODS[settings.method.name].TRAINS_ALL
    compute = loading.run_dtype(settings, trains_all)
    held = loading.weight_dtype(settings.model.dtype, trains_all, compute)
    if base == "trained":
        return loading.load_model(folder, settings.model, held, compute, device), compute
    plain = loading.load_model(folder, unquantized(settings.model), torch.float32)
    if base == "dequantized":
        quantize.unpack_into(plain, loading.load_model(folder, settings.model, held, compute, device))
    return plain, torch.float32


def unquantized(settings: ModelSettings) -> ModelSettings:
    return settings.model_copy(update={"quantize": "none", "device_map": None})


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
