"""BitFit trains exactly the biases, in float32, and merges where the plain architecture has room for them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from test_layers import (
    IDS,
    TRIE_FAMILIES,
    assert_checkpointing_changes_nothing,
    assert_learns_in_half_precision,
    assert_trie_equals_rows,
    held,
    learn,
    logits,
    on_meta,
    reloaded,
    trained,
    trained_names,
)
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PhiConfig

from weitiao.errors import RunError, SettingError
from weitiao.model.methods import count_parameters
from weitiao.model.methods.added import WithTokens
from weitiao.model.methods.bitfit import Bitfit
from weitiao.settings.methods import BitfitSettings

OWN, ADDED = BitfitSettings(), BitfitSettings(add_bias=True)
WITH_BIASES, WITHOUT = ["bloom", "gpt2", "qwen2", "glm"], ["llama", "mistral", "gemma3"]
BLOOM = dict(n_layer=24, n_head=16, vocab_size=46145)


@pytest.mark.parametrize(("config", "count"), [
    (BloomConfig(hidden_size=2048, **BLOOM), 544_768), (BloomConfig(hidden_size=1536, **BLOOM), 408_576), (GPT2Config(), 102_144),
])
def test_counts_of_the_tutorials(config, count):
    total = count_parameters(on_meta(config))[1]
    assert count_parameters(Bitfit().attach(on_meta(config), OWN, 0)) == (count, total)


def test_llama_7b_gets_a_bias_for_each_output_of_its_linears():
    model = Bitfit().attach(on_meta(LlamaConfig()), ADDED, 0)
    added = 32 * (5 * 4096 + 2 * 11008)  # q k v o down; gate up
    assert count_parameters(model) == (added, 6_738_415_616 + added)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_biases_is_refused_with_the_way_out(name):
    with pytest.raises(SettingError, match=r"has no bias(.|\n)*method.add_bias=true"):
        Bitfit().attach(tiny_model(name), OWN, 0)


def test_exactly_the_biases_are_trained():
    model = Bitfit().attach(tiny_model("qwen2"), OWN, 0)
    assert trained_names(model) == [f"model.layers.{i}.self_attn.{m}_proj.bias" for i in range(2) for m in "qkv"]
    model = Bitfit().attach(tiny_model("qwen2"), BitfitSettings(add_bias=True, targets=["o_proj"]), 0)
    assert [n.split(".", 3)[3] for n in trained_names(model)] == [f"self_attn.{m}_proj.bias" for m in "qkvo"] * 2
    with pytest.raises(SettingError, match="method.targets names 'o_prog'"):
        Bitfit().attach(tiny_model("qwen2"), BitfitSettings(add_bias=True, targets=["o_prog"]), 0)


@pytest.mark.parametrize(("name", "settings"), [*((n, OWN) for n in WITH_BIASES), *((n, ADDED) for n in WITHOUT + ["qwen2"])])
def test_trained_saved_loaded_switched_off(name, settings, tmp_path):
    before = logits(tiny_model(name))
    model = trained(tiny_model(name), Bitfit(), settings)
    after = logits(model)
    with Bitfit().untuned(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    Bitfit().save(model, tmp_path / "adapter", "the/base")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["biases.safetensors"]
    with safe_open(tmp_path / "adapter" / "biases.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(trained_names(model))
        assert file.metadata() == {"format": "pt", "method": "bitfit", "base": "the/base"}
    fresh = Bitfit().attach(tiny_model(name), settings, seed=7)
    Bitfit().load(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), after)
    with Bitfit().untuned(fresh):
        assert torch.equal(logits(fresh), before)


def test_biases_of_another_model_are_not_loaded(tmp_path):
    Bitfit().save(Bitfit().attach(tiny_model("gpt2"), OWN, 0), tmp_path, "base")
    with pytest.raises(AssertionError, match="holds biases of another model"):
        Bitfit().load(Bitfit().attach(tiny_model("bloom"), OWN, 0), tmp_path)


def test_a_head_with_a_bias_is_found_again_when_added_tokens_wrap_it(tmp_path):
    def phi():
        torch.manual_seed(0)
        sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        return AutoModelForCausalLM.from_config(PhiConfig(**sizes, pad_token_id=0))

    both = WithTokens(Bitfit(), [60, 61])
    model = both.attach(phi(), OWN, 0)
    assert "lm_head.bias" in model.bitfit
    learn(model)
    after = logits(model)
    both.save(model, tmp_path / "adapter", "base")
    fresh = both.attach(phi(), OWN, 7)
    both.load(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), after)
    assert (logits(reloaded(both.merge(fresh), tmp_path / "merged")) - after).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(("name", "settings"), [
    *((n, OWN) for n in WITH_BIASES),
    ("llama", ADDED),
    ("llama", BitfitSettings(add_bias=True, targets=["q_proj"])),  # attention_bias wants k, v and o as well
    ("llama", BitfitSettings(add_bias=True, targets=["mlp.up_proj"])),
    ("gemma3", BitfitSettings(add_bias=True, targets=["q_proj", "k_proj", "v_proj", "o_proj"])),
])
def test_merged_is_a_plain_model_that_computes_the_same(name, settings, tmp_path):
    model = trained(tiny_model(name), Bitfit(), settings)
    after = logits(model)
    merged = Bitfit().merge(model)
    assert not hasattr(merged, "bitfit")
    assert (logits(reloaded(merged, tmp_path)) - after).abs().max() < 1e-5


def test_only_the_flags_that_are_needed_are_set():
    settings = BitfitSettings(add_bias=True, targets=["q_proj"])
    merged = Bitfit().merge(Bitfit().attach(tiny_model("llama"), settings, 0))
    assert (merged.config.attention_bias, merged.config.mlp_bias) == (True, False)
    assert merged.model.layers[0].self_attn.o_proj.bias.count_nonzero() == 0
    assert merged.model.layers[0].mlp.up_proj.bias is None


@pytest.mark.parametrize(("name", "homeless", "way_out"), [
    ("gemma3", "gate_proj, up_proj, down_proj", r"method.targets=\[q_proj, k_proj, v_proj, o_proj\]"),
    ("mistral", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", "Use the run folder as it is"),
    ("qwen2", "o_proj, gate_proj, up_proj, down_proj", "Use the run folder as it is"),
])
def test_an_architecture_without_room_is_told_and_left_as_it_was(name, homeless, way_out):
    model = Bitfit().attach(tiny_model(name), ADDED, 0)
    config, before = model.config.to_dict(), logits(model)
    with pytest.raises(RunError, match=rf"added to {homeless}\.\n(.|\n)*{way_out}"):
        Bitfit().merge(model)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


def test_a_half_precision_model_merges_into_its_own_dtype(tmp_path):
    model = Bitfit().attach(held("bloom", tmp_path / "base"), OWN, 0)
    learn(model)
    after = logits(model)
    merged = Bitfit().merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(merged), after)
    assert torch.equal(logits(reloaded(merged, tmp_path / "merged")), after)


# ------------------------------------------------------------------------------------------- precision and gradients


@pytest.mark.parametrize("holding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize(("name", "settings"), [("bloom", OWN), ("gpt2", OWN), ("llama", ADDED)])
def test_half_precision_and_quantised_bases(name, settings, holding, tmp_path):
    assert_learns_in_half_precision(name, Bitfit(), settings, holding, tmp_path)


def test_a_step_too_small_for_bf16_is_kept(tmp_path):
    model = Bitfit().attach(held("bloom", tmp_path), OWN, 0)
    bias = model.transformer.h[0].mlp.dense_4h_to_h.bias
    with torch.no_grad():
        bias.fill_(1.0).add_(1e-4)  # bf16 has 8 bits: 1.0001 would be 1
    logits(model)
    assert bias.dtype is torch.float32 and (bias == 1.0001).all()


def test_switching_off_is_seen_inside_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(tiny_model("bloom"))
    model = trained(tiny_model("bloom"), Bitfit(), OWN)
    with torch.autocast("cpu", torch.bfloat16):
        after = logits(model)
        with Bitfit().untuned(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), after)


def test_an_error_in_a_forward_leaves_no_copy_behind(tmp_path):
    model = Bitfit().attach(held("bloom", tmp_path), OWN, 0)
    linear = model.transformer.h[0].mlp.dense_4h_to_h
    with pytest.raises(RuntimeError):
        linear(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert isinstance(linear.bias, torch.nn.Parameter)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # its recomputation ends in the middle of a forward
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained_names(model))
    assert isinstance(linear.bias, torch.nn.Parameter)


@pytest.mark.parametrize("name", ["bloom", "llama", "gemma3", "gpt2"])
def test_checkpointing_changes_no_gradient(name, branching):
    assert_checkpointing_changes_nothing(name, Bitfit(), ADDED, branching)


@pytest.mark.parametrize("name", TRIE_FAMILIES)
def test_trie_equals_rows(name, branching):
    assert_trie_equals_rows(name, Bitfit(), ADDED, branching)
