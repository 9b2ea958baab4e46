"""A row of any format becomes the conversation a reader of the row would expect; one that cannot teach says why."""

import json
import re

import pytest

from weitiao.data.conversation import Conversation, Message
from weitiao.data.formats import FORMATS, CannotTeach, convert, detect, rename, row_weight
from weitiao.data.rows.row import Row
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings


def settings(**more):
    return DataSettings(train=["rows.jsonl"], **more)


def read(fields, format="auto", **more):
    row = Row(fields, "rows.jsonl", 4)
    return convert(row, detect([row], settings(format=format, **more)), settings(**more))


def reason(fields, format="auto", **more):
    with pytest.raises(CannotTeach) as caught:
        read(fields, format, **more)
    return str(caught.value)


def said(conversation):
    """[(role, text)] with a * where the message is learned."""
    return [(m.role + "*" * (m.weight > 0), m.content) for m in conversation.messages]


# -- each format -------------------------------------------------------------------------------------------------------

QUESTION, ANSWER = ("user", "q"), ("assistant*", "a")


@pytest.mark.parametrize("fields, format", [
    ({"instruction": "q", "output": "a"}, "instruction"),
    ({"instruction": "q", "input": "", "output": "a"}, "instruction"),
    ({"instruction": "q", "input": None, "output": "a", "system": None, "history": None}, "instruction"),
    ({"prompt": "q", "completion": "a"}, "completion"),
    ({"prompt": "q", "response": "a"}, "completion"),
    ({"question": "q", "answer": "a"}, "completion"),
    ({"query": "q", "response": "a"}, "completion"),
    ({"input": "q", "output": "a"}, "completion"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
    ({"text": "q", "label": "a"}, "label"),
])
def test_each_format_is_told_from_its_columns_and_converted(fields, format):
    assert detect([Row(fields | {"id": 7}, "rows.jsonl", 1)], settings()) == format
    assert said(read(fields)) == [QUESTION, ANSWER]


def test_the_format_may_be_said_where_columns_leave_it_open():
    both = {"instruction": "i", "input": "q", "output": "a"}
    assert said(read(both)) == [("user", "i\nq"), ANSWER]
    assert detect([Row(both, "rows.jsonl", 1)], settings(format="completion")) == "completion"
    chat = both | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert said(read(chat)) == [QUESTION, ANSWER] and said(read(chat, format="instruction"))[0] == ("user", "i\nq")


def test_instruction_and_input_are_joined_by_a_newline_and_stripped():
    assert read({"instruction": " 翻译 ", "input": "你好\n", "output": "hello"}).messages[0] == Message("user", "翻译 \n你好")
    assert read({"instruction": "", "input": "你好", "output": "hello"}).messages[0] == Message("user", "你好")


def test_a_file_of_input_and_output_keeps_the_instruction_that_some_rows_have():
    plain, more = {"input": "妮露", "output": "a"}, {"instruction": "评价", "input": "妮露", "output": "a"}
    assert detect([Row(plain, "rows.jsonl", 1), Row(more, "rows.jsonl", 2)], settings()) == "completion"
    assert said(convert(Row(more, "rows.jsonl", 2), "completion", settings())) == [("user", "评价\n妮露"), ANSWER]


def test_a_prompt_and_its_answer_stay_as_they_are_written():
    assert said(read({"prompt": "\nq ", "completion": " a\n"})) == [("user", "\nq "), ("assistant*", " a\n")]


def test_a_prompt_and_its_completion_may_be_turns_of_a_chat():
    asked = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q"}]
    conversation = read({"prompt": asked, "completion": [{"role": "assistant", "content": "a"}]})
    assert said(conversation) == [("user", "q1"), ("assistant", "a1"), QUESTION, ANSWER]


def test_an_answer_that_is_a_list_or_table_is_written_as_json():
    assert read({"input": "q", "output": {"姓名": ["高勇"]}}).messages[1].content == '{"姓名": ["高勇"]}'
    assert read({"input": "q", "output": 0}).messages[1].content == "0"


def test_history_comes_before_the_question_and_is_learned_too():
    row = {"instruction": "q", "output": "a", "history": [["q1", "a1"], ["q2", None]]}
    assert said(read(row)) == [("user", "q1"), ("assistant*", "a1"), ("user", "q2"), ("assistant", ""), QUESTION, ANSWER]


@pytest.mark.parametrize("history", [["q1", "a1"], [["q1", "a1", "x"]], [{"q": 1}], "q1"])
def test_a_history_of_another_shape_is_named(history):
    assert reason({"instruction": "q", "output": "a", "history": history}) == "its history is not a list of [question, answer]"


def test_a_chat_learns_each_assistant_turn_that_answers_something():
    chat = [("system", "s"), ("assistant", "greeting"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    conversation = read({"messages": [{"role": role, "content": text} for role, text in chat]})
    assert conversation.turns() == [3, 5]
    assert conversation.as_dicts(3) == [{"role": role, "content": text} for role, text in chat[:3]]


@pytest.mark.parametrize("speaker, role", [
    ("human", "user"), ("user", "user"), ("Human", "user"), ("gpt", "assistant"), ("assistant", "assistant"), ("bot", "assistant"),
    ("system", "system"), ("developer", "system"), ("observation", "tool"), ("tool", "tool"), ("function_call", "assistant"),
])
def test_speakers_by_their_usual_names(speaker, role):
    turns = [{"from": "human", "value": "q"}, {"from": speaker, "value": "x"}, {"from": "gpt", "value": "a"}]
    assert read({"conversations": turns}).messages[1].role == role


def test_a_function_call_is_learned_and_an_observation_is_not():
    turns = [("human", "今天天气?"), ("function_call", '{"name": "weather"}'), ("observation", "晴"), ("gpt", "晴天")]
    tools = [{"name": "weather", "description": "天气"}]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps(tools)}
    conversation = read(row)
    assert said(conversation) == [
        ("user", "今天天气?"), ("assistant*", '{"name": "weather"}'), ("tool", "晴"), ("assistant*", "晴天"),
    ]
    assert conversation.tools == tuple(tools)
    assert read(row | {"tools": ""}).tools == read(row | {"tools": None}).tools == ()


def test_typed_parts_are_joined_and_a_loss_weight_of_0_is_not_learned():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "value": "好"}], "loss_weight": 1.0},
        {"role": "assistant", "content": [{"type": "text", "value": "a1"}], "loss_weight": 0.0},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": [{"type": "text", "value": "a2"}, "!", {"type": "text", "text": None}], "loss_weight": 0.5},
    ]
    conversation = read({"messages": turns})
    assert conversation.messages == (
        Message("user", "你好"), Message("assistant", "a1", 0.0), Message("user", "q2"), Message("assistant", "a2!", 0.5),
    )
    assert conversation.turns() == [3]


