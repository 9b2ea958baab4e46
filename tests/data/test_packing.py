"""How a step is split changes how often a prefix is computed, and nothing that is learned."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from conftest import example

from weitiao.data.batch import padded_batch, trie_batch
from weitiao.data.packing import padded_passes, trie_passes


def edges(tries) -> Counter:
    """(the whole path up to the token, weight) of every learned edge."""
    found: Counter = Counter()
    for trie in tries:
        for i in trie.edges():
            path, node = [], int(i)
            while node >= 0:
                path.append(int(trie.token[node]))
                node = int(trie.parent[node])
            found[tuple(path[::-1])] += float(trie.weight[i])
    return found


@pytest.mark.parametrize("budget", [1, 21, 25, 30, 60, 10_000])
def test_a_budget_keeps_every_learned_edge(branching, budget):
    passes = trie_passes(branching, budget)
    assert edges(passes) == pytest.approx(edges(trie_passes(branching, 10_000)))
    longest = max(len(row) for row in branching)
    assert max(len(trie) for trie in passes) <= max(budget, longest)


def test_a_wide_budget_is_one_pass(branching):
    assert len(trie_passes(branching, 10_000)) == 1


def test_passes_are_of_like_size():
    rows = [example(np.arange(i * 10, i * 10 + 10), 1, i) for i in range(11)]
    assert [len(trie) for trie in trie_passes(rows, 100)] == [60, 50]  # not 100 and 10


def test_padded_passes_group_by_length_and_count_the_pads():
    rows = [example(np.arange(n), 1, n) for n in (3, 20, 4, 19, 3)]
    passes = padded_passes(rows, 40)
    assert [[len(r) for r in rows] for rows in passes] == [[3, 3, 4], [19, 20]]


def test_padded_batch_predicts_the_next_token_and_learns_no_pad():
    batch = padded_batch([example([5, 6, 7], 2), example([8, 9], 1, weight=0.5)], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["targets"].tolist() == [[6, 7, 0], [9, 0, 0]]
    assert batch["weights"].tolist() == [[0, 1, 0], [0.5, 0, 0]]


def test_trie_batch_of_the_worked_example():
    batch = trie_batch(trie_passes([example([1, 2, 3, 4], 3), example([1, 2, 3, 5, 6], 3)], 99)[0])
    plan = batch["trie"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4]]
    assert plan.predictors.tolist() == [2, 2, 4]
    assert plan.targets.tolist() == [4, 5, 6]
    assert plan.weights.tolist() == [1, 1, 1]
