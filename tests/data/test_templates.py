"""A prompt in training is the prompt at inference, id for id; an answer ends in one known id; one BOS at most."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from weitiao.data.conversation import Conversation, Message
from weitiao.data.templates import load_template, named_templates
from weitiao.data.tokens import encode_turn
from weitiao.errors import TemplateError

CHAT = (("system", "Be brief."), ("user", "1+1?"), ("assistant", "2."), ("user", "你好 "), ("assistant", "你好！\nHi."))

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Llama 2 and Mistral write: spaces of the template's own around an answer, and the EOS behind it.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# As reasoning models write: earlier answers lose what stands before </think>, and the generation prompt opens a thought.
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('starts with the user') }}{% endif %}" + BARE


def byte_tokenizer(special, adds_bos=False, chat_template=None, **roles):
    """A token a byte, and the special ones: ids 0, 1, … in their order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    if adds_bos:
        bos = roles["bos_token"]
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    made.chat_template = chat_template
    return made


@pytest.fixture(scope="module")
def llama_3():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_tokenizer(special, True, LLAMA_3, bos_token=special[0], eos_token=special[1])


@pytest.fixture(scope="module")
def bare():
    """A tokenizer as a base model brings it: <s> before a text, </s>, and no chat template."""
    return byte_tokenizer(["<s>", "</s>", "<unk>"], True, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tokenizer, llama_3, bare):
    thinking = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], chat_template=THINK, eos_token="<|endoftext|>")
    inst = byte_tokenizer(["<s>", "</s>"], True, INST, bos_token="<s>", eos_token="</s>")
    own = byte_tokenizer(["<s>", "</s>"], True, BARE, bos_token="<s>", eos_token="</s>")
    return {"own": own, "chatml": tokenizer, "llama 3": llama_3, "bare": bare, "thinking": thinking, "inst": inst}


def conversation(*said, **more):
    return Conversation(tuple(Message(role, text, float(role == "assistant")) for role, text in said), **more)


def encoded(template, chat):
    """[(ids of the prompt, ids of the answer with its stop)] of each learned turn."""
    turns = [encode_turn(turn, template) for turn in template.turns(chat)]
    return [(turn.prompt.tolist(), [*turn.answer.tolist(), *turn.stop.tolist()]) for turn in turns]


def rendered_by_transformers(template, messages, answer_next):
    """The independent judge: the ids that transformers itself makes of a chat, and one BOS where the tokenizer adds one."""
    tokenizer = template.tokenizer
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template.source, add_generation_prompt=answer_next, tokenize=True, return_dict=False,
    )
    bos = tokenizer("").input_ids if template.name != "auto" else []
    return ids if ids[:1] == bos else [*bos, *ids]


# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [
    (kind, name) for kind in ("chatml", "llama 3", "bare", "thinking", "inst", "own") for name in ("auto", *named_templates())
])
def test_the_prompt_in_training_is_the_prompt_at_inference(tokenizers, kind, name):
    template = load_template(name, tokenizers[kind])
    chat = conversation(*CHAT)
    turns = encoded(template, chat)
    assert len(turns) == 2
    for place, (prompt, _) in zip(chat.turns(), turns, strict=True):
        before = chat.as_dicts(place)
        assert prompt == template.prompt_ids(before).tolist() == rendered_by_transformers(template, before, True)


@pytest.mark.parametrize("kind, name", [
    *((kind, "auto") for kind in ("chatml", "llama 3", "bare", "inst")), *(("chatml", name) for name in named_templates()),
])
def test_prompt_and_answer_are_what_the_template_writes_of_the_whole_chat(tokenizers, kind, name):
    template = load_template(name, tokenizers[kind])
    chat = conversation(*CHAT)
    for place, (prompt, answer) in zip(chat.turns(), encoded(template, chat), strict=True):
        whole = rendered_by_transformers(template, chat.as_dicts(place + 1), False)
        assert [*prompt, *answer] == whole[: len(prompt) + len(answer)]


