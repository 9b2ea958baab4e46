"""Which label does an answer begin with?"""

from __future__ import annotations

import pytest

from weitiao.train.evaluation import label_of, score


@pytest.mark.parametrize(("answer", "label"), [
    ("pos", "pos"), (" positive!", "positive"), ("posh", "pos"), ("neg pos", "neg"), ("maybe", "maybe"), ("", ""),
])
def test_the_longest_label_that_an_answer_begins_with(answer, label):
    assert label_of(answer, {"pos", "neg", "positive"}) == label


def test_field_scores_only_where_every_reference_is_a_json_object():
    assert score(['{"a": 1}'], ['{"a": 1}']).as_dict()["field_f1"] == 1.0
    assert "field_f1" not in score(["x", '{"a": 1}'], ["x", '{"a": 1}']).as_dict()
