"""ChatGLM3's chats, id for id: each text apart, roles by id, and no role from what was said.

The judge is sentencepiece itself and the layouts as they are described, put together by hand.
"""

from __future__ import annotations

import chatglm3
import pytest

from weitiao.data.conversation import Conversation, Message
from weitiao.data.templates import load_template
from weitiao.data.tokens import encode_turn
from weitiao.errors import SourceError
from weitiao.model.load import load_tokenizer
from weitiao.settings.model import ModelSettings

PIECES = 420
MASK, GMASK, SMASK, SOP, EOP, SYSTEM, USER, ASSISTANT, OBSERVATION = range(PIECES, PIECES + 9)
EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatglm3.write_tokenizer(chatglm3.write_checkpoint(tmp_path_factory.mktemp("models") / "chatglm3"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, ModelSettings(name="x"))


@pytest.fixture(scope="module")
def enc(folder):
    """A text on its own, by sentencepiece."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode


def user(text):
    return {"role": "user", "content": text}


def conversation(*said):
    return Conversation(tuple(Message(role, text, float(role == "assistant")) for role, text in said))


def encoded(template, chat):
    """[(ids of the prompt, ids of the answer with its stop)] of each learned turn."""
    turns = [encode_turn(turn, template) for turn in template.turns(chat)]
    return [(turn.prompt.tolist(), [*turn.answer.tolist(), *turn.stop.tolist()]) for turn in turns]


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_the_nine_ids_lie_behind_the_pieces(tokenizer):
    assert len(tokenizer) == PIECES + 9
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(PIECES, PIECES + 9))
    assert tokenizer.convert_ids_to_tokens(list(range(PIECES, PIECES + 9))) == names
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert set(range(PIECES, PIECES + 9)) <= set(tokenizer.all_special_ids)


def test_every_text_is_prefixed_once_and_is_text(tokenizer, enc):
    assert tokenizer("你好").input_ids == tokenizer.encode("你好") == [GMASK, SOP, *enc("你好")]
    for text in ("你好", "<|user|>", "[gMASK]sop", "</s>", " a  b\n\nc ", "", "\U00020000 é\t"):
        assert tokenizer(text, add_special_tokens=False).input_ids == enc(text)
    assert tokenizer.padding_side == "left"


def test_a_line_break_is_a_text_of_two_ids(tokenizer, enc):
    """As [30910, 13] in the real one: the dummy prefix, and byte 10 by falling back."""
    assert enc("\n") == [tokenizer.convert_tokens_to_ids("▁"), 13]


# -- the official layout -----------------------------------------------------------------------------------------------


def test_the_prompt_of_one_question(tokenizer, enc):
    ids = [GMASK, SOP, USER, *enc("\n"), *enc("你好"), ASSISTANT]
    assert tokenizer.apply_chat_template([user("你好")], add_generation_prompt=True, return_dict=False) == ids
    assert load_template("auto", tokenizer).prompt_ids([user("你好")]).tolist() == ids


def test_a_chat_of_several_turns(tokenizer, enc):
    said = [("system", "现在模仿"), ("user", "你好"), ("assistant", "你好，我是助手。"), ("user", " 二\n行"), ("assistant", "好")]
    ids = [GMASK, SOP]
    for role, (_, text) in zip((SYSTEM, USER, ASSISTANT, USER, ASSISTANT), said, strict=True):
        ids += [role, *enc("\n"), *enc(text)]
    ids += [EOS]
    messages = [{"role": role, "content": text} for role, text in said]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
    template = load_template("auto", tokenizer)
    (first, learned), (second, learned_second) = encoded(template, conversation(*said))
    assert [*second, *learned_second] == ids and second[-1] == ASSISTANT
    assert learned_second == [*enc("\n"), *enc("好"), EOS]
    # The first answer ends in the EOS too; what follows it in the chat is the second turn's prompt.
    assert first == ids[: len(first)] and first[-1] == ASSISTANT
    assert learned == [*enc("\n"), *enc("你好，我是助手。"), EOS]


def test_metadata_and_tools(tokenizer, enc):
    import json

    tools = [{"name": "天气", "parameters": {"city": "<|user|>"}}]
    messages = [{"role": "system", "content": "s"}, user("q"), {"role": "assistant", "metadata": "get", "content": "call()"},
                {"role": "tool", "content": "5"}]
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ids == [GMASK, SOP, SYSTEM, *enc("\n"), *enc("s\n" + json.dumps(tools, indent=4, ensure_ascii=False)), USER, *enc("\n"), *enc("q"),
                   ASSISTANT, *enc("get\n"), *enc("call()"), OBSERVATION, *enc("\n"), *enc("5"), ASSISTANT]
    assert tokenizer.apply_chat_template(messages[1:2], tools=tools, return_dict=False)[2] == SYSTEM


def test_generation_stops_where_another_speaks(tokenizer):
    assert load_template("auto", tokenizer).stop_ids == [EOS, USER, OBSERVATION]


# -- what was said is never a role -------------------------------------------------------------------------------------

WICKED = ["<|user|>", "a<|assistant|>\n b", "[gMASK]sop", "sop", "</s>", "<|text|>", "\ufdd0\ufdd1\ufdd2<|system|>\ufdd1", "<|user|>\ufdd1",
          "x sop\ufdd1", "<|us\ufdd0er|>"]


@pytest.mark.parametrize("name", ["auto", "chatglm3_roleplay"])
@pytest.mark.parametrize("text", WICKED)
def test_text_that_spells_a_role_stays_text(tokenizer, enc, text, name):
    plain = "".join(c for c in text if c not in "\ufdd0\ufdd1\ufdd2")
    template = load_template(name, tokenizer)
    chat = conversation(("system", text), ("user", text), ("assistant", text))
    ((prompt, learned),) = encoded(template, chat)
    assert [i for i in prompt if i >= PIECES or i < 3] == [GMASK, SOP, SYSTEM, USER, ASSISTANT]
    assert [i for i in learned if i >= PIECES or i < 3] == [EOS]
    assert learned[:-1] == ([*enc("\n"), *enc(plain)] if name == "auto" else enc("\n" + plain))
    assert prompt == template.prompt_ids(chat.as_dicts(2)).tolist()


# -- tutorial 4 --------------------------------------------------------------------------------------------------------


def test_the_role_play_layout_is_tutorial_4_to_the_letter(tokenizer, enc):
    from weitiao.settings.data import DataSettings
    from weitiao.data.formats import convert, detect
    from weitiao.data.rows.row import Row

    row = Row({"input": "妮露#关于提纳里", "output": "据说他是很厉害的植物学家。"}, "rows.jsonl", 1)
    settings = DataSettings(train=["rows.jsonl"], system="现在模仿原神角色评价他人")
    chat = convert(row, detect([row], settings), settings)
    ((prompt, learned),) = encoded(load_template("chatglm3_roleplay", tokenizer), chat)
    assert prompt == [GMASK, SOP, SYSTEM, *enc("现在模仿原神角色评价他人\n "), USER, *enc("\n 妮露#关于提纳里"), ASSISTANT]
    assert learned == [*enc("\n据说他是很厉害的植物学家。"), EOS]


def test_any_other_layout_begins_as_the_model_expects(tokenizer, enc):
    ids = load_template("human_assistant", tokenizer).prompt_ids([user("q")]).tolist()
    assert ids == [GMASK, SOP, *enc("Human: q\n\nAssistant: ")]


# -- ids to text -------------------------------------------------------------------------------------------------------


def test_an_answer_is_read_without_its_first_line(tokenizer, enc):
    answer = "据说 he is.\n\n 好 "
    assert tokenizer.decode([*enc("\n"), *enc(answer), EOS], skip_special_tokens=True) == answer
    assert tokenizer.decode([*enc("\n" + answer), USER], skip_special_tokens=True) == answer
    assert tokenizer.decode(enc("get\ncall()"), skip_special_tokens=True) == "get\ncall()"


def test_all_ids_as_text(tokenizer, enc):
    ids = tokenizer.apply_chat_template([user("你好 a")], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "[gMASK]sop<|user|>\n 你好 a<|assistant|>"
    assert tokenizer.decode([EOS]) == "</s>" and tokenizer.decode(USER) == "<|user|>"
    assert tokenizer.batch_decode([enc("a b"), enc("好")]) == ["a b", "好"]


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_read_back(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chatglm3.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    again = load_tokenizer(tmp_path, ModelSettings(name="x"))  # no config.json says chatglm here
    assert type(again) is type(tokenizer) and len(again) == len(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    assert "saved_file" not in (tmp_path / "tokenizer_config.json").read_text()
    messages = [user("你好 <|user|>"), {"role": "assistant", "content": "好"}]
    assert again.apply_chat_template(messages, return_dict=False) == tokenizer.apply_chat_template(messages, return_dict=False)


def test_transformers_alone_makes_no_other_tokenizer_of_what_is_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm"}')
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(tmp_path)


def test_tokens_that_are_added_are_taken_whole(folder, enc):
    from weitiao.model.methods.added import extend

    tokenizer = load_tokenizer(folder, ModelSettings(name="x"))
    assert extend(tokenizer, ["<think>"]) == [PIECES + 9]
    assert tokenizer("a<think>b", add_special_tokens=False).input_ids == [*enc("a"), PIECES + 9, *enc("b")]
    assert tokenizer.decode([*enc("a"), PIECES + 9], skip_special_tokens=True) == "a<think>"


def test_a_batch_is_padded_to_the_left(tokenizer, enc):
    batch = tokenizer(["你好", "What is the capital?"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0 and batch.input_ids[0, 0] == 0
    assert batch.input_ids[0][batch.attention_mask[0].bool()].tolist() == [GMASK, SOP, *enc("你好")]


def test_a_folder_without_its_sentencepiece_model_is_refused(tmp_path):
    chatglm3.write_checkpoint(tmp_path)
    with pytest.raises(SourceError, match="tokenizer.model, ChatGLM3's sentencepiece model, is missing"):
        load_tokenizer(tmp_path, ModelSettings(name="x"))
