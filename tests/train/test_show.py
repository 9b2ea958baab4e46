"""Rows are shown as the model meets them: each token, what is learned of it, and what another row has computed already."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.cells import cell_len
from rich.console import Console

from weitiao.data.dataset import load
from weitiao.data.findings import Finding
from weitiao.data.spelling import Spelling
from weitiao.data.templates import load_template
from weitiao.errors import RunError
from weitiao.screen import Screen
from weitiao.settings.data import DataSettings
from weitiao.train.folder import write_asked
from weitiao.train.paths import choose, common_folder, paths_of
from weitiao.train.show import show, show_rows
from weitiao.train.show_html import html_page

LEGEND = """\
⟦learned⟧   ¦ between tokens   ⋮ shared with an earlier row, computed once
· space   ⏎ line break   → tab   字₃ a character in 3 tokens
"""
CHINESE = "请识别“高勇”的国籍，并以 JSON 返回。\n\n他是中国人·1966 年生。"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read(tokenizer):
    """(rows as they are trained on, their template)"""
    def read(*rows, template="auto", name="rows.jsonl", tokenizer=tokenizer, **settings):
        with open(name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        template = load_template(template, tokenizer)
        settings = DataSettings(train=name, **settings)
        return load(settings.train, settings, template, 1 << 20, 1 << 20, 0), template

    return read


def pair(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def shown(data, template, width=80, coloured=False, **options):
    screen = Screen()
    screen.console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=coloured, color_system="standard" if coloured else None)
    show_rows(data.rows, template, screen, **options)
    text = screen.console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(cell_len(line) <= width for line in plain.splitlines()), plain
    return text


def without_legend(text):
    assert text.startswith(LEGEND + "\n")
    return text.removeprefix(LEGEND + "\n")


def learned_text(text):
    """What stands in brackets, without our marks."""
    inside = "".join(re.findall("⟦(.*?)⟧", re.sub(r"\n(▌ |  )", "", text.removeprefix(LEGEND)), re.DOTALL))
    return re.sub("[¦₂-₉]", "", inside).replace("⏎", "\n").replace("·", " ").replace("→", "\t")


# ------------------------------------------------------------------------------------------------------ on a terminal


def test_two_rows_behind_one_beginning(read):
    data, template = read(pair("What is 1 and 1?", "It is 2."), pair("What is 1 and 2?", "It is 3."))
    assert without_legend(shown(data, template)) == """\
rows.jsonl:1 · 26 tokens, 7 learned · ends with <|im_end|>
  <|im_start|>¦user¦⏎¦
  Wh¦at¦·is¦·¦1¦·¦an¦d¦·¦1¦?¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦I¦t¦·is¦·¦2¦.¦<|im_end|>⟧

rows.jsonl:2 · 26 tokens, 12 of them shared with rows.jsonl:1, 7 learned · ends
with <|im_end|>
  ⋮ 12 tokens shared with rows.jsonl:1
  2¦?¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦I¦t¦·is¦·¦3¦.¦<|im_end|>⟧

2 rows: 38 nodes in the place of 52 tokens (1 / 1.37), 14 learned.
"""


def test_a_conversation_turn_by_turn(read):
    said = [("user", "Paris?"), ("assistant", "France."), ("user", "你"), ("assistant", "<b> & 时\t好")]
    data, template = read({"messages": [{"role": role, "content": content} for role, content in said]})
    text = shown(data, template)
    assert without_legend(text) == """\
rows.jsonl:1 · 2 turns, each with all before it · 58 tokens, 16 of them shared,
19 learned · ends with <|im_end|>
turn 1 of 2 · 16 tokens, 5 learned
  <|im_start|>¦user¦⏎¦
  Pa¦ris¦?¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦Fr¦an¦ce¦.¦<|im_end|>⟧
turn 2 of 2 · 42 tokens, 16 of them shared with turn 1, 14 learned
  ⋮ 16 tokens shared with turn 1
  ⏎¦
  <|im_start|>¦user¦⏎¦
  你₃¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦<¦b¦>¦·¦&¦·¦时₃¦→¦好₃¦<|im_end|>⟧

