"""Answers on a split -> metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weitiao import metrics
from weitiao.data.dataset import Dataset, skipped_summary
from weitiao.data.glance import glance
from weitiao.data.stored import TrainingRow
from weitiao.errors import RunError
from weitiao.screen import Screen, quiet_libraries
from weitiao.settings.data import Source
from weitiao.settings.results import EvaluationSettings
from weitiao.train import memory
from weitiao.train.evaluation import answer_and_score, label_prompts, label_samples, label_weights, mean_loss, questions, score_labels
from weitiao.train.folder import RunFolder, open_run, write_asked
from weitiao.use.trained import Trained, open_trained


def evaluate(
    path: str, data: str | None, rows: int | None, base: bool, max_new_tokens: int | None, batch_size: int | None, columns: Mapping[str, str] | None = None,
) -> None:
    """Measure a run on its own rows set aside, or on others; write samples.jsonl and scores.json into the run folder.

    columns: which are which in `data`, where they are not the run's.
    """
    refuse_no_rows(open_run(path)[0], data, columns)
    quiet_libraries()
    screen = Screen()
    trained = open_trained(path, screen)
    measured = rows_to_measure(trained, data, screen, columns)
    asked = EvaluationSettings(rows=rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    results = {}
    if base:
        with trained.method.untuned(trained.model):
            _, results["base"] = measure(trained, measured.rows, asked, screen)
    samples, results["tuned"] = measure(trained, measured.rows, asked, screen)
    show(results, len(measured), screen)  # first: the disk may be full
    write_asked(trained.run.path / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    rows_of = {"data": data or "the run's own", **({"columns": dict(columns)} if columns else {})}
    write_asked(trained.run.path / "scores.json", json.dumps({**rows_of, "weights": str(trained.weights), **results}, ensure_ascii=False, indent=2) + "\n")


def refuse_no_rows(run: RunFolder, data: str | None, columns: Mapping[str, str] | None) -> None:
    """Told before the model is loaded: the file named is not there, or the run has none of its own."""
    settings = run.settings().data
    if data:
        glance(Source(path=data), settings.with_columns(columns), read=bool(columns))
    elif not (settings.eval or settings.eval_share):
        raise RunError(f"{run.path} set no rows aside to measure on.", "Expected data.eval or data.eval_share in training.",
                       f"Name some: weitiao evaluate {run.path} --data rows.jsonl")


def rows_to_measure(trained: Trained, data: str | None, screen: Screen, columns: Mapping[str, str] | None = None) -> Dataset:
    """Rows of a file, else the run's data.eval, else the share it set aside."""
    settings = trained.settings
    if data:
        found = trained.read([Source(path=data)], screen.progress, columns=columns)
        if found.skipped:
            screen.tell(f"{len(found.skipped)} rows cannot be measured:\n{skipped_summary(found.skipped)}", style="yellow")
        return found
    if settings.data.eval:
        return unchanged(trained, trained.read(settings.data.eval, screen.progress))
    return unchanged(trained, trained.read(settings.data.train, screen.progress, own=True).split(settings.data.eval_share, settings.training.seed)[1])


def unchanged(trained: Trained, rows: Dataset) -> Dataset:
    """The run's own rows, if they are still those it set aside: others may have been trained on."""
    if rows.fingerprint() != trained.run.read_json("data.json")["eval_fingerprint"]:
        raise RunError(f"The rows that {trained.run.path} set aside are no longer the same.",
                       "Expected the files that it was trained with, unchanged.",
                       f"Bring them back, or name others: weitiao evaluate {trained.run.path} --data rows.jsonl")
    return rows


def measure(
    trained: Trained, rows: Sequence[TrainingRow], asked: EvaluationSettings, screen: Screen,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """(samples, {loss, perplexity, exact_match, field_f1, …}), or {loss, accuracy, macro_f1, confusion} of labels"""
    if trained.labels:
        rows = rows[: asked.rows]
        nll = trained.label_nll(label_prompts(rows), screen.progress)
        scores = score_labels(nll, [q.reference for q in questions(rows)], trained.labels, label_weights(rows))
        return label_samples(rows, nll, trained.labels), scores.as_dict()
    training = trained.settings.training
    loss = mean_loss(
        trained.model, rows, training.layout, training.nodes_per_pass or memory.LEAST_NODES,
        trained.template.pad_id, trained.device, trained.autocast, progress=screen.progress,
    )
    with trained.autocast():
        samples, scores = answer_and_score(trained.model, trained.template, questions(rows), asked, screen.progress, training.layout)
    return samples, {"loss": loss, "perplexity": metrics.perplexity(loss), **scores.as_dict()}


def show(results: dict[str, dict[str, Any]], rows: int, screen: Screen) -> None:
    names = list(results)
    lines = [[key, *(_cell(results[n].get(key)) for n in names)] for key in
             ("loss", "perplexity", "accuracy", "macro_f1", "exact_match", "field_f1", "field_precision", "field_recall", "json_parsed")
             if any(key in results[n] for n in names)]
    screen.tell()
    answered = results["tuned"]["rows"]
    screen.grid([f"{rows} rows" if answered == rows else f"{rows} rows, {answered} answered", *names], lines)
    if fields := results["tuned"].get("per_field"):
        screen.tell()
        others = [n for n in names if n != "tuned"]
        screen.grid(["field", "precision", "recall", "F1", *(f"F1, {n}" for n in others), "in the rows"],
                    [[field, *(_cell(found[part]) for part in ("precision", "recall", "f1")),
                      *(_cell(results[n].get("per_field", {}).get(field, {}).get("f1")) for n in others), str(found["support"])]
                     for field, found in fields.items()])
    if labels := results["tuned"].get("labels"):
        screen.tell()
        counts = results["tuned"]["confusion"]
        screen.grid(["label ↓, answer →", *labels], [[word, *map(str, row)] for word, row in zip(labels, counts, strict=True)])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
