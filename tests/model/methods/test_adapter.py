"""Bottlenecks stand behind sublayers, begin as nothing, can be switched off, and cannot be merged."""

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
    trained,
    trained_names,
)
from transformers import BloomConfig, GPT2Config, LlamaConfig

from weitiao.errors import RunError
from weitiao.model.methods import count_parameters
from weitiao.model.methods.adapter import Adapter, Bottleneck
from weitiao.settings.methods import AdapterSettings

PFEIFFER, HOULSBY = AdapterSettings(bottleneck=4), AdapterSettings(style="houlsby", bottleneck=4, activation="relu")


def one(hidden: int, bottleneck: int = 64) -> int:
    return 2 * hidden * bottleneck + hidden + bottleneck


@pytest.mark.parametrize(("config", "layers", "hidden", "total"), [
    (LlamaConfig(), 32, 4096, 6_738_415_616),
    (BloomConfig(hidden_size=2048, n_layer=24, n_head=16, vocab_size=46145), 24, 2048, 1_303_111_680),
    (GPT2Config(), 12, 768, 124_439_808),
])
def test_counts_on_real_shapes(config, layers, hidden, total):
    for style, each in (("pfeiffer", 1), ("houlsby", 2)):
        model = Adapter().attach(on_meta(config), AdapterSettings(style=style), 0)
        assert count_parameters(model) == (layers * each * one(hidden), total + layers * each * one(hidden))


@pytest.mark.parametrize(("name", "attention", "mlp"), [
    ("llama", "self_attn.o_proj", "mlp.down_proj"), ("bloom", "self_attention.dense", "mlp.dense_4h_to_h"),
    ("gpt2", "attn.c_proj", "mlp.c_proj"),
])
def test_where_they_stand(name, attention, mlp):
    for settings, places in ((PFEIFFER, {mlp}), (HOULSBY, {attention, mlp})):
        model = Adapter().attach(tiny_model(name), settings, 0)
        found = [n.split(".bottleneck.")[0] for n in trained_names(model)]
        assert {".".join(n.split(".")[-2:]) for n in found} == places
        assert len(set(found)) == 2 * len(places)


def test_a_bottleneck_by_hand():
    made = Bottleneck(3, 2, "tanh", 0.0)
    with torch.no_grad():
        made.up.weight.normal_()
        made.up.bias.normal_()
    h = torch.randn(5, 3)
    inner = torch.tanh(h @ made.down.weight.T + made.down.bias)
    assert torch.allclose(made(h), h + inner @ made.up.weight.T + made.up.bias, atol=1e-6)
    assert made(h.bfloat16()).dtype is torch.bfloat16
    made.enabled = False
    assert made(h) is h


def test_it_acts_before_the_residual_is_added():
    """With up's bias b alone, a Llama of one layer puts out norm(stream + b)."""
    model = Adapter().attach(tiny_model("llama", num_hidden_layers=1), PFEIFFER, 0)
    stream = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))
    logits(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bottleneck.up.bias.fill_(0.5)
    logits(model)
    assert torch.allclose(stream[1], stream[0] + 0.5, atol=1e-6)


def test_the_seed_makes_them():
    def downs(seed):
        return [p for n, p in Adapter().attach(tiny_model(), HOULSBY, seed).named_parameters() if n.endswith("down.weight")]

    assert all(torch.equal(a, b) for a, b in zip(downs(3), downs(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(downs(3), downs(4), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [PFEIFFER, HOULSBY], ids=["pfeiffer", "houlsby"])
def test_trained_saved_loaded_switched_off(name, settings, tmp_path):
    before = logits(tiny_model(name))
    model = trained(tiny_model(name), Adapter(), settings)
    after = logits(model)
    with Adapter().untuned(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    Adapter().save(model, tmp_path, "the/base")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.json", "adapters.safetensors"]
    assert json.loads((tmp_path / "adapter.json").read_text("utf-8")) == {
        "style": settings.style, "bottleneck": 4, "activation": settings.activation, "base": "the/base",
    }
    fresh = Adapter().attach(tiny_model(name), settings, seed=7)
    Adapter().load(fresh, tmp_path)
    assert torch.equal(logits(fresh), after)


def test_adapters_of_another_shape_or_model_are_not_loaded(tmp_path):
    Adapter().save(Adapter().attach(tiny_model("llama"), PFEIFFER, 0), tmp_path, "base")
    for name, settings, what in (("llama", HOULSBY, "holds other adapters"), ("gpt2", PFEIFFER, "of another model")):
        with pytest.raises(AssertionError, match=what):
            Adapter().load(Adapter().attach(tiny_model(name), settings, 0), tmp_path)


def test_they_cannot_be_merged():
    with pytest.raises(RunError, match=r"cannot be merged(.|\n)*from the run folder"):
        Adapter().refuse_merge()


@pytest.mark.parametrize("holding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_half_precision_and_quantised_bases(name, holding, tmp_path):
    assert_learns_in_half_precision(name, Adapter(), HOULSBY, holding, tmp_path)


def test_dropout_acts_in_training_alone():
    model = Adapter().attach(tiny_model(), AdapterSettings(bottleneck=4, dropout=0.5), 0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.up.weight.normal_()
    assert torch.equal(logits(model), logits(model))
    bottleneck = model.model.layers[0].mlp.down_proj.bottleneck.train()
    h = torch.randn(4, 32)
    assert not torch.equal(bottleneck(h), bottleneck(h))


@pytest.mark.parametrize("name", ["bloom", "llama", "gemma3", "gpt2"])
def test_checkpointing_changes_no_gradient(name, branching):
    assert_checkpointing_changes_nothing(name, Adapter(), HOULSBY, branching)


@pytest.mark.parametrize("name", TRIE_FAMILIES)
def test_trie_equals_rows(name, branching):
    assert_trie_equals_rows(name, Adapter(), HOULSBY, branching)