def test_a_chat_may_be_written_as_json_text_as_csv_does():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert said(read({"conversations": json.dumps(turns)})) == [QUESTION, ANSWER]
    assert reason({"conversations": "q a"}) == "the conversation is a text, not a list"


# -- labels ------------------------------------------------------------------------------------------------------------


def test_a_label_is_answered_with_its_word():
    words = {"labels": {0: "neg", 1: "pos"}}
    answered = (Message("user", "dull"), Message("assistant", "neg", 1.0))
    assert read({"text": "dull", "label": 0}, **words) == Conversation(answered, is_label=True)
    assert said(read({"text": "dull", "label": "1"}, **words)) == [("user", "dull"), ("assistant*", "pos")]
    assert said(read({"text": "dull", "label": 1})) == [("user", "dull"), ("assistant*", "1")]


def test_a_label_that_no_word_is_given_for():
    assert reason({"text": "dull", "label": 2}, labels={0: "neg", 1: "pos"}) == "its label is none of 0, 1 (data.labels): '2'"
    assert reason({"text": "dull", "label": None}) == "no label"


# -- columns of other names --------------------------------------------------------------------------------------------


def test_columns_of_other_names():
    columns = {"instruction": "指示", "input": "输入", "output": "输出"}
    assert said(read({"指示": "q", "输入": "x", "输出": "a"}, columns=columns)) == [("user", "q\nx"), ANSWER]
    assert rename({"q": 1, "a": 2, "id": 3}, {"prompt": "q", "completion": "a", "system": "s"}) == {"id": 3, "prompt": 1, "completion": 2}
    assert rename({"text": "long", "summary": "short"}, {"prompt": "text"}) == {"prompt": "long", "summary": "short"}


