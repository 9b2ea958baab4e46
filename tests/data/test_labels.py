"""A label is one token that no other label begins with; a long row loses its front, and nothing of its label."""

import json

import numpy as np
import pytest

from weitiao.data.dataset import load
from weitiao.data.labels import Labels, prompt_of
from weitiao.data.templates import load_template
from weitiao.data.tokens import cut_front
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings


@pytest.fixture
def read(tmp_path, tokenizer):
    """(text, label) pairs -> the data set that a run makes of them."""
    def read(*pairs, template="label", task="auto", model_limit=1 << 20, known=None, **settings):
        rows = [{"text": text, "label": label} for text, label in pairs]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        made = DataSettings(train=str(tmp_path / "rows.jsonl"), **settings)
        return load(made.train, made, load_template(template, tokenizer), model_limit, 300, 0, task=task, labels=known)

    return read


def refused(read, *pairs, **settings) -> str:
    with pytest.raises(RowError) as caught:
        read(*pairs, **settings)
    return str(caught.value)


def shown(tokenizer, row) -> tuple[str, str]:
    example = row.examples[0]
    return tokenizer.decode(prompt_of(example)), tokenizer.decode(example.ids[example.weights > 0])


# -- the layout --------------------------------------------------------------------------------------------------------


def test_the_label_stands_behind_the_end_token_and_is_learned_alone(read, tokenizer):
    data = read(("12", "8"), ("3", "7"))
    assert [shown(tokenizer, row) for row in data.rows] == [("12<|im_end|>", "8"), ("3<|im_end|>", "7")]
    assert data.labels.words == ("7", "8") and data.learned_tokens == 2


def test_a_long_text_loses_its_front_and_keeps_end_token_and_label(read, tokenizer):
    data = read(("123456789", "8"), ("3", "7"), max_tokens=8)
    assert shown(tokenizer, data.rows[0]) == ("456789<|im_end|>", "8")
    assert (data.cut, data.max_tokens, len(data.rows[0].examples[0])) == (1, 8, 8)


def test_what_stands_before_the_text_is_kept(read, tokenizer):
    data = read(("123456789", "8"), ("3", "7"), template="chatml", system="0")
    whole = data.rows[0].examples[0].ids
    short = read(("123456789", "8"), ("3", "7"), template="chatml", system="0", max_tokens=len(whole) - 3)
    assert shown(tokenizer, data.rows[0])[0].replace("123456789", "456789") == shown(tokenizer, short.rows[0])[0]
    assert short.rows[1].examples[0].ids.tolist() == data.rows[1].examples[0].ids.tolist()


def test_no_prompt_tells_its_label_by_its_length(read):
    """The longest label has three tokens with its stop: every prompt leaves room for it."""
    data = read(("123456789", "8"), ("123456789", "77"), label_scoring="sequence", max_tokens=10)
    assert [len(prompt_of(row.examples[0])) for row in data.rows] == [7, 7]


@pytest.mark.parametrize("most, head, left", [(3, 1, [0, 3, 4]), (5, 1, [0, 1, 2, 3, 4]), (2, 0, [3, 4]), (2, 2, [0, 1, 2, 3, 4])])
def test_the_front_is_cut_behind_the_head(most, head, left):
    assert cut_front(np.arange(5), most, head).tolist() == left


# -- labels that cannot be told apart ----------------------------------------------------------------------------------

CURE = ("Expected labels that are one token each, no two the same.\n"
        "Choose other words, such as data.labels='{0: neg, 1: pos}', score whole words (data.label_scoring=sequence), "
        "or let them be answered as text (task=answer).")


def test_labels_that_begin_alike_are_refused(read, tokenizer):
    message = refused(read, ("1", "81"), ("2", "82"))
    first = tokenizer("8", add_special_tokens=False).input_ids[0]
    assert message.startswith(f"The labels '81' and '82' both begin with the token '8' ({first}): told by one token, they are one label.\n")
    assert message.endswith(CURE)


def test_labels_of_several_tokens_are_refused(read):
    assert refused(read, ("1", "8"), ("2", "79")).startswith("The label '79' has 2 tokens: '7' (")


def test_whole_words_are_learned_with_their_end_when_asked_for(read, tokenizer):
    data = read(("1", "8"), ("2", "89"), label_scoring="sequence")
    assert [shown(tokenizer, row)[1] for row in data.rows] == ["8<|im_end|>", "89<|im_end|>"]


def test_a_label_without_a_token_is_refused(read):
    assert refused(read, ("1", "1"), ("2", "1"), labels={"0": "", "1": "8"}) == (
        "The label '' has no token.\nExpected a word for each label (data.labels).")


def test_a_chat_among_the_rows_is_skipped_and_names_no_label(tmp_path, tokenizer):
    chat = {"messages": [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 2, "1234")]}
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": c}]} for c in "78" * 15]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, chat]))
    settings = DataSettings(train=str(tmp_path / "rows.jsonl"))
    data = load(settings.train, settings, load_template("plain", tokenizer), 1 << 20, 300, 0, task="classify")
    assert data.labels.words == ("7", "8") and len(data) == 30
    assert [s.reason for s in data.skipped] == ["2 answers in one row, where one label is to be learned"]


def test_one_label_is_no_classification(read):
    assert refused(read, ("1", "8"), ("2", "8")) == (
        "All rows are answered with '8'.\nExpected two labels or more to classify.\n"
        "Look at the column of labels, name them all (data.labels), or learn the answers as text (task=answer)."
    )


def test_a_label_that_the_run_does_not_know_is_named(read):
    known = read(("1", "8"), ("2", "7")).labels
    data = read(*[("1", "8")] * 30, ("2", "9"), known=known)
    assert [(s.where.rpartition("/")[2], s.reason) for s in data.skipped] == [("rows.jsonl:31", "its label is none of 7, 8: '9'")]


def test_rows_of_any_format_are_classified_when_asked_for(tmp_path, tokenizer):
    rows = [{"prompt": "1", "completion": "8"}, {"prompt": "2", "completion": "7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(train=str(tmp_path / "rows.jsonl"))
    template = load_template("label", tokenizer)
    asked = load(settings.train, settings, template, 1 << 20, 300, 0, task="classify")
    assert [shown(tokenizer, row) for row in asked.rows] == [("1<|im_end|>", "8"), ("2<|im_end|>", "7")]
    assert load(settings.train, settings, template, 1 << 20, 300, 0).labels is None


def test_labels_are_stored_and_read_back(read):
    labels = read(("1", "8"), ("2", "7")).labels
    again = Labels.from_dict(json.loads(json.dumps(labels.as_dict())))
    assert again.words == labels.words and [a.tolist() for a in again.ids] == [b.tolist() for b in labels.ids]
    assert Labels.from_dict(None) is None


def test_of_each_label_some_rows_are_learned_and_some_measured(read, tokenizer):
    data = read(*((str(n), "7") for n in range(30)), *((str(n), "8") for n in range(10)), ("1", "9"))
    for seed in range(5):
        learn, measure = data.split(0.1, seed)
        told = [[shown(tokenizer, row)[1] for row in part.rows] for part in (learn, measure)]
        assert [[labels.count(label) for label in "789"] for labels in told] == [[27, 9, 1], [3, 1, 0]]
        again = data.split(0.1, seed)[1]
        assert again.fingerprint() == measure.fingerprint() and again.labels == data.labels
    assert data.split(0.1, 0)[1].fingerprint() != data.split(0.1, 1)[1].fingerprint()
    assert [len(part) for part in read(("1", "7"), ("2", "8")).split(0.5, 0)] == [1, 1]
