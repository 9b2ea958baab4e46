"""Optimizers and schedulers by name: torch's own under plain names, and what transformers offers by the names it gives them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError

from weitiao.config import read_scalar
from weitiao.errors import SettingError, nearest
from weitiao.settings.training import WITHOUT_DECAY, TrainingSettings
from weitiao.train.stepping import ByWeight

PLAIN: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adamw_torch": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad, "adadelta": torch.optim.Adadelta,
    "rprop": torch.optim.Rprop, "lbfgs": torch.optim.LBFGS,
}
FUSED = ("adamw", "adamw_torch", "adam")
SEARCHERS = ("lbfgs",)  # those that want the loss and gradient of a step several times, at weights they try
# torch remembers 100 steps and takes up to 20 a batch: here it is 2 x 10 copies of what is trained, and 5 steps a batch. Without
# a line search, LoRA on SmolLM2-135M (bf16) went from a loss of 2.0 to 45 in 12 batches (rate 1; to 5.6 at 0.1); with it, to 0.04.
DEFAULTS: dict[str, dict[str, Any]] = {"lbfgs": {"history_size": 10, "max_iter": 5, "line_search_fn": "strong_wolfe"}}

# Options that are settings of ours, by the setting; and those that have no sense in a fine-tuning.
OURS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
OURS_OF_ADAM = OURS | {"betas": "adam_beta1 and training.adam_beta2", "eps": "adam_epsilon"}
SENSELESS = ("params", "maximize", "capturable", "differentiable")
NARROWER: dict[str, Any] = {  # than torch's annotations say: L-BFGS looks at none of these before its first step
    "max_iter": PositiveInt, "max_eval": PositiveInt | None, "history_size": PositiveInt,
    "line_search_fn": Literal["strong_wolfe"] | None,
}

# Optimizers of transformers that want the backward pass or the evaluation done their way; our loop does neither. What does instead.
LOOPS_OF_THEIR_OWN = {
    r"lomo": "LOMO is training.optimizer=sgd with training.step_in_backward=true.",
    r"adalomo": "Its package keeps its state where no checkpoint finds it. training.optimizer=adafactor with training.step_in_backward=true is "
                "much the same: factored squares, stepped in the backward pass.",
    r"(.+)_layerwise": r"It is training.optimizer=\1 with training.step_in_backward=true.",
    r"schedule_free_.+": "It changes weights for an evaluation and back, which this loop does not do.",
    r"galore_adamw_8bit": "Its package calls bitsandbytes as that was in 2024. training.optimizer=apollo_adamw keeps still less.",
}
# Those that keep Adam's state of a projection of each linear's gradient, of so many dimensions (optimizer_options: rank, update_proj_gap, scale):
# GaLore (Zhao et al. 2024, arXiv:2403.03507), APOLLO (Zhu et al. 2024, arXiv:2412.05270). What their state holds beside tensors.
LOW_RANK = {
    "galore": ("galore_torch.galore_projector:GaLoreProjector",),
    "apollo": ("apollo_torch.random_projector:GradientProjector", "apollo_torch.svd_projector:GaLoreProjector"),
}


def kinds_of_state(name: str) -> list[type]:
    """Classes of which an optimizer's state holds objects; a checkpoint is read with these and no other."""
    found = [path.split(":") for path in LOW_RANK.get(name.partition("_")[0], ())]
    return [getattr(importlib.import_module(module), kind) for module, kind in found]


def refuse_unfit(settings: TrainingSettings, compute: torch.dtype) -> None:
    """Told at once, before anything is read or loaded. compute: what the run computes in.

    Raises:
        SettingError: there is no optimizer or scheduler of that name, or its options or the precision do not suit it.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for pattern, cure in LOOPS_OF_THEIR_OWN.items():
        if found := re.fullmatch(pattern, settings.optimizer):
            raise SettingError(f"training.optimizer={settings.optimizer} does not go with this loop.", found.expand(cure))
    own = re.compile("|".join(LOOPS_OF_THEIR_OWN))
    for name, ours, theirs in (("optimizer", list(PLAIN), OptimizerNames), ("scheduler", [], SchedulerType)):
        names = list(dict.fromkeys([*ours, *(kind.value for kind in theirs if not own.fullmatch(kind.value))]))
        asked = getattr(settings, name)
        if asked not in names:
            raise SettingError(f"training.{name} = {asked!r} is unknown. {nearest(asked, names)}".rstrip(),
                               f"Expected one of {', '.join(names)}.")
    if settings.optimizer in PLAIN:
        _build(settings, [torch.nn.Parameter(torch.zeros(1))], 1.0)
    if settings.optimizer in SEARCHERS and compute is torch.float16:
        raise SettingError(
            f"training.optimizer={settings.optimizer} measures the loss at several weights within a step, and this run computes in fp16: "
            "a step whose gradient overflows is to be skipped and the loss scaled anew, which cannot be done in its middle.",
            "Expected training.precision=fp32, or bf16 where the hardware has it.",
        )


def make_optimizer(
    model: torch.nn.Module, settings: TrainingSettings, learning_rate: float,
    rate_factor: Callable[[str], float] = lambda name: 1.0,
    decays: Callable[[str, torch.nn.Parameter], bool] = lambda name, parameter: parameter.ndim >= 2,
    by_weight: ByWeight | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer over what is trained.

    rate_factor: how many times as fast as `learning_rate` a weight learns (LoRA+). decays: does weight decay fall on it?
    by_weight: what will step the weights one at a time; the optimizer is made over its stand-ins and bound to it.
    fused: update each weight in one kernel, where there is one, unless the options say otherwise; see `takes_fused`.

    Raises:
        SettingError: the package that brings it is missing, or it refuses its options or this model.
    """
    kind, options = (None, {}) if settings.optimizer in PLAIN else _of_transformers(model, settings, learning_rate)
    projected, projection = _projection(options)
    groups: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if decays(name, parameter) else 0.0
            members = by_weight.stand_ins(parameter) if by_weight else [parameter]
            groups.setdefault((decay, rate_factor(name), id(parameter) in projected), []).extend(members)
    listed = [
        {"params": parameters, "lr": learning_rate * factor} | ({} if settings.optimizer in WITHOUT_DECAY else {"weight_decay": decay})
        | (projection if low_rank else {})
        for (decay, factor, low_rank), parameters in groups.items()
    ]
    if settings.optimizer in SEARCHERS:
        _refuse_spread(settings.optimizer, listed)
    if kind is None:
        dense = all(p.is_contiguous() for group in groups.values() for p in group)  # torch's kernel for a CPU takes numbers as they lie
        made = _build(settings, listed, learning_rate, fused and dense and settings.optimizer in FUSED)
    else:
        made = kind(listed, **options)
    if by_weight:
        by_weight.bind(made)
    return made


