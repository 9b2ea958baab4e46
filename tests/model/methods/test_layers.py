"""Where things are in a decoder, told of families that are named and built differently.

What the tests of several methods share stands here too: three steps of training, logits, gradients, and the promises that
every method keeps.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, OPTConfig, Phi3Config

from weitiao.data.batch import padded_batch, trie_batch
from weitiao.data.packing import parts, trie_passes
from weitiao.errors import SettingError
from weitiao.model.methods.layers import (
    decoder_layers,
    final_norm,
    keys_and_values,
    linear_names,
    linears,
    select,
    sublayer_ends,
    within_layer,
)
from weitiao.train.evaluation import trie_batches
from weitiao.train.loss import learn_on_tries, summed_losses
from weitiao.model.load import checkpoint_activations, virtual_places

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama", "bloom", "gpt2", "qwen2", "gemma3", "glm", "mistral"]
TRIE_FAMILIES = ["llama", "gpt2", "qwen2", "gemma3", "glm"]

# -------------------------------------------------------------------------------------------- shared by the methods


def on_meta(config):
    """A model of real shapes that holds no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def logits(model, context=nullcontext) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), context():
        return model(input_ids=IDS, use_cache=False).logits


def learn(model, steps: int = 3, context=nullcontext) -> list[float]:
    """Losses of a few AdamW steps over what is trained."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with context():  # for each pass anew: autocast keeps its casts of weights until it is left
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_names(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def trained(model, method, settings):
    """The model with its method, after three steps that moved the logits and nothing that is frozen."""
    before = logits(model)
    model = method.attach(model, settings, seed=0)
    assert torch.equal(logits(model), before), "attaching alone changes what the model says"
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    learn(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert learned and not all(torch.equal(now[name], value) for name, value in learned.items())
    assert not torch.equal(logits(model), before)
    return model


def gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in summed_losses(model, batches):
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def worst(ours, theirs) -> float:
    """|difference| / |gradient|, the worst tensor; one that is 0 by nature (a key's bias) counts against the largest."""
    floor = 1e-6 * max(g.norm() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - g).norm() / max(g.norm(), floor)) for n, g in theirs.items())


def in_float64(name, method, settings):
    """With its method, new weights that begin at 0 moved, so that every gradient says something."""
    model = tiny_model(name)
    learn_on_tries(model)
    model = method.attach(model, settings, seed=0).double().train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.1)
    return model


def assert_trie_equals_rows(name, method, settings, branching) -> None:
    model = in_float64(name, method, settings)
    ours = gradients(model, [trie_batch(trie) for trie in trie_passes(branching, 40)])
    theirs = gradients(model, [padded_batch([row], pad_id=0) for row in branching])
    assert worst(ours, theirs) < 2e-6
    behind_stems = gradients(model, trie_batches(parts(branching, 21, worth=1), "cpu", virtual_places(model)))
    assert worst(behind_stems, theirs) < 2e-6


def assert_checkpointing_changes_nothing(name, method, settings, branching) -> None:
    model = in_float64(name, method, settings)
    batches = [trie_batch(trie) for trie in trie_passes(branching, 40)] if name != "bloom" else [padded_batch(branching[:2], 3)]
    plain = gradients(model, batches)
    checkpoint_activations(model)
    assert worst(gradients(model, batches), plain) < 1e-12


def reloaded(model, folder):
    """A plain model, written and read again with no weight missing or left over."""
    model.save_pretrained(folder)
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return plain


def held(name, folder, dtype=torch.bfloat16, **quantised):
    """A tiny model as it is loaded from disk, in bf16 or quantised."""
    tiny_model(name).save_pretrained(folder)
    more = {"quantization_config": BitsAndBytesConfig(**quantised)} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its packed weights, made in eval mode, have no backward
    return model


