"""`weitiao train --help` ends with every setting: its name, type, unit, default and meaning, as `Settings` and its groups have them."""

import re

import pytest

from weitiao.config import every_setting
from weitiao.help import settings_text


def entry(name, method="", width=200):
    """What the help says of one setting, of a method's behind that method's head: (facts in brackets, meaning)."""
    text = settings_text(width)
    if method:
        text = re.search(rf"^method={method}: .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0] + "\n"
    found = re.search(rf"^  {re.escape(name)}  \[(.*)\]\n((?:      .*\n)*)", text, re.MULTILINE)
    assert found, f"{name} is not in the help"
    return found[1], " ".join(found[2].split())


@pytest.mark.parametrize("name, facts, meaning", [
    ("data.max_tokens", "whole number >= 8 (tokens), default below",
     "longest row; default: the model's limit or the rows' 99th percentile, whichever is less"),
    ("data.train", "list, required", "rows to learn from: one or several files or data sets, each a path or {path, split, subset, share}"),
    ("data.train[].share", "number > 0, default none", "its part of the mix, against the other files' shares; all files or none"),
    ("data.system", "text, default none", "system text put before rows that have none"),
    ("method", "lora|full|bitfit|prompt|ptuning|prefix|ia3|adapter, default lora", "how to tune"),
    ("method.rank", "whole number >= 1, default 16", "rank of each update"),
    ("method.dropout", "number >= 0 < 1, default 0.0", "share of an adapter's inputs dropped in training"),
    ("method.targets", "all-linear|list, default all-linear", "names of the linear layers to adapt"),
    ("training.batch_size", "whole number >= 1 (rows), default 16", "rows per optimizer step, over all passes and processes"),
    ("training.adam_epsilon", "number > 0, default 1e-08", "added to the root of that mean, so that nothing is divided by 0"),
    ("evaluation.every", "epoch|end|whole number >= 1 (steps), default epoch", "epoch, end, or a number of steps"),
    ("model.trust_remote_code", "true|false, default false", "run Python code that comes with the model; only for authors you trust"),
])
def test_a_setting_is_told_with_type_unit_default_and_meaning(name, facts, meaning):
    assert entry(name) == (facts, meaning)


def test_every_setting_is_listed_once_with_its_default_and_meaning():
    listed = re.findall(r"^  (\S+)  \[", settings_text(), re.MULTILINE)
    assert listed == [name for name, _, _ in every_setting()]
    for name, info, method in every_setting():
        facts, meaning = entry(name, method)
        unit = (info.json_schema_extra or {}).get("unit")
        assert "default" in facts or facts.endswith("required"), name
        assert meaning == (info.description or "how to tune"), name
        assert unit is None or f"({unit})" in facts, name


def test_a_methods_settings_stand_under_its_name_and_learning_rate():
    head = re.search(r"^method=lora: .*", settings_text(200), re.MULTILINE)[0]
    assert "arXiv:2106.09685" in head and head.endswith("Its learning rate is 0.0005.")
    assert entry("method.targets", "ia3")[1].startswith("names of the linear layers whose outputs are rescaled")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_meanings_are_wrapped_to_the_width(width):
    meanings = [line for line in settings_text(width).splitlines() if line.startswith("      ")]
    assert max(map(len, meanings)) <= width
