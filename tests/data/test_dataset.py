"""Rows that can teach are kept, cut and counted; the others are named with their reason, and too many of them stop the run.

Digits are no merges of the test tokenizer, and the template `plain` writes nothing of its own: a digit is a token, and a
stop token follows each answer. Row {"prompt": "111", "completion": "22"} has 3 + 2 + 1 tokens, of which 3 are learned.
"""

import itertools
import json

import numpy as np
import pytest

from weitiao.data import dataset, encoded
from weitiao.data.dataset import load, skipped_summary
from weitiao.data.gathered import Skipped
from weitiao.data.templates import load_template
from weitiao.data.tokens import encode_turns
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings

MIB = 1 << 20


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plain(tokenizer):
    return load_template("plain", tokenizer)


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return name


def pair(prompt, answer, **more):
    """A row of `prompt` tokens given and `answer` tokens before the stop."""
    return {"prompt": "1" * prompt, "completion": "2" * answer, **more}


@pytest.fixture
def load_rows(plain):
    def load_rows(rows=None, template=plain, model_limit=MIB, vocabulary=300, seed=0, as_trained=None, task="auto", **settings):
        if rows is not None:
            settings["train"] = write("rows.jsonl", rows)
        settings = DataSettings(**settings)
        return load(settings.train, settings, template, model_limit, vocabulary, seed, as_trained, task=task)

    return load_rows


@pytest.fixture
def refusal(load_rows):
    def refusal(rows=None, **settings):
        with pytest.raises(RowError) as caught:
            load_rows(rows, **settings)
        return str(caught.value)

    return refusal


def text(tokenizer, example):
    """(what is given, what is learned)"""
    learned = example.weights > 0
    return tokenizer.decode(example.ids[~learned]), tokenizer.decode(example.ids[learned])


# -- rows to paths -----------------------------------------------------------------------------------------------------


def test_a_row_is_its_prompt_given_and_its_answer_learned(load_rows, tokenizer):
    data = load_rows([pair(3, 2), pair(1, 4)])
    assert [row.where for row in data.rows] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert [text(tokenizer, row.examples[0]) for row in data.rows] == [("111", "22<|im_end|>"), ("1", "2222<|im_end|>")]
    assert (len(data), data.tokens, data.learned_tokens, data.max_tokens, data.cut, data.skipped) == (2, 12, 8, 6, 0, [])


def test_each_assistant_turn_is_a_path_of_its_row(load_rows, tokenizer):
    def chat(*texts):
        return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]}

    data = load_rows([chat("1", "2", "3", "4"), chat("5", "6")])
    assert [[text(tokenizer, e) for e in row.examples] for row in data.rows] == [
        [("1", "2<|im_end|>"), ("12<|im_end|>3", "4<|im_end|>")],
        [("5", "6<|im_end|>")],
    ]
    assert [[e.row for e in row.examples] for row in data.rows] == [[0, 0], [1]]
    assert data.rows[0].conversation.turns() == [1, 3]


def test_a_label_is_learned_alone_and_as_text_when_asked_for(load_rows, tokenizer):
    rows = [{"text": "111", "label": 0}, {"text": "11", "label": 1}]
    data = load_rows(rows, labels={0: "7", 1: "8"})
    assert [text(tokenizer, row.examples[0]) for row in data.rows] == [("111", "7"), ("11", "8")]
    assert data.learned_tokens == 2 and data.labels.words == ("7", "8")
    data = load_rows(rows, task="answer", labels={0: "7", 1: "8"})
    assert [text(tokenizer, row.examples[0])[1] for row in data.rows] == ["7<|im_end|>", "8<|im_end|>"]
    assert data.labels is None


def test_labels_take_the_names_that_a_saved_data_set_gives_them(load_rows, tokenizer):
    datasets = pytest.importorskip("datasets")
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": ["11", "1"], "label": [1, 0]}, features=names).save_to_disk("saved")
    named = load_rows(train="saved", label_scoring="sequence")
    assert [text(tokenizer, row.examples[0])[1] for row in named.rows] == ["pos<|im_end|>", "neg<|im_end|>"]
    assert named.labels.words == ("neg", "pos")
    own = load_rows(train="saved", labels={0: "7", 1: "8"})
    assert [text(tokenizer, row.examples[0])[1] for row in own.rows] == ["8", "7"]


