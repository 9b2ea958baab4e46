"""The one training loop, on accelerate.

One step = `training.batch_size` rows = as many passes as their nodes need = one call of the optimizer. The divisor of the
loss is the weight of the whole step, over all its passes and all processes, so neither the split nor the number of
processes changes what is learned.

What a step does is a function of the settings and its number alone: the order of the rows and the noise of dropout come from
(seed, epoch) and (seed, step, process), never from a state that runs along. So a run that goes on from a checkpoint makes
the steps that it would have made.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from weitiao.config import Settings
from weitiao.data.labels import Labels
from weitiao.data.stored import TrainingRow
from weitiao.data.streamed import GivenUp, Streamed
from weitiao.data.templates import Template
from weitiao.errors import RowError, RunError, SourceError, TrainingStopped
from weitiao.model import heap
from weitiao.model.load import virtual_places
from weitiao.model.methods.method import Method
from weitiao.settings.training import TrainingSettings
from weitiao.train.ahead import Ahead
from weitiao.train.evaluation import (
    answer_and_score, label_nll, label_prompts, label_weights, make_passes, mean_loss, questions, score_labels,
)
from weitiao.train.folder import Checkpoint, RunFolder, write_text
from weitiao.train.loss import summed_losses
from weitiao.train.optimizer import SEARCHERS, kinds_of_state, make_optimizer, make_scheduler, step_scheduler, takes_fused
from weitiao.train.stepping import ByWeight, paged_again
from weitiao.trie import Example

ENCODER = "encoder.safetensors"  # of a checkpoint: what training needs to go on and use does not
FIRST_WINDOW, GROWTH = 4096, 4  # rows of a stream that are shuffled together at first; how many times as many the next time
MOST_SKIPPED = 20  # steps in a row; the scale of the loss begins at 65,536 and has then been halved to below 1


@dataclass(frozen=True)
class Schedule:
    """Which rows belong to which step. Steps count from 1; an epoch's last step takes what is left."""

    rows: int
    batch_size: int
    seed: int
    epochs: float
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        return self.max_steps or max(1, math.ceil(self.epochs * self.steps_per_epoch))

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def rows_of(self, step: int) -> np.ndarray:
        """Indices of the rows of a step: a slice of the epoch's permutation."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = _order(self.rows, self.seed, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def due(self, every: str | int, step: int) -> bool:
        """Is something that happens each epoch, each N steps, or at the end, due after this step?"""
        if step == self.steps or every == "end":
            return step == self.steps
        return step % (self.steps_per_epoch if every == "epoch" else every) == 0

    def looked_at(self, most: int) -> int:
        """How many of the first steps tell of all, at most so many: those of the first epoch."""
        return min(most, self.steps_per_epoch, self.steps)

    def rows_behind(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step tells of the rows, beside the run folder, which tells of all."""
        return {}


