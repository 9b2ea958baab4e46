"""Trained and all parameters of the models that the tutorials name, to the digit, without a weight in memory."""

import chatglm3
import pytest
import torch
import transformers as T

from weitiao.model.families.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from weitiao.model.families.yuan2 import YuanConfig, YuanForCausalLM
from weitiao.model.methods import METHODS, count_parameters, trainable_summary
from weitiao.settings.methods import BitfitSettings, FullSettings, LoraSettings, PrefixSettings, PromptSettings, PtuningSettings
from weitiao.train.loss import learn_on_tries


def bloom(hidden: int):
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=46145, hidden_size=hidden, n_layer=24, n_head=16))


MODELS = {
    "bloom-1b4": (lambda: bloom(2048), 1_303_111_680),
    "bloom-800m": (lambda: bloom(1536), 750_841_344),
    "llama-2-7b": (lambda: T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                                                            num_hidden_layers=32, num_attention_heads=32)), 6_738_415_616),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config()), 124_439_808),
    "yuan2-2b": (lambda: YuanForCausalLM(YuanConfig()), 2_088_724_480),
    "glm": (lambda: T.GlmForCausalLM(T.GlmConfig(
        vocab_size=65_024, hidden_size=4096, intermediate_size=13696, num_hidden_layers=28, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128, attention_bias=True, tie_word_embeddings=False, pad_token_id=None)), 6_243_584_000),
    "chatglm3-6b": (lambda: ChatGLM3ForCausalLM(ChatGLM3Config.from_dict(dict(chatglm3.FULL_SIZE))), 6_243_584_000),
}


def lora(*targets: str):
    return LoraSettings(rank=8, targets=list(targets) or "all-linear")


# What the tutorials print, or what their sizes come to (10 virtual tokens).
FIGURES = [
    ("bloom-1b4", FullSettings(), 1_303_111_680),
    ("bloom-1b4", BitfitSettings(), 544_768),
    ("bloom-1b4", PromptSettings(virtual_tokens=10), 20_480),
    ("bloom-1b4", PtuningSettings(virtual_tokens=10, encoder_hidden=1024), 5_267_456),
    ("bloom-1b4", PtuningSettings(virtual_tokens=10), 12_609_536),
    ("bloom-1b4", PtuningSettings(virtual_tokens=10, encoder="lstm", encoder_hidden=1024, encoder_layers=5), 134_324_224),
    ("bloom-1b4", PrefixSettings(virtual_tokens=10), 983_040),
    ("bloom-1b4", PrefixSettings(virtual_tokens=10, projection=True), 205_641_728),
    ("bloom-1b4", lora("query_key_value"), 1_572_864),
    ("bloom-1b4", lora(), 6_291_456),
    ("bloom-800m", FullSettings(), 750_841_344),
    ("bloom-1b4", PromptSettings(virtual_tokens=7), 14_336),
    ("bloom-800m", BitfitSettings(), 408_576),
    ("bloom-800m", lora("query_key_value"), 1_179_648),
    ("bloom-800m", PromptSettings(virtual_tokens=10), 15_360),
    ("bloom-800m", PrefixSettings(virtual_tokens=10), 737_280),
    ("llama-2-7b", PromptSettings(virtual_tokens=10), 40_960),
    ("llama-2-7b", PtuningSettings(virtual_tokens=10, encoder_hidden=1024), 9_484_288),
    ("llama-2-7b", PtuningSettings(virtual_tokens=10), 50_384_896),
    ("llama-2-7b", PtuningSettings(virtual_tokens=10, encoder="lstm", encoder_hidden=1024, encoder_layers=5), 155_318_272),
    ("llama-2-7b", PrefixSettings(virtual_tokens=10), 2_621_440),
    ("llama-2-7b", PrefixSettings(virtual_tokens=10, projection=True), 1_090_826_240),
    ("llama-2-7b", lora("q_proj", "v_proj"), 4_194_304),
    ("llama-2-7b", lora(), 19_988_480),
    ("gpt2", FullSettings(), 124_439_808),
    ("gpt2", BitfitSettings(), 102_144),
    ("gpt2", lora("c_attn"), 294_912),
    ("yuan2-2b", lora("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 9_043_968),
    ("yuan2-2b", lora(), 9_043_968),
    ("chatglm3-6b", lora("query_key_value"), 1_949_696),
    ("glm", lora("q_proj", "k_proj", "v_proj"), 3_784_704),  # the same layers, queries, keys and values apart
]


@pytest.mark.parametrize("model, settings, trainable", FIGURES, ids=lambda x: x if isinstance(x, str) else getattr(x, "name", None))
def test_counts(model, settings, trainable):
    make, base = MODELS[model]
    with torch.device("meta"):
        made = make()
        assert count_parameters(made)[1] == base
        learn_on_tries(made)
        tuned = METHODS[settings.name].attach(made, settings, 0)
    added = 0 if settings.name in ("full", "bitfit") else trainable
    assert count_parameters(tuned) == (trainable, base + added)


def test_the_summary_is_the_tutorials():
    assert trainable_summary(9_043_968, 2_097_768_448) == "trainable params: 9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311"
    assert trainable_summary(1_949_696, 6_245_533_696) == "trainable params: 1,949,696 || all params: 6,245,533,696 || trainable%: 0.0312"
