"""Rows as flat arrays are the rows that they are made of; what is told of all of them is what one by one comes to."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from weitiao.data.conversation import Conversation, Message
from weitiao.data.stored import COLUMNS, StoredRows, conversation_of, said_by

TALKS = [
    Conversation((Message("user", "猫"), Message("assistant", "b", 1.0), Message("user", "c"), Message("assistant", "d", 0.5))),
    Conversation((Message("system", "s"), Message("user", ""), Message("assistant", "neg", 1.0)), is_label=True),
    Conversation((Message("user", "a\n\"b\""), Message("assistant", "c", 2.0)), tools=({"name": "f", "of": [1, None, 2.5]},)),
]


@pytest.fixture
def rows() -> StoredRows:
    """Of the drawing in stored.py, with a row of two paths and one that was drawn twice."""
    said = [said_by(TALKS[i]) for i in (0, 1, 2, 1)]
    ends = np.cumsum([len(text) for text in said])
    columns = {
        "ids": [3, 7, 7, 5, 2, 3, 9, 4, 2, 3, 7, 7, 6, 2, 8, 8, 3, 9], "begin": [0, 5, 9, 14, 5], "end": [5, 9, 14, 16, 9],
        "start": [3, 2, 3, 1, 2], "weight": [1, 1, 0.5, 2, 1], "first": [0, 2, 3, 4, 5], "file": [0, 1, 0, 1], "line": [1, 7, 9, 7],
        "turns": [1, 1, 1, 1], "said": np.frombuffer(b"".join(said), np.uint8), "said_begin": ends - [len(text) for text in said], "said_end": ends,
    }
    return StoredRows.all({name: np.array(columns[name], dtype) for name, dtype in COLUMNS.items()}, ["a.jsonl", "b.json"])


def test_a_row_is_its_place_its_talk_and_its_paths(rows):
    assert [row.where for row in rows] == ["a.jsonl:1", "b.json, row 7", "a.jsonl:9", "b.json, row 7"]
    assert [e.ids.tolist() for e in rows[0].examples] == [[3, 7, 7, 5, 2], [3, 9, 4, 2]]
    assert [e.weights.tolist() for e in rows[0].examples] == [[0, 0, 0, 1, 1], [0, 0, 1, 1]]
    assert rows[2].examples[0].weights.tolist() == [0, 2] and rows[-1].examples[0].row == 3
    assert rows[0].conversation == TALKS[0].first_turns(1) and rows[2].conversation == TALKS[2]
    with pytest.raises(IndexError):
        rows[4]


def test_what_was_said_comes_back_as_it_was():
    assert [conversation_of(said_by(talk)) for talk in TALKS] == TALKS


@pytest.mark.parametrize("which", [slice(None), slice(1, 3), np.array([3, 0]), np.array([False, True, False, True]), slice(0, 0)])
def test_all_together_are_what_they_are_one_by_one(rows, which):
    some = rows.of(which)
    examples = [example for row in some for example in row.examples]
    told = hashlib.sha256(b"".join(e.ids.tobytes() + e.weights.tobytes() for e in examples))
    assert some.digest() == told.hexdigest()
    assert some.tokens == sum(map(len, examples)) and some.learned_tokens == sum(int((e.weights > 0).sum()) for e in examples)
    assert len(some.paths) == len(some) and len(some.examples) == len(examples)
    assert [[e.ids.tolist() for e in paths] for paths in some.paths] == [[e.ids.tolist() for e in row.examples] for row in some]
    assert [(e.ids.tolist(), e.row) for e in some.examples] == [(e.ids.tolist(), e.row) for e in examples]
    assert some.paths.tokens.tolist() == [sum(map(len, row.examples)) for row in some]
    assert not examples or some.paths.longest == max(map(len, examples))


def test_a_row_that_was_drawn_twice_has_one_place(rows):
    assert rows.places().tolist() == [0, 1, 2, 1]
    assert rows.of(np.array([3, 2, 1])).places().tolist() == [0, 1, 0]


def test_an_id_outside_is_found_with_its_row_if_a_path_has_it(rows):
    assert rows.first_outside(10) is None and rows.first_outside(9) == ("a.jsonl:1", 9)
    assert rows.of(slice(2, 3)).first_outside(8) == ("a.jsonl:9", 8) and rows.of(slice(2, 3)).first_outside(9) is None
