"""A trie is its rows: every promise of its drawing, against the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import example

from weitiao.trie import build


def test_worked_example():
    A, B, C, d, e, f = range(10, 16)
    trie = build([example([A, B, C, d], 3, 0), example([A, B, C, e, f], 3, 1)])
    assert trie.token.tolist() == [A, B, C, d, e, f]
    assert trie.parent.tolist() == [-1, 0, 1, 2, 2, 4]
    assert trie.depth.tolist() == [0, 1, 2, 3, 3, 4]
    assert trie.subtree_end.tolist() == [6, 6, 6, 4, 6, 6]
    assert [(int(trie.parent[i]), int(trie.token[i])) for i in trie.edges()] == [(2, d), (2, e), (4, f)]
    assert [tuple(s) for s in trie.segments()] == [(0, 3, 6), (3, 4, 4), (4, 6, 6)]


def test_a_row_that_occurs_twice_is_computed_once_with_twice_the_weight():
    row = [5, 6, 7]
    trie = build([example(row, 2, 0), example(row, 2, 1)])
    assert len(trie) == 3
    assert trie.weight.tolist() == [0, 0, 2]


def test_weights_of_rows_add_up_on_shared_edges():
    trie = build([example([1, 2, 3], 1, 0, weight=0.5), example([1, 2, 4], 2, 1, weight=3.0)])
    assert dict(zip(trie.token.tolist(), trie.weight.tolist(), strict=True)) == {1: 0, 2: 0.5, 3: 0.5, 4: 3.0}


def test_every_row_is_a_path_of_it(branching):
    trie = build(branching)
    children = {(int(p), int(t)): i for i, (p, t) in enumerate(zip(trie.parent, trie.token, strict=True))}
    assert len(children) == len(trie)  # no node has two children with the same token
    for row in branching:
        node = -1
        for place, token in enumerate(row.ids.tolist()):
            node = children[node, token]
            assert trie.depth[node] == place


def test_a_node_sees_its_ancestors_and_itself_and_nothing_else(branching):
    trie = build(branching)
    sees = trie.sees()
    for node in range(len(trie)):
        ancestors, here = set(), node
        while here >= 0:
            ancestors.add(here)
            here = int(trie.parent[here])
        assert set(np.flatnonzero(sees[node]).tolist()) == ancestors
        assert int(trie.depth[node]) == len(ancestors) - 1


def test_total_weight_is_that_of_the_rows(branching):
    assert build(branching).weight.sum() == pytest.approx(sum(row.weights.sum() for row in branching))


def test_segments_cover_the_trie_and_never_branch_inside(branching):
    trie = build(branching)
    segments = trie.segments()
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
    for start, end, below in segments:
        assert trie.parent[start + 1 : end].tolist() == list(range(start, end - 1))
        assert set(trie.subtree_end[start:end].tolist()) == {below}


def test_the_order_of_rows_does_not_matter(branching):
    forward, backward = build(branching), build(branching[::-1])
    for name in ("token", "parent", "depth", "subtree_end", "weight"):
        assert np.array_equal(getattr(forward, name), getattr(backward, name))


def test_what_is_needed_stands_above_something_learned(branching):
    A, B, C, d, e, f, g = range(10, 17)
    rows = [example([A, B, C, d], 3, 0), example([A, B, C, e, f], 3, 1), example([A, B, g, g, g], 2, 2)]
    rows[2].weights[3:] = 0  # what follows the last learned token
    assert (one := build(rows)).needed().tolist() == [t in (A, B, C, e) for t in one.token.tolist()]
    assert build([example([A, B], 2)]).needed().tolist() == [False, False]  # nothing is learned
    trie = build(branching)
    below = [[k for k in range(len(trie)) if k != i and trie.sees()[k, i]] for i in range(len(trie))]
    assert trie.needed().tolist() == [any(trie.weight[k] > 0 for k in under) for under in below]
    assert trie.needed()[trie.parent[trie.edges()]].all() and 0 < trie.needed().sum() < len(trie)


def test_some_of_the_nodes_see_of_each_other_what_they_saw(branching):
    trie = build(branching)
    kept = trie.needed()
    some = trie.of(kept)
    assert (some.sees() == trie.sees()[kept][:, kept]).all()
    assert (some.token == trie.token[kept]).all() and (some.depth == trie.depth[kept]).all() and (some.weight == trie.weight[kept]).all()
    assert [some.token[p] if p >= 0 else -1 for p in some.parent] == [trie.token[p] if p >= 0 else -1 for p in trie.parent[kept]]
    assert some.segments()[-1].end == len(some)


def test_random_rows_against_a_dictionary_of_prefixes():
    rng = np.random.default_rng(1)
    for _ in range(30):
        rows = [example(rng.integers(0, 3, rng.integers(1, 9)), 1, i) for i in range(rng.integers(1, 12))]
        trie = build(rows)
        prefixes = {tuple(row.ids[: t + 1].tolist()) for row in rows for t in range(len(row))}
        assert len(trie) == len(prefixes)


def test_the_first_token_cannot_be_learned():
    with pytest.raises(AssertionError, match="nothing before it"):
        example([1, 2], 0)
