"""One planted row a defect: what is said of it, where it shows, how to mend it; and clean rows, of which nothing is said."""

import json
import time

import pytest

from weitiao import config
from weitiao.data import rows as reading
from weitiao.data.defects import DEFECTS, find_all
from weitiao.data.defects.shown import shown
from weitiao.data.findings import Tally
from weitiao.data.formats import CannotTeach, convert, detect
from weitiao.data.rows.row import Row
from weitiao.errors import RowError
from weitiao.settings.data import DataSettings

SETTINGS = DataSettings(train="rows.jsonl")
QUESTION = "What is the capital of France?"
PAD = " and more of the same"


def conversation_of(fields, format=None):
    row = Row(fields, "rows.jsonl", 1)
    try:
        return convert(row, format or detect([row], SETTINGS), SETTINGS)
    except (CannotTeach, RowError):
        return None


def findings(fields, format=None):
    """name -> Finding"""
    found = {}
    for name, detail in find_all(fields, conversation_of(fields, format)).items():
        tally = Tally()
        tally.add("rows.jsonl:1", detail)
        found[name] = tally.finding(name, DEFECTS[name], 1)
    return found


def answered(answer, prompt=QUESTION):
    return {"prompt": prompt, "completion": answer}


def chat(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


FENCED = "Run this:\n```\nls -l\nand see"
PLANTED = {
    "utf8_as_latin": (answered("A cafÃ© in Paris."), "'Ã©' stands for 'é'", "encoding='utf-8'"),
    "utf8_as_gbk": (answered("浣犲ソ锛屼笘"), "stands for '你好，", "text.encode('gb18030').decode('utf-8')"),
    "gbk_as_latin": (answered("ÄãºÃ"), "'ÄãºÃ' stands for '你好'", "encoding='gb18030'"),
    "mixed_encodings": (answered("我们在北京喝 cafÃ©"), "'Ã©' stands for 'é'", "No one encoding mends the whole file"),
    "lost_characters": (answered("人们使用锟斤拷的水果"), "'人们使用锟斤拷的水果'", "cannot be turned back"),
    "c1_controls": (answered("It\x92s Paris."), "'It[U+0092]s Paris.', where U+0092 stands for ’", "encoding='cp1252'"),
    "control_characters": (answered("Par\x00is"), "'Par[U+0000]is'", "Take them out"),
    "invisible_characters": (answered("Par\u200bis"), "'Par[U+200B]is'", "Take them out, unless they are meant"),
    "private_use": (answered("\uf0b7 Paris"), "'[U+F0B7] Paris'", "PDF"),
    "noncharacters": (answered("Paris\ufdd0"), "'Paris[U+FDD0]'", "broken conversion"),
    "lone_surrogates": (answered("Paris \ud83d"), "'Paris [U+D83D]'", "surrogatepass"),
    "html": (answered("Paris &amp; Lyon"), "'Paris &amp; Lyon'", "html.unescape"),
    "escaped_breaks": (answered("Paris\\nLyon"), "'Paris\\nLyon'", "text.replace('\\\\n', '\\n')"),
    "stand_ins": (answered("nan"), "'nan'", "dropna()"),
    "no_words": (answered(" …?! "), "' …?! '", "fill in their answers"),
    "json_broken": (answered('{"city" "Paris", "n": 1}'), "Expecting ':' delimiter at character 9", "json.dumps"),
    "json_python": (answered("{'city': 'Paris', 'n': 1}"), "{'city': 'Paris'", "ast.literal_eval"),
    "json_cut": (answered('{"city": "Paris", "rivers": ["Seine", "Mar'), "[\"Seine\", \"Mar'", "met a limit of length"),
    "json_and_more": (answered('{"city": "Paris"} I hope this helps'), "I hope this helps", "Take the text out"),
    "json_twice": (answered('{"city": "Paris", "city": "Lyon"}'), "'city' in", "under one name"),
    "foreign_columns": (
        {"指示": "你好", "输入": "", "输出": "你好！"},
        "指示, 输入, 输出: set data.columns='{instruction: 指示, input: 输入, output: 输出}'", "data.columns says which is which"),
    "preference": ({"conversations": [{"from": "human", "value": QUESTION}], "chosen": "Paris.", "rejected": "Lyon."},
                   "chosen, rejected", "completion: chosen"),
    "not_text": ({"prompt": QUESTION, "completion": 1.0}, "completion = 1.0 (float)", "'1.0' is not '1'"),
    "unknown_speaker": (chat(("human", QUESTION), ("narrator", "He thought."), ("gpt", "Paris.")), "'narrator' in turn 2", "Rename the speaker"),
    "same_speaker": (chat(("human", "Hi there."), ("human", QUESTION), ("gpt", "Paris.")), "turns 1 and 2 are both by human", "join them"),
    "begins_with_answer": (chat(("gpt", "How can I help?"), ("human", QUESTION), ("gpt", "Paris.")), "'How can I help?'", "Take it out"),
    "system_inside": (chat(("human", QUESTION), ("system", "Be brief."), ("gpt", "Paris.")), "turn 2: 'Be brief.'", "Put it first"),
    "empty_turn": (chat(("human", QUESTION), ("gpt", "Paris."), ("human", " "), ("gpt", "Yes?")), "turn 3 of 4, by human", "end the chat before it"),
    "ends_on_human": (chat(("human", QUESTION), ("gpt", "Paris."), ("human", "Thanks!")), "'Thanks!'", "Take its last turn out"),
    "many_turns": (chat(*[("human", "And now?"), ("gpt", "Paris.")] * 51), "102 turns", "data.max_tokens"),
    "special_tokens": (answered("Paris.<|im_end|>"), "'Paris.<|im_end|>'", "ends the answer early"),
    "role_markers": (answered("Paris.\n\nHuman: And of Italy?"), "Human: And of Italy?", "Split such rows into turns"),
    "open_fence": (answered(FENCED), "ls -l and see'", "Close the block"),
    "boilerplate": (answered("As an AI language model, I cannot say."), "'As an AI language model, I cannot say.'", "cut the opening"),
    "answer_is_prompt": (answered(QUESTION), f"'{QUESTION}'", "data.columns"),
    "repeats_prompt": (answered(QUESTION + " It is Paris."), "'What is the capital of France?", "Cut the prompt off"),
}


def test_every_defect_is_planted():
    assert set(PLANTED) == set(DEFECTS)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_row(name):
    fields, detail, cure = PLANTED[name]
    found = findings(fields, "sharegpt" if "conversations" in fields else None)
    assert set(found) == {name}, "this defect, and no other"
    assert found[name].what.startswith("1 of 1 rows ")
    assert detail in found[name].what
    assert cure in found[name].cure
    assert "{" not in DEFECTS[name].what.format(count=1, rows=1, share="", noun="row", detail=""), "every brace is filled in"


MORE = [
    ("utf8_as_latin", answered("donâ€™t"), "'â€™' stands for '’'"),
    ("utf8_as_latin", answered("ä½\xa0å¥½"), "stands for '你好'"),
    ("utf8_as_latin", answered("ðŸ˜€ Paris"), "stands for '😀'"),
    ("gbk_as_latin", answered("ÖÐÎÄ"), "stands for '中文'"),
    ("utf8_as_gbk", answered("It鈥檚 Paris"), "'鈥檚' stands for '’s'"),
    ("mixed_encodings", answered("这是一个测试浣犲ソ"), "stands for '你好'"),
    ("lost_characters", answered("Par\ufffds"), "Par\ufffds"),
    ("lost_characters", answered("烫烫烫烫"), "烫烫烫烫"),
    ("invisible_characters", answered("\u202eParis"), "[U+202E]"),
    ("html", answered("Paris<br/>Lyon"), "<br/>"),
    ("escaped_breaks", answered("第一行\\n第二行"), "第一行\\n第二行"),
    ("repeats_prompt", answered("今天的天气怎么样今天的天气很好", "今天的天气怎么样"), "今天的天气很好"),
    ("stand_ins", answered("N/A"), "'N/A'"),
    ("json_python", answered("[{'city': 'Paris'}]"), "[{'city'"),
    ("json_cut", answered('[{"city": "Paris"}, '), '"Paris"},'),
    ("special_tokens", answered("Paris.", "[INST] " + QUESTION), "[INST]"),
    ("special_tokens", answered("Paris.</s>"), "</s>"),
    ("role_markers", answered("Paris.\n### Response: Lyon"), "### Response:"),
    ("boilerplate", answered("很抱歉，作为一个AI语言模型，我不知道。"), "作为一个AI语言模型"),
    ("foreign_columns", {"问题": "你好", "答案": "你好！"}, "data.columns='{question: 问题, answer: 答案}'"),
    ("foreign_columns", {"Instruction": "Hi", "Output": "Hello"}, "data.columns='{instruction: Instruction, output: Output}'"),
    ("foreign_columns", {"指令": "你好", "回答": "你好！"}, "data.columns='{instruction: 指令, output: 回答}'"),
    ("foreign_columns", {"instruction": "Hi", "回答": "Hello"}, "data.columns='{output: 回答}'"),
    ("foreign_columns", {"甲": "你好", "乙": "你好！"}, "甲, 乙: set data.columns='{instruction: …, output: …}'"),
    ("not_text", {"instruction": "Say", "input": ["a"], "output": "a it is"}, "input = ['a'] (list)"),
    ("ends_on_human", {"messages": [{"role": "user", "content": QUESTION}]}, QUESTION),
]


@pytest.mark.parametrize(("name", "fields", "detail"), MORE, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(MORE)])
def test_other_faces_of_a_defect(name, fields, detail):
    found = findings(fields)
    assert set(found) == {name}
    assert detail in found[name].what


