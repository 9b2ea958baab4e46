"""Yuan2's tokens, id for id. The judge is sentencepiece itself: a text between two named tokens is encoded on its own."""

from __future__ import annotations

import json

import pytest
from yuan2 import BEHIND, LATER, NAMED, ROW, write_tokenizer

from weitiao.data import dataset
from weitiao.data.conversation import Conversation, Message
from weitiao.data.templates import FOLDER, load_template
from weitiao.data.tokens import encode_turn
from weitiao.errors import SourceError
from weitiao.model.families.yuan2_tokenizer import Yuan2Tokenizer
from weitiao.model.load import load_tokenizer
from weitiao.settings.data import DataSettings
from weitiao.settings.model import ModelSettings

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("models") / "yuan2")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, ModelSettings(name="x"))


@pytest.fixture(scope="module")
def pieces(folder):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """(the real tokenizer, sentencepiece on its file)"""
    from sentencepiece import SentencePieceProcessor

    copy = tmp_path_factory.mktemp("models") / "real"
    copy.mkdir()
    for file in (shared / "tokenizers/yuan2").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text('{"model_type": "yuan"}')
    return load_tokenizer(copy, ModelSettings(name="x")), SentencePieceProcessor(model_file=str(copy / "tokenizer.model"))


def said(*messages):
    return Conversation(tuple(Message(role, text, float(role == "assistant")) for role, text in messages))


def encoded(template, *messages):
    """(ids of the prompt, ids that are learned) of each turn."""
    turns = [encode_turn(turn, template) for turn in template.turns(said(*messages))]
    return [(turn.prompt.tolist(), [*turn.answer.tolist(), *turn.stop.tolist()]) for turn in turns]


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_named_tokens_are_pieces_or_lie_behind_them(tokenizer, pieces):
    assert isinstance(tokenizer, Yuan2Tokenizer) and len(tokenizer) == len(pieces) + 5
    assert tokenizer.convert_tokens_to_ids(BEHIND) == [len(pieces) + i for i in range(5)]
    assert tokenizer.convert_tokens_to_ids([*NAMED, *LATER]) == [pieces.piece_to_id(t) for t in [*NAMED, *LATER]]
    assert tokenizer.eos_token == tokenizer.pad_token == "<eod>" and tokenizer.padding_side == "left"
    assert tokenizer.convert_ids_to_tokens([pieces.piece_to_id("<sep>"), len(pieces)]) == ["<sep>", "<mask>"]


def test_the_real_ids(real):
    tokenizer, pieces = real
    assert len(pieces) == 134_953 and len(tokenizer) == 134_958
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", *NAMED]) == [0, 1, 2, 77185, 77186, 77187, 77188]
    assert tokenizer.convert_tokens_to_ids(LATER) == list(range(96630, 96638))
    assert tokenizer.convert_tokens_to_ids(BEHIND) == list(range(134_953, 134_958))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (77185, 77185)


@pytest.mark.parametrize("text", ["你好", " a  b\n\nc ", "", "\n", "<n>", "a<n>b", "</s>", "\U00020000 é\t", "x yz xyz", "12 345", "<", "<sep"])
def test_a_text_is_what_sentencepiece_makes_of_it(tokenizer, pieces, text):
    assert tokenizer(text).input_ids == tokenizer.encode(text) == pieces.encode(text)


def test_a_text_is_parted_at_named_tokens_and_each_part_begins_anew(tokenizer, pieces):
    def named(token):
        return tokenizer.convert_tokens_to_ids(token)

    enc = pieces.encode
    assert tokenizer("a<sep>b <eod>").input_ids == [*enc("a"), named("<sep>"), *enc("b "), named("<eod>")]
    assert tokenizer("<sep><sep> b").input_ids == [named("<sep>"), named("<sep>"), *enc(" b")]
    assert tokenizer("<FIM_PREFIX>def<FIM_SUFFIX>").input_ids == [named("<FIM_PREFIX>"), *enc("def"), named("<FIM_SUFFIX>")]
    assert tokenizer(["a", "b<sep>"], padding=True).attention_mask == [[0, *[1] * len(enc("a"))], [1] * (1 + len(enc("b")))]


def test_tokens_that_are_added_are_taken_whole(folder, pieces):
    from weitiao.model.methods.added import extend

    tokenizer = load_tokenizer(folder, ModelSettings(name="x"))
    assert extend(tokenizer, ["<think>"]) == [len(pieces) + 5]
    assert tokenizer("a<think>b").input_ids == [*pieces.encode("a"), len(pieces) + 5, *pieces.encode("b")]
    assert tokenizer.decode(tokenizer("a<think>b").input_ids, skip_special_tokens=True) == "a<think> b"


