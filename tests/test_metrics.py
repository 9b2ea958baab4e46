"""Metrics: every expected number below can be counted by eye."""

import math

import pytest

from weitiao.metrics import (
    FieldScore,
    accuracy,
    confusion,
    exact_match,
    field_scores,
    is_json_object,
    macro_f1,
    parse_json,
    perplexity,
)


def test_exact_match_is_a_share_and_ignores_outer_white_space():
    assert exact_match([" yes\n", "no", "No", "a b"], ["yes", "no", "no", "a  b"]) == 0.5


@pytest.mark.parametrize("score", [exact_match, field_scores, accuracy, macro_f1])
def test_answers_and_references_must_pair_and_be_there(score):
    with pytest.raises(ValueError, match="2 answers cannot be paired with 1"):
        score(["{}", "{}"], ["{}"])
    with pytest.raises(ValueError, match="no answers"):
        score([], [])


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        (' {"a": {"b": "中"}}\n', {"a": {"b": "中"}}),
        ('Here it is:\n```json\n{"a": 1}\n```', {"a": 1}),
        ('She said "look": {"a": "}{"} and {"b": 2}', {"a": "}{"}),
        (r'x {"a": "\"}"} y', {"a": '"}'}),
        (r'x {"a": "\\"} y', {"a": "\\"}),
        ('{curly} words, then {"a": 1}', {"a": 1}),
        ('[{"a": 1}]', {"a": 1}),
        ("} {}", {}),
        ('{"a": {"b": 1}', None),
        ("{'a': 1}", None),
        ('{"a": NaN}', None),
        ("[1, 2]", None),
        ("null", None),
        ("", None),
        ('{"a":' * 100_000, None),
        ("[" * 100_000, None),
    ],
)
def test_parse_json_finds_the_object_of_an_answer(text, found):
    assert parse_json(text) == found


def test_is_json_object_allows_nothing_around_it():
    assert is_json_object(' {"a": 1}\n')
    assert not is_json_object('Answer: {"a": 1}')
    assert not is_json_object("[1]")
    assert not is_json_object("3")


def test_field_scores_of_perfect_answers():
    scores = field_scores(['Sure! {"b": "y", "a": "x"}'], ['{"a": "x", "b": "y"}'])
    assert (scores.precision, scores.recall, scores.f1, scores.parsed) == (1, 1, 1, 1)
    assert scores.per_field == {"a": FieldScore(1, 1, 1, 1), "b": FieldScore(1, 1, 1, 1)}


def test_field_scores_count_pairs_over_all_rows():
    references = ['{"a": "x", "b": "y"}', '{"a": "x", "b": null}']
    answers = ['{"a": "x", "b": "no", "c": 1}', '{"a": "x"}']
    scores = field_scores(answers, references)
    # predicted a a b c, expected a a b b, right a a
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert list(scores.per_field) == ["a", "b", "c"]
    assert scores.per_field["a"] == (1, 1, 1, 2)
    assert scores.per_field["b"] == (0, 0, 0, 2)
    assert scores.per_field["c"] == (0, 0, 0, 0)


def test_an_answer_that_does_not_parse_misses_its_pairs():
    scores = field_scores(["I do not know", '{"a": 1}'], ['{"a": 1}', '{"a": 1}'])
    assert (scores.precision, scores.recall, scores.parsed) == (1.0, 0.5, 0.5)
    assert scores.f1 == pytest.approx(2 / 3)


def test_values_compare_as_stripped_strings():
    reference = '{"n": 2020, "t": true, "s": " x ", "f": 1.5, "z": null}'
    answer = '{"n": "2020", "t": "true", "s": "x", "f": "1.5", "z": "null"}'
    assert field_scores([answer], [reference]).f1 == 1.0


def test_lists_are_multisets_and_nested_keys_are_dotted():
    reference = '{"tags": ["p", "q", "q"], "who": {"name": {"first": "A"}}}'
    answer = '{"tags": ["q", "p", "p"], "who": {"name": {"first": "A"}}}'
    scores = field_scores([answer], [reference])
    assert scores.per_field["tags"] == (2 / 3, 2 / 3, 2 / 3, 3)
    assert scores.per_field["who.name.first"] == (1, 1, 1, 1)
    assert scores.f1 == 0.75


def test_objects_in_a_list_are_one_pair_each_whatever_their_key_order():
    scores = field_scores(['{"l": [{"b": 2, "a": 1}]}'], ['{"l": [{"a": 1, "b": 2}]}'])
    assert scores.per_field == {"l": (1, 1, 1, 1)}


def test_pairs_match_only_within_their_own_row():
    assert field_scores(['{"a": 1}', '{"a": 2}'], ['{"a": 2}', '{"a": 1}']).f1 == 0.0


def test_no_pairs_anywhere_is_a_perfect_score():
    scores = field_scores(["{}", "nothing"], ['{"a": []}', "{}"])
    assert (scores.precision, scores.recall, scores.f1, scores.parsed) == (1, 1, 1, 0.5)
    assert scores.per_field == {}


@pytest.mark.parametrize("reference", ["[1]", "words", 'so: {"a": 1}', ""])
def test_a_reference_that_is_no_object_is_named_by_its_index(reference):
    with pytest.raises(ValueError, match="reference 1 is not a JSON object"):
        field_scores(["{}", "{}"], ["{}", reference])


REFERENCES = ["a", "a", "a", "b", "b"]
ANSWERS = ["a", " a", "b", "b", "who knows"]


def test_accuracy():
    assert accuracy(ANSWERS, REFERENCES) == 0.6


def test_confusion_counts_stray_answers_in_the_last_column():
    assert confusion(ANSWERS, REFERENCES, ["a", "b"]) == [[2, 1, 0], [0, 1, 1]]


def test_confusion_refuses_a_reference_outside_the_labels_and_a_label_given_twice():
    with pytest.raises(ValueError, match="reference 3 is 'b'"):
        confusion(ANSWERS, REFERENCES, ["a"])
    with pytest.raises(ValueError, match="differ"):
        confusion(ANSWERS, REFERENCES, ["a", "b", "a "])


def test_macro_f1_averages_labels_and_a_stray_answer_is_no_label():
    # a: 2 right of 2 answered and 3 expected, F1 4/5; b: 1 right of 2 and 2, F1 1/2
    assert macro_f1(ANSWERS, REFERENCES) == pytest.approx((0.8 + 0.5) / 2)
