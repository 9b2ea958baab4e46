"""Rows that are measured and not learned: their loss, and the scores of the answers a model gives to them.

Rows with labels are not answered in words: the labels' probabilities behind the row are compared, and the likeliest one is
the answer. So every answer is a label, and no other word that the model finds likely stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from weitiao import metrics
from weitiao.data.batch import learned_batch, padded_batch, part_batch
from weitiao.data.labels import Labels, prompt_of
from weitiao.data.packing import NEVER, WORTH, Part, padded_passes, parts, room, trie_rows, with_stems
from weitiao.data.stored import TrainingRow
from weitiao.data.templates import Template
from weitiao.model import heap
from weitiao.model.generate import Sampling, answer_all
from weitiao.model.load import virtual_places
from weitiao.model.stems import Behind, Stem
from weitiao.settings.results import EvaluationSettings
from weitiao.train.loss import summed_losses, token_nll
from weitiao.trie import Example, build_with_paths

Progress = Callable[[Iterable, str], Iterable]
WITHOUT_GRADIENTS = 4  # times the nodes of a pass that trains: that keeps the activations of all layers, this one's of a layer


def no_progress(items: Iterable, what: str) -> Iterable:
    return items


def make_passes(
    examples: Sequence[Example], layout: str, budget: int, pad_id: int, device: Any, virtual_tokens: int = 0, stems: bool = False,
) -> list[dict[str, Any]]:
    """Batches of one step: tries, or padded rows. What a pass weighs is in the batch.

    stems: may passes go on behind earlier ones? Then they are all for one process, in this order (`loss.summed_losses`).
    """
    if layout == "trie":
        return list(trie_batches(parts(examples, room(budget, virtual_tokens), WORTH if stems else NEVER), device, virtual_tokens))
    return [padded_batch(rows, pad_id, device) for rows in padded_passes(examples, budget, virtual_tokens)]


def trie_batches(some: Iterable[Part], device: Any, virtual_tokens: int = 0) -> Iterator[dict[str, Any]]:
    """Parts of rows as batches, each with the stems that it goes on behind."""
    stems: dict[Part, Stem] = {}
    for part, above in with_stems(some):
        stems = {stem: stems[stem] for stem in above}
        behind = stems[above[-1]] if above else None
        batch = part_batch(part, device, virtual_tokens)
        if part.end is not None:
            stems[part] = Stem(behind, part.end, part.again)
        if behind or part in stems:
            batch["trie"] = replace(batch["trie"], memory=Behind(behind, stems.get(part)))
        yield batch


def mean_loss(
    model: torch.nn.Module, rows: Sequence[TrainingRow], layout: str, budget: int, pad_id: int, device: Any,
    autocast: Callable[[], Any], rank: int = 0, world: int = 1, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    progress: Progress = no_progress,
) -> float:
    """sum(weight * nll) / sum(weight) over all rows, however they are batched; each process takes every world-th pass."""
    examples = [e for row in rows for e in row.examples]
    places = virtual_places(model)
    if layout == "trie":
        passes: Sequence[Any] = parts(examples, WITHOUT_GRADIENTS * room(budget, places), WORTH if world == 1 else NEVER)
        made = trie_batches(progress(passes[rank::world], "Measuring"), device, places)
    else:
        passes = padded_passes(examples, budget, places)
        made = (padded_batch(rows, pad_id, device) for rows in progress(passes[rank::world], "Measuring"))
    totals = torch.zeros(2, dtype=torch.float64, device=device)

    def weighed() -> Iterator[dict[str, Any]]:
        for batch in made:
            totals[1] += (batch["trie"].weights if layout == "trie" else batch["weights"]).double().sum()
            yield batch

    with measuring(model), autocast():
        for loss in summed_losses(model, weighed()):
            totals[0] += loss.double()
    loss, weight = reduce(totals).tolist()
    return loss / weight


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and the mode it was in afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), heap.kept():
            yield
    finally:
        model.train(training)


def label_nll(
    model: torch.nn.Module, prompts: Sequence[np.ndarray], labels: Labels, layout: str, budget: int, pad_id: int, device: Any,
    autocast: Callable[[], Any], rank: int = 0, world: int = 1, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    progress: Progress = no_progress,
) -> np.ndarray:
    """-log p(label | prompt) in nats, float64 [prompts, labels]; on tries a prompt is computed once for all its labels.

    Args:
        prompts: int32 [T] each. Each process takes every world-th pass; `reduce` sums over processes.
    """
    paths = [path for i, prompt in enumerate(prompts) for path in labels.paths(prompt, i * len(labels))]
    places = virtual_places(model)
    passes = trie_rows(paths, WITHOUT_GRADIENTS * room(budget, places)) if layout == "trie" else padded_passes(paths, budget, places)
    found = torch.zeros(len(paths), dtype=torch.float64, device=device)
    with measuring(model), autocast():
        for rows in progress(passes[rank::world], "Comparing labels"):
            found[[row.row for row in rows]] = _nll_by_trie(model, rows, device) if layout == "trie" else _nll_by_rows(model, rows, pad_id, device)
    return reduce(found).cpu().numpy().reshape(len(prompts), len(labels))


def _nll_by_trie(model: torch.nn.Module, rows: Sequence[Example], device: Any) -> torch.Tensor:
    """float64 [rows]"""
    trie, paths = build_with_paths(rows)
    by_node = torch.zeros(len(trie), dtype=torch.float64, device=device)
    by_node[torch.from_numpy(trie.edges())] = model(**learned_batch(trie, device), per_edge=True).double()
    return torch.stack([by_node[torch.from_numpy(path[row.weights > 0])].sum() for row, path in zip(rows, paths, strict=True)])


def _nll_by_rows(model: torch.nn.Module, rows: Sequence[Example], pad_id: int, device: Any) -> torch.Tensor:
    """float64 [rows]; the second, independent path."""
    batch = padded_batch(rows, pad_id, device)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return token_nll(logits, batch["targets"], batch["weights"]).double().sum(dim=1)


@dataclass(frozen=True)
class Question:
    """The last turn of a row, to be answered: its messages, its place, and the answer it should get."""

    where: str
    messages: list[dict[str, str]]
    tools: tuple[Any, ...]
    reference: str


def questions(rows: Sequence[TrainingRow]) -> list[Question]:
    found = []
    for row in rows:
        last = row.conversation.turns()[-1]
        found.append(Question(row.where, row.conversation.as_dicts(last), row.conversation.tools,
                              row.conversation.messages[last].content))
    return found


@dataclass(frozen=True)
class LabelScores:
    """loss in nats a learned token, accuracy, macro_f1: shares in [0, 1]; confusion[i][j]: rows of label i taken for label j."""

    rows: int
    loss: float
    accuracy: float
    macro_f1: float
    labels: tuple[str, ...]
    confusion: list[list[int]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"labels": list(self.labels)}


def classify(nll: np.ndarray, labels: Labels) -> tuple[list[str], np.ndarray]:
    """(the likeliest label of each prompt, its share of the labels' probability [prompts]) from `label_nll`."""
    likely = np.exp(nll.min(axis=1, keepdims=True) - nll)
    return [labels.words[k] for k in nll.argmin(axis=1)], likely.max(axis=1) / likely.sum(axis=1)


def score_labels(nll: np.ndarray, references: Sequence[str], labels: Labels, weights: np.ndarray | None = None) -> LabelScores:
    """What `label_nll` found against the rows' own labels; loss as `mean_loss` has it, each row with its weight (default: 1)."""
    answers, _ = classify(nll, labels)
    right = [labels.words.index(word) for word in references]
    weights = np.ones(len(right)) if weights is None else weights
    return LabelScores(
        rows=len(answers),
        loss=float((weights * nll[np.arange(len(right)), right]).sum() / (weights * [len(labels.ids[k]) for k in right]).sum()),
        accuracy=metrics.accuracy(answers, references),
        macro_f1=metrics.macro_f1(answers, references, labels.words),
        labels=labels.words,
        confusion=[row[:-1] for row in metrics.confusion(answers, references, labels.words)],  # none is neither
    )


def label_prompts(rows: Sequence[TrainingRow]) -> list[np.ndarray]:
    return [prompt_of(row.examples[0]) for row in rows]


def label_weights(rows: Sequence[TrainingRow]) -> np.ndarray:
    """float64 [rows]: how much each row's label counts."""
    return np.array([row.examples[0].weights.max() for row in rows], np.float64)


def label_samples(rows: Sequence[TrainingRow], nll: np.ndarray, labels: Labels) -> list[dict[str, Any]]:
    """{where, prompt, reference, answer, probability} a row."""
    return [
        {"where": q.where, "prompt": q.messages[-1]["content"], "reference": q.reference, "answer": answer, "probability": round(float(p), 6)}
        for q, answer, p in zip(questions(rows), *classify(nll, labels), strict=True)
    ]


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
    layout: str = "trie",
) -> tuple[list[dict[str, str]], Scores]:
    """Greedy answers to some questions, as samples ({where, prompt, reference, answer}), and what they score."""
    asked = list(asked[: settings.rows])
    prompts = [template.prompt_ids(q.messages, q.tools) for q in asked]
    limit = settings.max_new_tokens or longest_answer(template, asked)
    answers = answer_all(model, template, prompts, Sampling(limit), settings.batch_size, progress, layout)
    samples = [
        {"where": q.where, "prompt": q.messages[-1]["content"], "reference": q.reference, "answer": a}
        for q, a in zip(asked, answers, strict=True)
    ]
    return samples, score(answers, [q.reference for q in asked])


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    fields = metrics.field_scores(answers, references) if all(map(metrics.is_json_object, references)) else None
    return Scores(len(answers), metrics.exact_match(answers, references), fields)


def longest_answer(template: Template, asked: Sequence[Question]) -> int:
    """A half more than the longest reference, in tokens, the stop token counted."""
    return int(1.5 * max(len(template.tokenizer(q.reference, add_special_tokens=False).input_ids) + 1 for q in asked))