def test_every_row_passes_the_progress(plain):
    seen = []

    def progress(items, what):
        for item in items:
            seen.append(what)
            yield item

    settings = DataSettings(train=write("rows.jsonl", [pair(1, 1)] * 3))
    load(settings.train, settings, plain, MIB, 300, 0, progress=progress)
    assert seen == ["Reading rows"] * 3


def test_several_processes_and_a_folder_give_what_one_gives_in_memory(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "FEW", 0)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    rows = [pair(n % 9, n % 5, w=n % 4) for n in range(60)]
    settings = DataSettings(train=write("rows.jsonl", rows), weight_column="w", bad_share=0.9, max_tokens=8)

    def told(**how):
        data = load(settings.train, settings, plain, MIB, 300, 0, **how)
        return [(row.where, row.conversation, [(e.ids.tolist(), e.weights.tolist()) for e in row.examples]) for row in data.rows], data.skipped, data.cut

    assert told(workers=1) == told(workers=2, folder=tmp_path) == told(workers=2)
    assert (tmp_path / "ids").stat().st_size and told()[1]


def test_a_row_refused_in_another_process_is_told_as_here(plain):
    settings = DataSettings(train=write("rows.jsonl", [pair(1, 1, w="much")]), weight_column="w")
    with pytest.raises(RowError, match="rows.jsonl:1: the weight is 'much'"):
        load(settings.train, settings, plain, MIB, 300, 0, workers=2)


# -- the longest row ---------------------------------------------------------------------------------------------------


def test_the_longest_row_is_the_99th_percentile(load_rows, tokenizer):
    data = load_rows([pair(3, 50)] * 2 + [pair(3, 6)] * 199)  # 54 tokens twice, 10 tokens 199 times
    assert (data.max_tokens, data.cut, len(data)) == (10, 2, 201)
    assert text(tokenizer, data.rows[0].examples[0]) == ("111", "222222<|im_end|>")  # cut, and it still stops


def test_few_rows_are_not_cut_for_being_the_longest(load_rows):
    data = load_rows([pair(3, 50)] + [pair(3, 6)] * 99)
    assert (data.max_tokens, data.cut) == (54, 0)


def test_rows_of_labels_are_not_cut_by_default_since_the_label_stands_at_the_end(load_rows):
    rows = [{"text": "1" * 50, "label": "3"}] * 2 + [{"text": "1" * 5, "label": "4"}] * 199
    data = load_rows(rows)
    assert (data.max_tokens, data.cut, len(data), data.skipped) == (51, 0, 201, [])
    within = load_rows(rows, model_limit=40)
    assert (within.max_tokens, within.cut, len(within), within.skipped) == (40, 2, 201, [])


@pytest.mark.parametrize("setting, model_limit, argument, expected", [
    (None, 1000, None, 24),  # the rows' own
    (20, 1000, None, 20), (20, 12, None, 12), (None, 12, None, 12), (1000, 1000, None, 1000),
    (20, 1000, 16, 16),  # as other rows were trained
])
def test_the_longest_row_in_force(load_rows, setting, model_limit, argument, expected):
    data = load_rows([pair(3, 20)] * 5, model_limit=model_limit, max_tokens=setting, as_trained=argument)
    assert data.max_tokens == expected
    assert [len(row.examples[0]) for row in data.rows] == [min(24, expected)] * 5
    assert data.cut == (5 if expected < 24 else 0)


def test_chats_are_cut_at_the_end_of_a_turn(load_rows, tokenizer):
    turns = [{"from": who, "value": said} for who, said in (("human", "1"), ("gpt", "22"), ("human", "3"), ("gpt", "4444"))]
    data = load_rows([{"conversations": turns}], max_tokens=9)  # the whole chat: 1 22 stop 3 4444 stop, 10 tokens
    assert [text(tokenizer, e) for e in data.rows[0].examples] == [("1", "22<|im_end|>")]
    assert data.cut == 1
    assert len(load_rows([{"conversations": turns}], max_tokens=10).rows[0].examples) == 2


