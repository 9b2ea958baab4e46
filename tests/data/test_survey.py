"""What rows are like together: the arithmetic of a survey is that of the rows loaded, and each planted repeat is told.

As in test_dataset, a digit is a token and a stop token follows each answer: pair(3, 2) has 3 + 2 + 1 tokens.
"""

import json

import numpy as np
import pytest

from weitiao.data.alike import frequent_grams, loose
from weitiao.data.conversation import Conversation, Message
from weitiao.data.dataset import load
from weitiao.data.rows.row import Row
from weitiao.data.survey import Facts, Survey, Surveyor
from weitiao.data.templates import load_template
from weitiao.settings.data import DataSettings

MIB = 1 << 20
POEM = ("Shall I compare thee to a summer's day? Thou art more lovely and more temperate. Rough winds do shake the darling buds of "
        "May, and summer's lease hath all too short a date. Sometime too hot the eye of heaven shines, and often is his gold "
        "complexion dimmed; and every fair from fair sometime declines, by chance or nature's changing course untrimmed.")


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
    return {"prompt": "1" * prompt, "completion": "2" * answer, **more}


@pytest.fixture
def loaded(plain):
    """rows -> (the rows loaded, their survey, its lengths)"""
    def loaded(rows=None, template=plain, model_limit=MIB, vocabulary=300, task="auto", **settings):
        if rows is not None:
            settings["train"] = write("rows.jsonl", rows)
        settings = DataSettings(bad_share=1, **settings)
        survey = Survey(Facts.of(settings, template, vocabulary))
        data = load(settings.train, settings, template, model_limit, vocabulary, 0, task=task, survey=survey)
        head = 0
        if data.labels:
            head = template.head(survey.asked.as_dicts(survey.asked.turns()[0]))
        return data, survey, survey.lengths(model_limit, settings.max_tokens, data.labels, head)

    return loaded


@pytest.fixture
def told(loaded):
    """rows -> {kind: finding}"""
    def told(rows, **settings):
        _, survey, lengths = loaded(rows, **settings)
        return {finding.kind: finding for finding in survey.findings(lengths, "cure")}

    return told


def chat(*texts):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]}


# -- the arithmetic is that of the rows loaded -------------------------------------------------------------------------


def agree(data, survey, lengths):
    assert lengths.limit == data.max_tokens
    assert (lengths.tokens, lengths.learned) == (data.tokens, data.learned_tokens)
    assert lengths.cut == data.cut
    assert survey.skipped + len(lengths.dropped) == len(data.skipped)
    assert len(survey) - len(lengths.dropped) - len(lengths.weight_0) == len(data)


@pytest.mark.parametrize("rows, settings", [
    ([pair(3, 50)] * 2 + [pair(3, 6)] * 199, {}),
    ([pair(3, 20)] * 5 + [pair(30, 2), pair(18, 5), pair(19, 5), pair(20, 1)], {"max_tokens": 20}),
    ([pair(3, 2, w=0), pair(9, 9, w=2), pair(3, 2, w=0.5)], {"weight_column": "w", "max_tokens": 10}),
    ([pair(3, 2)], {"model_limit": 5}),
    ([chat("1", "22", "3", "4444"), chat("1", "2"), chat("1", "222222222", "3", "4")], {"max_tokens": 9}),
    ([{"text": "1" * n, "label": "34"[n % 2]} for n in (2, 5, 30, 31)], {"max_tokens": 12}),
    ([{"text": "1" * n, "label": "34"[n % 2]} for n in (2, 5, 30, 31)], {"max_tokens": 12, "cut": "end"}),
    ([{"text": "1" * n, "label": "34"[n % 2]} for n in (2, 5, 30, 31)], {}),
    ([pair(3, 2), {"prompt": "1", "completion": ""}, {"x": 1}], {}),
])
def test_lengths_are_those_of_the_rows_loaded(loaded, rows, settings):
    agree(*loaded(rows, **settings))


