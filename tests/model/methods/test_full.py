"""Full tuning trains every weight, the last layers, or those that are named; the rest does not move by a bit."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from test_layers import (
    FAMILIES,
    assert_checkpointing_changes_nothing,
    assert_trie_equals_rows,
    logits,
    on_meta,
    reloaded,
    trained,
    trained_names,
)
from transformers import BloomConfig, GPT2Config, LlamaConfig

from weitiao.errors import RunError, SettingError
from weitiao.model.methods import count_parameters
from weitiao.model.methods.full import Full
from weitiao.settings.methods import FullSettings

LAST = FullSettings(last_layers=1)
BLOOM_800M = BloomConfig(hidden_size=1536, n_layer=24, n_head=16, vocab_size=46145)


@pytest.mark.parametrize(("config", "settings", "count"), [
    (BLOOM_800M, {}, 750_841_344), (GPT2Config(), {}, 124_439_808), (LlamaConfig(), {}, 6_738_415_616),
    (LlamaConfig(), {"last_layers": 2}, 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096),
    (BLOOM_800M, {"last_layers": 3}, 3 * (12 * 1536**2 + 13 * 1536) + 2 * 1536),
    (GPT2Config(), {"last_layers": 12}, 12 * (12 * 768**2 + 13 * 768) + 2 * 768),
    (LlamaConfig(), {"train": ["*.mlp.*"]}, 32 * 3 * 4096 * 11008),
    (LlamaConfig(), {"train": ["lm_head.weight"]}, 32000 * 4096),
    (LlamaConfig(), {"last_layers": 1, "train": ["lm_head.*"]}, 4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 32000 * 4096),
])
def test_counts_on_real_shapes(config, settings, count):
    trainable, total = count_parameters(Full().attach(on_meta(config), FullSettings(**settings), 0))
    assert (trainable, total) == (count, count_parameters(on_meta(config))[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_and_the_norm_behind_it(name):
    model = Full().attach(tiny_model(name), LAST, 0)
    last = model.config.num_hidden_layers - 1
    base, layers, norm = ("transformer", "h", "ln_f") if name in ("bloom", "gpt2") else ("model", "layers", "norm")
    expected = [n for n, _ in model.named_parameters() if n.startswith((f"{base}.{layers}.{last}.", f"{base}.{norm}."))]
    assert trained_names(model) == expected
    assert any(norm in n for n in expected)


def test_naming_a_tied_head_trains_the_embedding():
    model = Full().attach(tiny_model("gpt2"), FullSettings(train=["lm_head*"]), 0)
    assert trained_names(model) == ["transformer.wte.weight"]


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "gemma3"])
@pytest.mark.parametrize("settings", [FullSettings(), LAST, FullSettings(train=["*.0.*"])], ids=["all", "last", "first"])
def test_trained_saved_loaded_merged(name, settings, tmp_path):
    model = trained(tiny_model(name), Full(), settings)
    after = logits(model)
    Full().save(model, tmp_path / "model", "base")
    fresh = Full().attach(tiny_model(name, seed=5), settings, seed=7)
    Full().load(fresh, tmp_path / "model")
    assert torch.equal(logits(fresh), after)
    assert (logits(reloaded(Full().merge(model), tmp_path / "merged")) - after).abs().max() < 1e-5


def test_a_pattern_that_matches_nothing_is_told_the_nearest_names():
    with pytest.raises(SettingError, match=r"'\*.mlp.down.weight' matches no weight(.|\n)*model.layers.\*.mlp.down_proj.weight"):
        Full().attach(tiny_model(), FullSettings(train=["*.mlp.down.weight"]), 0)


def test_more_layers_than_there_are():
    with pytest.raises(SettingError, match=r"method.last_layers = 9, and the model has 2.\nExpected 1 to 2"):
        Full().attach(tiny_model(), FullSettings(last_layers=9), 0)


def test_a_trained_base_cannot_be_switched_off():
    with pytest.raises(RunError, match="trained the base itself"), Full().untuned(tiny_model()):
        pass


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2"])
def test_checkpointing_changes_no_gradient(name, branching):
    assert_checkpointing_changes_nothing(name, Full(), LAST, branching)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_trie_equals_rows(name, branching):
    assert_trie_equals_rows(name, Full(), LAST, branching)