CLEAN = [
    answered("Le café «bébé»… coûte 3 €, et l’été à Nîmes."),
    answered("„Spaß“, „Größe“, Äpfel – Straße … 20 °C"),
    answered("SÃO PAULO, “CAPITÔ”, NÃO"),
    answered("VÝŠKA, žluťoučký kůň, ĽÚBOZVUČNÝ"),
    answered("Привет, мир! «Ёлка»"),
    answered("你好，世界！这是一个测试——“引号”、《书名》、联通公司。"),
    answered("這個傢伙喜歡鐵觀音，臺灣烏龜龍鳳龐。"),
    answered("日本語のテキストです。ソース、ｶﾅ、々〆"),
    answered("안녕하세요, 세계!"),
    answered("\u200fשלום\u200f and مرحبا"),
    answered("Family 👨‍👩‍👧 and ❤️ 🇫🇷"),
    answered("E = mc², 5 × 4 ≥ ½·π"),
    answered("×××× °°°° ÀÉÈ"),
    answered("ABCDEFGHIJKÈÉÆØÅ, ABCDEFGHIJKÕÄÖÜ, HIJK ÁÉÝÚÍÓÞÆÐÖ"),
    answered("{}"),
    answered('{"姓名": ["常建良"], "地点": []}'),
    answered("[1] See the list. {Note} it is no JSON"),
    answered("{'a' is a quotation} here" + PAD),
    answered("```python\nprint('a\\nb')\n```"),
    answered("In HTML, <br> breaks a line and &amp; is an ampersand."),
    answered(r"The gradient is \nabla f, kept in C:\new"),
    answered("x < y and y > z; a & b; list[0] <= [1]"),
    answered("None of them is right."),
    answered("👍"),
    answered("7"),
    answered("Hello!", "Hello!"),
    answered("What is the capital of Francesca?", "What is the capital of Fran"),
    answered("As an AI Life Coach, I advise breaking your project into parts."),
    answered("She said: 'Human rights matter.' Assistant teachers agree."),
    {"instruction": "Say hello", "input": None, "output": "Hello there", "id": 7, "备注": "x"},
    {"text": "a fine film", "label": 1},
    {"text": "a fine film", "label": "None"},
    chat(("system", "Be brief."), ("human", QUESTION), ("gpt", "Paris."), ("human", "Thanks!"), ("gpt", "With pleasure.")),
    chat(("human", "Roll a die"), ("function_call", '{"name": "roll"}'), ("observation", '{"result": 4}'), ("gpt", "It is a 4.")),
]


