"""Labels are compared alone, on tries as on plain rows; field scores where all references are JSON objects."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import tiny_model

from weitiao.data.labels import Labels
from weitiao.train.evaluation import classify, label_nll, score, score_labels
from weitiao.train.loss import learn_on_tries

TOKENS = Labels(("neg", "neutral", "pos"), tuple(np.asarray([i], np.int32) for i in (7, 8, 9)))
WORDS = Labels(("不", "不好", "好"), tuple(np.asarray(ids, np.int32) for ids in ([7, 2], [7, 8, 2], [9, 2])))

WORDS_OF_TWO = Labels(TOKENS.words, tuple(np.asarray([i, 2], np.int32) for i in (7, 8, 9)))


@pytest.fixture(scope="module")
def model():
    made = tiny_model().double()
    learn_on_tries(made)
    return made.train()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Some share a beginning, two are the same, lengths differ."""
    draw = np.random.default_rng(0)
    shared = draw.integers(10, 60, 5)
    made = [np.concatenate([shared, draw.integers(10, 60, n)]).astype(np.int32) for n in (1, 4, 4, 9)]
    return [*made, made[1], draw.integers(10, 60, 3).astype(np.int32)]


def by_hand(model, prompts, labels) -> np.ndarray:
    """Each prompt with each label alone, from the logits."""
    found = np.zeros((len(prompts), len(labels)))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for k, ids in enumerate(labels.ids):
                row = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
                nll = -model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
                found[i, k] = sum(float(nll[len(prompt) + t - 1, token]) for t, token in enumerate(ids.tolist()))
    return found


@pytest.mark.parametrize("labels", [TOKENS, WORDS], ids=["token", "sequence"])
@pytest.mark.parametrize("layout", ["trie", "padded"])
@pytest.mark.parametrize("budget", [16, 4096])
def test_a_labels_nll_is_that_of_its_row_alone(model, prompts, labels, layout, budget):
    nll = label_nll(model, prompts, labels, layout, budget, 0, "cpu", nullcontext)
    assert nll == pytest.approx(by_hand(model, prompts, labels), abs=1e-6)  # norms compute in fp32
    assert model.training


def test_several_processes_find_what_one_does(model, prompts):
    parts = [label_nll(model, prompts, TOKENS, "trie", 4, 0, "cpu", nullcontext, rank, 2) for rank in (0, 1)]
    assert all((part == 0).any() for part in parts)
    assert sum(parts) == pytest.approx(label_nll(model, prompts, TOKENS, "trie", 4, 0, "cpu", nullcontext), abs=1e-9)


def test_the_likeliest_label_answers_with_its_share_of_the_labels_alone():
    nll = -np.log([[0.1, 0.3, 0.0001], [0.02, 0.01, 0.07]])
    answers, shares = classify(nll, TOKENS)
    assert answers == ["neutral", "pos"]
    assert shares == pytest.approx([0.3 / 0.4001, 0.7])


def test_scores_of_five_rows_counted_by_hand():
    nll = np.array([[0.1, 2, 2], [2, 0.2, 2], [0.3, 2, 2], [2, 2, 0.4], [2, 2, 0.5]])  # neg, neutral, neg, pos, pos
    scores = score_labels(nll, ["neg", "neutral", "pos", "pos", "neutral"], TOKENS)
    assert scores.confusion == [[1, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert scores.loss == pytest.approx((0.1 + 0.2 + 2 + 0.4 + 2) / 5)
    assert score_labels(nll, ["neg"] * 5, WORDS_OF_TWO).loss == pytest.approx((0.1 + 2 + 0.3 + 2 + 2) / 10)  # a learned token


def test_field_scores_only_where_every_reference_is_a_json_object():
    assert score(['{"a": 1}'], ['{"a": 1}']).as_dict()["field_f1"] == 1.0
    assert "field_f1" not in score(["x", '{"a": 1}'], ["x", '{"a": 1}']).as_dict()
