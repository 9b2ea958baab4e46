"""Trained and all parameters of the models that the tutorials name, to the digit, without a weight in memory."""

import chatglm3
import pytest
import torch
import transformers as T
from torch import nn

from weitiao.config import BitfitSettings, FullSettings, LoraSettings, PrefixSettings, PromptSettings, PtuningSettings
from weitiao.model.families.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM
from weitiao.model.methods import METHODS, count_parameters, trainable_summary
from weitiao.train.loss import learn_on_tries


def bloom(hidden: int):
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=46145, hidden_size=hidden, n_layer=24, n_head=16))


MODELS = {
    "bloom-1b4": (lambda: bloom(2048), 1_303_111_680),
    "bloom-800m": (lambda: bloom(1536), 750_841_344),
    "llama-2-7b": (lambda: T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                                                            num_hidden_layers=32, num_attention_heads=32)), 6_738_415_616),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config()), 124_439_808),
    "yuan2-2b": (lambda: Yuan2Shapes(), 2_088_724_480),
    "glm": (lambda: T.GlmForCausalLM(T.GlmConfig(
        vocab_size=65_024, hidden_size=4096, intermediate_size=13696, num_hidden_layers=28, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128, attention_bias=True, tie_word_embeddings=False, pad_token_id=None)), 6_243_584_000),
    "chatglm3-6b": (lambda: ChatGLM3ForCausalLM(ChatGLM3Config.from_dict(dict(chatglm3.FULL_SIZE))), 6_243_584_000),
}


class Shapes(T.PreTrainedModel, T.GenerationMixin):
    """The weights of a model that transformers has no class for: names, shapes and ties, no forward."""

    config_class = T.LlamaConfig
    base_model_prefix = "model"

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, **more): ...


class Yuan2Shapes(Shapes):
    def __init__(self, h: int = 2048, inner: int = 8192, vocabulary: int = 135_040):
        super().__init__(T.LlamaConfig(vocab_size=vocabulary, hidden_size=h, num_hidden_layers=24, num_attention_heads=32))
        self.model = nn.Module()
        self.model.embed_tokens = self.embed = nn.Embedding(vocabulary, h)
        self.model.layers = nn.ModuleList(self._layer(h, inner) for _ in range(24))
        self.model.norm = nn.RMSNorm(h)
        self.lm_head = nn.Linear(h, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    @staticmethod
    def _layer(h: int, inner: int) -> nn.Module:
        layer, layer.self_attn, layer.mlp = nn.Module(), nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, nn.Linear(h, h, bias=False))
        gate = layer.self_attn.lf_gate = nn.Module()
        gate.conv1, gate.conv2 = nn.Conv2d(h, h // 2, (2, 1)), nn.Conv2d(h // 2, h, (2, 1))
        gate.output_layernorm = nn.RMSNorm(h)
        layer.mlp.up_proj, layer.mlp.gate_proj = nn.Linear(h, inner, bias=False), nn.Linear(h, inner, bias=False)
        layer.mlp.down_proj = nn.Linear(inner, h, bias=False)
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(h), nn.RMSNorm(h)
        return layer


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
        if not isinstance(made, Shapes):
            learn_on_tries(made)
        tuned = METHODS[settings.name].attach(made, settings, 0)
    added = 0 if settings.name in ("full", "bitfit") else trainable
    assert count_parameters(tuned) == (trainable, base + added)


def test_the_summary_is_the_tutorials():
    assert trainable_summary(9_043_968, 2_097_768_448) == "trainable params: 9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311"
    assert trainable_summary(1_949_696, 6_245_533_696) == "trainable params: 1,949,696 || all params: 6,245,533,696 || trainable%: 0.0312"
