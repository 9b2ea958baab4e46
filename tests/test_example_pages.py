"""The pages in examples/: their commands and settings are there, their links lead somewhere, and both languages say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from weitiao import config
from weitiao.cli import app
from weitiao.help import settings_text

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = sorted((ROOT / "examples").rglob("README.md"))
PAGES = [page for english in ENGLISH for page in (english, english.with_name("README.zh-CN.md"))]
# A setting by its full name, as the tables and the advice give it: `data.template`, `training.nodes_per_pass=512`.
NAMED = re.compile(r"`((?:model|data|method|training|evaluation|saving|samples|tokens)\.(?!jsonl?`)[a-z_]+)(?:=[^`]+)?`")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", page.read_text("utf-8"), re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of each command: those in blocks, and those of tables."""
    text = page.read_text("utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += [command for command in re.findall(r"`(weitiao [^`]*)`", text) if "examples/" in command]
    return [shlex.split(line) for line in lines if line]


def test_each_folder_has_a_page_in_both_languages():
    folders = [path for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {page.parent for page in ENGLISH} == {ROOT / "examples", *folders}
    assert all(page.is_file() for page in PAGES)


@every_page
def test_every_command_and_setting_is_there(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = typer.main.get_command(app).commands
    found = [words[1:] for words in commands(page) if words[0] == "weitiao"]
    assert found
    for name, *words in found:
        assert {word for word in words if word.startswith("--")} <= {o for p in known[name].params for o in p.opts}, words
        if name == "train":
            overrides = [word for word in words[1:] if re.match(r"^[a-z_.]+=", word)]
            assert config.read(words[0], overrides)
    for words in commands(page):
        assert all((ROOT / word).is_file() for word in words if word.startswith("examples/")), words


@every_page
def test_every_setting_that_is_spoken_of_is_there(page):
    named = set(NAMED.findall(page.read_text("utf-8")))
    assert named and named <= set(re.findall(r"^ +([a-z]+\.[a-z_]+) +\[", settings_text(100), re.M))


@every_page
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("english", ENGLISH, ids=lambda page: page.parent.name)
def test_both_languages_give_the_same_commands_and_output(english):
    chinese = english.with_name("README.zh-CN.md")
    assert blocks(english) == blocks(chinese)
    assert len(re.findall(r"^## ", english.read_text("utf-8"), re.M)) == len(re.findall(r"^## ", chinese.read_text("utf-8"), re.M))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name == "README.zh-CN.md"], ids=lambda page: page.parent.name)
def test_chinese_prose_has_full_width_punctuation(page):
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", page.read_text("utf-8"), flags=re.S)
    assert re.findall(r"[\u4e00-\u9fff][,;:!?(]|[,;:!?)][\u4e00-\u9fff]", prose) == []
