"""What the READMEs say is what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from weitiao import config
from weitiao.cli import app
from weitiao.data.templates import named_templates
from weitiao.model.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text("utf-8"), re.S)


def commands(readme: Path) -> list[list[str]]:
    lines = [line.split(" #")[0].strip() for block in blocks(readme, "bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("weitiao ")]


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_every_command_and_option_exists(readme):
    known = typer.main.get_command(app).commands
    found = commands(readme)
    assert {words[0] for words in found} >= {"demo", "train", "check", "plan", "chat", "generate", "evaluate", "merge", "export", "prove"}
    for words in found:
        options = {o for p in known[words[0]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, words


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_every_setting_exists(readme):
    for words in commands(readme):
        overrides = [w for w in words if re.match(r"^[a-z_.]+=", w)]
        assert config.read(None, overrides, **{"data.train": "rows.jsonl"})
    (text,) = blocks(readme, "yaml")
    settings = config.parse(yaml.safe_load(text))
    assert settings.method.rank == 8 and settings.learning_rate == 5e-4 and settings.data.eval_share == 0.1


def test_the_commands_run_as_they_stand(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    """Every `weitiao` line of the README, on a tiny model in the place of the ones it names, in the order it gives them."""
    import io
    import shutil
    import sys

    from weitiao.cli import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(rows_file, "rows.jsonl")
    (tmp_path / "reviews.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 6)
    (tmp_path / "run.yaml").write_text(blocks(READMES[0], "yaml")[0].replace("smollm2-135m", str(model_folder)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    run = f"runs/rows-lora-{model_folder.name}"
    done = set()
    yaml_line = next(re.findall(r"for: weitiao (.*)", readme.read_text("utf-8"))[0] for readme in READMES[:1])
    for words in [*commands(READMES[0]), shlex.split(yaml_line)]:
        if words[0] == "demo":  # measured by hand: it takes minutes
            continue
        words = [{"RUN": run, "Qwen/Qwen2.5-0.5B-Instruct": str(model_folder)}.get(word, word) for word in words]
        if words[0] in ("train", "check", "plan") and "--data" in words and "--model" not in words:
            words += ["--model", str(model_folder), "data.eval_share=0.2"]
        if "reviews.jsonl" in words:  # to the tiny tokenizer a letter is a token
            words += ["data.label_scoring=sequence"]
        monkeypatch.setattr(sys, "argv", ["weitiao", *words])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, (words, capsys.readouterr().err)
        done.add(words[0])
    assert done == {"train", "check", "plan", "chat", "generate", "evaluate", "merge", "export", "prove"}
    loras = [Path(run).name, *(f"{Path(run).name}-{i}" for i in range(2, 6))]
    others = [f"rows-{method}-{model_folder.name}" for method in ("prefix", "prompt")]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [f"reviews-lora-{model_folder.name}", *loras, *others]


def test_both_languages_say_the_same_commands():
    english, chinese = (re.sub(r"#.*", "", "".join(blocks(r, "bash"))).split() for r in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_methods_and_templates_are_those_there_are(readme):
    text = readme.read_text("utf-8")
    for name in [*METHODS, *named_templates()]:
        assert f"`{name}`" in text


def test_the_two_commands_stand_at_the_top():
    for readme in READMES:
        head = readme.read_text("utf-8")[:500]
        assert "make run" in head and "make test" in head
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^run:", makefile, re.M) and re.search(r"^test:", makefile, re.M)


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[><=]", d)[0].lower() for d in [*project["dependencies"], *project["optional-dependencies"]["test"]]}
    assert wanted <= pinned
    assert all(">=" in d and "==" not in d and "<" not in d for d in project["dependencies"])