def test_where_a_template_rewrites_what_was_said_each_turn_keeps_the_prompt_it_would_meet(tokenizers):
    template = load_template("auto", tokenizers["thinking"])
    chat = conversation(("user", "q1"), ("assistant", "hm</think>a1"), ("user", "q2"), ("assistant", "so</think>a2"))
    turns = [(turn.prompt, turn.answer) for turn in template.turns(chat)]
    assert turns == [
        ("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n", "hm</think>a1"),
        ("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
         "<|im_start|>assistant\n<think>\n", "so</think>a2"),
    ]


@pytest.mark.parametrize("name", ["auto", *named_templates()])
def test_a_chat_is_written_as_apply_chat_template_writes_it(tokenizer, shared, name):
    template = load_template(name, tokenizer)
    rows = json.loads((shared / "data/alpaca_zh/alpaca_zh_demo.json").read_text("utf-8"))[:50]
    chats = [[{"role": "user", "content": row["instruction"] + row["input"]}, {"role": "assistant", "content": row["output"]}] for row in rows]
    for chat in chats:
        for upto, answer_next in ((1, True), (2, False)):
            expected = tokenizer.apply_chat_template(chat[:upto], chat_template=template.source, add_generation_prompt=answer_next, tokenize=False)
            assert template.render(chat[:upto], answer_next) == expected


def test_a_template_goes_to_another_process(tokenizer):
    template = load_template("auto", tokenizer)
    before = template.prompt_ids([{"role": "user", "content": "1+1?"}])
    again = pickle.loads(pickle.dumps(template))
    assert again.source == template.source and np.array_equal(again.prompt_ids([{"role": "user", "content": "1+1?"}]), before)


def test_tools_reach_the_prompt():
    names = "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}"
    made = byte_tokenizer(["</s>"], chat_template=names + BARE, eos_token="</s>")
    template = load_template("auto", made)
    chat = conversation(("user", "q"), ("assistant", "a"), tools=({"name": "weather"},))
    (turn,) = template.turns(chat)
    assert turn.prompt == "weather;q\n"
    assert encode_turn(turn, template).prompt.tolist() == template.prompt_ids(chat.as_dicts(1), chat.tools).tolist()


# -- tutorial 0 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction, given, prompt", [
    ("如何写好一个简历？", "", "Human: 如何写好一个简历？\n\nAssistant: "),
    ("翻译成英文", "你好", "Human: 翻译成英文\n你好\n\nAssistant: "),
])
def test_human_assistant_is_tutorial_0_to_the_letter(bare, instruction, given, prompt):
    from weitiao.settings.data import DataSettings
    from weitiao.data.formats import convert
    from weitiao.data.rows.row import Row

    template = load_template("human_assistant", bare)
    row = Row({"instruction": instruction, "input": given, "output": "一份好简历……"}, "rows.json", 1)
    chat = convert(row, "instruction", DataSettings(train=["rows.json"]))
    (turn,) = template.turns(chat)
    assert (turn.prompt, turn.answer) == (prompt, "一份好简历……")
    ((given_ids, learned),) = encoded(template, chat)
    assert bare.decode(given_ids) == "<s>" + prompt
    assert bare.decode(learned) == "一份好简历……</s>"


def test_a_tokenizer_without_a_chat_template_gets_human_assistant(bare):
    template = load_template("auto", bare)
    assert template.name == "human_assistant"
    assert template.render([{"role": "user", "content": "q"}], True) == "Human: q\n\nAssistant: "


