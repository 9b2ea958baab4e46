"""Which models may share prefixes, and that the others stay the models they are."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from conftest import tiny_config, tiny_model

from weitiao.model.load import load_model, model_limit, trie_obstacle, weight_dtype
from weitiao.settings.model import ModelSettings

SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             pad_token_id=None, bos_token_id=None, eos_token_id=2)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "glm", "gpt2", "cohere", "granite", "bloom", "yuan"])
def test_families_of_the_interface_have_no_obstacle(name):
    assert trie_obstacle(tiny_model(name)) is None


@pytest.mark.parametrize(("config", "reason"), [
    (T.Gemma2Config(**SMALL, head_dim=8), "its attention is eager, not sdpa"),
    (T.GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "its attention is eager, not sdpa"),
    (tiny_config("gptj"), "gptj does not take its attention from outside"),
    (tiny_config("bloom", pretraining_tp=2, slow_but_exact=True), "slow_but_exact"),
    (T.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "its rope is dynamic"),
], ids=["gemma2", "gpt_oss", "gptj", "bloom", "dynamic rope"])
def test_others_are_named_and_computed_as_transformers_computes_them(config, reason, tmp_path):
    torch.manual_seed(0)
    own = T.AutoModelForCausalLM.from_config(config).eval()
    assert reason in trie_obstacle(own)
    own.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, ModelSettings(name="x"), torch.float32).eval()
    ids = torch.randint(4, 60, (2, 9))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, own(ids).logits)


def test_what_is_trained_is_held_in_float32_whatever_the_checkpoint(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert weight_dtype("auto", trains_all=True, compute=torch.bfloat16) is torch.float32
    assert weight_dtype("auto", trains_all=False, compute=torch.bfloat16) is torch.bfloat16
    assert weight_dtype("bfloat16", trains_all=True, compute=torch.float32) is torch.bfloat16
    model = load_model(tmp_path, ModelSettings(name="x"), torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_models_limit():
    assert model_limit(tiny_config("llama")) == model_limit(tiny_config("gpt2")) == 256


def test_gpt2_as_its_hub_gives_it(tmp_path):
    """Names without `transformer.`, and a mask a layer that is no weight: everything is found, and the numbers are its own."""
    import json

    from safetensors.torch import save_file

    config = tiny_config("gpt2")
    torch.manual_seed(0)
    own = T.GPT2LMHeadModel(config).eval()
    state = {name.removeprefix("transformer."): w.contiguous() for name, w in own.state_dict().items() if name != "lm_head.weight"}
    assert {"wte.weight", "h.0.attn.c_attn.weight", "ln_f.bias"} <= set(state)
    mask = torch.ones(1, 1, config.n_positions, config.n_positions).tril()
    save_file(state | {f"h.{i}.attn.bias": mask.clone() for i in range(config.n_layer)}, tmp_path / "model.safetensors", {"format": "pt"})
    facts = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    (tmp_path / "config.json").write_text(json.dumps(facts | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": config.n_positions}))
    loaded = load_model(tmp_path, ModelSettings(name="x"), torch.float32).eval()
    assert trie_obstacle(loaded) is None
    ids = torch.randint(4, 60, (2, 9))
    with torch.inference_mode():
        assert float((loaded(ids).logits - own(ids).logits).abs().max()) < 1e-5
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