@pytest.mark.parametrize("file", [
    "alpaca_zh/sample_with_a_bad_row.json", "multi_turn/openai_typed_parts.jsonl", "multi_turn/dummy_conversation.json",
    "rotten_tomatoes/validation.jsonl", "resume/seed_200.json",
])
@pytest.mark.parametrize("max_tokens", [None, 800])
def test_lengths_of_real_rows_are_those_of_the_rows_loaded(shared, loaded, tokenizer, file, max_tokens):
    settings = {"labels": {"0": "7", "1": "8"}} if "rotten" in file else {}
    agree(*loaded(train=str(shared / "data" / file), template=load_template("auto", tokenizer), max_tokens=max_tokens, **settings))


def test_rows_that_a_share_repeats_are_looked_at_once(loaded):
    write("a.jsonl", [pair(2, 1), pair(3, 1)])
    write("b.jsonl", [pair(n, 2) for n in range(1, 9)])
    data, survey, lengths = loaded(train=[{"path": "a.jsonl", "share": 4}, {"path": "b.jsonl", "share": 1}])
    assert len(data) == 10 and survey.rows == 4  # a's two rows four times each, two of b
    assert "duplicates" not in {finding.kind for finding in survey.findings(lengths, "")}


# -- in parts, in few bytes --------------------------------------------------------------------------------------------


def surveyed(rows, plain, parts, format="completion"):
    facts = Facts.of(DataSettings(train="x"), plain, 300)
    rows = [Row(fields, "ab"[number > 13] + ".jsonl", number) for number, fields in enumerate(rows, 1)]
    surveyor = Surveyor(facts, plain, MIB, False, (), np.zeros(0, np.uint32))
    survey = Survey(facts)
    for some in np.array_split(np.arange(len(rows)), parts):
        survey.merge(surveyor([rows[i] for i in some], format))
    return survey


def test_parts_merged_are_the_whole(plain):
    rows = [pair(1 + n % 7, 2) for n in range(30)] + [{"prompt": "1"}, {"prompt": "1", "completion": ""}]
    one, many = (surveyed(rows, plain, parts) for parts in (1, 5))
    assert (one.rows, one.files, one.columns, one.sketches, one.skips) == (many.rows, many.files, many.columns, many.sketches, many.skips)
    assert one.files == {"a.jsonl": 0, "b.jsonl": 1} and one.where(13) == "b.jsonl:14"


def test_labels_are_counted_alike_in_parts(plain):
    facts = Facts.of(DataSettings(train="x"), plain, 300)
    surveyor = Surveyor(facts, plain, MIB, True, (), np.zeros(0, np.uint32))
    survey = Survey(facts)
    for labels in ("334", "43", "5"):
        survey.merge(surveyor([Row({"text": "1", "label": label}, "a.jsonl", 1) for label in labels], "label"))
    assert survey.class_counts() == {"3": 3, "4": 2, "5": 1}


def test_a_row_takes_some_80_bytes(plain):
    survey = surveyed([{"prompt": POEM + str(n), "completion": POEM} for n in range(100)], plain, 4)
    assert survey.bytes / len(survey) <= 90


# -- repeats -----------------------------------------------------------------------------------------------------------


def test_what_most_rows_share_makes_no_near_repeat(told):
    words = ["apple river", "stone lamp", "cloud house", "green door", "quiet night", "paper moon", "silver spoon", "broken glass"]
    rows = [{"prompt": f"{POEM} {words[i % 8]} {words[i // 8]} {words[(i * 5 + i // 8) % 8]}", "completion": "yes"} for i in range(64)]
    assert len(frequent_grams(loose(Conversation((Message("user", row["prompt"]),))) for row in rows)) > 100
    assert "near_duplicates" not in told(rows)


CLEAN = [{"prompt": f"What is {word}?", "completion": f"It is a {word} {kind}."} for word in
         ("fir", "oak", "elm", "ash", "yew") for kind in ("tree",)]


def test_clean_rows_have_no_finding(told):
    assert told(CLEAN) == {}