1 row: 41 nodes in the place of 58 tokens (1 / 1.41), 19 learned.
"""
    assert learned_text(text) == "France.<|im_end|><b> & 时\t好<|im_end|>"


def test_labels_are_learned_alone(read):
    data, template = read({"text": "good", "label": "1"}, {"text": "bad", "label": "0"})
    assert without_legend(shown(data, template)) == """\
rows.jsonl:1 · 13 tokens, 1 learned · its label alone is learned: 1
  <|im_start|>¦user¦⏎¦
  g¦o¦o¦d¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦1⟧

rows.jsonl:2 · 12 tokens, 3 of them shared with rows.jsonl:1, 1 learned · its
label alone is learned: 0
  <|im_start|>¦user¦⏎¦
  b¦a¦d¦<|im_end|>¦⏎¦
  <|im_start|>¦assistant¦⏎
▌ ⟦0⟧

2 rows: 20 nodes in the place of 25 tokens (1 / 1.25), 2 learned.
"""


def test_a_weight_is_told_where_it_is_not_1(read):
    data, template = read(pair("1", "2", w=0.5), pair("3", "4", w=1), template="plain", weight_column="w")
    text = shown(data, template)
    assert "rows.jsonl:1 · 3 tokens, 2 learned with weight 0.5 · ends" in text and "▌ 1×0.5⟦2¦<|im_end|>⟧\n" in text
    assert "rows.jsonl:2 · 3 tokens, 2 learned · ends" in text and "▌ 3⟦4¦<|im_end|>⟧\n" in text


def test_long_stretches_are_folded_in_their_middle(read):
    data, template = read(pair("1" * 60, "2" * 99), pair("1" * 60, "3" * 60), template="plain")
    text = without_legend(shown(data, template, most_tokens=20))
    assert text == f"""\
rows.jsonl:1 · 160 tokens, 100 learned · ends with <|im_end|>
  {"1¦" * 10}
  … 40 more tokens …
▌ {"1¦" * 9}1⟦{"2¦" * 29}
▌ {"2¦" * 11}
  … 20 more tokens …
▌ {"2¦" * 39}
▌ <|im_end|>⟧

rows.jsonl:2 · 121 tokens, 60 of them shared with rows.jsonl:1, 61 learned ·
ends with <|im_end|>
  ⋮ 60 tokens shared with rows.jsonl:1
▌ ⟦{"3¦" * 38}
▌ {"3¦" * 22}<|im_end|>⟧

2 rows: 219 nodes in the place of 281 tokens (1 / 1.28), 161 learned.
"""


def test_a_row_twice_shows_what_it_learns_twice(read):
    data, template = read(*[pair("What is 1 and 1?", "It is 2.")] * 2)
    again = shown(data, template).split("\n\n")[2]
    assert again == """\
rows.jsonl:2 · 26 tokens, 26 of them shared with rows.jsonl:1, 7 learned · ends
with <|im_end|>
  ⋮ 19 tokens shared with rows.jsonl:1
