"""A setting that stands for others sets what is not given besides."""

import pytest

from weitiao import config
from weitiao.settings.implied import MEMORY
from weitiao.settings.training import TrainingSettings


@pytest.mark.parametrize("words, expected", [
    ({"method": "full", "training": {"memory": "thrifty"}}, ("bfloat16", "stochastic", "paged_adamw_8bit", True, True)),
    ({"method": "full", "training": {"memory": "balanced"}}, ("bfloat16", "stochastic", "adamw_bnb_8bit", False, None)),
    ({"method": {"name": "full"}, "model": "gpt2", "training": {"memory": "fast"}}, ("auto", "auto", "adamw_torch", False, False)),
    ({"method": "full", "model": {"dtype": "float32"}, "training": {"memory": "thrifty", "optimizer": "adafactor", "checkpointing": False}},
     ("float32", "auto", "adafactor", True, False)),
    ({"training": {"memory": "thrifty"}}, ("auto", "auto", "adamw_torch", False, True)),
    ({"method": "lora", "training": {"memory": "balanced"}}, ("auto", "auto", "adamw_torch", False, None)),
])
def test_a_memory_setting_stands_for_several_and_what_is_given_wins(words, expected):
    made = config.parse({"data": "rows.jsonl"} | words)
    t = made.training
    assert (made.model.dtype, t.rounding, t.optimizer, t.step_in_backward, t.checkpointing) == expected
    assert config.parse(made.model_dump(mode="json")) == made, "a run goes on with what was settled"
    assert config.parse(made.model_dump(exclude_unset=True)) == made
    assert all(name in TrainingSettings.model_fields["memory"].description
               for kinds in MEMORY.values() for rungs in kinds.values() for name in (n.removeprefix("training.") for n in rungs))
