"""`weitiao plan`: what a run will need, told before anything is paid for; and turned round, what fits into so much memory.

    settings ── config.json (a folder's, the embedded model's, or a table's by hub id) ── needs ── one table
    --memory 8GB ────────── the same for every way of WAYS, best first ── what fits, and the one change that makes the run fit
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weitiao.config import NO_ROWS, Settings
from weitiao.data.templates import load_template
from weitiao.errors import SettingError, SourceError, nearest
from weitiao.model import load as loading
from weitiao.model.known import known_config, known_names
from weitiao.model.methods import METHODS, method_of
from weitiao.model.methods.added import WithTokens
from weitiao.model.source.wheel import EMBEDDED
from weitiao.screen import Screen, duration, format_bytes, times
from weitiao.train.check import cache_of, room_and_vocabulary
from weitiao.train.devices import device_named, parse_bytes
from weitiao.train.folder import write_asked
from weitiao.train.needs import NoPlan, Plan, Subject, Target, needs, standing
from weitiao.train.tree import folder_of
from weitiao.trie import Example

TOKENS, ROWS = 512, 1000  # of made-up rows, where none are given; half of each is learned


@dataclass(frozen=True)
class Change:
    """One change of the settings that takes less memory. words: settings as on the command line; cost: what it costs."""

    words: Mapping[str, Any]
    cost: str

    def __str__(self) -> str:
        return " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in self.words.items())


# From the one that costs least to those that teach something else. Those that change nothing of a run are left out of its list.
CHANGES = (
    Change({"training.nodes_per_pass": None}, "a step in more passes, the same result"),
    Change({"training.checkpointing": True}, "about a third more time, the same result"),
    Change({"training.offload_activations": True}, "inputs of layers in the host's memory, for two copies over the bus; the same result"),
    Change({"model.stream": True}, "frozen layers come from the host's memory one at a time, each twice a pass; the same result"),
    Change({"model.dtype": "auto"}, "frozen weights in the type that is computed in"),
    Change({"training.precision": "bf16"}, "products rounded to 8 bits"),
    Change({"training.optimizer": "adamw_bnb_8bit"}, "the optimizer's state in 8 bits; needs bitsandbytes"),
    Change({"model.dtype": "bfloat16", "training.rounding": "compensated"}, "weights in bf16 and the other half of float32 beside them; products rounded to 8 bits"),
    Change({"training.memory": "thrifty"}, "weights in bf16, stepped one by one in the backward pass; the optimizer's state in 8 bits; about twice the time"),
    Change({"training.optimizer": "adafactor"}, "another optimizer, which keeps sums of rows and columns"),
    Change({"model.quantize": "int8"}, "frozen weights in 8 bits"),
    Change({"model.quantize": "nf4"}, "frozen weights in 4 bits, a little less exact"),
    Change({"method": "lora"}, "an adapter in the place of all weights"),
    Change({"method": "lora", "training.precision": "bf16"}, "an adapter on weights in bf16"),
    Change({"method": "lora", "model.quantize": "nf4"}, "an adapter on weights in 4 bits"),
    Change({"data.max_tokens": 512}, "longer rows are cut"),
    Change({"data.max_tokens": 256}, "longer rows are cut"),
    Change({"method": "lora", "model.quantize": "nf4", "training.precision": "bf16", "data.max_tokens": 256}, "an adapter on weights in 4 bits, rows cut"),
)

# Ways to tune a model, best first: how much of it learns, and how exactly its weights are held.
WAYS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("all weights", {"method": "full", "model.quantize": "none"}),
    ("all weights, 8-bit optimizer", {"method": "full", "model.quantize": "none", "training.optimizer": "adamw_bnb_8bit"}),
    ("all weights in bf16, thrifty", {"method": "full", "model.quantize": "none", "training.memory": "thrifty"}),
    ("LoRA", {"method": "lora", "model.quantize": "none"}),
    ("LoRA on bf16", {"method": "lora", "model.quantize": "none", "training.precision": "bf16"}),
    ("LoRA on int8", {"method": "lora", "model.quantize": "int8"}),
    ("LoRA on nf4", {"method": "lora", "model.quantize": "nf4"}),
    ("LoRA on nf4, bf16", {"method": "lora", "model.quantize": "nf4", "training.precision": "bf16"}),
    ("LoRA on nf4, bf16, streamed", {"method": "lora", "model.quantize": "nf4", "training.precision": "bf16", "model.stream": True}),
    ("prefix on nf4, bf16", {"method": "prefix", "model.quantize": "nf4", "training.precision": "bf16"}),
)

WORTH_TELLING = 2**20 / 10  # bytes; less would be told as 0.0 MiB

MEANINGS = {
    "weights": "of the model", "quantisation": "scales of the packed weights", "adapter": "what is trained beside them",
    "gradients": "of what is trained", "optimizer": "its state", "activations": "kept for the backward pass",
    "logits": "the head's, a chunk at a time", "work space": "of the operation under way", "framework": "libraries",
    "file pages": "of the checkpoint, which the system may take back",
}


# ------------------------------------------------------------------------------------------------------------ the command


def plan(
    settings: Settings, screen: Screen, tokens: int | None = None, rows: int | None = None, gpu: str | None = None,
    memory: str | None = None, file: str | None = None,
) -> Plan:
    """Print what a run needs.

    Args:
        tokens, rows: of made-up rows, where the settings name none.
        gpu: a GPU by name or size; default: what is here.
        memory: so much of it is there (on the GPU named, else of any kind); list what fits.
        file: also write the plan here, as JSON.

    Raises:
        SourceError, SettingError: no such model, GPU or size; or the model cannot be planned.
    """
    target = target_of(gpu, memory)
    subject, note = subject_of(settings, screen, tokens, rows)
    screen.tell(f"Tracing a step of {settings.model.name}, without its weights …")
    try:
        wanted = needs(subject, target)
        show(wanted, subject, target, screen, note)
        if memory or not wanted.fits:
            show_ways(subject, target, screen, change_that_fits(subject, target, screen.progress) if not wanted.fits else None, wanted)
    except NoPlan as reason:
        raise SourceError(f"{settings.model.name} cannot be planned: {reason}.", "Expected a causal language model of transformers.") from reason
    if file:
        write_asked(Path(file), json.dumps(wanted.as_dict(), ensure_ascii=False, indent=2) + "\n")
    return wanted


def target_of(gpu: str | None, memory: str | None) -> Target:
    if gpu or memory:
        if memory:
            parse_bytes(memory)  # a size, not a name
        device = device_named(gpu or memory)
        if gpu and memory:
            device = replace(device, memory=device_named(memory).memory)
        target = Target.of_gpu(device)
        if target.available <= 0:
            raise SettingError(f"{memory or gpu!r} of memory is less than a GPU's own libraries take.", "Expected at least 2GB.",
                               "Give the size of the whole card, such as 8GB.")
        return target
    return Target.here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def subject_of(settings: Settings, screen: Screen, tokens: int | None, rows: int | None) -> tuple[Subject, str]:
    """(what is planned, where its rows come from)"""
    config, home = config_of(settings, screen)
    named = settings.data.train[0].path != NO_ROWS
    tokenizer, note = _tokenizer(home, settings), ""
    if tokenizer is None and (settings.tokens.add or getattr(settings.method, "text", None)):
        raise SettingError(f"tokens.add and method.text want the tokenizer of {settings.model.name}, which is not here.",
                           "Expected a folder with its tokenizer.", "Leave them out of the plan: they take next to nothing.")
    if not named:
        tokens, rows = tokens or TOKENS, rows or ROWS
        return Subject(settings, config, made_up(tokens, rows), tokenizer, method_of(settings, tokenizer)), f"{rows:,} made-up row{'s' * (rows > 1)} of {tokens:,} tokens, half of each learned"
    if tokenizer is None:
        tokenizer = loading.load_tokenizer(folder_of(settings.model.model_copy(update={"name": "smollm2-135m"}), screen), settings.model)
        note = ", counted by smollm2-135m's tokenizer: its own is not here"
    template = load_template(settings.data.template, tokenizer)
    method = method_of(settings, tokenizer)
    room, vocabulary = room_and_vocabulary(settings, method, template, config)
    data = cache_of(settings.data, screen).load(
        settings.data.train, settings.data, template, room, max(vocabulary, len(tokenizer)), settings.training.seed,
        progress=screen.progress, task=settings.task,
    )
    return Subject(settings, config, data.rows.paths, tokenizer, method), f"{len(data):,} rows of up to {data.max_tokens:,} tokens{note}"


def config_of(settings: Settings, screen: Screen) -> tuple[Any, Path | None]:
    """(config, its folder); by a table, without any hub, where the id is in it and no such folder is here."""
    name = settings.model.name
    if name not in EMBEDDED and not Path(name).expanduser().exists() and (found := known_config(name)) is not None:
        return found, None
    try:
        folder = folder_of(settings.model, screen)
    except SourceError as error:
        close = nearest(name, known_names())
        if not close:
            raise
        raise SourceError(error.found, error.expected, f"{close} {error.next_step}".strip()) from error
    return loading.load_config(folder, settings.model), folder


def _tokenizer(folder: Path | None, settings: Settings) -> Any:
    try:
        return loading.load_tokenizer(folder, settings.model) if folder else None
    except SourceError:
        return None


def made_up(tokens: int, rows: int) -> list[list[Example]]:
    """Rows that share nothing, the second half of each learned."""
    weights = np.r_[np.zeros(tokens - tokens // 2), np.ones(tokens // 2)].astype(np.float32)
    weights[0] = 0
    ids = np.arange(tokens, dtype=np.int32) % 1000
    return [[Example(np.concatenate([[1000 + i], ids[1:]]).astype(np.int32), weights, i)] for i in range(rows)]


# ---------------------------------------------------------------------------------------------------- what else would fit


def changed(settings: Settings, words: Mapping[str, Any]) -> Settings | None:
    """The settings with some of them changed; None if they were so already, or do not go together then."""
    plain = settings.model_dump(exclude_unset=True)
    for name, value in words.items():
        if name == "method":
            if settings.method.name == value:
                continue
            plain["method"] = {"name": value}
            if "training" in plain:  # another method's rate
                plain["training"].pop("learning_rate", None)
            continue
        group, _, key = name.partition(".")
        plain.setdefault(group, {})
        plain[group][key] = value
    try:
        made = Settings.model_validate(plain)
    except ValueError:
        return None
    return None if made == settings else made


def under(subject: Subject, settings: Settings) -> Subject:
    """The same rows under other settings."""
    limit = settings.data.max_tokens
    paths = subject.paths
    if limit and limit != subject.settings.data.max_tokens:
        paths = [[Example(p.ids[-limit:], np.r_[0, p.weights[-limit:][1:]].astype(np.float32), p.row) for p in row] for row in paths]
    method = METHODS[settings.method.name]
    if settings.tokens.add:  # the tokenizer knows them already
        method = WithTokens(method, subject.tokenizer.convert_tokens_to_ids(list(settings.tokens.add)))
    return Subject(settings, subject.config, paths, subject.tokenizer, method, subject.lines)


def installed(words: Mapping[str, Any]) -> bool:
    """Is the package there that it needs?"""
    return not ({"training.optimizer", "training.memory"} & set(words) and words.get("training.optimizer") != "adafactor") or importlib.util.find_spec("bitsandbytes") is not None


def change_that_fits(subject: Subject, target: Target, progress: Any = lambda items, what: items) -> tuple[Change, Plan] | None:
    """The first of CHANGES with which the run fits."""
    for change in progress(CHANGES, "Looking for what fits"):
        settings = changed(subject.settings, change.words)
        if settings is None or not installed(change.words):
            continue
        with contextlib.suppress(NoPlan, SettingError):
            other = under(subject, settings)
            if standing(other, target) < target.available and (planned := needs(other, target)).fits:
                return change, planned
    return None


def nearest_fit(subject: Subject, target: Target) -> str:
    """`training.checkpointing=true, 3.1 GiB (about a third more time, the same result)`, or nothing."""
    found = change_that_fits(subject, target)
    return f"{found[0]}, {format_bytes(found[1].peak)} ({found[0].cost})" if found else ""


@dataclass(frozen=True)
class Way:
    """One of WAYS under these settings. least: bytes that it cannot do without; planned: None where those are too many already."""

    name: str
    least: int
    planned: Plan | None

    @property
    def fits(self) -> bool:
        return self.planned is not None and self.planned.fits


def ways(subject: Subject, target: Target, progress: Any = lambda items, what: items) -> list[Way]:
    """What fits first, best first; then what does not."""
    found: list[Way] = []
    seen = set()
    for name, words in progress(WAYS, "Looking for what fits"):
        settings = changed(subject.settings, words) or subject.settings
        if not installed(words):
            continue
        with contextlib.suppress(NoPlan, SettingError):
            other = under(subject, settings)
            kind = (settings.method.name, settings.model.quantize, settings.model.dtype, settings.model.stream, settings.training.optimizer, target.compute(settings, other.method.TRAINS_ALL))
            if kind not in seen:
                seen.add(kind)
                least = standing(other, target)
                found.append(Way(name, least, needs(other, target) if least < target.available else None))
    return sorted(found, key=lambda way: not way.fits)


# ---------------------------------------------------------------------------------------------------------------- telling


def show(planned: Plan, subject: Subject, target: Target, screen: Screen, rows: str) -> None:
    settings = subject.settings
    how = [settings.method.name, f"computed in {planned.compute}"]
    how += [settings.model.quantize] * (settings.model.quantize != "none") + ["checkpointing"] * planned.checkpointing
    screen.table("", [
        ("model", f"{settings.model.name}, {planned.total:,} parameters, {planned.trainable:,} of them trained"),
        ("method", ", ".join(how)),
        ("rows", rows),
        ("on", f"{planned.target}, {format_bytes(planned.available)} free"),
    ])
    screen.table("Memory at the worst moment of a step", [
        *((name, f"{format_bytes(size):>10}  {MEANINGS[name]}") for name, size in planned.terms.items() if size >= WORTH_TELLING),
        ("in all", f"{format_bytes(planned.parts['steps']):>10}  up to {planned.largest:,} nodes at once"),
    ])
    others = [f"{name} {format_bytes(planned.parts[name])}" for name in ("load", "proof") if planned.parts[name]]
    kept = f"; the allocator may keep {format_bytes(planned.kept)} beside it" if planned.kept >= WORTH_TELLING else ""
    facts = [
        ("before that", ", ".join(others) + kept),
        ("work", f"{planned.steps:,} steps, {times(planned.epochs)} through the rows; {planned.tokens:,} tokens an epoch, "
                 f"{planned.nodes:,} computed" + ("" if planned.layout == "padded" else f" (1 / {planned.tokens / max(1, planned.nodes):.2f})")),
        ("disk", ", ".join(f"{name} {format_bytes(size)}" for name, size in planned.disk.items())),
    ]
    if planned.host >= WORTH_TELLING:
        facts.insert(1, ("in the host", f"{format_bytes(planned.host)} of its memory, beside the GPU's"))
    if planned.seconds is not None:
        facts.insert(-1, ("time", f"{about(planned.seconds)} an epoch, {about(planned.seconds * planned.epochs)} in all; measuring and saving come on top"))
    screen.table("", facts)
    if planned.fits:
        screen.tell(f"\nIt fits: {format_bytes(planned.peak)} of {format_bytes(planned.available)}.", style="green")
    else:
        screen.tell(f"\nIt does not fit: {format_bytes(planned.peak)}, and {format_bytes(planned.available)} are free.", style="red")


def show_ways(subject: Subject, target: Target, screen: Screen, change: tuple[Change, Plan] | None, wanted: Plan) -> None:
    """What fits, best first; and the one change that makes the wanted run fit."""
    if change:
        screen.tell(f"One change makes it fit: {change[0]} ({change[0].cost}), {format_bytes(change[1].peak)}.", style="green")
    elif not wanted.fits:
        screen.tell("No single change of those that are tried makes it fit.", style="yellow")
    lines = []
    for way in ways(subject, target, screen.progress):
        planned = way.planned
        size = format_bytes(planned.peak) if planned else f"over {format_bytes(way.least)}"
        fitting = ("recomputed" if planned.checkpointing else "kept", f"{planned.budget:,}",
                   duration(planned.seconds) if planned.seconds is not None else "") if planned and way.fits else ("", "", "")
        lines.append((way.name, size, "yes" if way.fits else "no", *fitting))
    screen.tell()
    header = ["best first", "needs", "fits", "activations", "nodes a pass", "an epoch"]
    if not any(line[-1] for line in lines):  # of a GPU known by its size alone
        header, lines = header[:-1], [line[:-1] for line in lines]
    screen.grid(header, lines, title=f"{subject.settings.model.name} on {target.name}")


def about(seconds: float) -> str:
    """`about 42 s`, `about 2:51:00`, `less than 1 s`: no more exact than an estimate is."""
    if seconds < 1:
        return "less than 1 s"
    return f"about {duration(seconds if seconds < 600 else round(seconds / 60) * 60)}"
