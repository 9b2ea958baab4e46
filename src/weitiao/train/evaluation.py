"""Rows that are measured and not learned: their loss, and the scores of the answers a model gives to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weitiao import metrics
from weitiao.config import EvaluationSettings
from weitiao.data.batch import padded_batch, trie_batch
from weitiao.data.dataset import TrainingRow
from weitiao.data.packing import padded_passes, trie_passes
from weitiao.data.templates import Template
from weitiao.model.generate import Sampling, answer_all
from weitiao.model.load import virtual_places
from weitiao.train.loss import summed_loss
from weitiao.trie import Example

Progress = Callable[[Iterable, str], Iterable]


def no_progress(items: Iterable, what: str) -> Iterable:
    return items


def make_passes(
    examples: Sequence[Example], layout: str, budget: int, pad_id: int, device: Any, virtual_tokens: int = 0,
) -> list[dict[str, Any]]:
    """Batches of one step: tries, or padded rows. What a pass weighs is in the batch."""
    if layout == "trie":
        return [trie_batch(trie, device) for trie in trie_passes(examples, budget - virtual_tokens)]
    return [padded_batch(rows, pad_id, device) for rows in padded_passes(examples, budget, virtual_tokens)]


def mean_loss(
    model: torch.nn.Module, rows: Sequence[TrainingRow], layout: str, budget: int, pad_id: int, device: Any,
    autocast: Callable[[], Any], rank: int = 0, world: int = 1, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    progress: Progress = no_progress,
) -> float:
    """sum(weight * nll) / sum(weight) over all rows, however they are batched; each process takes every world-th pass."""
    examples = [e for row in rows for e in row.examples]
    places = virtual_places(model)
    passes = trie_passes(examples, budget - places) if layout == "trie" else padded_passes(examples, budget, places)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            for one in progress(passes[rank::world], "Measuring"):
                batch = trie_batch(one, device) if layout == "trie" else padded_batch(one, pad_id, device)
                weights = batch["trie"].weights if layout == "trie" else batch["weights"]
                totals += torch.stack([summed_loss(model, batch).double(), weights.double().sum()])
    finally:
        model.train(training)
    loss, weight = reduce(totals).tolist()
    return loss / weight


@dataclass(frozen=True)
class Question:
    """The last turn of a row, to be answered: its messages, its place, and the answer it should get."""

    where: str
    messages: list[dict[str, str]]
    tools: tuple[Any, ...]
    reference: str
    bare_label: bool


def questions(rows: Sequence[TrainingRow]) -> list[Question]:
    found = []
    for row in rows:
        last = row.conversation.turns()[-1]
        found.append(Question(row.where, row.conversation.as_dicts(last), row.conversation.tools,
                              row.conversation.messages[last].content, row.conversation.bare_label))
    return found


@dataclass(frozen=True)
class Scores:
    """exact_match, and the JSON field scores where every reference is a JSON object. Shares in [0, 1]."""

    rows: int
    exact_match: float
    fields: metrics.FieldScores | None

    def as_dict(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"rows": self.rows, "exact_match": self.exact_match}
        if self.fields:
            scores |= {"field_precision": self.fields.precision, "field_recall": self.fields.recall,
                       "field_f1": self.fields.f1, "json_parsed": self.fields.parsed,
                       "per_field": {k: v._asdict() for k, v in self.fields.per_field.items()}}
        return scores


def answer_and_score(
    model, template: Template, asked: Sequence[Question], settings: EvaluationSettings, progress: Progress = no_progress,
) -> tuple[list[dict[str, str]], Scores]:
    """Greedy answers to some questions, as samples ({where, prompt, reference, answer}), and what they score."""
    labels = {q.reference for q in asked}
    asked = list(asked[: settings.rows])
    prompts = [template.prompt_ids(q.messages, q.tools) for q in asked]
    limit = settings.max_new_tokens or longest_answer(template, asked)
    answers = answer_all(model, template, prompts, Sampling(limit), settings.batch_size, progress)
    answers = [label_of(a, labels) if q.bare_label else a for a, q in zip(answers, asked, strict=True)]
    samples = [
        {"where": q.where, "prompt": q.messages[-1]["content"], "reference": q.reference, "answer": a}
        for q, a in zip(asked, answers, strict=True)
    ]
    return samples, score(answers, [q.reference for q in asked])


def label_of(answer: str, labels: Collection[str]) -> str:
    """The label that an answer begins with; no stop token is learned after a bare label, so more may follow it."""
    answer = answer.strip()
    return max((label for label in labels if answer.startswith(label)), key=len, default=answer)


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    fields = metrics.field_scores(answers, references) if all(map(metrics.is_json_object, references)) else None
    return Scores(len(answers), metrics.exact_match(answers, references), fields)


def longest_answer(template: Template, asked: Sequence[Question]) -> int:
    """A half more than the longest reference, in tokens, the stop token counted."""
    lengths = [len(template.tokenizer(q.reference, add_special_tokens=False).input_ids) + 1 for q in asked]
    if all(q.bare_label for q in asked):
        return max(lengths)
    return int(1.5 * max(lengths))