@pytest.mark.parametrize("planted, kind, severity, what, where", [
    ([CLEAN[1]], "duplicates", "warning", "1 of 6 rows (16.7%) repeat an earlier one, prompt and answer: rows.jsonl:6 is rows.jsonl:2.", "rows.jsonl:6"),
    ([{"prompt": "what  is OAK", "completion": "it is a oak, tree 7"}], "near_duplicates", "note", "rows.jsonl:6 is nearly rows.jsonl:2", "rows.jsonl:6"),
    ([CLEAN[2] | {"completion": "A large tree with big leaves."}], "several_answers", "note", "rows.jsonl:6 has the prompt of rows.jsonl:3", "rows.jsonl:6"),
    ([{"prompt": "1", "completion": "Well.<|im_end|> And more."}], "special_tokens", "warning", "<|im_end|>", "rows.jsonl:6"),
    ([{"prompt": "1", "completion": None}], "no_answer", "warning", "1 of 6 rows skipped: no answer.", "rows.jsonl:6"),
    ([{"prompt": "", "completion": "x"}], "no_prompt", "warning", "1 of 6 rows skipped: an answer without a prompt.", "rows.jsonl:6"),
    ([{"frage": "1", "antwort": "x"}], "foreign_columns", "warning", "frage", "rows.jsonl:6"),
    ([{"a_b": "1", "c_d": "x"}], "columns", "warning", "of the first one, its columns are a_b, c_d.", "rows.jsonl:6"),
])
def test_each_planted_defect_is_told_with_its_place(told, planted, kind, severity, what, where):
    found = told([*CLEAN, *planted])
    assert set(found) == {kind}
    assert found[kind].severity == severity and what in found[kind].what and found[kind].where == (where,)
    assert found[kind].count == 1 and found[kind].cure


@pytest.mark.parametrize("planted, kind, what", [
    ([{"from": "human", "value": "1"}], "ends_on_human", "end on a turn that the assistant does not answer"),
    ([{"from": "human", "value": "1"}, {"from": "alien", "value": "2"}], "unknown_speaker", "alien"),
    ([{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}, {"from": "human", "value": ""}, {"from": "gpt", "value": "3"}],
     "empty_turn", "turn 3 of 4, by human"),
    ([], "no_turns", "a conversation without turns"),
])
def test_planted_defects_of_chats(told, planted, kind, what):
    clean = [chat(row["prompt"], row["completion"]) for row in CLEAN]
    assert told(clean) == {}
    found = told([*clean[:3], {"conversations": planted}, *clean[3:]])
    assert set(found) == {kind} and what in found[kind].what and found[kind].where == ("rows.jsonl:4",)


def test_an_id_that_stops_inside_an_answer(plain):
    stops = Facts(DataSettings(train="x"), stop_id=plain.encode("2")[0], bos_id=plain.encode("1")[0], vocabulary=300)
    survey = Surveyor(stops, plain, MIB, False, (), np.zeros(0, np.uint32))([Row(pair(2, 2), "a.jsonl", 7)], "completion")
    found = {finding.kind: finding for finding in survey.findings(survey.lengths(MIB, None), "")}
    assert set(found) == {"stop_inside", "second_bos"} and found["stop_inside"].where == found["second_bos"].where == ("a.jsonl:7",)


def test_rows_cut_and_rows_dropped(loaded):
    _, survey, lengths = loaded([pair(3, 50), *[pair(3, 6 + n) for n in range(9)], pair(30, 1)], max_tokens=20)
    found = {finding.kind: finding for finding in survey.findings(lengths, "Raise data.max_tokens.")}
    assert found["answer_cut"].what.startswith("1 of 11 rows (9.1%) lose the end of their answer, being longer than 20 tokens.")
    assert found["answer_cut"].where == ("rows.jsonl:1",) and found["answer_cut"].cure == "Raise data.max_tokens."
    assert found["dropped"].where == ("rows.jsonl:11",) and "within 20 tokens" in found["dropped"].what
    assert (lengths.keeping(1), lengths.keeping(0.5)) == (54, 15)


def test_ids_outside_the_embedding_are_told(plain):
    facts = Facts.of(DataSettings(train="x"), plain, 10)
    survey = Surveyor(facts, plain, MIB, False, (), np.zeros(0, np.uint32))([Row(pair(1, 1), "a.jsonl", 7)], "completion")
    (finding,) = survey.findings(survey.lengths(MIB, None), "")
    assert (finding.kind, finding.severity, finding.where) == ("outside", "error", ("a.jsonl:7",)) and "embedding of 10 rows" not in finding.cure