def test_a_chat_is_read_no_further_than_the_model_can(load_rows, monkeypatch):
    read = []
    monkeypatch.setattr(encoded, "encode_turns", lambda turns, template: read.extend(turns) or encode_turns(turns, template))
    turns = [{"from": ("human", "gpt")[i % 2], "value": "12"} for i in range(400)]
    data = load_rows([{"conversations": turns}], model_limit=20)  # 5 tokens a round
    assert len(read) == 5
    assert [len(e) for e in data.rows[0].examples] == [5, 10, 15, 20]
    assert (data.max_tokens, data.cut) == (20, 1)


# -- rows that cannot teach --------------------------------------------------------------------------------------------

GOOD = [pair(1, 1)] * 38


def test_rows_that_cannot_teach_are_skipped_and_named(load_rows):
    data = load_rows([*GOOD, {"prompt": "1", "completion": None}, {"提示": "1"}])
    assert len(data) == 38
    assert data.skipped == [Skipped("rows.jsonl:39", "no answer"), Skipped("rows.jsonl:40", "its columns are 提示")]


def test_a_chat_that_the_template_refuses_is_skipped_with_the_templates_words(load_rows, tokenizer, tmp_path):
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    strict = load_template("strict.jinja", tokenizer)
    data = load_rows([*GOOD, pair(1, 1, system="9")], template=strict)
    (skipped,) = data.skipped
    assert skipped == Skipped("rows.jsonl:39", "The template 'strict.jinja' refuses the conversation: no system here")


def test_a_prompt_that_leaves_no_room_is_skipped_with_its_length(load_rows):
    data = load_rows([*GOOD, pair(7, 5), pair(6, 5)], max_tokens=8)
    assert data.skipped == [Skipped("rows.jsonl:39", "its answer is cut away: the prompt alone has 7 of 8 tokens")]
    assert len(data.rows[-1].examples[0]) == 8 and data.cut == 1  # 6 + one token of the answer + the stop


def test_a_label_that_does_not_fit_is_skipped_and_not_halved(load_rows):
    some = [{"text": "1", "label": "33"}, {"text": "1", "label": "4"}] * 19
    rows = [*some, {"text": "1" * 6, "label": "33"}, {"text": "1" * 5, "label": "33"}]
    data = load_rows(rows, max_tokens=8, label_scoring="sequence", cut="end")  # 33 and its stop: 3 tokens
    assert [s.where for s in data.skipped] == ["rows.jsonl:39"] and data.cut == 0
    assert {int((row.examples[0].weights > 0).sum()) for row in data.rows} == {2, 3}


def test_all_rows_cut_before_their_answer_are_refused(refusal):
    assert refusal([pair(20, 5)] * 4, max_tokens=16) == (
        "Nothing can be learned from any of the 4 rows.\n"
        "  4 rows: its answer is cut away: the prompt alone has 20 of 16 tokens (rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, …)\n"
        "Raise data.max_tokens."
    )
    assert refusal([pair(20, 5), pair(21, 5)], model_limit=16) == (
        "Nothing can be learned from any of the 2 rows.\n"
        "  2 rows: its answer is cut away (rows.jsonl:1, rows.jsonl:2)\n"
        "Shorten the prompts."
    )


def test_a_set_without_anything_to_learn_is_refused(refusal):
    rows = [{"prompt": "1", "completion": ""}, {"prompt": "1", "completion": None}, {"prompt": "", "completion": "2"}]
    assert refusal(rows, bad_share=1) == (
        "Nothing can be learned from any of the 3 rows.\n"
        "  2 rows: no answer (rows.jsonl:1, rows.jsonl:2)\n"
        "  1 row: no prompt (rows.jsonl:3)\n"
        "Look at the rows named; data.columns says which column is which."
    )