@pytest.mark.parametrize("name, text", [
    ("alpaca", "Be brief.\n\n### Instruction:\n1+1?\n\n### Response:\n2.<eos>\n\n### Instruction:\n你好\n\n### Response:\n"),
    ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2.<|im_end|>\n"
               "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"),
    ("chatglm3_roleplay", "<|system|>Be brief.\n <|user|>\n 1+1?<|assistant|>\n2.<eos><|user|>\n 你好<|assistant|>"),
    ("human_assistant", "Be brief.\n\nHuman: 1+1?\n\nAssistant: 2.<eos>\n\nHuman: 你好\n\nAssistant: "),
    ("plain", "Be brief.1+1?2.<eos>你好"),
    ("yuan2", "Be brief.\n1+1?<n>2.<n>你好<sep>"),
])
def test_each_named_template_as_it_is_written(name, text):
    made = byte_tokenizer(["<eos>"], eos_token="<eos>")
    said = [{"role": role, "content": text.strip()} for role, text in CHAT[:4]]
    assert load_template(name, made).render(said, True) == text


# -- the stop token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, stop", [
    ("chatml", "<|im_end|>"),
    ("llama 3", "<|eot_id|>"),  # not the EOS, which is <|end_of_text|>
    ("inst", "</s>"),
    ("thinking", "<|im_end|>"),  # not the EOS, and found although the prompt is no prefix of the whole
    ("bare", "</s>"),
])
def test_the_stop_token_is_what_the_template_writes_after_an_answer(tokenizers, kind, stop):
    tokenizer = tokenizers[kind]
    template = load_template("auto", tokenizer)
    assert template.stop_id == tokenizer.convert_tokens_to_ids(stop)
    for _, learned in encoded(template, conversation(*CHAT)):
        assert learned[-1] == template.stop_id and learned.count(template.stop_id) == 1


def test_generation_stops_at_the_learned_stop_and_at_the_eos(llama_3):
    assert load_template("auto", llama_3).stop_ids == [4, 1]
    assert load_template("human_assistant", llama_3).stop_ids == [1]


def test_a_template_that_writes_no_special_token_stops_at_the_eos():
    made = byte_tokenizer(["</s>"], chat_template=BARE, eos_token="</s>")
    template = load_template("auto", made)
    ((_, learned),) = encoded(template, conversation(("user", "q"), ("assistant", "a\n")))
    assert made.decode(learned) == "a\n</s>"  # the newline of the row, not the one of the template


def test_markers_that_are_no_tokens_are_not_learned_as_text(bare):
    template = load_template("chatml", bare)
    ((_, learned),) = encoded(template, conversation(("user", "q"), ("assistant", "a")))
    assert bare.decode(learned) == "a</s>"


def test_a_marker_that_is_unknown_to_the_tokenizer_is_no_stop():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "q": 2, "a": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    assert load_template("chatml", made).stop_id == 1


def test_the_spaces_that_a_template_writes_around_an_answer_are_learned_with_it(tokenizers):
    template = load_template("auto", tokenizers["inst"])
    (turn,) = template.turns(conversation(("user", "q"), ("assistant", "a")))
    assert (turn.prompt, turn.answer) == ("<s>[INST] q [/INST]", " a ")


def test_what_the_template_strips_of_an_answer_is_not_learned(llama_3):
    (turn,) = load_template("auto", llama_3).turns(conversation(("user", "q"), ("assistant", " a\n")))
    assert turn.answer == "a"


def test_an_answer_that_speaks_of_the_stop_token_is_learned_to_its_end(tokenizer):
    (turn,) = load_template("auto", tokenizer).turns(conversation(("user", "q"), ("assistant", "<|im_end|> ends it.")))
    assert turn.answer == "<|im_end|> ends it."


def test_a_template_that_cannot_be_asked_still_ends_its_answers_once():
    strict = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
        "{{ m['content'] + (eos_token + '\n' if m['role'] == 'assistant' else '\n') }}{% endfor %}"
    )
    made = byte_tokenizer(["</s>"], chat_template=strict, eos_token="</s>")
    (turn,) = load_template("auto", made).turns(conversation(("system", "s"), ("user", "q"), ("assistant", "</s> ends it")))
    assert turn.answer == "</s> ends it"


