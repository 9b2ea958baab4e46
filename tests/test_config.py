"""Settings are born once, read from YAML and name=value alike, and a wrong one is told with its cure."""

import pytest
import yaml
from pydantic import ValidationError

from weitiao import config
from weitiao.errors import SettingError, SourceError
from weitiao.settings.methods import LoraSettings

HELP = "`weitiao train --help` lists every setting."


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*overrides, data="rows.jsonl", **given):
    """Settings that learn from rows.jsonl, with overrides as typed on the command line."""
    return config.read(None, overrides, **{"data.train": data, **given})


def refusal(*overrides, file=None, **given):
    with pytest.raises(SettingError) as caught:
        config.read(file, overrides, **given) if file else read(*overrides, **given)
    return str(caught.value)


def from_yaml(text, *overrides):
    with open("run.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return config.read("run.yaml", overrides)


# -- defaults and round trips ------------------------------------------------------------------------------------------


def test_one_file_of_rows_is_enough():
    settings = read()
    assert [source.path for source in settings.data.train] == ["rows.jsonl"]
    assert (settings.model.name, settings.method.name, settings.method.rank) == ("smollm2-135m", "lora", 16)
    assert (settings.training.batch_size, settings.training.epochs, settings.training.seed) == (16, 3.0, 42)


@pytest.mark.parametrize("overrides", [
    [],
    ["method=full", "training.learning_rate=3e-5", "evaluation.every=7", "data.system=你是助手"],
    ["method.targets=[q_proj, v_proj]", "data.labels={0: 差评, 1: 好评}", "data.columns={instruction: question}", "data.max_tokens=64"],
    ["data=[{path: a.jsonl, share: 2}, {path: b.jsonl, share: 1}]", "data.eval=c.jsonl", "evaluation.metric=field_f1", "output=runs/x"],
])
def test_settings_come_back_from_yaml_as_they_were(overrides):
    settings = read(*overrides)
    assert from_yaml(config.to_yaml(settings)) == settings


def test_yaml_holds_every_setting_of_the_run_and_chinese_as_it_is():
    text = config.to_yaml(read("data.system=你是助手"))
    written = yaml.safe_load(text)
    for name, _, method in config.every_setting():
        if "[]" not in name and method in ("", "lora"):
            value = written
            for part in name.split("."):
                value = value[part]  # a KeyError here is a setting that would be lost
    assert "system: 你是助手" in text


def test_the_learning_rate_is_the_methods_unless_given():
    assert read().learning_rate == 5e-4
    assert read("method=full").learning_rate == 2e-5
    assert read("method=full", "training.learning_rate=1e-3").learning_rate == 1e-3


# -- what is typed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override, group, leaf, value", [
    ("method.rank=16", "method", "rank", 16),
    ("--method.rank=4", "method", "rank", 4),
    ("training.batch-size=4", "training", "batch_size", 4),
    ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
    ("training.adam_epsilon=1E-6", "training", "adam_epsilon", 1e-6),
    ("training.steps=", "training", "steps", None),
    ("training.checkpointing=true", "training", "checkpointing", True),
    ("training.scheduler_options={num_cycles: 2}", "training", "scheduler_options", {"num_cycles": 2}),
    ("method.targets=[q_proj, v_proj]", "method", "targets", ["q_proj", "v_proj"]),
    ("evaluation.every=end", "evaluation", "every", "end"),
    ("evaluation.every=50", "evaluation", "every", 50),
    ("data.labels={0: neg, 1: pos}", "data", "labels", {"0": "neg", "1": "pos"}),
])
def test_name_equals_value(override, group, leaf, value):
    assert getattr(getattr(read(override), group), leaf) == value


def test_1e_minus_4_is_a_number_in_a_file_too():
    assert from_yaml("data: rows.jsonl\ntraining: {learning_rate: 1e-4}\n").training.learning_rate == 1e-4


def test_the_later_word_wins_file_then_options_then_name_equals_value():
    from_yaml("data: rows.jsonl\nmodel: a\nmethod: {rank: 2, alpha: 4}\n")
    settings = config.read("run.yaml", ["method.rank=3", "model.name=c"], **{"model.name": "b", "output": None})
    assert (settings.model.name, settings.method.rank, settings.method.alpha, settings.output) == ("c", 3, 4, None)


def test_short_forms():
    settings = from_yaml("model: gpt2\ndata: [a.jsonl, b.jsonl]\nmethod: full\n")
    assert settings.model.name == "gpt2" and settings.method.name == "full"
    assert [source.path for source in settings.data.train] == ["a.jsonl", "b.jsonl"]
    assert from_yaml("data: {train: a.jsonl, eval: {path: b.jsonl, split: test}}").data.eval[0].split == "test"


def test_a_short_form_is_spelled_out_when_more_is_said():
    settings = from_yaml("model: gpt2\ndata: a.jsonl\nmethod: lora\n", "model.dtype=bfloat16", "data.max_tokens=64", "method.rank=2")
    assert (settings.model.name, settings.model.dtype) == ("gpt2", "bfloat16")
    assert (settings.data.train[0].path, settings.data.max_tokens) == ("a.jsonl", 64)
    assert (settings.method.name, settings.method.rank) == ("lora", 2)


def test_one_source_and_the_settings_of_data_may_stand_together():
    data = from_yaml("data: {path: a.jsonl, split: test, max_tokens: 64}", "data.template=plain").data
    assert (data.train[0].path, data.train[0].split, data.max_tokens, data.template) == ("a.jsonl", "test", 64, "plain")