▌ ⟦I¦t¦·is¦·¦2¦.¦<|im_end|>⟧"""


def test_a_character_of_three_tokens_is_shown_once(read):
    data, template = read(pair(CHINESE, CHINESE))
    text = shown(data, template)
    assert "\ufffd" not in text and text.count("籍₃") == 2 and text.count("籍") == 2
    assert learned_text(text) == CHINESE.replace("·", " ") + "<|im_end|>"


def test_a_character_that_is_shared_in_part_is_whole(read):
    # 是 and 时 begin with the same byte: 41 tokens are shared, and 时 is shown with all three of its own.
    data, template = read(pair("1" * 40 + "是", "2"), pair("1" * 40 + "时", "2"), template="plain")
    text = shown(data, template)
    assert "45 tokens, 41 of them shared with rows.jsonl:1" in text and "▌ 时₃⟦2¦<|im_end|>⟧" in text


def test_an_answer_cut_inside_a_character_tells_its_bytes(read):
    data, template = read(pair("111", "是时"), template="plain", max_tokens=8)
    assert r"▌ 1¦1¦1⟦是₃¦\xe6¦<|im_end|>⟧" in shown(data, template)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_no_line_is_wider_than_the_terminal(read, width, coloured, ids):
    odd = "中文" * 70 + "word" * 60 + "\n\n\t \x1b[31m\u202e👩\u200d👧❤\ufe0f" + "e\u0301" * 50
    data, template = read(pair(odd, odd[::-1]), pair(odd + "!", "长" * 300), name=f"{'很长的名字' * 12}.jsonl")
    text = shown(data, template, width, coloured, ids=ids)
    assert "\x1b[31m\u202e" not in text and r"\x1b" in text and r"\u202e" in text


def test_colours_take_the_place_of_signs(read):
    data, template = read(pair("What is 1 and 1?", "It is 2."), pair("What is 1 and 2?", "It is 3."))
    text = shown(data, template, coloured=True)
    assert "⟦" not in text and "¦" not in text
    assert "\x1b[32mI\x1b[0m\x1b[4;32mt\x1b[0m" in text  # green, and the next one underlined
    assert "\x1b[35m<|im_start|>\x1b[0m" in text
    assert "\x1b[1;7;32m<|im_end|>\x1b[0m" in text  # the stop token, learned
    assert "▌ It·is·3.<|im_end|>" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_without_colours_a_terminal_gets_the_signs(read, monkeypatch):
    data, template = read(pair("1", "2"))
    screen = Screen()
    screen.console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    show_rows(data.rows, template, screen)
    assert "⟦" in screen.console.file.getvalue()


def test_ids_in_columns(read):
    data, template = read(pair("Paris 是", "It is 2."))
    assert without_legend(shown(data, template, ids=True)) == """\
rows.jsonl:1 · 21 tokens, 7 learned · ends with <|im_end|>
       1 <|im_start|>                      289 user           202 ⏎
     270 Pa             284 ris            224 ·              166 是 1/3
     250 是 2/3         111 是 3/3           2 <|im_end|>     202 ⏎
       1 <|im_start|>                      275 assistant      202 ⏎
▌     44 I               87 t              290 ·is            224 ·
▌     21 2               17 .                2 <|im_end|>

