"""IA3 rescales keys, values and the inside of the MLP, in PEFT's format, and merges."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model
from test_layers import (
    FAMILIES,
    TRIE_FAMILIES,
    assert_checkpointing_changes_nothing,
    assert_learns_in_half_precision,
    assert_trie_equals_rows,
    logits,
    on_meta,
    reloaded,
    trained,
    trained_names,
)
from transformers import BloomConfig, GPT2Config, LlamaConfig

from weitiao.errors import SettingError
from weitiao.model.methods import count_parameters
from weitiao.model.methods.ia3 import Ia3
from weitiao.settings.methods import Ia3Settings

AUTO = Ia3Settings()
BLOOM = dict(n_layer=24, n_head=16, vocab_size=46145)


@pytest.mark.parametrize(("config", "count", "total"), [
    (LlamaConfig(), 32 * (2 * 4096 + 11008), 6_738_415_616),
    (BloomConfig(hidden_size=2048, **BLOOM), 344_064, 1_303_111_680),
    (BloomConfig(hidden_size=1536, **BLOOM), 258_048, 750_841_344),
    (GPT2Config(), 12 * (3 * 768 + 3072), 124_439_808),
])
def test_counts_on_real_shapes(config, count, total):
    assert count_parameters(Ia3().attach(on_meta(config), AUTO, 0)) == (count, total + count)


@pytest.mark.parametrize(("name", "places"), [
    ("llama", {"self_attn.k_proj": (16, 1), "self_attn.v_proj": (16, 1), "mlp.down_proj": (1, 48)}),
    ("gpt2", {"attn.c_attn": (96, 1), "mlp.c_proj": (1, 128)}),  # not attn.c_proj
    ("bloom", {"self_attention.query_key_value": (96, 1), "mlp.dense_4h_to_h": (1, 128)}),
])
def test_what_is_rescaled(name, places):
    model = Ia3().attach(tiny_model(name), AUTO, 0)
    first = {n.split(".0.", 1)[1].split(".ia3_l")[0]: n for n in trained_names(model) if ".0." in n}
    assert {place: tuple(model.get_parameter(n).shape) for place, n in first.items()} == places
    assert len(trained_names(model)) == 2 * len(places)


def test_layers_can_be_named():
    model = Ia3().attach(tiny_model("llama"), Ia3Settings(targets=["q_proj"], feedforward=["up_proj"]), 0)
    assert {n.split(".ia3_l")[0].rsplit(".", 1)[1] for n in trained_names(model)} == {"q_proj", "up_proj"}
    assert model.get_parameter(next(n for n in trained_names(model) if "up_proj" in n)).shape == (1, 32)
    for wrong in ({"targets": ["qproj"]}, {"feedforward": ["qproj"]}):
        with pytest.raises(SettingError, match=f"method.{next(iter(wrong))} names 'qproj'(.|\n)*Did you mean 'q_proj'"):
            Ia3().attach(tiny_model("llama"), Ia3Settings(**wrong), 0)
    with pytest.raises(SettingError, match="mlp.c_proj is named by method.targets and by method.feedforward"):
        Ia3().attach(tiny_model("gpt2"), Ia3Settings(targets=["c_proj"]), 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_saved_loaded_switched_off_merged(name, tmp_path):
    from peft import PeftModel

    before = logits(tiny_model(name))
    model = trained(tiny_model(name), Ia3(), AUTO)
    after = logits(model)
    with Ia3().untuned(model):
        assert torch.equal(logits(model), before)
    Ia3().save(model, tmp_path / "adapter", "the/base")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == "the/base"
    fresh = Ia3().attach(tiny_model(name), AUTO, seed=7)
    Ia3().load(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), after)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")), after)
    assert (logits(reloaded(Ia3().merge(model), tmp_path / "merged")) - after).abs().max() < 1e-5


@pytest.mark.parametrize("holding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_half_precision_and_quantised_bases(name, holding, tmp_path):
    assert_learns_in_half_precision(name, Ia3(), AUTO, holding, tmp_path)


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2"])
def test_checkpointing_changes_no_gradient(name, branching):
    assert_checkpointing_changes_nothing(name, Ia3(), AUTO, branching)


@pytest.mark.parametrize("name", TRIE_FAMILIES)
def test_trie_equals_rows(name, branching):
    assert_trie_equals_rows(name, Ia3(), AUTO, branching)