def test_bad_rows_refuse_stops_at_one(load_rows, refusal):
    assert refusal([*GOOD, {"prompt": "1", "completion": None}], bad_rows="refuse") == (
        "1 of 39 rows cannot teach.\n"
        "  1 row: no answer (rows.jsonl:39)\n"
        "data.bad_rows=refuse stops on the first.\n"
        "Mend them, or skip them with data.bad_rows=skip."
    )
    assert len(load_rows(GOOD, bad_rows="refuse")) == 38


def test_more_than_5_percent_of_bad_rows_are_refused(load_rows, refusal):
    bad = {"prompt": "1", "completion": None}
    assert len(load_rows([*GOOD, bad, bad])) == 38  # 2 of 40 are 5 percent
    assert refusal([*GOOD, bad, bad, bad]) == (
        "3 of 41 rows cannot teach (7.3%).\n"
        "  3 rows: no answer (rows.jsonl:39, rows.jsonl:40, rows.jsonl:41)\n"
        "Expected at most 5% (data.bad_share).\n"
        "Mend them, or allow them with a larger data.bad_share."
    )
    assert len(load_rows([*GOOD, bad, bad, bad], bad_share=0.1)) == 38


def test_unknown_columns_are_refused_with_file_and_row(refusal):
    message = refusal([{"指示": "1", "输出": "2"}])
    assert message.startswith("rows.jsonl:1 has the columns 指示, 输出.\nExpected columns of one of these formats:\n")


def test_reasons_are_told_a_line_each_the_commonest_first():
    skipped = [Skipped("a:1", "no answer"), *(Skipped(f"a:{i}", f"unknown speaker: {i}") for i in range(2, 6)), Skipped("b:1", "no prompt")]
    assert skipped_summary(skipped, named=2) == (
        "  4 rows: unknown speaker (a:2, a:3, …)\n"
        "  1 row: no answer (a:1)\n"
        "  1 row: no prompt (b:1)"
    )
    assert skipped_summary([]) == ""


# -- ids and the embedding ---------------------------------------------------------------------------------------------


def test_ids_outside_the_embedding_are_refused_with_their_row(load_rows, refusal, tokenizer):
    largest = max(tokenizer("é", add_special_tokens=False).input_ids)
    rows = [pair(1, 1), {"prompt": "1", "completion": "é"}]
    assert len(load_rows(rows, vocabulary=largest + 1)) == 2
    assert refusal(rows, vocabulary=largest) == (
        f"rows.jsonl:2: token id {largest} is outside the model's embedding of {largest} rows.\n"
        "Expected a tokenizer that belongs to the model.\n"
        "Use the tokenizer that came with the model, or leave out the tokens that were added to it."
    )


def test_a_stop_token_outside_the_embedding_is_refused_too(refusal):
    assert "is outside the model's embedding of 2 rows" in refusal([pair(1, 1)], vocabulary=2)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_rows_and_messages_have_weights_that_multiply(load_rows):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss_weight": 0.5}]
    data = load_rows([{"messages": turns, "w": 4}, {"messages": turns, "w": "0.5"}], weight_column="w")
    assert [row.examples[0].weights.tolist() for row in data.rows] == [[0, 2, 2], [0, 0.25, 0.25]]


def test_a_row_of_weight_0_teaches_nothing(load_rows):
    data = load_rows([pair(1, 1, w=1)] * 38 + [pair(1, 1, w=0)], weight_column="w")
    assert data.skipped == []  # a weight of 0 is a wish and no defect


@pytest.mark.parametrize("weight", ["much", -1, float("nan"), None])
def test_a_weight_that_is_no_number_stops_at_its_row(refusal, weight):
    message = refusal([pair(1, 1, w=1), pair(1, 1, w=weight)], weight_column="w")
    assert message == f"rows.jsonl:2: the weight is {weight!r}.\nExpected a number of 0 or more."


# -- several sources ---------------------------------------------------------------------------------------------------


