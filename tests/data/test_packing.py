"""How a step is split changes how often a prefix is computed, and nothing that is learned."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from conftest import example

from weitiao.data.batch import padded_batch, trie_batch
from weitiao.data.packing import NEVER, Part, padded_passes, parts, trie_passes
from weitiao.trie import Example, build


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


def learned_by(found: list[Part]) -> tuple[Counter, int, int]:
    """(weight of every learned edge by its whole path, nodes computed, nodes kept at once), from the parts alone."""
    edges_of_all: Counter = Counter()
    above: list[Part] = []
    computed = at_once = 0
    for part in found:
        while above and above[-1].end > part.behind:
            above.pop()
        assert part.behind == (above[-1].end if above else 0), "what it goes on behind has to be there"
        assert all(tuple(row.ids[: part.behind]) == tuple(part.rows[0].ids[: part.behind]) for row in part.rows)
        nodes = part.computed()
        assert nodes.sum() == part.nodes > 0
        for i in part.trie.edges():
            if nodes[part.trie.parent[i]]:
                path, node = [], int(i)
                while node >= 0:
                    path.append(int(part.trie.token[node]))
                    node = int(part.trie.parent[node])
                edges_of_all[tuple(path[::-1])] += float(part.trie.weight[i])
        computed += part.nodes
        at_once = max(at_once, part.nodes + sum(stem.nodes for stem in above if not stem.again))
        above += [part] if part.end is not None else []
    return edges_of_all, computed, at_once


def many_rows(seed: int) -> list[Example]:
    """A tree of rows, some of them twice, some the beginning of others, learned here and there."""
    draw = np.random.default_rng(seed)
    paths = [draw.integers(0, 9, draw.integers(2, 12))]
    for _ in range(draw.integers(1, 14)):
        old = paths[draw.integers(len(paths))]
        paths.append(np.concatenate([old[: draw.integers(1, len(old) + 1)], draw.integers(0, 9, draw.integers(0, 15))]))
    rows = []
    for i, path in enumerate(path for path in paths if len(path) > 1):
        weights = (draw.random(len(path)) < draw.choice([0.1, 0.5, 1.0])).astype(np.float32)
        weights[0] = 0
        rows.append(Example(path.astype(np.int32), weights, i))
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_parts_predict_every_learned_edge_once_and_keep_to_their_budget(seed):
    rows = many_rows(seed)
    whole = build(rows)
    for budget in (1, 3, 8, 20, 60):
        for worth in (1, 4, 1000, NEVER):
            found, computed, at_once = learned_by(parts(rows, budget, worth))
            assert found == pytest.approx(edges([whole]))
            assert computed >= whole.computed
            assert at_once <= budget or worth == NEVER
            if worth == 1:
                assert computed == whole.computed


def test_a_prefix_of_all_rows_that_would_fill_a_pass_is_computed_again():
    shared = np.arange(600)
    rows = [example([*shared, *range(1000 + 300 * i, 1300 + 300 * i)], 601, i) for i in range(4)]
    assert [(part.behind, part.end, part.again, part.nodes) for part in parts(rows, 1024)] == [
        (0, 600, True, 600), (600, None, False, 598), (600, None, False, 598)]  # the last token of a row is a target alone
    assert [(part.behind, part.end, part.again) for part in parts(rows, 2048)] == [(0, None, False)]
    assert [(part.behind, part.end, part.again) for part in parts(rows, 1536)] == [(0, 600, False), (600, None, False), (600, None, False)]


def test_a_long_row_goes_through_in_pieces_of_like_size():
    row = example(range(2501), 2000)
    assert [(part.behind, part.end, part.again, part.nodes) for part in parts([row], 1000)] == [
        (0, 833, True, 833), (833, 1666, True, 833), (1666, None, False, 834)]
    assert len(parts([row], 1000, NEVER)) == 1
