"""Prompts that a run was given -> answers by what it has learned: shown, and written to answers.jsonl, when all else is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from weitiao.config import Settings
from weitiao.data.templates import Template
from weitiao.errors import Interrupted, RowError, RunError
from weitiao.model.generate import Answer, Sampling, answers_to
from weitiao.model.methods.method import Method
from weitiao.screen import Screen
from weitiao.train.folder import RunFolder


def prompt_ids(settings: Settings, template: Template) -> list[np.ndarray]:
    """Each of samples.prompts as inference sends it, int32 [T]: the run's template, and data.system before it."""
    opening = [{"role": "system", "content": settings.data.system}] if settings.data.system else []
    return [template.prompt_ids([*opening, {"role": "user", "content": prompt}]) for prompt in settings.samples.prompts]


def refuse_too_long(settings: Settings, template: Template, room: int) -> None:
    """Told before training. room: the most tokens of prompt and answer that the model takes.

    Raises:
        RowError: a prompt leaves no room for an answer.
        TemplateError: the template refuses a prompt.
    """
    for number, ids in enumerate(prompt_ids(settings, template), 1):
        if len(ids) >= room:
            raise RowError(f"samples.prompts: prompt {number} has {len(ids):,} tokens with its template.",
                           f"The model takes {room:,}, the answer counted.", "Shorten it.")


def answer_prompts(
    model: torch.nn.Module, method: Method, settings: Settings, template: Template, run: RunFolder, autocast: Callable[[], Any],
    screen: Screen,
) -> None:
    """Answer by the weights that were published, write, show. The run is finished before, and stays so whatever happens here.

    Raises:
        Interrupted: Ctrl-C.
        RunError: answers.jsonl cannot be written.
    """
    asked = settings.samples
    sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p)
    try:
        method.load(model, run.path / method.FOLDER)  # of the best step, which may not be the last
        torch.manual_seed(settings.training.seed)
        with autocast():
            answers = answers_to(model, template, prompt_ids(settings, template), sampling, progress=screen.progress,
                                 layout=settings.training.layout)
        write(run, asked.prompts, answers)
        show(asked.prompts, answers, screen)
    except KeyboardInterrupt as end:
        raise Interrupted(f"Stopped while answering. The run is finished; ask it: weitiao generate {run.path} --prompt \"…\"",
                          end) from None


def write(run: RunFolder, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
    lines = [{"prompt": p, "answer": a.text} | ({"cut": True} if a.cut else {}) for p, a in zip(prompts, answers, strict=True)]
    try:
        run.write_text("answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise RunError(f"The run is finished, but {run.path}/answers.jsonl cannot be written: {error}.", next_step="Make room, and ask it: "
                       f"weitiao generate {run.path} --prompt \"…\"") from error


def show(prompts: Sequence[str], answers: Sequence[Answer], screen: Screen) -> None:
    screen.tell()
    screen.grid(["", "prompt", "answer"], [
        [str(number), prompt, f"{answer.text}{answer.note}"] for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
    ])