@dataclass(frozen=True)
class StreamedSchedule:
    """The same for rows that are still being encoded: how many there are shows when the first epoch ends.

    In the first epoch rows are shuffled in windows, each four times as long as the one before, and a step waits for the windows
    that it takes rows from. Later epochs are as of any rows.
    """

    rows: Streamed
    batch_size: int
    seed: int
    steps: int

    def _whole(self, step: int) -> Schedule | None:
        """Of all rows; None if they go on behind this step."""
        taken = step * self.batch_size
        there = self.rows.wait(taken + 1)
        return Schedule(there, self.batch_size, self.seed, 1.0, self.steps) if there <= taken else None

    def epoch(self, step: int) -> float | None:
        """None within the first."""
        whole = self._whole(step)
        return whole and whole.epoch(step)

    def rows_of(self, step: int) -> np.ndarray:
        """
        Raises:
            WeitiaoError: rows that this step or the question for the epoch's end would want cannot be read.
        """
        whole = self._whole(step)
        if whole and step > whole.steps_per_epoch:
            return whole.rows_of(step)
        place, stop = (step - 1) * self.batch_size, min(step * self.batch_size, whole.rows if whole else math.inf)
        found = []
        for number, start, end in self._windows(int(stop)):
            if place < end:
                order = _window_order(end - start, self.seed, number)
                found.append(start + order[max(place - start, 0) : int(stop) - start])
        return np.concatenate(found)

    def _windows(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(number, first row, one past the last) of those that hold the first `count` rows."""
        start, size = 0, FIRST_WINDOW
        for number in itertools.count():
            if start >= count:
                return
            end = self.rows.wait(start + size)
            yield number, start, end
            start, size = end, size * GROWTH

    def due(self, every: str | int, step: int) -> bool:
        if every == "epoch" and step != self.steps:
            whole = self._whole(step)
            return whole is not None and whole.due(every, step)
        return Schedule(1, self.batch_size, self.seed, 1.0, self.steps).due(every, step)

    def looked_at(self, most: int) -> int:
        """Those of the first window."""
        return max(1, min(most, FIRST_WINDOW // self.batch_size, self.steps))

    def rows_behind(self, step: int) -> dict[str, Any]:
        """By how many rows, and which, the steps so far were decided."""
        *_, (_, _, end) = self._windows(self.rows.wait(step * self.batch_size))
        return {"rows": end, "rows_digest": self.rows.digest(end)}


def schedule_for(rows: Sequence[TrainingRow] | Streamed, training: TrainingSettings) -> Schedule | StreamedSchedule:
    if isinstance(rows, Streamed):
        return StreamedSchedule(rows, training.batch_size, training.seed, training.steps)
    return Schedule(len(rows), training.batch_size, training.seed, training.epochs, training.steps)


@functools.lru_cache(maxsize=2)
def _window_order(rows: int, seed: int, window: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, window]).permutation(rows)


@functools.lru_cache(maxsize=2)  # of a million rows it takes longer to draw than their trie to build
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.setflags(write=False)
    return order


class Work(NamedTuple):
    """What a step does: the rows' places, their paths, what is learned of them in all, and the passes through the model."""

    indices: np.ndarray
    examples: list[Example]
    weight: float
    passes: list[dict[str, Any]]


class Listener(Protocol):
    """Who watches a run: the screen, or a test."""

    def on_step(self, line: dict[str, Any], seconds: float) -> None: ...
    def on_evaluation(self, line: dict[str, Any]) -> None: ...
    def on_message(self, text: str) -> None: ...


@dataclass(eq=False)
class Training:
    """A run in progress. `model` has its method attached and is wrapped by accelerate in `prepare`."""

    settings: Settings
    run: RunFolder | None
    model: torch.nn.Module
    method: Method
    base: str
    template: Template
    rows: Sequence[TrainingRow] | Streamed
    eval_rows: Sequence[TrainingRow]
    accelerator: Any
    layout: str
    budget: int
    listener: Listener
    stop_requested: Callable[[], bool] = lambda: False
    labels: Labels | None = None
    best: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    saved_step: int = -1
    skipped: int = 0  # steps in a row that overflowed float16

    def __post_init__(self) -> None:
        training = self.settings.training
        self.schedule = schedule_for(self.rows, training)
        self.plain_model = self.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.by_weight = ByWeight.of(self.settings)
        self.optimizer = make_optimizer(
            self.model, training, self.settings.learning_rate,
            rate_factor=lambda name: self.method.rate_factor(name, self.settings.method), decays=self.method.decays, by_weight=self.by_weight,
            fused=takes_fused(self.accelerator.device, loss_scaled=self.accelerator.scaler is not None),
        )
        self.scheduler = make_scheduler(self.optimizer, training, self.schedule.steps)
        # The model is where it belongs; quantised weights must not be moved.
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer, device_placement=[False, False])
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.stems = takes_stems(training.checkpointing, self.world)

    # --------------------------------------------------------------------------------------------------- the loop

    def fit(self, last: int | None = None) -> bool:
        """Steps until `last` (default: the schedule's end). False if it was asked to stop before."""
        self.model.train()
        last = last or self.schedule.steps
        with Ahead(self._work_of, last) as work_of, heap.kept(), what_is_there_stays():
            try:
                return self._steps(last, work_of)
            except GivenUp:
                self.save()
                return False
            except (RowError, SourceError) as error:  # of a stream, and met before the step that wants its rows
                if not isinstance(self.rows, Streamed) or not self.step:
                    raise
                self.save()
                raise type(error)(f"After step {self.step}: {error.found}", error.expected,
                                  f"{error.next_step}\nThen go on: weitiao train {self.run.path} --resume" if self.run else error.next_step) from error
            except BaseException:
                if isinstance(self.rows, Streamed):
                    self.rows.give_up()  # nobody waits any more: what is made ahead may be waiting for rows
                raise

    def _steps(self, last: int, work_of: Callable[[int], Work]) -> bool:
        for step in range(self.step + 1, last + 1):
            if self._should_stop() or not self._take(step, work_of):
                self.save()
                return False
            if self.schedule.due(self.settings.evaluation.every, step) and self.eval_rows:
                try:
                    self.evaluate()
                except Exception:
                    if self.world == 1:  # the others of several may be elsewhere, and saving wants them all
                        self.save()  # what cannot be measured is learned all the same
                    raise
            if step < self.schedule.steps:  # the last one must be saved: whoever began the run sees to it
                if self.schedule.due(self.settings.saving.every, step) or self.best.get("step") == step:
                    self.save()
        return True

    def _work_of(self, step: int) -> Work:
        indices = self.schedule.rows_of(step)
        examples = [e for i in indices for e in self.rows[i].examples]
        weight = float(sum(float(e.weights.sum(dtype=np.float64)) for e in examples))
        return Work(indices, examples, weight, self._passes(examples))

    def _take(self, step: int, work_of: Callable[[int], Work]) -> bool:
        """One optimizer step. False, with nothing changed, if a stop was asked for in its middle."""
        began = time.perf_counter()
        indices, examples, weight, passes = work_of(step)
        rate = self.scheduler.get_last_lr()[0]
        with self.by_weight.gathering(step) if self.by_weight else nullcontext():
            loss = self._gradients(step, passes, weight, self.stop_requested)
        if loss is None:
            return False
        if not math.isfinite(loss):
            self._stop_at_row(step, indices, loss)
        norm = self._clip()
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            late = self.by_weight is not None and self.by_weight.steps_at_once
            raise TrainingStopped(
                f"Step {step}: the gradient is {norm}, with a loss of {loss:.4g}.",
                f"Expected finite numbers; weights were stepped as it came, and are not saved. {self._standing()}" if late else
                "Expected finite numbers; the step was not taken, and no weight was changed by it.",
                "Lower training.learning_rate, or compute in training.precision=fp32.",
            )
        self._change(step, passes, weight, loss)
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0
        if not self.skipped:
            step_scheduler(self.scheduler, loss)
        self._forget_gradients()
        self.step = step
        line = {
            "step": step, "epoch": self._epoch(step), "loss": loss, "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm) else None, **({"skipped": True} if self.skipped else {}),
            "rows": len(indices), "tokens": sum(len(e) for e in examples),
            "nodes": sum(b["input_ids"].numel() for b in passes),
            "learned": sum(int((e.weights > 0).sum()) for e in examples),
        }
        self._record(line)
        self.listener.on_step(line, time.perf_counter() - began)
        if self.skipped:
            self.listener.on_message(skip_message(step, self.skipped, self.accelerator.scaler.get_scale()))
        return True

    def _gradients(
        self, step: int, passes: Sequence[dict[str, Any]], weight: float, stop_requested: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """The loss of a step, over all passes and processes, and its gradients where the weights keep them. The noise is the
        step's own, so a second time at the same weights gives the same. None, and no gradients, if a stop was asked for."""
        torch.manual_seed(_seed(self.settings.training.seed, step, self.rank))
        mine, idle = deal(passes, self.rank, self.world)
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with contextlib.closing(summed_losses(self.model, mine)) as losses:
            for i in range(len(mine)):
                if self.world == 1 and stop_requested():
                    self._forget_gradients()
                    return None
                last = i == len(mine) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    loss = next(losses)
                    if self.by_weight and self.by_weight.in_backward:
                        self.by_weight.due = last
                        if last and not math.isfinite(float(total + loss.detach())):  # before any weight is stepped by it
                            self._forget_gradients()
                            return float(total + loss.detach()) / weight
                    if last and idle:  # this process has a pass less than others: it takes part, with weight 0
                        loss = loss * 0.0
                    # DDP averages over processes; the sum is wanted
                    self.accelerator.backward(loss * (self.world / weight))
                total += loss.detach().double()
        return float(self.accelerator.reduce(total, reduction="sum")) / weight

    def _change(self, step: int, passes: Sequence[dict[str, Any]], weight: float, loss: float) -> None:
        """Step the weights, unless their gradients did so as they came. Under loss scaling: not where the gradient overflowed, and the
        scale is halved."""
        if self.by_weight is None:
            self.optimizer.step(self._again(step, passes, weight, loss) if self.settings.training.optimizer in SEARCHERS else None)
        elif not self.by_weight.in_backward:
            self.by_weight.step(step)
        elif not self.by_weight.steps_at_once:
            with self.by_weight.stepping(step):
                self._gradients(step, passes, weight)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _clip(self) -> float:
        """Scale long gradients down; how long they were, loss scaling taken off. A search is told true slopes."""
        if self.by_weight and self.by_weight.in_backward:
            return self.by_weight.norm  # they are gone
        limit = math.inf if self.settings.training.optimizer in SEARCHERS else self.settings.training.max_grad_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(self.parameters, limit))

    def _again(self, step: int, passes: Sequence[dict[str, Any]], weight: float, loss: float) -> Callable[[], torch.Tensor]:
        """What an optimizer that searches calls: the loss at the weights it has put in place, their gradients beside it.

        It first calls where the step begins, which is measured already: `loss`. Every process gets the same numbers, so all
        search alike. A stop that is asked for meanwhile waits for the step's end: the weights are on their way.
        """
        at_the_start = [loss]

        def measure() -> torch.Tensor:
            if at_the_start:
                return torch.tensor(at_the_start.pop(), dtype=torch.float64)
            self._forget_gradients()
            there = self._gradients(step, passes, weight)
            norm = self._clip()
            if not (math.isfinite(there) and math.isfinite(norm)):
                raise TrainingStopped(
                    f"Step {step}: {self.settings.training.optimizer} went from a loss of {loss:.4g} to weights where the loss is "
                    f"{there:.4g} and the gradient {norm:.4g}.",
                    f"Expected finite numbers; the step was broken off, and is not saved. {self._standing()}",
                    "Lower training.learning_rate, or choose another optimizer.",
                )
            return torch.tensor(there, dtype=torch.float64)

        return measure

    def _passes(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        return make_passes(examples, self.layout, self.budget, self.template.pad_id, self.accelerator.device,
                           virtual_places(self.plain_model), self.stems)

    def _epoch(self, step: int) -> float | None:
        epoch = self.schedule.epoch(step)
        return None if epoch is None else round(epoch, 6)

    def _should_stop(self) -> bool:
        """Has any process been asked to stop? All of them must agree on the step."""
        if self.world == 1:
            return self.stop_requested()
        asked = torch.tensor(float(self.stop_requested()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _stop_at_row(self, step: int, indices: Sequence[int], loss: float) -> None:
        """A loss that is not finite: find the row and stop. Every process looks, so that none waits for another."""
        for i in indices:
            with torch.no_grad(), self.accelerator.autocast():
                row_loss = sum(float(loss) for loss in summed_losses(self.plain_model, self._passes(self.rows[i].examples)))
            if not math.isfinite(row_loss):
                raise TrainingStopped(
                    f"Step {step}: the loss is {loss}; it comes from {self.rows[i].where}.",
                    "Expected a finite loss; the step was not taken.",
                    "Look at that row, lower training.learning_rate, or compute in training.precision=fp32.",
                )
        raise TrainingStopped(f"Step {step}: the loss is {loss}, though each of its rows alone has a finite one.",
                              "Expected a finite loss; the step was not taken.", "Compute in training.precision=fp32.")

    # ------------------------------------------------------------------------------------- measuring and recording

    def evaluate(self) -> dict[str, Any]:
        """Measure the rows set aside, and remember the best step."""
        settings = self.settings.evaluation
        line: dict[str, Any] = {"step": self.step, "epoch": self._epoch(self.step)}
        common = (self.layout, self.budget, self.template.pad_id, self.accelerator.device, self.accelerator.autocast,
                  self.rank, self.world, lambda t: self.accelerator.reduce(t, reduction="sum"))
        # Not through DDP: its forward would wait for processes that have no pass to measure.
        if self.labels:
            scores = score_labels(label_nll(self.plain_model, label_prompts(self.eval_rows), self.labels, *common),
                                  [q.reference for q in questions(self.eval_rows)], self.labels, label_weights(self.eval_rows))
            line |= {"eval_loss": scores.loss, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
        else:
            line["eval_loss"] = mean_loss(self.plain_model, self.eval_rows, *common)
        if settings.metric != "loss" and settings.metric not in line:
            # One process answers, so that all agree on which step is the best.
            (scores,) = broadcast_object_list([self._answer() if self.is_main else None])
            line |= scores
        value = -line["eval_loss"] if settings.metric == "loss" else line[settings.metric]
        if not self.best or value > self.best["value"]:
            self.best = {"step": self.step, "metric": settings.metric, "value": value}
        self._record(line)
        self.listener.on_evaluation(line)
        return line

    def _answer(self) -> dict[str, float]:
        """Scores of generated answers to the rows set aside."""
        settings = self.settings.evaluation
        with self.accelerator.autocast():
            _, scores = answer_and_score(self.plain_model, self.template, questions(self.eval_rows), settings, layout=self.layout)
        found = {k: v for k, v in scores.as_dict().items() if k in ("exact_match", "field_f1")}
        if settings.metric not in found:
            raise RunError(f"evaluation.metric = {settings.metric!r} cannot be measured on these rows.",
                           "Expected answers that are JSON objects.", "Choose loss or exact_match.")
        return found

    def _record(self, line: dict[str, Any]) -> None:
        if self.run is None or not self.is_main:
            return
        try:
            self.run.append_metrics(line)
        except OSError as error:
            raise TrainingStopped(
                f"Step {self.step}: metrics.jsonl cannot be written: {error}.",
                self._standing(), self._going_on(),
            ) from error

    # ---------------------------------------------------------------------------------------- saving and going on

    def save(self, must: bool = False) -> None:
        """A checkpoint of this step, once. A full disk is told and training goes on, unless it `must` be saved."""
        if self.run is None or self.saved_step == self.step or self.step == 0:
            return
        self._refuse_unsound_weights()
        (saved,) = broadcast_object_list([self._save(must) if self.is_main else None])
        if saved:
            self.saved_step = self.step

    def _save(self, must: bool) -> bool:
        spare = {self.best["step"]} if self.best else set()
        try:
            self.run.save_checkpoint(self.step, self._write, self.settings.saving.keep, spare)
        except OSError as error:
            message = f"Step {self.step} could not be saved: {error}."
            if must:
                raise TrainingStopped(
                    message, self._standing(), self._going_on(),
                ) from error
            self.listener.on_message(f"{message} Training goes on to the next save.")
            return False
        return True

    def _standing(self) -> str:
        saved = self.run.checkpoints() if self.run else []
        return f"The last good checkpoint stands: {saved[-1].path}." if saved else "No checkpoint could be saved so far."

    def _going_on(self) -> str:
        return f"Make room and go on: weitiao train {self.run.path} --resume." if self.run.is_worth_keeping else "Make room and start again: nothing is kept of this run."

    def _write(self, folder: Path) -> None:
        self.method.save(self.plain_model, folder / self.method.FOLDER, self.base)
        if state := self.method.encoder_state(self.plain_model):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / ENCODER)
        state = {"optimizer": self.optimizer.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            state |= {"scaler": self.accelerator.scaler.state_dict(), "skipped": self.skipped}
        torch.save(state, folder / "trainer.pt")
        write_text(folder / "progress.json", json.dumps({"step": self.step, "best": self.best} | self.schedule.rows_behind(self.step)))

    def _refuse_unsound_weights(self) -> None:
        for name, parameter in self.plain_model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise TrainingStopped(f"Step {self.step}: the weight {name} is no longer finite; it is not saved.",
                                      "Expected finite weights.", "Lower training.learning_rate.")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was saved."""
        self.method.load(self.plain_model, checkpoint.path / self.method.FOLDER)
        if (checkpoint.path / ENCODER).is_file():
            self.method.load_encoder_state(self.plain_model, load_file(checkpoint.path / ENCODER))
        with torch.serialization.safe_globals(kinds_of_state(self.settings.training.optimizer)):
            state = torch.load(checkpoint.path / "trainer.pt", map_location="cpu", weights_only=True)
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        if self.by_weight:
            self.by_weight.restored()
        paged_again(self.optimizer.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
            self.skipped = state["skipped"]
        progress = checkpoint.progress()
        if any(progress[name] != value for name, value in self.schedule.rows_behind(progress["step"]).items()):
            raise RunError(f"The first {progress['rows']:,} rows are not those that {checkpoint.path} was reached with.",
                           "Expected the same files, unchanged so far, and the same tokenizer.", "Bring them back, or begin a new run.")
        self.step, self.best = progress["step"], progress["best"]
        self.saved_step = self.step


def skip_message(step: int, in_a_row: int, scale: float) -> str:
    """What is told about a step whose gradients overflowed float16.

    Raises:
        TrainingStopped: too many in a row.
    """
    if in_a_row >= MOST_SKIPPED:
        raise TrainingStopped(
            f"Step {step}: the gradient overflowed float16 for the {in_a_row}th time in a row, the loss scaled by {scale:g}.",
            "Expected a finite gradient at some scale; no weight was changed by these steps.",
            "Lower training.learning_rate, or compute in training.precision=fp32 (bf16 where the hardware has it).",
        )
    return (f"Step {step}: the gradient overflowed float16, so no weight was changed and the learning rate did not move on; "
            f"from now on the loss is scaled by {scale:g}.")


def takes_stems(checkpointing: bool | None, processes: int) -> bool:
    """Are prefixes that passes of a step share computed once? A checkpointed layer is computed again when they are gone, and among
    several processes a step's passes are dealt out."""
    return not checkpointing and processes == 1


@contextlib.contextmanager
def what_is_there_stays() -> Iterator[None]:
    """The half million objects of the libraries are not looked through for garbage in the middle of a step: 0.3 s each time."""
    if gc.get_freeze_count():
        yield  # whoever froze it lets it go
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def deal(passes: Sequence[dict[str, Any]], rank: int, world: int) -> tuple[list[dict[str, Any]], bool]:
    """(the passes of one process, is the last one only there to keep step?) Every process runs equally many."""
    rounds = math.ceil(len(passes) / world)
    mine = list(passes[rank::world])
    idle = len(mine) < rounds
    return (mine + [passes[0]] if idle else mine), idle


def _seed(seed: int, step: int, rank: int) -> int:
    """One 63-bit seed out of three numbers, for the noise of a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)