def test_unknown_columns_are_refused_with_file_and_row():
    with pytest.raises(RowError) as caught:
        detect([Row({"指示": "q", "输出": "a"}, "rows.jsonl", 4)], settings())
    assert str(caught.value) == (
        "rows.jsonl:4 has the columns 指示, 输出.\n"
        "Expected columns of one of these formats:\n"
        "  messages     messages\n"
        "  sharegpt     conversations\n"
        "  instruction  instruction and output\n"
        "  completion   prompt and completion, or prompt and response, or question and answer, or query and response, or input and output\n"
        "  label        text and label\n"
        "Rename them, or say which is which: data.columns='{instruction: …, output: …}'."
    )


def test_columns_that_the_format_asked_for_lacks_are_refused():
    with pytest.raises(RowError, match=re.escape(
        "rows.json, row 2 has the columns prompt, completion.\nExpected columns of this format:\n  messages     messages\n"
    )):
        detect([Row({"prompt": "q", "completion": "a"}, "rows.json", 2)], settings(format="messages"))


def test_a_first_row_of_unknown_columns_does_not_hide_the_format():
    rows = [Row({"指示": "q"}, "rows.jsonl", 1), Row({"instruction": "q", "output": "a"}, "rows.jsonl", 2)]
    assert detect(rows, settings()) == "instruction"
    with pytest.raises(CannotTeach, match="^its columns are 指示$"):
        convert(rows[0], "instruction", settings())


def test_every_format_can_be_asked_for_by_name():
    assert set(FORMATS) == {"instruction", "completion", "messages", "sharegpt", "label"}


# -- the system text ---------------------------------------------------------------------------------------------------


def test_a_system_column_opens_the_conversation():
    assert said(read({"instruction": "q", "output": "a", "system": "s"}))[0] == ("system", "s")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert said(read({"conversations": turns, "system": "s"})) == [("system", "s"), QUESTION, ANSWER]
    own = [{"from": "system", "value": "own"}, *turns]
    assert said(read({"conversations": own, "system": "s"}))[0] == ("system", "own")


def test_data_system_is_for_rows_that_have_none():
    assert said(read({"prompt": "q", "completion": "a"}, system="ours")) == [("system", "ours"), QUESTION, ANSWER]
    assert said(read({"prompt": "q", "completion": "a", "system": "s"}, system="ours"))[0] == ("system", "s")
    labelled = read({"text": "q", "label": "a"}, system="ours")
    assert labelled.is_label and said(labelled)[0] == ("system", "ours")


# -- rows that cannot teach --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, why", [
    ({"instruction": "q", "output": None}, "no answer"),
    ({"instruction": "q", "output": ""}, "no answer"),
    ({"instruction": "q", "output": " \n"}, "no answer"),
    ({"prompt": "q", "completion": None}, "no answer"),
    ({"text": "q", "label": ""}, "no answer"),
    ({"instruction": "", "input": None, "output": "a"}, "no prompt"),
    ({"prompt": " ", "completion": "a"}, "no prompt"),
    ({"text": None, "label": 1}, "no prompt"),
    ({"messages": []}, "no turns"),
    ({"messages": None}, "no turns"),
    ({"messages": ["hello"]}, "a turn is a str, not an object"),
])
def test_a_row_that_cannot_teach_says_why(fields, why):
    assert reason(fields) == why


