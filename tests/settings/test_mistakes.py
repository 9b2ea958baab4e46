"""Mistakes in settings are told as the user wrote them, each with its cure: an unknown name, a value out of bounds, another's setting."""

import pytest

from weitiao import config
from weitiao.errors import SettingError
from weitiao.settings.mistakes import ELSEWHERE

HELP = "`weitiao train --help` lists every setting."


def read(*overrides):
    return config.read(None, overrides, **{"data.train": "rows.jsonl"})


def refusal(*overrides):
    with pytest.raises(SettingError) as caught:
        read(*overrides)
    return str(caught.value)


# -- unknown names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed, named, meant", [
    ("method.rnk=3", "method.rnk", "method.rank"),
    ("training.learning_rat=1", "training.learning_rat", "training.learning_rate"),
    ("rank=3", "rank", "method.rank"),
    ("epochs=3", "epochs", "training.epochs"),
    ("seeed=3", "seeed", "training.seed"),
    ("modle=x", "modle", "model"),
    ("trainning.epochs=1", "trainning", "training"),
    ("share=2", "share", "data.train[].share"),
    ("data.train=[{path: a, shar: 2}]", "data.train.0.shar", "data.train[].share"),
])
def test_an_unknown_setting_is_refused_with_the_nearest(typed, named, meant):
    assert refusal(typed) == f"There is no setting {named!r}.\nDid you mean {meant!r}?\n{HELP}"


def test_nothing_is_offered_where_nothing_is_near():
    assert refusal("training.foo=3") == f"There is no setting 'training.foo'.\n{HELP}"


@pytest.mark.parametrize("typed, cure", [
    ("lora_alpha=32", "It is called method.alpha."),
    ("method.lora_alpha=32", "It is called method.alpha."),
    ("method.r=8", "It is called method.rank."),
    ("training.num_train_epochs=1", "It is called training.epochs."),
    ("gradient_accumulation_steps=4", "training.batch_size counts the rows of a whole optimizer step; "
                                      "training.nodes_per_pass says how much of it is computed at once."),
    ("training.per_device_train_batch_size=4", "training.batch_size counts the rows of a whole optimizer step."),
    ("training.warmup_ratio=0.1", "It is called training.warmup; below 1 it is a share."),
    ("cutoff_len=512", "It is called data.max_tokens."),
])
def test_the_names_of_peers_are_known(typed, cure):
    name = typed.partition("=")[0]
    assert refusal(typed) == f"There is no setting {name!r}.\n{cure}\n{HELP}"


def test_every_cure_for_a_peers_name_names_a_setting_that_exists():
    known = {name for name, _, _ in config.every_setting()}
    for name, cure in ELSEWHERE.items():
        assert known & set(cure.replace(";", " ").replace(".\n", " ").rstrip(".").replace(":", " ").replace("=", " ").split()), name


def test_all_mistakes_are_told_in_one_message():
    assert refusal("method.rnk=3", "training.batch_size=0", "lr=1") == (
        "There is no setting 'method.rnk'.\n"
        "training.batch_size = 0: Input should be greater than or equal to 1.\n"
        "There is no setting 'lr'.\n"
        "Did you mean 'method.rank'?\n"
        "It is called training.learning_rate.\n"
        f"{HELP}"
    )


# -- wrong values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed, found", [
    ("training.batch_size=0", "training.batch_size = 0: Input should be greater than or equal to 1."),
    ("data.max_tokens=4", "data.max_tokens = 4: Input should be greater than or equal to 8."),
    ("data.eval_share=1", "data.eval_share = 1: Input should be less than 1."),
    ("saving.keep=1", "saving.keep = 1: Input should be greater than or equal to 2."),
    ("method.dropout=-0.1", "method.dropout = -0.1: Input should be greater than or equal to 0."),
    ("training.learning_rate=nan", "training.learning_rate = nan: Input should be a finite number."),
    ("training.learning_rate=0", "training.learning_rate = 0: Input should be greater than 0."),
    ("method.rank=2.5", "method.rank = 2.5: Input should be a valid integer, got a number with a fractional part."),
    ("method.rank=two", "method.rank = 'two': Input should be a valid integer, unable to parse string as an integer."),
    ("model.dtype=fp16", "model.dtype = 'fp16': Input should be 'auto', 'float32', 'bfloat16' or 'float16'."),
    ("data.train=[{path: a, share: 0}]", "data.train.0.share = 0: Input should be greater than 0."),
    ("training=5", "training = 5: Input should be a valid dictionary or instance of TrainingSettings."),
])
def test_a_value_out_of_bounds_is_told_with_the_bound(typed, found):
    assert refusal(typed) == f"{found}\n{HELP}"


@pytest.mark.parametrize("typed, found", [
    ("data.labels={0: no, 1: maybe}", "data.labels.0 = False: Input should be a valid string."),
    ("model.revision=1234567", "model.revision = 1234567: Input should be a valid string."),
])
def test_a_text_that_yaml_takes_for_something_else_wants_quotes(typed, found):
    assert refusal(typed) == f"{found}\nYAML reads numbers, yes, no, on and off as such: put a text like that into quotes, '…'.\n{HELP}"


def test_such_a_text_is_taken_in_quotes():
    assert read("data.labels={0: 'no', 1: 'yes'}").data.labels == {"0": "no", "1": "yes"}
    assert read("model.revision='1234567'").model.revision == "1234567"


def test_an_unknown_method_is_refused_with_those_there_are():
    methods = "Methods: lora, full, bitfit, prompt, ptuning, prefix, ia3, adapter."
    assert refusal("method=loar") == f"There is no method 'loar'.\n{methods} Did you mean 'lora'?\n{HELP}"
    assert refusal("method=qlora") == f"There is no method 'qlora'.\nIt is method=lora with model.quantize=nf4.\n{HELP}"
    assert "method=lora with method.dora=true" in refusal("method=dora")
    assert "It is called ptuning." in refusal("method=p_tuning")
    assert refusal("method.name=qlora") == refusal("method=qlora")


def test_a_setting_of_another_method_is_refused():
    assert refusal("method=full", "method.rank=3") == (
        f"method.rank belongs to lora; this run's method is full.\n{HELP}"
    )
    assert "method.targets belongs to lora, bitfit, ia3; this run's method is prompt." in refusal("method=prompt", "method.targets=[a]")
