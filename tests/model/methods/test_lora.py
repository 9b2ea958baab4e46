"""LoRA's kin: what PEFT is asked for, and PiSSA, whose file must fit the base as it was."""

import json

import pytest
import torch
from conftest import tiny_model

from weitiao import config
from weitiao.errors import SettingError
from weitiao.model.methods import METHODS, count_parameters
from weitiao.settings.methods import LoraSettings
from weitiao.settings.training import TrainingSettings
from weitiao.train.loss import learn_on_tries
from weitiao.train.optimizer import make_optimizer

LORA = METHODS["lora"]
IDS = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0))


def attached(settings, name="llama", seed=0, moved=0.0):
    model = tiny_model(name, seed=1)
    learn_on_tries(model)
    model = LORA.attach(model, settings, seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("settings, key, value", [
    (LoraSettings(rank=4, rslora=True), "use_rslora", True), (LoraSettings(rank=4, dora=True), "use_dora", True),
    (LoraSettings(rank=4, dropout=0.1), "lora_dropout", 0.1), (LoraSettings(rank=4, alpha=7), "lora_alpha", 7),
])
def test_settings_reach_peft(settings, key, value, tmp_path):
    LORA.save(attached(settings), tmp_path, "the/base")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved[key] == value and saved["base_model_name_or_path"] == "the/base"


def test_rslora_scales_by_the_root_of_the_rank():
    plain, root = attached(LoraSettings(rank=16, alpha=32)), attached(LoraSettings(rank=16, alpha=32, rslora=True))
    scale = [next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")) for model in (plain, root)]
    assert scale == [2.0, 8.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen2", "gemma3", "glm"])
def test_all_linear_is_every_linear_of_the_layers_and_not_the_head(name):
    from weitiao.model.methods.layers import linear_names

    model = tiny_model(name)
    names = set(linear_names(model))
    tuned = LORA.attach(model, LoraSettings(rank=4), 0)
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, p in tuned.named_parameters() if ".lora_A" in n}
    assert adapted == names and "lm_head" not in adapted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_begins_as_the_model_and_its_file_fits_the_base_as_it_was(name, rslora, tmp_path):
    from peft import PeftModel

    settings = LoraSettings(rank=4, init="pissa", rslora=rslora)
    base = logits(tiny_model(name, seed=1).eval())
    begun = attached(settings, name)
    assert float((logits(begun) - base).abs().max()) < 1e-6
    assert all(p.abs().max() > 0 for n, p in begun.named_parameters() if "lora_B" in n)
    model = attached(settings, name, moved=0.05)
    LORA.save(model, tmp_path, "base")
    by_peft = PeftModel.from_pretrained(tiny_model(name, seed=1), tmp_path).eval()
    assert by_peft.peft_config["default"].r == 8
    assert float((logits(by_peft) - logits(model)).abs().max()) < 1e-6
    # Begun elsewhere from other random numbers, the base is made to fit the file.
    elsewhere = attached(settings, name, seed=9)
    LORA.load(elsewhere, tmp_path)
    assert float((logits(elsewhere) - logits(model)).abs().max()) < 1e-6
    assert count_parameters(elsewhere)[0] == count_parameters(model)[0] == count_parameters(attached(LoraSettings(rank=4), name))[0]


def test_pissa_and_dora_together_are_refused():
    with pytest.raises(SettingError, match="choose one"):
        config.parse({"data": "r.jsonl", "method": {"name": "lora", "dora": True, "init": "pissa"}})


def test_lora_plus_teaches_b_faster_than_a():
    settings = LoraSettings(rank=4, plus_ratio=16)
    model = attached(settings)
    optimizer = make_optimizer(model, TrainingSettings(weight_decay=0.1), 1e-3, lambda name: LORA.rate_factor(name, settings))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), name


def test_targets_that_match_nothing_are_told_with_those_there_are():
    with pytest.raises(SettingError, match="q_proj"):
        attached(LoraSettings(targets=["query_key_value"]))
    with pytest.raises(SettingError, match="c_attn"):
        attached(LoraSettings(targets=["q_proj"]), "gpt2")