@pytest.mark.parametrize("fields", CLEAN, ids=range(len(CLEAN)))
def test_nothing_is_said_of_a_clean_row(fields):
    assert findings(fields) == {}


def test_what_cannot_be_seen_is_shown_by_its_number():
    assert shown("a\x85b\nc\u3000d\u200b") == "a[U+0085]b c\u3000d[U+200B]"


def test_columns_that_have_been_named_are_not_foreign():
    fields = {"指示": "你好", "输出": "你好！"}
    renamed = conversation_of({"instruction": "你好", "output": "你好！"})
    assert "foreign_columns" in find_all(fields, None)
    assert find_all(fields, renamed) == {}, "data.columns has named them"


@pytest.mark.parametrize("fields", [
    {"指示": "你好", "输入": "", "输出": "你好！"}, {"问题": "你好", "答案": "你好！"}, {"指令": "你好", "回答": "你好！"},
    {"instruction": "你好", "回答": "你好！"}, {"User": "你好", "Assistant": "你好！"},
])
def test_the_columns_that_are_offered_make_the_row_teach(fields):
    detail = find_all(fields, None)["foreign_columns"]
    override = detail.partition("set ")[2].replace("'", "")
    settings = config.read(None, ["data=rows.jsonl", override]).data
    row = Row(fields, "rows.jsonl", 1)
    messages = convert(row, detect([row], settings), settings).messages
    assert [message.content for message in messages] == ["你好", "你好！"]