HOLDINGS = {"bf16": {}, "int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def assert_learns_in_half_precision(name, method, settings, holding, tmp_path) -> None:
    """On a base in bf16 or quantised: begins as the base, learns in float32, and switched off is the base again."""
    if HOLDINGS[holding]:
        pytest.importorskip("bitsandbytes")
    for autocast in (False, True):
        context = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        model = held(name, tmp_path, **HOLDINGS[holding])
        before = logits(model, context)
        model = method.attach(model, settings, seed=0)
        assert torch.equal(logits(model, context), before)
        losses = learn(model, 4, context)
        assert losses[-1] < losses[0]
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        with method.untuned(model):
            assert torch.equal(logits(model, context), before)
        assert not torch.equal(logits(model, context), before)


# -------------------------------------------------------------------------------------------------- families we know


@pytest.mark.parametrize(("name", "attention", "mlp", "made_for_attention"), [
    ("llama", "self_attn.o_proj", "mlp.down_proj", ["self_attn.k_proj", "self_attn.v_proj"]),
    ("mistral", "self_attn.o_proj", "mlp.down_proj", ["self_attn.k_proj", "self_attn.v_proj"]),
    ("qwen2", "self_attn.o_proj", "mlp.down_proj", ["self_attn.k_proj", "self_attn.v_proj"]),
    ("gemma3", "self_attn.o_proj", "mlp.down_proj", ["self_attn.k_proj", "self_attn.v_proj"]),
    ("glm", "self_attn.o_proj", "mlp.down_proj", ["self_attn.k_proj", "self_attn.v_proj"]),
    ("gpt2", "attn.c_proj", "mlp.c_proj", ["attn.c_attn"]),
    ("bloom", "self_attention.dense", "mlp.dense_4h_to_h", ["self_attention.query_key_value"]),
])
def test_ends_of_sublayers_and_what_makes_keys_and_values(name, attention, mlp, made_for_attention):
    model = tiny_model(name)
    for kind, expected in (("attention", attention), ("mlp", mlp)):
        ends = sublayer_ends(model, kind)
        assert within_layer(model, ends) == [expected]
        assert len(ends) == model.config.num_hidden_layers
        assert all(model.get_submodule(full) is module for full, module in ends.items())
    assert within_layer(model, keys_and_values(model)) == made_for_attention


@pytest.mark.parametrize(("name", "names"), [
    ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ("gpt2", ["c_attn", "c_proj", "c_fc"]),
    ("bloom", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
])
def test_linears_are_those_of_the_layers_never_the_head(name, names):
    model = tiny_model(name)
    assert linear_names(model) == names
    assert model.get_output_embeddings() not in linears(model).values()


@pytest.mark.parametrize(("name", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("bloom", "transformer.ln_f"),
                                            ("gemma3", "model.norm")])
def test_the_norm_behind_the_last_layer(name, norm):
    model = tiny_model(name)
    assert final_norm(model) is model.get_submodule(norm)


def test_phi3_registers_its_end_first():
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = on_meta(Phi3Config(**sizes, pad_token_id=0))
    assert within_layer(model, sublayer_ends(model, "attention")) == ["self_attn.o_proj"]
    assert within_layer(model, keys_and_values(model)) == ["self_attn.qkv_proj"]


def test_opt_has_its_mlp_in_the_layer_itself():
    sizes = dict(vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    model = on_meta(OPTConfig(**sizes, word_embed_proj_dim=32))
    assert within_layer(model, sublayer_ends(model, "attention")) == ["self_attn.out_proj"]
    assert within_layer(model, sublayer_ends(model, "mlp")) == ["fc2"]
    assert final_norm(model) is model.model.decoder.final_layer_norm


# ------------------------------------------------------------------------------------------ models with their own code


def linear_(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def modules(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


class Custom(nn.Module):
    """Stands for a model that brings its own code: layers at a place of its own, a config that says how many."""

    def __init__(self, layers, **config):
        super().__init__()
        self.model = modules(embed=nn.Embedding(9, 32), layers=nn.ModuleList(layers), norm=nn.LayerNorm(32))
        self.lm_head = linear_(32, 9)
        self.config = SimpleNamespace(hidden_size=32, **config)
        self.config.get_text_config = lambda: self.config


def yuan_layer() -> nn.Module:
    """v and o before q and k, all as wide as the stream, and a gate of convolutions among them (tutorial 1's printout)."""
    gate = modules(conv1=nn.Conv2d(32, 16, (2, 1)), conv2=nn.Conv2d(16, 32, (2, 1)), output_layernorm=nn.LayerNorm(32))
    q, k, v, o = (linear_(32, 32) for _ in range(4))
    mlp = modules(up_proj=linear_(32, 48), gate_proj=linear_(32, 48), down_proj=linear_(48, 32))
    return modules(self_attn=modules(v_proj=v, o_proj=o, lf_gate=gate, q_proj=q, k_proj=k), mlp=mlp)


def chatglm_layer() -> nn.Module:
    attention = modules(query_key_value=nn.Linear(32, 48), core_attention=nn.Module(), dense=linear_(32, 32))
    return modules(self_attention=attention, mlp=modules(dense_h_to_4h=linear_(32, 96), dense_4h_to_h=linear_(48, 32)))


def test_yuan_ends_its_attention_before_it_makes_queries():
    model = Custom([yuan_layer() for _ in range(3)], num_hidden_layers=3)
    assert within_layer(model, sublayer_ends(model, "attention")) == ["self_attn.o_proj"]
    assert within_layer(model, sublayer_ends(model, "mlp")) == ["mlp.down_proj"]
    assert within_layer(model, keys_and_values(model)) == ["self_attn.k_proj", "self_attn.v_proj"]


def test_chatglm3_counts_its_layers_by_another_name():
    model = Custom([chatglm_layer() for _ in range(3)], num_layers=3)
    assert decoder_layers(model)[0] == "model.layers"
    assert within_layer(model, sublayer_ends(model, "attention")) == ["self_attention.dense"]
    assert within_layer(model, sublayer_ends(model, "mlp")) == ["mlp.dense_4h_to_h"]
    assert within_layer(model, keys_and_values(model)) == ["self_attention.query_key_value"]


@pytest.mark.parametrize(("widths", "expected"), [((32, 8, 8), ["attn.b", "attn.c"]), ((48,), ["attn.a"])])
def test_names_nobody_knows_are_told_from_shapes(widths, expected):
    def layer():
        inner = {name: linear_(32, width) for name, width in zip("abc", widths)}
        return modules(attn=modules(**inner, z=linear_(32, 32)), mlp=modules(y=linear_(32, 32)))

    model = Custom([layer(), layer()], num_hidden_layers=2)
    assert within_layer(model, keys_and_values(model)) == expected


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_defies_the_probe_is_refused_by_name():
    with pytest.raises(SettingError, match=r"No layers are found in Custom.\n.*ModuleList of 7 layers(.|\n)*method.targets"):
        decoder_layers(Custom([chatglm_layer()], num_hidden_layers=7))
    nameless = [modules(attn=modules(a=linear_(32, 32), b=linear_(32, 16), c=linear_(32, 8), z=linear_(32, 32)))] * 2
    with pytest.raises(SettingError, match=r"belong to keys and values are recognised(.|\n)*a, b, c, z(.|\n)*method.targets"):
        keys_and_values(Custom(nameless, num_hidden_layers=2))


def test_a_mixture_of_experts_has_no_linear_that_ends_its_mlp():
    config = MixtralConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=4)
    with pytest.raises(SettingError, match="no linear layer that ends its mlp"):
        sublayer_ends(on_meta(config), "mlp")


def test_linears_are_chosen_by_the_end_of_their_name():
    model = tiny_model("gpt2")
    assert len(select(model, ["c_proj"], "method.targets")) == 4
    assert list(select(model, ["mlp.c_proj"], "method.targets")) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert select(model, "all-linear", "method.targets") == linears(model)
    with pytest.raises(SettingError, match=r"method.targets names 'c_atn'(.|\n)*c_attn, c_proj, c_fc\.\nDid you mean 'c_attn'"):
        select(model, ["c_atn"], "method.targets")