def test_weights(told, plain):
    rows = [row | {"w": 1} for row in CLEAN]
    found = told([*rows, pair(1, 1, w=0)], weight_column="w")
    assert set(found) == {"weight_0"} and found["weight_0"].where == ("rows.jsonl:6",)
    facts = Facts.of(DataSettings(train="x", weight_column="w"), plain, 300)
    survey = Surveyor(facts, plain, MIB, False, (), np.zeros(0, np.uint32))([Row(pair(1, 1, w="x"), "a.jsonl", 7)], "completion")
    (finding,) = survey.findings(survey.lengths(MIB, None), "")
    assert (finding.kind, finding.severity) == ("weight", "error") and "the weight is 'x'" in finding.what


def test_prompts_that_dwarf_the_answers_are_told(told):
    found = told([pair(200 + n, 1 + n % 2) for n in range(5)])
    assert "little_learned" in found and found["little_learned"].what.startswith("1.2% of all tokens are learned")


@pytest.mark.parametrize("settings, what", [
    ({}, "4 of 9 rows (44.4%) cannot teach, and data.bad_share allows 5%."),
    ({"bad_rows": "refuse", "bad_share": 1}, "4 of 9 rows (44.4%) cannot teach, and data.bad_rows=refuse allows none."),
    ({"bad_share": 0.5}, None),
])
def test_skipping_too_many_is_an_error(plain, settings, what):
    rows = [Row(fields, "a.jsonl", n) for n, fields in enumerate([*CLEAN, *[{"prompt": "1", "completion": ""}] * 4], 1)]
    survey = Surveyor(Facts.of(DataSettings(train="x", **settings), plain, 300), plain, MIB, False, (), np.zeros(0, np.uint32))(rows, "completion")
    found = {finding.kind: finding for finding in survey.findings(survey.lengths(MIB, None), "")}
    assert (found["too_many_skipped"].what if what else "too_many_skipped" not in found) == (what or True)
    assert not what or found["too_many_skipped"].severity == "error"


# -- labels ------------------------------------------------------------------------------------------------------------


def reviews(labels):
    return [{"text": str(n), "label": label} for n, label in enumerate(labels, 100)]


def test_labels_out_of_balance_and_in_blocks(told):
    assert told(reviews("34" * 20)) == {}
    found = told(reviews("3" * 20 + "4" * 20))
    assert set(found) == {"label_blocks"} and "changes of label from row to row: 1," in found["label_blocks"].what
    found = told(reviews("3333433333" * 4))
    assert set(found) == {"unbalanced"} and found["unbalanced"].what == "Labels out of balance: 3 90.0%, 4 10.0%."


def test_one_text_with_two_labels_is_a_contradiction(told):
    found = told([*reviews("34" * 5), {"text": "100", "label": "4"}])
    assert set(found) == {"contradicting_labels"}
    assert "rows.jsonl:11 has the text of rows.jsonl:1 ('4' and '3')" in found["contradicting_labels"].what


def test_rows_to_measure_on_that_are_learned_from(loaded):
    _, train, _ = loaded(CLEAN)
    _, measured, _ = loaded([CLEAN[2], {"prompt": "What is oak?", "completion": "Wood."}, {"prompt": "New?", "completion": "Yes."}])
    found = {finding.kind: finding for finding in measured.beside(train) if finding}
    assert set(found) == {"eval_overlap", "eval_prompts"}
    assert found["eval_overlap"].what == "1 of 3 rows of data.eval (33.3%) are also learned from: rows.jsonl:1 is in training as rows.jsonl:3."
    assert found["eval_prompts"].where == ("rows.jsonl:2",)


def test_labels_that_only_the_rows_to_measure_on_have(loaded):
    _, train, _ = loaded(reviews("3434"))
    _, measured, _ = loaded(reviews("3455"))
    found = {finding.kind: finding for finding in measured.beside(train) if finding}
    assert found["eval_new_labels"].count == 2 and "'5'" in found["eval_new_labels"].what