# -- tutorial 1 --------------------------------------------------------------------------------------------------------


def test_a_row_of_tutorial_1(tokenizer, pieces):
    template = load_template("auto", tokenizer)
    assert (template.stop_ids, template.begins_with_bos) == ([tokenizer.eos_token_id], False)
    ((prompt, learned),) = encoded(template, ("user", ROW["input"]), ("assistant", ROW["output"]))
    assert prompt == [*pieces.encode(ROW["input"]), pieces.piece_to_id("<sep>")] == template.prompt_ids([{"role": "user", "content": ROW["input"]}]).tolist()
    assert learned == [*pieces.encode(ROW["output"]), tokenizer.eos_token_id]
    assert pieces.id_to_piece(learned[0]).startswith("▁")
    assert tokenizer.decode([*prompt, *learned]) == ROW["input"] + "<sep> " + ROW["output"] + "<eod>"
    assert tokenizer.decode(learned) == ROW["output"] + "<eod>"
    assert tokenizer.decode(learned, skip_special_tokens=True) == ROW["output"]


@pytest.mark.parametrize("name", ["auto", "yuan2"])
@pytest.mark.parametrize("answer", [" a", "a ", "a\n", "a<eod>", "<sep>", "\n\na"])
def test_an_answer_is_learned_as_it_stands(tokenizer, name, answer):
    ((prompt, learned),) = encoded(load_template(name, tokenizer), ("user", " q \n"), ("assistant", answer))
    assert prompt == tokenizer(" q \n<sep>").input_ids and learned == tokenizer(answer + "<eod>").input_ids


def test_all_200_rows_of_tutorial_1(real, shared):
    tokenizer, pieces = real
    settings = DataSettings(train=str(shared / "data/resume/seed_200.json"), max_tokens=384)
    loaded = dataset.load(settings.train, settings, load_template("auto", tokenizer), 8192, 135_040, seed=42)
    rows = json.loads((shared / "data/resume/seed_200.json").read_text("utf-8"))
    assert len(loaded) == len(rows) == 200 and loaded.cut == 0
    assert max(len(row.examples[0]) for row in loaded.rows) == 356
    for row, trained in zip(rows, loaded.rows, strict=True):
        (example,) = trained.examples
        learned = example.weights > 0
        prompt, answer = [*pieces.encode(row["input"]), 77187], [*pieces.encode(row["output"]), 77185]
        assert example.ids[~learned].tolist() == prompt and example.ids[learned].tolist() == answer
        assert tokenizer.decode(example.ids) == row["input"] + "<sep> " + row["output"] + "<eod>"
        assert tokenizer.decode(example.ids[learned]) == row["output"] + "<eod>"
    text = tokenizer.decode(loaded.rows[0].examples[0].ids)
    assert text.endswith('返回结果。<sep> {"姓名": ["高勇"], "国籍": ["中国国籍"]}<eod>')


# -- chats -------------------------------------------------------------------------------------------------------------


def test_a_chat_of_several_turns_is_learned_as_it_will_be_asked(tokenizer):
    chat = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    template = load_template("auto", tokenizer)
    turns = list(template.turns(said(*chat)))
    assert [(turn.prompt, turn.answer) for turn in turns] == [("s\nq1<sep>", "a1"), ("s\nq1<n>a1<n>q2<sep>", "a2")]
    asked = [{"role": role, "content": text} for role, text in chat[:4]]
    assert template.prompt_ids(asked).tolist() == encoded(template, *chat)[1][0] == tokenizer("s\nq1<n>a1<n>q2<sep>").input_ids


def test_the_named_template_is_the_default_one(tokenizer):
    assert tokenizer.chat_template == (FOLDER / "yuan2.jinja").read_text("utf-8")


def test_a_template_that_ends_no_answer_is_not_taken(folder, tmp_path):
    """In some releases tokenizer_config.json brings one; it writes the same prompts."""
    write_tokenizer(tmp_path)
    theirs = ("{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'].strip() + '\\n' }}"
              "{% else %}{{ message['content'].strip() + (sep_token if loop.last else '<n>') }}{% endif %}{% endfor %}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    more = {"chat_template": theirs, "sep_token": "<sep>", "eod_token": "<eod>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
    tokenizer = load_tokenizer(tmp_path, ModelSettings(name="x"))
    ours = load_template("auto", tokenizer)
    assert ours.stop_ids == [tokenizer.convert_tokens_to_ids("<eod>")]
    chat = [{"role": role, "content": text} for role, text in [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3")]]
    assert ours.render(chat, answer_next=True) == tokenizer.apply_chat_template(chat, chat_template=theirs, tokenize=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0]['content'] }}!"}))
    assert load_tokenizer(tmp_path, ModelSettings(name="x")).chat_template == "{{ messages[0]['content'] }}!"


# -- ids to text -------------------------------------------------------------------------------------------------------


def test_ids_as_text(tokenizer, pieces):
    assert tokenizer.decode(tokenizer.eos_token_id) == "<eod>" and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer("a<sep>b").input_ids) == "a<sep> b"
    assert tokenizer.decode(tokenizer("a<sep>b").input_ids, skip_special_tokens=True) == "a b"
    assert tokenizer.decode([len(tokenizer), *pieces.encode("a")]) == "a"  # an id of the embedding that is no token
    assert tokenizer.batch_decode([pieces.encode("a b"), pieces.encode(" 好")]) == ["a b", " 好"]
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("Paris<sep>")) == "Paris<sep>"
    assert tokenizer.decode(pieces.encode("\U00020000")[:-1]).endswith("\ufffd")