def test_a_method_without_its_name_is_lora():
    assert from_yaml("data: rows.jsonl\nmethod: {rank: 8}\n").method == LoraSettings(rank=8)


def test_one_name_is_a_list_of_one_and_a_methods_name_may_be_in_capitals():
    assert read("method=LoRA", "method.targets=q_proj").method.targets == ["q_proj"]
    assert read("method=ia3").method.targets == "auto" and read("tokens.add=<think>").tokens.add == ["<think>"]


def test_a_list_names_the_labels_from_0_on():
    for text in ("[neg, pos]", "{0: neg, 1: pos}", "{'0': neg, '1': pos}"):
        assert config.read(None, [f"data.labels={text}"], **{"data.train": "r.jsonl"}).data.labels == {"0": "neg", "1": "pos"}


# -- what goes with what -----------------------------------------------------------------------------------------------


def test_an_empty_value_is_told():
    from weitiao.cli import refuse_slips

    with pytest.raises(SettingError, match="method.text= has no value"):
        refuse_slips(["method=prompt", "method.text="])
    assert "method.text is empty" in refusal("method=prompt", "method.text=   ")
    assert "8 bits are int8, 4 bits are nf4" in refusal("model.quantize=int4")


def test_full_tuning_of_weights_that_cannot_take_a_step_is_refused_as_settings_are_read():
    assert "Choose method=lora" in refusal("method=full", "model.quantize=nf4")
    assert "quantize=int8, and would do nothing here" in refusal("model.int8_threshold=3")


@pytest.mark.parametrize("which", ["train", "eval"])
def test_every_file_has_a_share_or_none_has(which):
    both = "[{path: a.jsonl, share: 2}, {path: b.jsonl, share: 1}]"
    assert [source.share for source in getattr(read(f"data.{which}={both}").data, which)] == [2, 1]
    one = "[{path: a.jsonl, share: 2}, b.jsonl]"
    assert refusal(f"data.{which}={one}") == f"data.{which}: give every file a share, or none.\n{HELP}"


def test_a_metric_needs_rows_to_measure_on():
    assert refusal("evaluation.metric=field_f1") == (
        "evaluation.metric=field_f1 needs rows to measure on: give data.eval=FILE or data.eval_share=0.1, or leave it at loss.\n" + HELP)
    assert read("evaluation.metric=field_f1", "data.eval_share=0.1").evaluation.metric == "field_f1"


def test_no_rows_at_all():
    expected = f"There are no rows to learn from.\nGive --data FILE, or data: FILE in the YAML.\n{HELP}"
    assert refusal(data=None) == expected
    message = refusal("data.max_tokens=64", data=None)
    assert message == f"The setting data.train is missing.\nGive --data FILE, or data: FILE in the YAML.\n{HELP}"


# -- what is no setting at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["foo", "=3", "--resume"])
def test_a_word_that_is_no_setting(typed):
    assert refusal(typed) == f"Found {typed!r} among the settings.\nExpected name=value, such as method.rank=16.\n{HELP}"


def test_a_value_that_is_no_yaml():
    assert refusal("method.targets=[q_proj") == "The value of method.targets cannot be read: '[q_proj'.\nwhile parsing a flow sequence"


def test_a_setting_below_something_that_is_no_group():
    assert refusal("training=5", "training.epochs=2") == (
        f"training.epochs cannot be set: training is 5.\nExpected training to be a group of settings.\n{HELP}"
    )
    assert refusal("data.train.0.share=2") == (
        "data.train.0.share cannot be set: data.train is 'rows.jsonl'.\nExpected data.train to be a group of settings.\n"
        "Give it as a whole, such as data.train='[{path: a.jsonl, share: 2}, {path: b.jsonl, share: 1}]'."
    )


def test_a_missing_file_is_told_with_the_nearest():
    from_yaml("data: rows.jsonl")
    with pytest.raises(SourceError) as caught:
        config.read("rnu.yaml")
    assert str(caught.value) == (
        "There is no file rnu.yaml.\nExpected a YAML file of settings, or a run folder.\nDid you mean 'run.yaml'?"
    )


def test_a_file_that_is_no_yaml_or_no_settings():
    with pytest.raises(SettingError) as caught:
        from_yaml("data: [a.jsonl\nmethod: lora\n")
    message = str(caught.value)
    assert message.startswith("run.yaml is not readable as YAML.") and "line 2" in message
    assert message.endswith("Check indentation and colons.")
    with pytest.raises(SettingError) as caught:
        from_yaml("- rows.jsonl\n")
    assert str(caught.value) == "run.yaml holds a list.\nExpected settings such as `data: rows.jsonl`."


# -- settings are values -----------------------------------------------------------------------------------------------


def test_settings_are_frozen():
    settings = read()
    for group, leaf in ((settings, "output"), (settings.training, "seed"), (settings.method, "rank"), (settings.data.train[0], "path")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(group, leaf, 1)


def test_every_setting_has_a_meaning():
    silent = [name for name, info, _ in config.every_setting() if name != "method" and not info.description]
    assert silent == []


def test_no_setting_is_left_out_of_the_list():
    def leaves(values, at=""):
        for name, value in values.items():
            yield from leaves(value, f"{at}{name}.") if isinstance(value, dict) and value else [f"{at}{name}"]

    listed = {name for name, _, _ in config.every_setting()}
    groups = {name.partition(".")[0] for name in listed}
    assert groups == set(config.Settings.model_fields)
    assert set(leaves(read().model_dump())) - {"method.name"} <= listed