@pytest.mark.parametrize("turns, why", [
    ([("human", "q"), ("gpt", "a"), ("human", "q2")], "ends on a human turn"),
    ([("human", "q"), ("function_call", "f"), ("observation", "o")], "ends on a tool turn"),
    ([("human", "q"), ("narrator", "x"), ("gpt", "a")], "unknown speaker 'narrator'"),
    ([("human", "q"), (None, "a")], "unknown speaker None"),
    ([("human", "q"), ("gpt", "")], "no answer"),
    ([("human", "q"), ("gpt", None)], "no answer"),
    ([("gpt", "hello")], "no answer"),
    ([("system", "s"), ("gpt", "hello")], "no answer"),
])
def test_a_chat_that_cannot_teach_says_why(turns, why):
    assert reason({"conversations": [{"from": who, "value": text} for who, text in turns]}) == why


def test_a_chat_with_one_empty_answer_teaches_the_others():
    turns = [("human", "q1"), ("gpt", ""), ("human", "q2"), ("gpt", "a2")]
    assert read({"conversations": [{"from": who, "value": text} for who, text in turns]}).turns() == [3]


@pytest.mark.parametrize("answer, why", [
    ({"content": "a", "loss_weight": 0}, "no answer with a loss_weight above 0"),
    ({"content": "a", "loss_weight": "much"}, "a loss_weight of 'much'; expected a number of 0 or more"),
    ({"content": "a", "loss_weight": -1}, "a loss_weight of -1; expected a number of 0 or more"),
    ({"content": "a", "loss_weight": float("nan")}, "a loss_weight of nan; expected a number of 0 or more"),
    ({"content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url'; only text can be learned"),
    ({"content": None, "tool_calls": [{"function": {"name": "f"}}]},
     "a turn with tool_calls; only their text can be learned, as a turn from function_call"),
])
def test_a_turn_that_cannot_be_learned_says_why(answer, why):
    assert reason({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]}) == why


def test_a_loss_weight_of_null_is_none_given():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_weight": None}]
    assert read({"messages": turns}).messages[1].weight == 1.0


def test_tools_that_are_no_json():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert reason({"conversations": turns, "tools": "weather"}) == "its tools are no JSON"


@pytest.mark.parametrize("fields", [
    {"prompt": "\ud800", "completion": "a"},
    {"prompt": "q", "completion": "a\udfff"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{"name": "\ud800"}]},
])
def test_half_of_a_surrogate_pair_is_told_before_it_breaks_an_encoder(fields):
    assert reason(fields) == "half of a surrogate pair, which is no text"


def test_a_whole_surrogate_pair_is_text():
    assert read(json.loads('{"prompt": "q", "completion": "\\ud83d\\ude00"}')).messages[1].content == "😀"


# -- the weight of a row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, weight", [(2, 2.0), (0.5, 0.5), ("0.25", 0.25), (0, 0.0)])
def test_a_row_counts_by_its_weight_column(value, weight):
    assert row_weight(Row({"w": value}, "rows.jsonl", 1), settings(weight_column="w")) == weight


def test_a_row_counts_once_without_a_weight_column():
    assert row_weight(Row({"w": 7}, "rows.jsonl", 1), settings()) == 1.0


@pytest.mark.parametrize("value", [None, "much", -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_of_0_or_more_is_refused_with_its_row(value):
    with pytest.raises(RowError) as caught:
        row_weight(Row({"w": value}, "rows.jsonl", 4), settings(weight_column="w"))
    assert str(caught.value) == f"rows.jsonl:4: the weight is {value!r}.\nExpected a number of 0 or more."


def test_a_missing_weight_column_is_refused_with_its_row():
    with pytest.raises(RowError) as caught:
        row_weight(Row({"prompt": "q", "completion": "a"}, "rows.jsonl", 4), settings(weight_column="w"))
    assert str(caught.value) == (
        "rows.jsonl:4 has no column 'w'.\nExpected the weight named by data.weight_column.\nIts columns are prompt, completion."
    )
