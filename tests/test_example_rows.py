"""examples/make_rows.py: the same rows each time, in the shapes of the tutorials, and right when solved another way."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "make_rows.py"
COLUMNS = {"instructions": ["instruction", "input", "output"], "resume": ["input", "output"], "reviews": ["text", "label"],
           "role_play": ["input", "output"]}
COUNTS = {"instructions": 400, "resume": 200, "reviews": 1200, "role_play": 300}
kinds = pytest.mark.parametrize("kind", COUNTS)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("examples_make_rows", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def made(script):
    """kind -> (rows, 60 held-out rows)"""
    return {kind: script.make_rows(kind, heldout=60) for kind in COUNTS}


def sentence_of(row: dict) -> str:
    return row["input"].split("# 当前简历\n")[1].split("\n\n# 任务重述")[0]


# ----------------------------------------------------------------------------------------------------------- all kinds


def test_it_stands_alone():
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@kinds
def test_columns_counts_and_no_question_twice(script, made, kind):
    rows, heldout = made[kind]
    assert (len(rows), len(heldout)) == (COUNTS[kind], 60)
    for row in rows + heldout:
        assert list(row) == COLUMNS[kind]
        assert all(isinstance(value, int if name == "label" else str) for name, value in row.items())
        assert str(row.get("output", row.get("label"))).strip()
        assert not re.search(r"[{}]", row.get("text") or (row["output"] if kind != "resume" else ""))  # no slot left unfilled
    questions = ["\n".join(str(row[name]) for name in COLUMNS[kind][:-1]) for row in rows + heldout]
    assert len(set(questions)) == len(questions)


@kinds
def test_one_seed_one_file_and_the_first_does_not_depend_on_the_second(script, made, kind):
    assert script.make_rows(kind, heldout=60) == made[kind]
    assert script.make_rows(kind)[0] == made[kind][0] != script.make_rows(kind, seed=1)[0]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_files_as_the_command_writes_them(script, suffix, tmp_path):
    file, heldout = tmp_path / "new" / f"rows.{suffix}", tmp_path / f"heldout.{suffix}"
    words = ["resume", file, "--rows", "7", "--seed", "3", "--heldout", heldout, "--heldout-rows", "5"]
    done = subprocess.run([sys.executable, "-I", SCRIPT, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{file}: 7 rows\n{heldout}: 5 rows\n"
    expected = script.make_rows("resume", 7, 5, seed=3)
    for path, rows in zip((file, heldout), expected, strict=True):
        text = path.read_text("utf-8")
        assert "\\u" not in text
        assert (json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]) == rows


@pytest.mark.parametrize(("words", "message"), [
    (["poems", "rows.jsonl"], "invalid choice: 'poems'"),
    (["resume", "rows.csv"], "rows.csv should end in .jsonl (a row a line) or .json (a list)."),
    (["resume", "rows.json", "--heldout", "./rows.json"], "rows.json cannot hold both"),
    (["resume", "rows.json", "--rows", "0"], "take a number of 1 or more"),
    (["role_play", "rows.json", "--rows", "900"], "different rows of this kind can be made, not 900; ask for fewer."),
])
def test_what_cannot_be_made_is_said_and_nothing_is_written(words, message, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- instructions

METRES = {"千米": 1000, "米": 1, "厘米": 0.01, "毫米": 0.001}
OTHER_UNITS = {"吨": 1_000_000, "千克": 1000, "克": 1, "星期": 604_800, "天": 86_400, "小时": 3600, "分钟": 60, "秒": 1, "升": 1000, "毫升": 1,
               "元": 10, "角": 1, "平方米": 100, "平方分米": 1}
UNITS = METRES | OTHER_UNITS  # each in the smallest of its kind, or in metres


def solved_unit(script, instruction, given):
    number, unit = re.fullmatch(r"(\d+)(\D+)", given).groups()
    wanted = re.fullmatch("请把下面的数量换算成(.+)。", instruction)[1]
    return f"{given}等于{round(int(number) * UNITS[unit] / UNITS[wanted])}{wanted}。"


def solved_date(script, instruction, given):
    if "-" in given:
        day = datetime.date.fromisoformat(given)
        return f"{day.year}年{day.month}月{day.day}日"
    return datetime.datetime.strptime(given, "%Y年%m月%d日").strftime("%Y-%m-%d")


def solved_weekday(script, instruction, given):
    today, later = re.fullmatch("今天是星期(.)，再过(.+)天是星期几？", instruction).groups()
    week = "一二三四五六日" * 10
    return f"再过{later}天是星期{week[week.index(today) + int(later)]}。"


def solved_numbers(script, instruction, given):
    ordered = sorted(given.split("，"), key=int)
    return "，".join(ordered if "从小到大" in instruction else ordered[::-1])


def solved_lengths(script, instruction, given):
    ordered = sorted(given.split("、"), key=len)
    return "、".join(ordered if "从少到多" in instruction else ordered[::-1])


def solved_opposite(script, instruction, given):
    return next(pair[1 - pair.index(given)] for pair in script.OPPOSITES if given in pair)


def solved_capital(script, instruction, given):
    country = re.fullmatch("(?:请告诉我)?(.+?)的首都(?:是哪里？|。)", instruction)[1]
    return f"{country}的首都是{dict(script.CAPITALS)[country]}。"


def solved_odd(script, instruction, given):
    group_of = {word: group for group, words in script.GROUPS.items() for word in words}
    words = given.split("、")
    counts = Counter(map(group_of.get, words))
    odd = next(word for word in words if counts[group_of[word]] == 1)
    common = counts.most_common(1)[0][0]
    assert sorted(counts.values()) == [1, 3]
    return f"{odd}。因为其余三个都是{common}，而{odd}是{group_of[odd]}。"


def solved_passive(script, instruction, given):
    who, did, what = next(deed for deed in script.DEEDS if given.endswith("".join(deed) + "。"))
    return given.replace("".join((who, did, what)), f"{what}被{who}{did}")


def solved_repeats(script, instruction, given):
    kept = []
    for word in given.split("、"):
        kept += [word] * (word not in kept)
    assert len(kept) == 4
    return "、".join(kept)


def solved_sum(script, instruction, given):
    had, more, gone = map(int, re.findall(r"\d+", given))
    thing = re.search(r"有\d+个(.+?)，", given)[1]
    assert had + more - gone > 0
    return f"{had} + {more} - {gone} = {had + more - gone}，还剩{had + more - gone}个{thing}。"


def solved_address(script, instruction, given):
    person = re.search("[王李张刘陈杨赵周](先生|女士|老师|经理)", given)[0]
    return f"联系人：{person}\n邮箱：{re.search(r'[a-z]+[0-9]+@example.com', given)[0]}"


def solved_opener(script, instruction, given):
    return script.OPENERS[given]


def solved_idiom(script, instruction, given):
    if "解释" in instruction:
        return f"“{given}”的意思是：{dict(script.IDIOMS)[given]}。"
    return f"这个成语是“{next(words for words, meaning in script.IDIOMS if meaning + '。' == given)}”。"


# What tells a task by its instruction -> the same task, solved from instruction and input alone.
SOLVED = {
    "换算成": solved_unit, "日期改写": solved_date, "今天是星期": solved_weekday, "下面的数字从": solved_numbers,
    "按字数": solved_lengths, "反义词": solved_opposite, "的首都": solved_capital, "不同类": solved_odd, "“被”字句": solved_passive,
    "删去下面重复": solved_repeats, "应用题": solved_sum, "联系人和邮箱": solved_address, "回复开头": solved_opener, "回信的第一句": solved_opener,
    "成语": solved_idiom,
}


def check_list(script, instruction, output):
    count, group = re.fullmatch("(?:列出|请举出)(.)[种个](?:属于)?(.+?)(?:的词语)?。", instruction).groups()
    lines = output.split("\n")
    assert [line.split(". ")[0] for line in lines] == [str(i) for i in range(1, int(count) + 1)]
    words = [line.split(". ")[1] for line in lines]
    assert len(set(words)) == int(count) and set(words) <= set(script.GROUPS[group])


def test_every_answer_is_what_solving_the_task_anew_gives(script, made):
    met = Counter()
    for row in sum(made["instructions"], []):
        if row["instruction"].startswith(("列出", "请举出")):
            check_list(script, row["instruction"], row["output"])
            met["列出"] += 1
            continue
        name = next(name for name in SOLVED if name in row["instruction"])
        assert row["output"] == SOLVED[name](script, row["instruction"], row["input"]), row
        met[name] += 1
    assert set(met) == {*SOLVED, "列出"} and min(met.values()) >= 5


def test_some_instructions_need_no_input(made):
    without = sum(not row["input"] for row in made["instructions"][0])
    assert 40 < without < 160


@pytest.mark.parametrize(("about", "fact"), [
    ("首都", lambda row: row["output"]),
    ("反义词", lambda row: frozenset((row["input"], row["output"]))),
    ("成语", lambda row: re.search("“(.{4})”", row["output"])[1]),
    ("[列举]出", lambda row: re.search("种(.+)。|属于(.+)的", row["instruction"])[0].strip("种。属于的")),
    ("“被”", lambda row: re.search("(?<=被).*", row["output"])[0]),
    ("回复开头|回信", lambda row: row["output"]),
])
def test_heldout_facts_are_not_taught(made, about, fact):
    taught, asked = ({fact(row) for row in rows if re.search(about, row["instruction"])} for rows in made["instructions"])
    assert taught and asked and not taught & asked


def test_words_belong_to_one_group_only(script):
    words = [word for group in script.GROUPS.values() for word in group]
    assert len(set(words)) == len(words)
    assert len({word for pair in script.OPPOSITES for word in pair}) == 2 * len(script.OPPOSITES)


# -------------------------------------------------------------------------------------------------------------- resume


def entities_in(script, sentence: str) -> dict[str, list[str]]:
    """Read from left to right, the longest known entity first: nothing of how the sentence was composed."""
    def any_of(*texts: str) -> str:
        return "|".join(sorted(map(re.escape, texts), key=len, reverse=True))

    degrees = any_of(*script.DEGREES, *script.SHORT_DEGREES, *script.FULL_DEGREES)
    patterns = {
        "姓名": f"(?:{any_of(*script.SURNAMES)})(?:{any_of(*script.GIVEN)})",
        "组织名": f"(?:{any_of(*script.STEMS)})(?:{any_of(*script.COMPANIES, *script.SCHOOLS)})",
        "职位": any_of(*script.POSTS, *script.RANKS, *script.CHAIRS),  # 博士生导师 before 博士
        "国籍": any_of(*script.COUNTRIES), "种族": any_of(*script.PEOPLES), "教育背景": degrees, "地名": any_of(*script.HOMES),
        "专业": any_of(*script.MAJORS, *script.SHORT_MAJORS),
    }
    names = list(patterns)
    found = {}
    for match in re.finditer("|".join(f"({pattern})" for pattern in patterns.values()), sentence):
        texts = found.setdefault(names[match.lastindex - 1], [])
        if match[0] not in texts:
            texts.append(match[0])
    return found


def test_every_record_is_what_its_sentence_holds(script, made):
    types = Counter()
    for row in sum(made["resume"], []):
        assert row["output"] == json.dumps(entities_in(script, sentence_of(row)), ensure_ascii=False), sentence_of(row)
        types.update(list(json.loads(row["output"])) or ["none"])
    assert set(types) == {"姓名", "国籍", "种族", "职位", "教育背景", "专业", "组织名", "地名", "none"}
    assert min(types.values()) >= 10


def test_repeats_are_dropped_and_types_come_in_the_order_of_the_text(script, made):
    rows = sum(made["resume"], [])
    posts = [(sentence_of(row), json.loads(row["output"]).get("职位", [])) for row in rows]
    assert any(sentence.count(post) == 2 for sentence, some in posts if sentence.startswith("曾任") for post in some)
    assert all(len(set(some)) == len(some) for _, some in posts)
    assert len({tuple(json.loads(row["output"])) for row in rows}) > 8


def test_the_prompt_is_the_tutorials(script, made):
    for row in sum(made["resume"], []):
        assert row["input"] == script.PROMPT.replace("{sentence}", sentence_of(row))
    assert "\n\n# 当前简历\n{sentence}\n\n# 任务重述\n" in script.PROMPT


def test_the_prompt_is_that_of_the_real_rows(script, shared):
    template = shared / "data" / "resume" / "template.txt"
    if not template.is_file():
        pytest.skip("the real rows are not here")
    assert script.PROMPT.replace("{sentence}", "{text}") == template.read_text("utf-8").rstrip("\n")


def test_no_heldout_name_stands_in_a_training_row(script, made):
    rows, heldout = made["resume"]
    text = "\n".join(sentence_of(row) for row in rows)
    records = [json.loads(row["output"]) for row in heldout]
    names = {name for record in records for key in ("姓名", "组织名") for name in record.get(key, [])}
    assert len(names) > 30
    assert not [name for name in names if name in text]


# ------------------------------------------------------------------------------------------------------------- reviews

TURNED = ("anything but", "Nothing about", "trailer", "could have been", "far from")


def label_of(script, text: str) -> int:
    """A verdict decides; else the last word of judgement does, unless the sentence turns it round."""
    verdicts = [label for label, phrases in script.VERDICTS.items() for phrase in phrases if phrase.lower() in text.lower()]
    if verdicts:
        assert len(verdicts) == 1
        return verdicts[0]
    place, label = max((text.rfind(word), label) for label, words in script.WORDS.items() for word in words)
    assert place > 0
    return 1 - label if any(phrase in text for phrase in TURNED) else label


def test_every_label_is_that_of_its_sentence(script, made):
    for row in sum(made["reviews"], []):
        assert row["label"] == label_of(script, row["text"]), row


def test_reviews_are_balanced_and_shuffled(made):
    for rows in made["reviews"]:
        assert Counter(row["label"] for row in rows) == {0: len(rows) // 2, 1: len(rows) // 2}
        changes = sum(a["label"] != b["label"] for a, b in zip(rows, rows[1:], strict=False))
        assert 0.35 < changes / len(rows) < 0.65


def test_counting_words_is_not_enough(script, made):
    """Words that praise, and words that blame, stand in about as many bad reviews as good ones."""
    for words in script.WORDS.values():
        met = Counter(row["label"] for row in made["reviews"][0] if re.search(rf"\b({'|'.join(words)})\b", row["text"]))
        assert 0.7 < met[0] / met[1] < 1.4


def test_reviews_are_whole_short_sentences(made):
    for row in sum(made["reviews"], []):
        assert re.fullmatch(r"[A-Z][A-Za-z ,;:]+\.", row["text"]), row["text"]
        assert not re.search(r"\ba [aeiou]|  ", row["text"]) and 5 <= len(row["text"].split()) <= 25


# ----------------------------------------------------------------------------------------------------------- role_play


def test_each_speaks_in_a_voice_of_their_own_and_of_whom_they_were_asked_about(script, made):
    people = {name: rest for name, *rest in script.PEOPLE}
    for row in sum(made["role_play"], []):
        speaker, who = re.fullmatch("(.+)#关于(.+)", row["input"]).groups()
        assert speaker != who
        _, work, habit, gift = people[who]
        assert who in row["output"] and any(fact in row["output"] for fact in (habit, gift))
        assert not any(fact in row["output"] for name, (_, _, *facts) in people.items() for fact in facts if name != who)
        plain = row["output"].replace(habit, "{habit}").replace(gift, "{gift}").replace(who, "{who}")
        assert plain in [line.replace("{work}", work) for line in script.VOICES[people[speaker][0]]]


def test_there_are_enough_people(script):
    assert len({name for name, *_ in script.PEOPLE}) == len(script.PEOPLE) >= 20
    assert {voice for _, voice, *_ in script.PEOPLE} == set(script.VOICES)
