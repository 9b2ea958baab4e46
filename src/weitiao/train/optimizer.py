"""The optimizers and schedulers that transformers offers, by the names it gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import torch

from weitiao.config import TrainingSettings
from weitiao.errors import SettingError, nearest


# Optimizers of transformers that want the backward pass or the evaluation done their way; our loop does neither.
LOOPS_OF_THEIR_OWN = ("lomo", "adalomo", "schedule_free")


def refuse_unknown(settings: TrainingSettings) -> None:
    """Told at once, before anything is read or loaded.

    Raises:
        SettingError: transformers knows no optimizer or scheduler of that name.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for name, known in (("optimizer", OptimizerNames), ("scheduler", SchedulerType)):
        names, asked = [kind.value for kind in known if not kind.value.startswith(LOOPS_OF_THEIR_OWN)], getattr(settings, name)
        if asked not in names:
            raise SettingError(f"training.{name} = {asked!r} is unknown. {nearest(asked, names)}".rstrip(),
                               f"Expected one of {', '.join(names)}.")


def make_optimizer(
    model: torch.nn.Module, settings: TrainingSettings, learning_rate: float,
    rate_factor: Callable[[str], float] = lambda name: 1.0,
    decays: Callable[[str, torch.nn.Parameter], bool] = lambda name, parameter: parameter.ndim >= 2,
) -> torch.optim.Optimizer:
    """The optimizer over what is trained.

    rate_factor: how many times as fast as `learning_rate` a weight learns (LoRA+). decays: does weight decay fall on it?

    Raises:
        SettingError: the package that brings it is missing, or it refuses its options.
    """
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    arguments = _arguments(
        optim=OptimizerNames(settings.optimizer), optim_args=settings.optimizer_options or None,
        learning_rate=learning_rate, adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon, weight_decay=settings.weight_decay,
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError) as error:
        raise SettingError(f"training.optimizer = {settings.optimizer!r} cannot be used here.", str(error).splitlines()[0]) from error
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((decay, rate_factor(name)), []).append(parameter)
    return kind([
        {"params": parameters, "weight_decay": decay, "lr": learning_rate * factor}
        for (decay, factor), parameters in groups.items()
    ], **options)


def _arguments(**ours: Any) -> SimpleNamespace:
    """What Trainer's optimizer table reads: every field of TrainingArguments at its default, but for ours.

    Not a TrainingArguments: making one resets accelerate's state, the process group included.
    """
    from transformers import TrainingArguments

    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(TrainingArguments)}
    return SimpleNamespace(**defaults | ours)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps: int) -> Any:
    """The learning rate's way over `steps` optimizer steps, warm-up included."""
    from transformers import get_scheduler

    try:
        return get_scheduler(
            settings.scheduler, optimizer, num_warmup_steps=warmup_steps(settings.warmup, steps), num_training_steps=steps,
            scheduler_specific_kwargs=settings.scheduler_options or None,
        )
    except (ValueError, TypeError) as error:
        raise SettingError(f"training.scheduler = {settings.scheduler!r} cannot be made.", str(error).splitlines()[0],
                           "See training.scheduler_options.") from error


def warmup_steps(warmup: float, steps: int) -> int:
    """A share below 1, rounded down so that a run of a few steps learns in all of them; a number of steps from 1 on."""
    return int(warmup * steps) if warmup < 1 else min(round(warmup), steps)


def step_scheduler(scheduler: Any, loss: float) -> None:
    """On to the next learning rate; those that follow a measure are given the step's loss."""
    if type(scheduler).__name__ in ("ReduceLROnPlateau", "GreedyLR"):
        scheduler.step(loss)
    else:
        scheduler.step()