def _refuse_spread(name: str, groups: list[dict[str, Any]]) -> None:
    """It joins all gradients to one vector."""
    devices = {str(p.device) for group in groups for p in group["params"]}
    if len(devices) > 1:
        raise SettingError(f"training.optimizer={name} joins all gradients to one vector, and what is trained lies on {', '.join(sorted(devices))}.",
                           "Expected one device.", "Leave model.device_map out, or choose another optimizer.")


def takes_fused(device: torch.device | str, loss_scaled: bool) -> bool:
    """The plain step makes temporaries, on a GPU of all weights, on a CPU twice the widest one's, and goes over all numbers again for each
    operation: one kernel takes a third of the time on a CPU (benchmarks/results.md). Not under loss scaling: the fused step skips an overflow by
    itself, and accelerate (1.15) then calls it taken."""
    return torch.device(device).type in ("cuda", "cpu") and not loss_scaled


def _build(settings: TrainingSettings, parameters: list[Any], learning_rate: float, fused: bool = False) -> torch.optim.Optimizer:
    """One of torch's own."""
    options = _options(settings)
    if fused and not {"fused", "foreach"} & options.keys():
        options["fused"] = True
    try:
        return PLAIN[settings.optimizer](parameters, lr=learning_rate, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SettingError(f"training.optimizer_options: {settings.optimizer} refuses them: {str(error).splitlines()[0]}",
                           f"Found {settings.optimizer_options!r}.") from error


def _options(settings: TrainingSettings) -> dict[str, Any]:
    """Arguments for one of torch's own, the learning rate and the decay aside.

    Raises:
        SettingError: an option that it does not have, or a value of another type.
    """
    of_adam = settings.optimizer.startswith("adam")
    ours = OURS_OF_ADAM if of_adam else OURS
    signature = inspect.signature(PLAIN[settings.optimizer], eval_str=True).parameters
    known = [name for name in signature if name not in SENSELESS and name not in ours]
    options = dict(DEFAULTS.get(settings.optimizer, {}))
    for name, text in _pairs(settings.optimizer_options):
        if name not in known:
            cure = f"It is training.{ours[name]}." if name in ours and name in signature else nearest(name, known)
            raise SettingError(f"training.optimizer_options: {settings.optimizer} has no option {name!r}. {cure}".rstrip(),
                               f"Expected some of {', '.join(known)}.")
        try:
            wanted = TypeAdapter(NARROWER.get(name, signature[name].annotation))
            options[name] = wanted.validate_python(read_scalar(text))
        except ValidationError as error:
            raise SettingError(f"training.optimizer_options: {name} = {text}: {error.errors()[0]['msg']}.") from None
    adam = {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    return options | (adam if of_adam else {})


def _pairs(text: str) -> list[tuple[str, str]]:
    """`a=1,b=[2, 3]` -> (a, 1), (b, [2, 3])"""
    pairs = []
    for pair in re.split(r",(?![^\[]*\])", text) if text.strip() else []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise SettingError(f"training.optimizer_options = {text!r} cannot be read.", "Expected key=value,key=value, such as momentum=0.9,nesterov=true.")
        pairs.append((name.strip(), value))
    return pairs


def _of_transformers(model: torch.nn.Module, settings: TrainingSettings, learning_rate: float) -> tuple[Any, dict[str, Any]]:
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    arguments = _arguments(
        optim=OptimizerNames(settings.optimizer), optim_args=settings.optimizer_options or None,
        learning_rate=learning_rate, adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon, weight_decay=settings.weight_decay, optim_target_modules="all-linear",
    )
    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError) as error:
        raise SettingError(f"training.optimizer = {settings.optimizer!r} cannot be used here.", str(error).splitlines()[0]) from error


def _projection(options: dict[str, Any]) -> tuple[set[int], dict[str, Any]]:
    """(ids of the weights whose gradients are projected, how), taken out of the options."""
    groups = options.pop("params", None)
    if not groups:
        return set(), {}
    return {id(p) for p in groups[1]["params"]}, {name: value for name, value in groups[1].items() if name != "params"}


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

    # rprop takes the rate for its first step alone, so any other way of it would be told and not be true
    name = "constant" if settings.optimizer == "rprop" else settings.scheduler
    try:
        return get_scheduler(
            name, optimizer, num_warmup_steps=warmup_steps(settings.warmup_in_force, steps), num_training_steps=steps,
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