def test_a_tokenizer_that_never_stops_is_refused():
    with pytest.raises(TemplateError) as caught:
        load_template("human_assistant", byte_tokenizer(["<s>"], bos_token="<s>"))
    assert str(caught.value) == (
        "The tokenizer has no EOS token, and the template writes none after an answer: the model would never stop.\n"
        "Choose a template that ends its answers (data.template), or set eos_token in tokenizer_config.json."
    )
    chatml = byte_tokenizer(["<|im_start|>", "<|im_end|>"], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert load_template("chatml", chatml).stop_ids == [1]


# -- one BOS at most ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name, bos", [
    ("bare", "auto", 1), ("bare", "plain", 1), ("bare", "chatml", 1),  # the tokenizer adds it
    ("llama 3", "auto", 1), ("inst", "auto", 1),  # the template writes it, and the tokenizer would add another
    ("own", "auto", 0),  # the tokenizer's own template has the last word: chats of this model begin without
    ("chatml", "auto", 0), ("chatml", "plain", 0), ("thinking", "auto", 0),
])
def test_one_bos_at_most_and_at_the_start(tokenizers, kind, name, bos):
    tokenizer = tokenizers[kind]
    for prompt, learned in encoded(load_template(name, tokenizer), conversation(*CHAT)):
        whole = [*prompt, *learned]
        assert whole.count(tokenizer.bos_token_id) == bos
        assert bos == 0 or whole[0] == tokenizer.bos_token_id