def test_clean_rows_cost_little():
    text = "这是一个普通的回答，没有什么特别之处。" * 10
    rows = [({"prompt": QUESTION, "completion": text}, conversation_of(answered(text))) for _ in range(1000)]
    begun = time.perf_counter()
    for fields, conversation in rows:
        find_all(fields, conversation)
    assert time.perf_counter() - begun < 0.5, "500 µs a row, some ten times what it takes"


# ------------------------------------------------------------------------------------------------------------- real files

REAL = {
    "alpaca_en/alpaca_en_demo.json": {"boilerplate": 23, "open_fence": 1},
    "alpaca_zh/ruozhiba_qa2449_gpt4o.json": {},
    "alpaca_zh/sample_with_a_bad_row.json": {"foreign_columns": 1, "escaped_breaks": 1},
    "multi_turn/dummy_conversation.json": {},
    "multi_turn/sharegpt_zh_1k.jsonl": {"ends_on_human": 7, "empty_turn": 1, "many_turns": 1, "invisible_characters": 8, "no_words": 5},
    "preference/dpo_zh_500.jsonl": {"preference": 500, "lost_characters": 13, "special_tokens": 1},
    "resume/seed_200.json": {},
    "rotten_tomatoes/train.jsonl": {"c1_controls": 54},
}


def counts(file):
    settings = DataSettings(train=str(file))
    found = list(reading.read_rows(str(file)))
    format = detect(found, settings)
    counted = {}
    for row in found:
        for name in find_all(row.fields, _converted(row, format, settings)):
            counted[name] = counted.get(name, 0) + 1
    return counted


def _converted(row, format, settings):
    try:
        return convert(row, format, settings)
    except CannotTeach:
        return None


@pytest.mark.parametrize("file", REAL)
def test_real_rows(file, shared):
    counted = counts(shared / "data" / file)
    assert {name: counted.get(name) for name in REAL[file]} == REAL[file]
    if not REAL[file]:
        assert counted == {}, "clean rows"


def test_real_rows_are_told_by_their_place(shared):
    rows = list(reading.read_rows(str(shared / "data" / "alpaca_zh/sample_with_a_bad_row.json")))
    bad = {row.line: list(found) for row in rows if (found := find_all(row.fields, _converted(row, "instruction", SETTINGS)))}
    assert bad == {22: ["escaped_breaks"], 1196: ["foreign_columns"]}


def test_real_clean_rows_misread_are_found(shared):
    """Every Chinese answer, spoilt as two wrong programs spoil it, is told."""
    answers = [row["output"] for row in json.loads((shared / "data/alpaca_zh/alpaca_zh_demo.json").read_text("utf-8"))]
    answers = [a for a in answers if sum("\u4e00" <= c <= "\u9fff" for c in a) >= 4]
    for name, spoil in {
        "utf8_as_latin": lambda text: text.encode().decode("latin-1"),
        "utf8_as_gbk": lambda text: text.encode().decode("gbk", "replace"),
    }.items():
        told = [bool({name, "mixed_encodings", "lost_characters"} & set(find_all(answered(s), conversation_of(answered(s)))))
                for s in map(spoil, answers)]
        assert sum(told) >= 0.98 * len(told), f"{name}: {sum(told)} of {len(told)}"


def test_a_number_longer_than_python_reads_is_json_all_the_same():
    assert not [name for name in findings(answered('{"n": ' + "1" * 5000 + "}")) if name.startswith("json")]
