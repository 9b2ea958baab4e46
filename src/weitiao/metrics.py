"""How good a set of answers is: answers and references enter, numbers leave.

    answers, references          exact_match        share in [0, 1]
    answers, references (JSON)   field_scores       precision, recall, F1 over (key, value) pairs
    answers, references (labels) accuracy, macro_f1, confusion
    mean loss in nats per token  perplexity

Everything here is pure. `answers[i]` is always judged against `references[i]`; sequences of
different lengths, or with nothing in them, raise ValueError.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# ---------------------------------------------------------------- text and loss


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share in [0, 1] of answers that equal their reference, both stripped of outer white space."""
    _check_pairing(answers, references)
    return _share(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))


def perplexity(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood (nats per token); inf where exp would overflow."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


# ---------------------------------------------------------------- JSON objects in text


def is_json_object(text: str) -> bool:
    """Whether the whole text, and nothing but it, is one JSON object."""
    return _load_object(text) is not None


def parse_json(text: str) -> dict[str, object] | None:
    """The JSON object an answer holds, or None.

    The whole text is tried first, then each outermost balanced {...} in turn, because models like
    to put words or a code fence around their answer. An object inside an unclosed one is not
    taken: `{"a": {"b": 1}` is an answer cut short, not the answer `{"b": 1}`.
    """
    whole = _load_object(text)
    if whole is not None:
        return whole
    spans = (_load_object(text[start:end]) for start, end in _balanced_spans(text))
    return next((found for found in spans if found is not None), None)


def _load_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # RecursionError: a model stuck on "[[[[…"
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")


def _balanced_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each outermost {...}; braces inside its strings do not count.

    `a {b {c}} {d}` gives (2, 9) and (10, 13).
    """
    depth, start, in_string, escaped = 0, 0, False, False
    for i, char in enumerate(text):
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = depth > 0  # a quotation mark in the prose around it opens nothing
        elif char == "{":
            start = i if depth == 0 else start
            depth += 1
        elif char == "}" and depth > 0:
            depth -= 1
            if depth == 0:
                yield start, i + 1


# ---------------------------------------------------------------- fields of JSON answers


class FieldScore(NamedTuple):
    """Scores in [0, 1] of one key; support is the number of its pairs in the references."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class FieldScores:
    """How well JSON answers reproduce the (key, value) pairs of their references.

    Attributes:
        precision: share of predicted pairs that are right, in [0, 1].
        recall: share of reference pairs that were predicted, in [0, 1].
        f1: harmonic mean of both, in [0, 1]; 1.0 where there are no pairs on either side.
        parsed: share of answers in which `parse_json` finds an object, in [0, 1].
        per_field: the same by key, the references' keys first, in order of appearance; a key
            that only answers use has support 0.
    """

    precision: float
    recall: float
    f1: float
    parsed: float
    per_field: dict[str, FieldScore]


def field_scores(answers: Sequence[str], references: Sequence[str]) -> FieldScores:
    """Micro-averaged scores over the multisets of (key, value) pairs of each row.

    Nested objects flatten to dotted keys, a list gives one pair per element, null is a value like
    any other, and values compare as stripped strings: `"2020"` equals `2020`. An answer without
    an object predicts no pairs, so all its reference pairs are missed.

    Raises:
        ValueError: a reference is not a JSON object; names its index, counted from 0.
    """
    _check_pairing(answers, references)
    hits: Counter[str] = Counter()  # key -> pairs; the three counts each score is made of
    expected: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    parsed = [parse_json(answer) for answer in answers]
    for i, (answer, reference) in enumerate(zip(parsed, references, strict=True)):
        right, given = _reference_pairs(reference, i), _pairs(answer or {})
        expected += _by_key(right)
        predicted += _by_key(given)
        hits += _by_key(right & given)
    keys = dict.fromkeys([*expected, *predicted])
    per_field = {key: _score(hits[key], predicted[key], expected[key]) for key in keys}
    overall = _score(hits.total(), predicted.total(), expected.total())
    return FieldScores(
        precision=overall.precision,
        recall=overall.recall,
        f1=overall.f1,
        parsed=_share(answer is not None for answer in parsed),
        per_field=per_field,
    )


def _reference_pairs(reference: str, index: int) -> Counter[tuple[str, str]]:
    value = _load_object(reference)
    if value is None:
        raise ValueError(f"reference {index} is not a JSON object: {reference[:80]!r}")
    return _pairs(value)


def _pairs(value: dict[str, object]) -> Counter[tuple[str, str]]:
    return Counter(_flatten(value))


def _flatten(value: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": [1, " x "]}}` gives ("a.b", "1") and ("a.b", "x")."""
    for key, inner in value.items():
        path = prefix + key
        if isinstance(inner, dict):
            yield from _flatten(inner, path + ".")
        elif isinstance(inner, list):
            yield from ((path, _as_text(element)) for element in inner)
        else:
            yield path, _as_text(inner)


def _as_text(value: object) -> str:
    # Objects and lists come here only as elements of a list; sorting makes key order not matter.
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _by_key(pairs: Counter[tuple[str, str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (key, _), count in pairs.items():
        counts[key] += count
    return counts


# ---------------------------------------------------------------- classification


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share in [0, 1] of answers that are the right label, compared after strip."""
    return exact_match(answers, references)


def macro_f1(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Mean over labels of each label's F1, in [0, 1].

    `labels` defaults to those the references hold. An answer that is none of them is a miss of
    its reference's label but no label of its own (scikit-learn would average it in): a generated
    answer can be any text, and each stray one would otherwise count as one more class with F1 0.
    """
    if labels is None:
        labels = sorted({r.strip() for r in references})
    table = confusion(answers, references, labels)
    f1s = []
    for i in range(len(labels)):
        predicted, expected = sum(row[i] for row in table), sum(table[i])
        f1s.append(_score(table[i][i], predicted, expected).f1)
    return sum(f1s) / len(f1s)


def confusion(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Counts by (reference, answer), compared after strip.

                     answered a   answered b   neither
        reference a      3            1           0
        reference b      0            2           1

    Returns: [len(labels)] rows of [len(labels) + 1] counts; the last column holds answers that
        are none of the labels.

    Raises:
        ValueError: a label occurs twice, or a reference is none of the labels.
    """
    _check_pairing(answers, references)
    place = {label.strip(): i for i, label in enumerate(labels)}
    if len(place) != len(labels):
        raise ValueError(f"labels must differ from each other, got {list(labels)}")
    table = [[0] * (len(labels) + 1) for _ in labels]
    for i, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if reference.strip() not in place:
            raise ValueError(f"reference {i} is {reference!r}, expected one of {list(labels)}")
        table[place[reference.strip()]][place.get(answer.strip(), len(labels))] += 1
    return table


# ---------------------------------------------------------------- counting


def _score(hits: int, predicted: int, expected: int) -> FieldScore:
    if predicted + expected == 0:
        return FieldScore(1.0, 1.0, 1.0, 0)  # nothing to say, and nothing was said
    return FieldScore(
        precision=hits / predicted if predicted else 0.0,
        recall=hits / expected if expected else 0.0,
        f1=2 * hits / (predicted + expected),
        support=expected,
    )


def _share(truths: Iterator[bool]) -> float:
    counts = Counter(truths)
    return counts[True] / counts.total()


def _check_pairing(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers cannot be paired with {len(references)} references"
        )
    if not answers:
        raise ValueError("no answers to score")