def test_files_are_mixed_by_their_shares_and_each_has_its_own_format(load_rows, tokenizer):
    write("pairs.jsonl", [pair(i, 1) for i in range(1, 7)])
    write("labels.jsonl", [{"text": "9", "label": 3}] * 6)
    sources = [{"path": "pairs.jsonl", "share": 3}, {"path": "labels.jsonl", "share": 1}]
    data = load_rows(train=sources)
    places = [row.where for row in data.rows]
    assert len(places) == 12  # as many as the files hold together, 9 : 3
    pairs = [place for place in places if place.startswith("pairs.jsonl")]
    assert len(pairs) == 9 and len(set(pairs)) == 6  # each came once before any came again
    assert {text(tokenizer, row.examples[0])[1] for row in data.rows} == {"2<|im_end|>", "3<|im_end|>"}
    assert [row.where for row in load_rows(train=sources).rows] == places
    assert [row.where for row in load_rows(train=sources, seed=1).rows] != places


def test_without_shares_all_rows_come_in_order(load_rows):
    write("a.jsonl", [pair(1, 1)] * 2)
    write("b.jsonl", [{"text": "9", "label": 3}])
    assert [row.where for row in load_rows(train=["a.jsonl", "b.jsonl"]).rows] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


# -- splitting and fingerprints ----------------------------------------------------------------------------------------


def test_a_share_is_set_aside_by_the_seed(load_rows):
    data = load_rows([pair(i, 1) for i in range(1, 21)])
    learn, measure = data.split(0.25, seed=3)
    places = [[row.where for row in part.rows] for part in (learn, measure)]
    assert len(places[0]) == 15 and len(places[1]) == 5
    assert sorted([*places[0], *places[1]]) == sorted(row.where for row in data.rows)
    assert (learn.max_tokens, measure.max_tokens) == (data.max_tokens, data.max_tokens)
    assert [[row.where for row in part.rows] for part in data.split(0.25, seed=3)] == places
    assert [row.where for row in data.split(0.25, seed=4)[1].rows] != places[1]