def test_a_file_that_writes_the_bos_itself_gets_no_second(bare, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(INST)
    template = load_template(str(file), bare)
    assert template.begins_with_bos
    ((prompt, _),) = encoded(template, conversation(("user", "q"), ("assistant", "a")))
    assert bare.decode(prompt) == "<s>[INST] q [/INST]" and prompt.count(0) == 1


# -- which template ----------------------------------------------------------------------------------------------------


def test_a_jinja_file(tmp_path, bare):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>", "utf-8")
    template = load_template(str(file), bare)
    assert template.render([{"role": "user", "content": "你好"}], True) == "<user>你好<assistant>"
    assert template.name == str(file) and template.source == file.read_text("utf-8")


def test_a_template_is_known_by_the_hash_of_its_text(tokenizer, bare):
    assert load_template("chatml", tokenizer).hash == load_template("chatml", bare).hash
    assert load_template("plain", tokenizer).hash != load_template("alpaca", tokenizer).hash


def test_an_unknown_template_is_refused_with_the_nearest(tokenizer):
    with pytest.raises(TemplateError) as caught:
        load_template("chatlm", tokenizer)
    assert str(caught.value) == (
        "There is no template 'chatlm'. Did you mean 'chatml'?\n"
        "Expected one of auto, alpaca, chatglm3_roleplay, chatml, human_assistant, label, plain, yuan2, or a .jinja file."
    )


def test_a_missing_jinja_file_is_refused_with_the_nearest(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text(BARE)
    with pytest.raises(TemplateError) as caught:
        load_template("mime.jinja", tokenizer)
    assert str(caught.value) == (
        "There is no template file mime.jinja.\nDid you mean 'mine.jinja'?\n"
        "Give the path of a .jinja file, or one of auto, alpaca, chatglm3_roleplay, chatml, human_assistant, label, plain, yuan2 (data.template)."
    )


def test_a_file_that_is_no_jinja_is_refused_before_any_row(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{% for m in messages %}\n{{ m['content' }}\n{% endfor %}")
    with pytest.raises(TemplateError) as caught:
        load_template("mine.jinja", tokenizer)
    message = str(caught.value)
    assert message.startswith("The template 'mine.jinja' is no jinja: line 2: ")
    assert message.endswith("\nMend it, or choose another (data.template).")


def test_a_template_that_refuses_a_chat_says_so():
    made = byte_tokenizer(["</s>"], chat_template=STRICT, eos_token="</s>")
    template = load_template("auto", made)
    with pytest.raises(TemplateError, match="The template 'auto' refuses the conversation: starts with the user"):
        template.prompt_ids([{"role": "system", "content": "s"}])
    assert made.decode(template.prompt_ids([{"role": "user", "content": "q"}])) == "q\n"


# -- real tokenizers and real rows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alpaca_zh(shared):
    rows = json.loads((shared / "data/alpaca_zh/alpaca_zh_demo.json").read_text("utf-8"))
    return rows[::20]  # 50 of the 1,000


def tutorial_0_prompt(row):
    """The formula of tutorial 0's page, written anew."""
    return "\n".join(["Human: " + row["instruction"], row["input"]]).strip() + "\n\nAssistant: "


def test_gpt2_meets_tutorial_0_on_real_rows(shared, alpaca_zh):
    from transformers import GPT2Tokenizer

    folder = shared / "tokenizers/gpt2"
    gpt2 = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    template = load_template("auto", gpt2)
    assert (template.name, template.stop_id, template.begins_with_bos) == ("human_assistant", 50256, False)
    for row in alpaca_zh:
        question = "\n".join([row["instruction"], row["input"]]).strip()
        ((prompt, learned),) = encoded(template, conversation(("user", question), ("assistant", row["output"])))
        assert prompt == gpt2(tutorial_0_prompt(row)).input_ids == template.prompt_ids([{"role": "user", "content": question}]).tolist()
        assert gpt2.decode([*prompt, *learned]) == tutorial_0_prompt(row) + row["output"] + "<|endoftext|>"


@pytest.fixture(scope="module")
def yuan2(shared):
    def load(**more):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(shared / "tokenizers/yuan2", **more)
        except (ValueError, ImportError) as error:
            pytest.skip(f"transformers cannot read Yuan2's sentencepiece model here (protobuf is not installed?): {error}"[:200])

    return load


def test_yuan2_meets_tutorial_0_on_real_rows(yuan2, alpaca_zh):
    tokenizer = yuan2()
    template = load_template("auto", tokenizer)
    assert (template.name, template.stop_id, template.begins_with_bos) == ("human_assistant", 2, True)
    for row in alpaca_zh:
        question = "\n".join([row["instruction"], row["input"]]).strip()
        ((prompt, learned),) = encoded(template, conversation(("user", question), ("assistant", row["output"])))
        assert [*prompt, 2] == tokenizer(tutorial_0_prompt(row)).input_ids  # this tokenizer ends each text with </s>
        assert prompt == template.prompt_ids([{"role": "user", "content": question}]).tolist()
        assert [*prompt, *learned].count(1) == 1 and learned.count(2) == 1
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() == row["output"].strip()


def test_yuan2_meets_tutorial_1_on_real_rows(yuan2, shared, tmp_path):
    """`input<sep>` is given, `output<eod>` is learned, and there is no BOS."""
    tokenizer = yuan2(add_bos_token=False, add_eos_token=False, eos_token="<eod>")
    tokenizer.add_tokens(["<sep>", "<eod>"], special_tokens=True)
    file = tmp_path / "yuan.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] + ('<eod>' if m['role'] == 'assistant' else '<sep>') }}{% endfor %}")
    template = load_template(str(file), tokenizer)
    assert template.stop_ids == [tokenizer.convert_tokens_to_ids("<eod>")]
    rows = json.loads((shared / "data/resume/seed_200.json").read_text("utf-8"))
    for row in rows[:50]:
        ((prompt, learned),) = encoded(template, conversation(("user", row["input"]), ("assistant", row["output"])))
        assert prompt == tokenizer(row["input"] + "<sep>").input_ids
        assert tokenizer.decode([*prompt, *learned]) == row["input"] + "<sep>" + row["output"] + "<eod>"
        assert not np.isin(tokenizer.bos_token_id, prompt)