1 row: 20 nodes in the place of 21 tokens (1 / 1.05), 7 learned.
"""


def test_no_rows_are_no_mistake(read):
    data, template = read(pair("1", "2"))
    assert choose(data.rows, 0) == []
    assert without_legend(shown(replace(data, rows=[]), template)).startswith("0 rows: 0 nodes")
    assert Page(html_page([], template, "none")).tokens == []


def test_a_quiet_screen_shows_nothing(read, capsys):
    data, template = read(pair("1", "2"))
    show_rows(data.rows, template, Screen(quiet=True))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ which rows, what is shared


def test_what_is_shared_is_counted_along_the_trie(read):
    # ABCd, ABCef, ABx and a row of its own; prompts are ABC, ABC, AB, 9.
    data, template = read(pair("111", "4"), pair("111", "56"), pair("11", "7"), pair("9", "9"), template="plain")
    by_row, totals = paths_of(data.rows)
    found = [(path.shared, path.owner and path.owner.where) for (path,) in by_row]
    assert found == [(0, None), (3, "rows.jsonl:1"), (2, "rows.jsonl:1"), (0, None)]
    assert (totals.tokens, totals.nodes, totals.learned) == (5 + 6 + 4 + 3, 4 + 2 + 1 + 2, 2 + 3 + 2 + 2)  # a row's last token is not computed


def test_a_row_shares_with_the_first_that_has_the_tokens(read):
    data, template = read(pair("12", "4"), pair("123", "5"), pair("1234", "6"), template="plain")
    assert [(path.shared, path.owner and path.owner.where) for (path,) in paths_of(data.rows)[0]] == [
        (0, None), (2, "rows.jsonl:1"), (3, "rows.jsonl:2"),
    ]


def test_the_first_rows_and_two_that_share_most(read):
    rows = [pair(str(n) * 9, "0") for n in range(1, 6)] + [pair("7" * 30 + "1", "2"), pair("7" * 30 + "2", "2"), *[pair("8" * 90, "8")] * 2]
    data, _ = read(*rows, template="plain")
    assert [row.where for row in choose(data.rows, 2)] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:6", "rows.jsonl:7"]
    assert [row.where for row in choose(data.rows, 6)] == [f"rows.jsonl:{n}" for n in range(1, 8)]  # its partner is among the first
    assert [row.where for row in choose(data.rows, 7)] == [f"rows.jsonl:{n}" for n in range(1, 8)]
    assert len(choose(data.rows[:3], 9)) == 3


def test_rows_that_share_need_no_others(read):
    data, _ = read(*(pair("1" * 20 + str(n), "2") for n in range(5)), template="plain")
    assert [row.where for row in choose(data.rows, 2)] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_the_folder_that_all_have_is_not_said():
    assert common_folder(["data/rows.jsonl:1", "data/rows.jsonl:12"]) == len("data/")
    assert common_folder(["data/a/rows.jsonl:1", "data/b/rows.jsonl:1"]) == len("data/")
    assert common_folder(["rows.jsonl:1"]) == 0 == common_folder(["a/x.json, row 1", "b/x.json, row 1"])
    assert common_folder(["C:\\data\\rows.jsonl:1"]) == len("C:\\data\\")


# ---------------------------------------------------------------------------------------------------------- as a page


class Page(HTMLParser):
    """Refuses what is not balanced. tokens: (class, title, text) of each."""

    VOID = {"meta", "wbr", "input"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tokens, self.tags = [], [], set()
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        given = dict(attributes)
        assert "src" not in given and not (given.get("href") or "#").removeprefix("#").startswith(("http", "/"))
        if tag == "b" and "title" in given:
            self.tokens.append([given["class"], given["title"], ""])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if "b" in self.open and "sub" not in self.open and self.tokens and "title" not in self.open:
            self.tokens[-1][2] += data


def test_a_page_has_every_token_with_its_id(read):
    data, template = read(pair("What is 1 and 1?", "It is 时。"), pair("What is 1 and 2?", "It is 3."))
    page = html_page(data.rows, template, "2 rows")
    tokens = Page(page).tokens
    ids = [i for row in data.rows for i in row.examples[0].ids.tolist()]
    assert [int(i) for _, title, _ in tokens for i in re.match(r"(?:\d+ tokens · )?ids? ([\d ]+) ·", title)[1].split()] == ids
    text = "".join(text for _, _, text in tokens).replace("⏎", "\n").replace("·", " ")
    assert text == "".join(template.tokenizer.decode(row.examples[0].ids) for row in data.rows)
    assert [(kind, text) for kind, _, text in tokens if kind[0] in "lt"][:8] == [
        ("l", "I"), ("l o", "t"), ("l", "·is"), ("l o", "·"), ("l k", "时"), ("l o k", "。"), ("t", "<|im_end|>"), ("l", "I"),
    ]
    spelled = Spelling(template.tokenizer).pieces(data.rows[0].examples[0].ids)[-3]
    assert next(title for _, title, text in tokens if text == "时") == (
        f"3 tokens · ids {' '.join(map(str, spelled.ids))} · positions 23 to 25 · weight 1 · stored {' '.join(spelled.stored)}"
    )
    assert "⋮ 12 tokens shared with <a href=\"#row-1\">rows.jsonl:1</a>" in page


def test_a_page_escapes_what_rows_say(read):
    evil = "<script>alert('&')</script>\x00\x1b\ufffe"
    data, template = read(pair(evil, evil), name="<b>&.jsonl")
    finding = Finding("kind", "warning", "3 of <4> rows.", ("<b>&.jsonl:1",), "Mend & \x07 go on.", 3)
    page = html_page(data.rows, template, "<i>title</i> & more", [finding])
    parsed = Page(page)
    assert page.count("<script>") == 1 and "<i>title" not in page and "<b>&" not in page
    assert html.escape("3 of <4> rows.") in page and r"Mend &amp; \x07 go on." in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe]", page)
    text = "".join(text for kind, _, text in parsed.tokens if kind[0] == "l")
    assert text == r"<script>alert('&')</script>\x00\x1b\ufffe"


def test_a_page_fetches_nothing(read):
    data, template = read(pair("中文", "好"))
    page = html_page(data.rows, template, "t")
    assert not re.search(r"https?:|//|url\(|@import|<link|<img|<iframe|srcset", page.split("</head>")[0] + page.split("</script>")[0][-600:])
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">') and 'lang="zh-Hans"' in page
    assert "link" not in Page(page).tags


def test_long_rows_open_on_a_page_and_huge_ones_are_cut(read):
    data, template = read(pair("1" * 9000, "2"), template="plain")
    page = html_page(data.rows, template, "t")
    assert "… 8,600 more tokens …" in page and "… 4,600 more tokens, not on this page …" in page
    assert len(Page(page).tokens) == 400 + 4000 + 2


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    write_asked(tmp_path / "page.html", "甲")
    assert (tmp_path / "page.html").read_text("utf-8") == "甲"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(RunError, match="cannot be written"):
        write_asked(tmp_path / "page.html" / "x.html", "甲")


def test_show_prints_and_writes_the_same_rows(read, tmp_path, capsys):
    data, template = read(*(pair(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(9)))
    show(data, template, 2, Screen(), tmp_path / "page.html")
    out = capsys.readouterr().out
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "rows.jsonl:2 · " in out and "rows.jsonl:3" not in out and "page.html" in out
    assert "<h2>rows.jsonl:2 " in page and "rows.jsonl:3" not in page and "<title>2 of 9 rows, token by token</title>" in page


def test_showing_loads_no_torch():
    script = "import sys, weitiao.train.show; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------------------------------------------------- real rows


@pytest.fixture(scope="module", params=["gpt2", "yuan2"])
def real(request, shared):
    from transformers import GPT2Tokenizer

    from weitiao.model.families.yuan2_tokenizer import Yuan2Tokenizer

    folder = shared / "tokenizers" / request.param
    return {
        "gpt2": lambda: GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")),
        "yuan2": lambda: Yuan2Tokenizer(vocab_file=str(folder / "tokenizer.model")),
    }[request.param]()


@pytest.mark.parametrize("file", ["alpaca_zh/alpaca_zh_demo.json", "resume/seed_200.json", "multi_turn/dummy_conversation.json"])
def test_real_rows(real, shared, read, file):
    rows = json.loads((shared / "data" / file).read_text("utf-8"))[:12]
    data, template = read(*rows, tokenizer=real)
    text = shown(data, template, most_tokens=1 << 20)
    assert "\ufffd" not in text
    pieces = Spelling(real).pieces
    learned = "".join(p.text for row in data.rows for e in row.examples for p in pieces(e.ids[e.weights > 0]))
    assert learned_text(text) == learned.replace("·", " ")
    if Spelling(real).in_bytes:  # sentencepiece has spaces of its own
        assert all(row.conversation.messages[i].content in learned for row in data.rows for i in row.conversation.turns())
    page = html_page(data.rows, template, file)
    assert Page(page).tokens and "\ufffd" not in page


def test_what_was_planned_is_told_of_the_parts_that_ran():
    """A run that goes on proves nothing again, so the proof's memory is none of its own."""
    from types import SimpleNamespace

    from weitiao.train.train import planned_and_measured

    meter = SimpleNamespace(peaks={"load": 1 << 20, "steps": 3 << 20}, before=0)
    planned = SimpleNamespace(parts={"load": 1 << 20, "proof": 9 << 20, "steps": 4 << 20}, kept=0)
    assert planned_and_measured(SimpleNamespace(meter=meter, planned=planned)) == "4.0 MiB planned; 3.0 MiB measured (steps)"