@pytest.mark.parametrize("share, measured", [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_a_split_leaves_a_row_on_either_side(load_rows, share, measured):
    learn, measure = load_rows([pair(i, 1) for i in range(1, 11)]).split(share, seed=0)
    assert (len(learn), len(measure)) == (10 - measured, measured)


def test_a_row_that_shares_repeat_is_not_measured_where_it_is_learned(load_rows):
    write("a.jsonl", [pair(i, 1) for i in range(1, 4)])
    write("b.jsonl", [pair(i, 2) for i in range(1, 10)])
    data = load_rows(train=[{"path": "a.jsonl", "share": 3}, {"path": "b.jsonl", "share": 1}])  # each row of a three times
    for seed in range(5):
        learn, measure = ({row.where for row in part.rows} for part in data.split(0.4, seed))
        assert learn and measure and not learn & measure


def test_skipped_rows_are_told_once_after_a_split(load_rows):
    learn, measure = load_rows([*GOOD, {"prompt": "1", "completion": None}]).split(0.5, seed=0)
    assert [s.where for s in learn.skipped] == ["rows.jsonl:39"] and measure.skipped == []


def test_a_fingerprint_is_that_of_the_ids_and_weights_in_their_order(load_rows):
    rows = [pair(1, 1, w=1), pair(2, 1, w=1)]
    known = load_rows(rows, weight_column="w").fingerprint()
    assert load_rows([{"question": r["prompt"], "answer": r["completion"]} for r in rows]).fingerprint() == known
    others = [
        rows[::-1], rows[:1], [pair(1, 2), pair(2, 1)], [pair(1, 1, w=1), pair(2, 1, w=2)],
    ]
    prints = {load_rows(other, weight_column="w" if "w" in other[-1] else None).fingerprint() for other in others}
    assert len(prints) == 4 and known not in prints


# -- real rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return load_template("auto", tokenizer)


@pytest.mark.parametrize("file, rows, turns", [
    ("resume/seed_200.json", 200, 200),
    ("alpaca_zh/alpaca_zh_demo.json", 1000, 1000),
    ("multi_turn/openai_typed_parts.jsonl", 500, None),
    ("multi_turn/glaive_toolcall_zh_demo.json", 300, None),
])
def test_real_files_are_read_whole(shared, load_rows, chatml, file, rows, turns):
    data = load_rows(train=str(shared / "data" / file), template=chatml)
    assert len(data) == rows and data.skipped == []
    assert 0 < data.cut <= rows // 100 + 1  # the longest hundredth
    paths = [path for row in data.rows for path in row.examples]
    assert turns is None or len(paths) == turns
    assert max(map(len, paths)) == data.max_tokens
    assert all(path.ids[-1] == chatml.stop_id and path.weights[-1] == 1 and path.weights[-2] == 1 for path in paths)


def test_typed_parts_are_learned_by_their_loss_weight(shared, load_rows, chatml):
    file = shared / "data/multi_turn/openai_typed_parts.jsonl"
    data = load_rows(train=str(file), template=chatml, max_tokens=100_000)
    for row, line in zip(data.rows, file.read_text("utf-8").splitlines(), strict=True):
        learned = [m for m in json.loads(line)["messages"] if m["role"] == "assistant" and m["loss_weight"] > 0]
        assert len(row.examples) == len(learned)
        assert text(chatml.tokenizer, row.examples[-1])[1] == learned[-1]["content"][0]["value"] + "<|im_end|>"


def test_function_calls_are_learned_as_answers(shared, load_rows, chatml):
    file = shared / "data/multi_turn/glaive_toolcall_zh_demo.json"
    data = load_rows(train=str(file), template=chatml, max_tokens=100_000)
    for row, fields in zip(data.rows, json.loads(file.read_text("utf-8")), strict=True):
        spoken = [turn["value"] for turn in fields["conversations"] if turn["from"] in ("gpt", "function_call")]
        assert len(row.examples) == len(spoken)
        assert len(row.conversation.tools) == len(json.loads(fields["tools"] or "[]"))


def test_rotten_tomatoes_is_one_label_a_row(shared, load_rows, plain):
    data = load_rows(
        train=str(shared / "data/rotten_tomatoes/train.jsonl"), labels={0: "neg", 1: "pos"}, template=plain, label_scoring="sequence",
    )
    assert (len(data), data.cut, data.skipped) == (8530, 0, [])
    answers = [row.examples[0].ids[row.examples[0].weights > 0] for row in data.rows]
    words = {tuple(ids.tolist()) for ids in answers}
    assert {plain.tokenizer.decode(list(ids)) for ids in words} == {"neg<|im_end|>", "pos<|im_end|>"}
    assert sum(plain.tokenizer.decode(ids) == "pos<|im_end|>" for ids in answers) == 4265


def test_long_and_broken_chats(shared, load_rows, chatml):
    with open(shared / "data/multi_turn/sharegpt_zh_1k.jsonl", encoding="utf-8") as file:
        lines = list(itertools.islice(file, 200))
    with open("chats.jsonl", "w", encoding="utf-8") as file:
        file.writelines(lines)
    data = load_rows(train="chats.jsonl", template=chatml, model_limit=2048)
    assert data.skipped == [Skipped("chats.jsonl:119", "ends on a human turn")]
    assert len(data) == 199 and data.max_tokens == 2048
    assert max(len(path) for row in data.rows for path in row.examples) <= 2048
    assert all(row.examples[-1].ids[-1] == chatml.stop_id for row in data.rows)
    learned = [row.conversation.messages[i] for row in data.rows for i in row.conversation.turns()]
    assert all(message.content.strip() for message in learned)
    assert len(learned) == sum(len(row.examples) for row in data.rows)  # a conversation ends with its last turn that fits


def test_a_real_bad_row_is_named(shared, load_rows, refusal, chatml):
    file = str(shared / "data/alpaca_zh/sample_with_a_bad_row.json")
    data = load_rows(train=file, template=chatml)
    assert len(data) == 1515
    assert data.skipped == [
        Skipped(f"{file}, row 243", "no answer"), Skipped(f"{file}, row 1196", "its columns are 指示, 输入, 输出"),
    ]
    message = refusal(train=file, template=chatml, bad_rows="refuse")
    assert message.startswith("2 of 1517 rows cannot teach.\n") and f"its columns are 指示, 输入, 输出 ({file}, row 1196)" in message