def test_a_streamed_answer_is_the_answer(tokenizer):
    import torch

    from weitiao.model.generate import streamer_for

    streamer = streamer_for(tokenizer)
    streamer.put(torch.tensor([tokenizer("问<sep>").input_ids]))
    answer = "输出: What is 好\n\n    # 样例 é\U00020000\n x\n"
    for token in tokenizer(answer + "<eod>").input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    told = list(streamer)
    assert "".join(told) == answer and len([t for t in told if t]) > 5


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_read_back(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "yuan2.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = load_tokenizer(tmp_path, ModelSettings(name="x"))  # no config.json says yuan here
    assert type(again) is Yuan2Tokenizer and again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template and again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<sep>b <mask><eod>").input_ids == tokenizer("a<sep>b <mask><eod>").input_ids


def test_transformers_alone_makes_no_other_tokenizer_of_what_is_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.needs_weitiao
    for kind in ("llama", "yuan"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises((OSError, ValueError)):
            AutoTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_its_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "yuan"}')
    with pytest.raises(SourceError, match="tokenizer.model, Yuan2's sentencepiece model, is missing"):
        load_tokenizer(tmp_path, ModelSettings(name="x"))


# -- where others read the same file otherwise --------------------------------------------------------------------------


def test_rows_that_the_conversion_reads_otherwise_are_counted(tokenizer):
    assert tokenizer.tokenize("xyz") == ["▁", "xy", "z"] and tokenizer.converted().tokenize("xyz") == ["▁x", "yz"]
    rows = [("a.json:1", "你好<sep>", "Paris"), ("a.json:2", "xyz<sep>", "Paris"), ("a.json:3", "q<sep>", "xyz")]
    note = tokenizer.conversion_note(iter(rows))
    assert note.startswith("Of 3 rows looked at, 2 (a.json:2 the first) have other token ids in transformers' conversion")
    assert "sentencepiece's own ids" in note and "a server that converts the tokenizer by itself sends the model other ids" in note
    assert tokenizer.conversion_note(rows[:1]) == tokenizer.conversion_note([]) == ""


def test_a_long_data_set_is_not_read_to_its_end(tokenizer):
    def endless():
        for i in range(10**9):
            assert i <= 1000
            yield f"a.json:{i}", "你好<sep>", "xyz"

    assert tokenizer.conversion_note(endless()).startswith("Of 1,000 rows looked at, 1,000 (a.json:0 the first)")
    long = ("a.json:1", "你好 " * 200_000, "xyz")
    assert tokenizer.conversion_note(long for _ in range(9)).startswith("Of 2 rows looked at, 2 ")


def test_a_conversion_that_fails_stops_nothing(tokenizer, monkeypatch):
    import transformers

    def fail(*a, **k):
        raise RuntimeError("no")

    monkeypatch.setattr(transformers.LlamaTokenizer, "from_pretrained", fail)
    assert tokenizer.conversion_note([("a.json:1", "xyz", "xyz")]) == ""


@pytest.mark.parametrize("file, rows, count", [
    ("resume/train_instruct.jsonl", 1000, 8), ("alpaca_zh/alpaca_zh_demo.json", 1000, 164), ("alpaca_en/alpaca_en_demo.json", 999, 916)])
def test_the_count_on_real_rows(real, shared, file, rows, count):
    tokenizer, _ = real
    settings = DataSettings(train=str(shared / "data" / file), bad_share=1)
    template = load_template("auto", tokenizer)
    loaded = dataset.load(settings.train, settings, template, 8192, 135_040, seed=42)
    told = ((row.where, turn.prompt, turn.answer) for row in loaded.rows for turn in template.turns(row.conversation))
    assert tokenizer.conversion_note(told).startswith(f"Of {rows:,} rows looked at, {count} (")
