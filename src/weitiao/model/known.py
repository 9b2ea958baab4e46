"""A hub id -> the architecture behind it, without the hub: what memory and time are told from before anything is fetched.

    "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"  ──  IDS  ──  SHAPES  ──  a config of transformers

Facts that the bytes and products of a run depend on are those of the model's published config.json: sizes, vocabulary, limits,
windows, rope, ties. What they don't depend on (token ids, epsilons, the spread of first weights) is left to the config class.

Models that share every such fact share a shape; one that differs in a few, such as its longest row, names them beside its ids.
The parameter count of a shape is the published one and no sum of the numbers beside it, so that each can be held against the other.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weitiao.model import families

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Facts = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """id: as the hub spells it; parameters: tied weights once; dtype: what the weights are published in; facts: of its config."""

    id: str
    model_type: str
    parameters: int
    dtype: str
    facts: Facts

    def config(self) -> PretrainedConfig:
        """A new one at every call, to be changed at will."""
        from transformers import AutoConfig

        families.named(self.model_type)
        return AutoConfig.for_model(self.model_type, **copy.deepcopy(self.facts), dtype=self.dtype, name_or_path=self.id)


def known(name: str) -> Known | None:
    """What is known of a hub id, in any case, with or without its owner; None: nothing.

    An owner that copies models under their own names counts as theirs. Any other does not: a model that was changed often keeps its name.
    """
    owner, _, bare = HUBS.sub("", name.strip().lower()).rpartition("/")
    return _by_bare_name().get(bare) if owner in MIRRORS else _by_id().get(f"{owner}/{bare}")


def known_config(name: str) -> PretrainedConfig | None:
    """The config of the model that the hub knows under `name`, made from the tables below; None: it isn't in them."""
    found = known(name)
    return found.config() if found else None


def known_names() -> list[str]:
    """Every id, as the hub spells it."""
    return [model.id for model in _by_id().values()]


HUBS = re.compile(r"^(hf|hub|modelscope):")
MIRRORS = {"", "unsloth", "nousresearch", "llm-research", "ai-modelscope", "zhipuai", "modelscope"}


# --------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    model_type: str
    parameters: int
    dtype: str
    facts: Facts


def _rope(theta: float, kind: str = "default", **more: Any) -> Facts:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> Facts:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": inner, **more}


def _family(model_type: str, dtype: str, **common: Any):
    """A maker of the shapes of one family: what they have in common, and then what each is."""
    return lambda parameters, **own: Shape(model_type, parameters, dtype, common | own)


def _qwen(model_type: str, **common: Any):
    return _family(model_type, "bfloat16", max_position_embeddings=32_768, tie_word_embeddings=False, **_rope(1e6), **common)


def _llama(dtype: str, vocab: int, limit: int, theta: float = 10_000.0, **common: Any):
    return _family("llama", dtype, **{"vocab_size": vocab, "max_position_embeddings": limit, "tie_word_embeddings": False,
                                      **_rope(theta), **common})


def _mistral(vocab: int, limit: int, theta: float, **common: Any):
    return _family("mistral", "bfloat16", vocab_size=vocab, max_position_embeddings=limit, tie_word_embeddings=False,
                   **_rope(theta), **({"sliding_window": None} | common))


def _llama3_rope(factor: float) -> Facts:
    """Stretched by wavelength, from the 8,192 tokens that Llama 3 was trained on."""
    return _rope(500_000.0, "llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8_192)


QWEN2, QWEN2_LARGE = (_qwen("qwen2", vocab_size=tokens) for tokens in (151_936, 152_064))
QWEN3, QWEN3_MOE = (_qwen(kind, vocab_size=151_936, head_dim=128) for kind in ("qwen3", "qwen3_moe"))
LLAMA2, YI = _llama("float16", 32_000, 4_096), _llama("bfloat16", 64_000, 4_096, 5e6)
LLAMA3 = _llama("bfloat16", 128_256, 8_192, 5e5)
LLAMA32 = _llama("bfloat16", 128_256, 131_072, **(_llama3_rope(32.0) | {"tie_word_embeddings": True}))
SMOLLM2 = _llama("bfloat16", 49_152, 8_192, 1e5, tie_word_embeddings=True)
DEEPSEEK_CODER = _llama("bfloat16", 32_256, 16_384, **_rope(1e5, "linear", factor=4.0))
GEMMA = _family("gemma", "bfloat16", vocab_size=256_000, max_position_embeddings=8_192, head_dim=256, tie_word_embeddings=True,
                **_rope(1e4))
GEMMA2 = _family("gemma2", "bfloat16", vocab_size=256_000, max_position_embeddings=8_192, sliding_window=4_096,
                 tie_word_embeddings=True, **_rope(1e4))
GEMMA3 = _family("gemma3_text", "bfloat16", vocab_size=262_144, max_position_embeddings=32_768, head_dim=256, sliding_window=512,
                 tie_word_embeddings=True)  # rope: two thetas by kind of layer, the class's own
PHI = _family("phi", "float16", vocab_size=51_200, max_position_embeddings=2_048, tie_word_embeddings=False)
PHI3 = _family("phi3", "bfloat16", vocab_size=32_064, max_position_embeddings=4_096, sliding_window=2_047,
               tie_word_embeddings=False, **_rope(1e4))
GLM = _family("glm", "bfloat16", vocab_size=151_552, head_dim=128, attention_bias=True, tie_word_embeddings=False)
GLM4 = _family("glm4", "bfloat16", vocab_size=151_552, max_position_embeddings=32_768, head_dim=128, tie_word_embeddings=False,
               **_rope(1e4, partial_rotary_factor=0.5))
BLOOM = _family("bloom", "float16", vocab_size=250_880, tie_word_embeddings=True)
GPT2 = _family("gpt2", "float32", vocab_size=50_257, n_positions=1_024, tie_word_embeddings=True)
OPT = _family("opt", "float16", vocab_size=50_272, max_position_embeddings=2_048, tie_word_embeddings=True)
PYTHIA = _family("gpt_neox", "float16", vocab_size=50_304, max_position_embeddings=2_048, tie_word_embeddings=False,
                 **_rope(1e4, partial_rotary_factor=0.25))


def _bloom(hidden: int, layers: int, heads: int) -> Facts:
    return {"hidden_size": hidden, "n_layer": layers, "n_head": heads}


def _gpt2(hidden: int, layers: int, heads: int) -> Facts:
    return {"n_embd": hidden, "n_layer": layers, "n_head": heads}


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> Facts:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden,
            "word_embed_proj_dim": hidden, **more}


def _pythia(hidden: int, layers: int, heads: int, **more: Any) -> Facts:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden, **more}


TIED = {"tie_word_embeddings": True}

# name -> parameters; hidden size, layers, heads, heads of keys and values, the MLP's inner width; what sets it apart in its family.
SHAPES: dict[str, Shape] = {
    "qwen1.5-0.5b": QWEN2(463_987_712, **_sizes(1024, 24, 16, 16, 2816), **TIED),
    "qwen1.5-1.8b": QWEN2(1_836_828_672, **_sizes(2048, 24, 16, 16, 5504)),
    "qwen1.5-4b": QWEN2(3_950_369_280, **_sizes(2560, 40, 20, 20, 6912), **_rope(5e6)),
    "qwen1.5-7b": QWEN2(7_721_324_544, **_sizes(4096, 32, 32, 32, 11_008)),
    "qwen2-0.5b": QWEN2(494_032_768, **_sizes(896, 24, 14, 2, 4864), **TIED),
    "qwen2-1.5b": QWEN2(1_543_714_304, **_sizes(1536, 28, 12, 2, 8960), **TIED),
    "qwen2-3b": QWEN2(3_085_938_688, **_sizes(2048, 36, 16, 2, 11_008), **TIED),
    "qwen2-7b": QWEN2_LARGE(7_615_616_512, **_sizes(3584, 28, 28, 4, 18_944)),
    "qwen2-14b": QWEN2_LARGE(14_770_033_664, **_sizes(5120, 48, 40, 8, 13_824)),
    "qwen2-32b": QWEN2_LARGE(32_763_876_352, **_sizes(5120, 64, 40, 8, 27_648)),
    "qwen2-72b": QWEN2_LARGE(72_706_203_648, **_sizes(8192, 80, 64, 8, 29_568)),
    "r1-qwen-1.5b": QWEN2(1_777_088_000, **_sizes(1536, 28, 12, 2, 8960), **_rope(1e4)),  # unlike its base, untied

    "qwen3-0.6b": QWEN3(596_049_920, **_sizes(1024, 28, 16, 8, 3072), **TIED),
    "qwen3-1.7b": QWEN3(1_720_574_976, **_sizes(2048, 28, 16, 8, 6144), **TIED),
    "qwen3-4b": QWEN3(4_022_468_096, **_sizes(2560, 36, 32, 8, 9728), **TIED),
    "qwen3-8b": QWEN3(8_190_735_360, **_sizes(4096, 36, 32, 8, 12_288)),
    "qwen3-14b": QWEN3(14_768_307_200, **_sizes(5120, 40, 40, 8, 17_408)),
    "qwen3-32b": QWEN3(32_762_123_264, **_sizes(5120, 64, 64, 8, 25_600)),
    "qwen3-30b-a3b": QWEN3_MOE(30_532_122_624, **_sizes(2048, 48, 32, 4, 6144), moe_intermediate_size=768, num_experts=128,
                               num_experts_per_tok=8, norm_topk_prob=True),

    "llama-2-7b": LLAMA2(6_738_415_616, **_sizes(4096, 32, 32, 32, 11_008)),
    "llama-2-13b": LLAMA2(13_015_864_320, **_sizes(5120, 40, 40, 40, 13_824)),
    "llama-2-70b": LLAMA2(68_976_648_192, **_sizes(8192, 80, 64, 8, 28_672)),
    "llama-3-8b": LLAMA3(8_030_261_248, **_sizes(4096, 32, 32, 8, 14_336)),
    "llama-3-70b": LLAMA3(70_553_706_496, **_sizes(8192, 80, 64, 8, 28_672)),
    "llama-3.2-1b": LLAMA32(1_235_814_400, **_sizes(2048, 16, 32, 8, 8192, head_dim=64)),
    "llama-3.2-3b": LLAMA32(3_212_749_824, **_sizes(3072, 28, 24, 8, 8192, head_dim=128)),
    "tinyllama-1.1b": _llama("bfloat16", 32_000, 2_048)(1_100_048_384, **_sizes(2048, 22, 32, 4, 5632)),
    "smollm2-135m": SMOLLM2(134_515_008, **_sizes(576, 30, 9, 3, 1536)),
    "smollm2-360m": SMOLLM2(361_821_120, **_sizes(960, 32, 15, 5, 2560)),
    "smollm2-1.7b": SMOLLM2(1_711_376_384, **_sizes(2048, 24, 32, 32, 8192), **_rope(130_000.0)),
    "smollm3-3b": _family("smollm3", "bfloat16", vocab_size=128_256, max_position_embeddings=65_536, **TIED, **_rope(5e6))(
        3_075_098_624, **_sizes(2048, 36, 16, 4, 11_008)),
    "yi-6b": YI(6_061_035_520, **_sizes(4096, 32, 32, 4, 11_008)),
    "yi-9b": YI(8_829_407_232, **_sizes(4096, 48, 32, 4, 11_008)),
    "yi-34b": YI(34_388_917_248, **_sizes(7168, 60, 56, 8, 20_480)),
    "deepseek-llm-7b": _llama("bfloat16", 102_400, 4_096)(6_910_365_696, **_sizes(4096, 30, 32, 32, 11_008)),
    "deepseek-coder-1.3b": DEEPSEEK_CODER(1_346_471_936, **_sizes(2048, 24, 16, 16, 5504)),
    "deepseek-coder-6.7b": DEEPSEEK_CODER(6_740_512_768, **_sizes(4096, 32, 32, 32, 11_008)),

    "mistral-7b-v0.1": _mistral(32_000, 32_768, 1e4, sliding_window=4_096)(7_241_732_096, **_sizes(4096, 32, 32, 8, 14_336)),
    "mistral-7b-v0.3": _mistral(32_768, 32_768, 1e6)(7_248_023_552, **_sizes(4096, 32, 32, 8, 14_336)),
    "mistral-nemo-12b": _mistral(131_072, 131_072, 1e6)(12_247_782_400, **_sizes(5120, 40, 32, 8, 14_336, head_dim=128)),
    "mistral-small-24b": _mistral(131_072, 32_768, 1e8)(23_572_403_200, **_sizes(5120, 40, 32, 8, 32_768, head_dim=128)),
    "mixtral-8x7b": _family("mixtral", "bfloat16", vocab_size=32_000, max_position_embeddings=32_768, sliding_window=None,
                            num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False, **_rope(1e6))(
        46_702_792_704, **_sizes(4096, 32, 32, 8, 14_336)),

    "gemma-2b": GEMMA(2_506_172_416, **_sizes(2048, 18, 8, 1, 16_384)),
    "gemma-7b": GEMMA(8_537_680_896, **_sizes(3072, 28, 16, 16, 24_576)),
    "gemma-2-2b": GEMMA2(2_614_341_888, **_sizes(2304, 26, 8, 4, 9216, head_dim=256)),
    "gemma-2-9b": GEMMA2(9_241_705_984, **_sizes(3584, 42, 16, 8, 14_336, head_dim=256)),
    "gemma-2-27b": GEMMA2(27_227_128_320, **_sizes(4608, 46, 32, 16, 36_864, head_dim=128), query_pre_attn_scalar=144),
    "gemma-3-270m": GEMMA3(268_098_176, **_sizes(640, 18, 4, 1, 2048)),
    "gemma-3-1b": GEMMA3(999_885_952, **_sizes(1152, 26, 4, 1, 6912)),

    "phi-1.5": PHI(1_418_270_720, **_sizes(2048, 24, 32, 32, 8192), **_rope(1e4, partial_rotary_factor=0.5)),
    "phi-2": PHI(2_779_683_840, **_sizes(2560, 32, 32, 32, 10_240), **_rope(1e4, partial_rotary_factor=0.4)),
    "phi-3-mini-4k": PHI3(3_821_079_552, **_sizes(3072, 32, 32, 32, 8192)),
    "phi-3-medium-4k": PHI3(13_960_238_080, **_sizes(5120, 40, 40, 10, 17_920)),
    "phi-4": PHI3(14_659_507_200, **_sizes(5120, 40, 40, 10, 17_920), vocab_size=100_352, max_position_embeddings=16_384,
                  sliding_window=None, pad_token_id=100_349, **_rope(250_000.0)),

    "glm-4-9b": GLM(9_399_951_360, **_sizes(4096, 40, 32, 2, 13_696), max_position_embeddings=8_192,
                    **_rope(1e4, partial_rotary_factor=0.5)),
    "glm-4-9b-0414": GLM4(9_400_279_040, **_sizes(4096, 40, 32, 2, 13_696), attention_bias=True),
    "glm-4-32b-0414": GLM4(32_566_081_536, **_sizes(6144, 61, 48, 2, 23_040), attention_bias=False),
    "chatglm3-6b": _family("chatglm", "float16", vocab_size=65_024, max_position_embeddings=8_192, head_dim=128, attention_bias=True,
                           pad_token_id=None, tie_word_embeddings=False, **_rope(1e4, partial_rotary_factor=0.5))(
        6_243_584_000, **_sizes(4096, 28, 32, 2, 13_696)),
    "yuan2-2b": _family("yuan", "bfloat16", vocab_size=135_040, max_position_embeddings=8_192, tie_word_embeddings=True)(
        2_088_724_480, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, intermediate_size=8192),

    "bloom-560m": BLOOM(559_214_592, **_bloom(1024, 24, 16)),
    "bloom-1b1": BLOOM(1_065_314_304, **_bloom(1536, 24, 16)),
    "bloom-1b7": BLOOM(1_722_408_960, **_bloom(2048, 24, 16)),
    "bloom-3b": BLOOM(3_002_557_440, **_bloom(2560, 30, 32)),
    "bloom-7b1": BLOOM(7_069_016_064, **_bloom(4096, 30, 32)),
    # Pruned to the tokens of Chinese text; the type is their parents'.
    "bloom-389m-zh": BLOOM(345_768_960, **_bloom(1024, 24, 16), vocab_size=42_437),
    "bloom-800m-zh": BLOOM(750_841_344, **_bloom(1536, 24, 16), vocab_size=46_145),
    "bloom-1b4-zh": BLOOM(1_303_111_680, **_bloom(2048, 24, 16), vocab_size=46_145),
    "distilgpt2": GPT2(81_912_576, **_gpt2(768, 6, 12)),
    "gpt2": GPT2(124_439_808, **_gpt2(768, 12, 12)),
    "gpt2-medium": GPT2(354_823_168, **_gpt2(1024, 24, 16)),
    "gpt2-large": GPT2(774_030_080, **_gpt2(1280, 36, 20)),
    "gpt2-xl": GPT2(1_557_611_200, **_gpt2(1600, 48, 25)),
    "opt-125m": OPT(125_239_296, **_opt(768, 12, 12)),
    "opt-350m": OPT(331_196_416, **_opt(1024, 24, 16) | {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "opt-1.3b": OPT(1_315_758_080, **_opt(2048, 24, 32)),
    "opt-2.7b": OPT(2_651_596_800, **_opt(2560, 32, 32)),
    "opt-6.7b": OPT(6_658_473_984, **_opt(4096, 32, 32)),
    "pythia-70m": PYTHIA(70_426_624, **_pythia(512, 6, 8)),
    "pythia-160m": PYTHIA(162_322_944, **_pythia(768, 12, 12)),
    "pythia-410m": PYTHIA(405_334_016, **_pythia(1024, 24, 16)),
    "pythia-1b": PYTHIA(1_011_781_632, **_pythia(2048, 16, 8)),
    "pythia-1.4b": PYTHIA(1_414_647_808, **_pythia(2048, 24, 16)),
    "pythia-2.8b": PYTHIA(2_775_208_960, **_pythia(2560, 32, 32)),
    "pythia-6.9b": PYTHIA(6_857_302_016, **_pythia(4096, 32, 32), vocab_size=50_432),
    "pythia-12b": PYTHIA(11_846_072_320, **_pythia(5120, 36, 40), vocab_size=50_688),
    "falcon-7b": _family("falcon", "bfloat16", vocab_size=65_024, max_position_embeddings=2_048, tie_word_embeddings=True, **_rope(1e4))(
        6_921_720_704, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71),
}


# ------------------------------------------------------------------------------------------------------------------ ids


def _limit(tokens: int, **more: Any) -> Facts:
    return {"max_position_embeddings": tokens, **more}


LLAMA31 = _limit(131_072, **_llama3_rope(8.0))
QWEN3_2507 = _limit(262_144, **_rope(5e6))
QWEN3_MOE_2507 = _limit(262_144, **_rope(1e7))
MATH = _limit(4_096, **_rope(1e4))
R1 = 131_072  # the limit of each of DeepSeek's distilled models
FLOAT32 = {"dtype": "float32"}

# (ids; their shape; what differs from it). [-Instruct|-Chat] stands for nothing, -Instruct and -Chat.
IDS: tuple[tuple[str, str, Facts], ...] = (
    ("Qwen/Qwen1.5-0.5B[-Chat]", "qwen1.5-0.5b", {}),
    ("Qwen/Qwen1.5-1.8B[-Chat]", "qwen1.5-1.8b", {}),
    ("Qwen/Qwen1.5-4B[-Chat]", "qwen1.5-4b", {}),
    ("Qwen/Qwen1.5-7B[-Chat]", "qwen1.5-7b", {}),
    ("Qwen/Qwen2-0.5B", "qwen2-0.5b", _limit(131_072)),
    ("Qwen/Qwen2-1.5B", "qwen2-1.5b", _limit(131_072)),
    ("Qwen/Qwen2-7B", "qwen2-7b", _limit(131_072)),
    ("Qwen/Qwen2-72B", "qwen2-72b", _limit(131_072)),
    ("Qwen/Qwen2-0.5B-Instruct", "qwen2-0.5b", {}),
    ("Qwen/Qwen2-1.5B-Instruct", "qwen2-1.5b", {}),
    ("Qwen/Qwen2-7B-Instruct", "qwen2-7b", {}),
    ("Qwen/Qwen2-72B-Instruct", "qwen2-72b", {}),
    ("Qwen/Qwen2.5-0.5B[-Instruct] Qwen/Qwen2.5-Coder-0.5B[-Instruct]", "qwen2-0.5b", {}),
    ("Qwen/Qwen2.5-1.5B", "qwen2-1.5b", _limit(131_072)),
    ("Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-Coder-1.5B[-Instruct]", "qwen2-1.5b", {}),
    ("Qwen/Qwen2.5-Math-1.5B[-Instruct]", "qwen2-1.5b", MATH),
    ("Qwen/Qwen2.5-3B[-Instruct] Qwen/Qwen2.5-Coder-3B[-Instruct]", "qwen2-3b", {}),
    ("Qwen/Qwen2.5-7B", "qwen2-7b", _limit(131_072)),
    ("Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Coder-7B[-Instruct]", "qwen2-7b", {}),
    ("Qwen/Qwen2.5-Math-7B[-Instruct]", "qwen2-7b", MATH),
    ("Qwen/Qwen2.5-14B", "qwen2-14b", _limit(131_072)),
    ("Qwen/Qwen2.5-14B-Instruct Qwen/Qwen2.5-Coder-14B[-Instruct]", "qwen2-14b", {}),
    ("Qwen/Qwen2.5-32B", "qwen2-32b", _limit(131_072)),
    ("Qwen/Qwen2.5-32B-Instruct Qwen/Qwen2.5-Coder-32B[-Instruct]", "qwen2-32b", {}),
    ("Qwen/QwQ-32B", "qwen2-32b", _limit(40_960)),
    ("Qwen/Qwen2.5-72B", "qwen2-72b", _limit(131_072)),
    ("Qwen/Qwen2.5-72B-Instruct", "qwen2-72b", {}),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "r1-qwen-1.5b", _limit(R1)),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2-7b", _limit(R1, **_rope(1e4))),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "qwen2-14b", _limit(R1)),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2-32b", _limit(R1)),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3-8b", LLAMA31),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3-70b", LLAMA31),
    ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b", {}),
    ("Qwen/Qwen3-1.7B-Base", "qwen3-1.7b", {}),
    ("Qwen/Qwen3-4B-Base", "qwen3-4b", {}),
    ("Qwen/Qwen3-8B-Base", "qwen3-8b", {}),
    ("Qwen/Qwen3-14B-Base", "qwen3-14b", {}),
    ("Qwen/Qwen3-30B-A3B-Base", "qwen3-30b-a3b", {}),
    ("Qwen/Qwen3-0.6B", "qwen3-0.6b", _limit(40_960)),
    ("Qwen/Qwen3-1.7B", "qwen3-1.7b", _limit(40_960)),
    ("Qwen/Qwen3-4B", "qwen3-4b", _limit(40_960)),
    ("Qwen/Qwen3-8B", "qwen3-8b", _limit(40_960)),
    ("Qwen/Qwen3-14B", "qwen3-14b", _limit(40_960)),
    ("Qwen/Qwen3-32B", "qwen3-32b", _limit(40_960)),
    ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", _limit(40_960)),
    ("Qwen/Qwen3-4B-Instruct-2507 Qwen/Qwen3-4B-Thinking-2507", "qwen3-4b", QWEN3_2507),
    ("Qwen/Qwen3-30B-A3B-Instruct-2507 Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3-30b-a3b", QWEN3_MOE_2507),
    ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-30b-a3b", QWEN3_MOE_2507),

    ("meta-llama/Llama-2-7b[-chat]-hf lmsys/vicuna-7b-v1.5", "llama-2-7b", {}),
    ("meta-llama/Llama-2-13b[-chat]-hf lmsys/vicuna-13b-v1.5", "llama-2-13b", {}),
    ("meta-llama/Llama-2-70b[-chat]-hf", "llama-2-70b", {}),
    ("meta-llama/Meta-Llama-3-8B[-Instruct]", "llama-3-8b", {}),
    ("meta-llama/Meta-Llama-3-70B[-Instruct]", "llama-3-70b", {}),
    ("meta-llama/Llama-3.1-8B[-Instruct] meta-llama/Meta-Llama-3.1-8B[-Instruct]", "llama-3-8b", LLAMA31),
    ("meta-llama/Llama-3.1-70B[-Instruct] meta-llama/Meta-Llama-3.1-70B[-Instruct]", "llama-3-70b", LLAMA31),
    ("meta-llama/Llama-3.2-1B[-Instruct]", "llama-3.2-1b", {}),
    ("meta-llama/Llama-3.2-3B[-Instruct]", "llama-3.2-3b", {}),
    ("meta-llama/Llama-3.3-70B-Instruct", "llama-3-70b", LLAMA31),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b", {}),
    ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tinyllama-1.1b", FLOAT32),
    ("HuggingFaceTB/SmolLM2-135M[-Instruct]", "smollm2-135m", {}),
    ("HuggingFaceTB/SmolLM2-360M[-Instruct]", "smollm2-360m", {}),
    ("HuggingFaceTB/SmolLM2-1.7B[-Instruct]", "smollm2-1.7b", {}),
    ("HuggingFaceTB/SmolLM3-3B[-Base]", "smollm3-3b", {}),
    ("01-ai/Yi-6B[-Chat] 01-ai/Yi-1.5-6B[-Chat]", "yi-6b", {}),
    ("01-ai/Yi-9B 01-ai/Yi-1.5-9B[-Chat]", "yi-9b", {}),
    ("01-ai/Yi-34B[-Chat] 01-ai/Yi-1.5-34B[-Chat]", "yi-34b", {}),
    ("deepseek-ai/deepseek-llm-7b-base deepseek-ai/deepseek-llm-7b-chat", "deepseek-llm-7b", {}),
    ("deepseek-ai/deepseek-coder-1.3b-base deepseek-ai/deepseek-coder-1.3b-instruct", "deepseek-coder-1.3b", {}),
    ("deepseek-ai/deepseek-coder-6.7b-base deepseek-ai/deepseek-coder-6.7b-instruct", "deepseek-coder-6.7b", {}),

    ("mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-v0.1", {}),
    ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b-v0.1", {"sliding_window": None, **_rope(1e6)}),
    ("mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3", {}),
    ("mistralai/Mistral-Nemo-Base-2407 mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo-12b", {}),
    ("mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501", "mistral-small-24b", {}),
    ("mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b", {}),

    ("google/gemma-2b[-it]", "gemma-2b", {}),
    ("google/gemma-7b[-it]", "gemma-7b", {}),
    ("google/gemma-2-2b", "gemma-2-2b", FLOAT32),
    ("google/gemma-2-9b", "gemma-2-9b", FLOAT32),
    ("google/gemma-2-27b", "gemma-2-27b", FLOAT32),
    ("google/gemma-2-2b-it", "gemma-2-2b", {}),
    ("google/gemma-2-9b-it", "gemma-2-9b", {}),
    ("google/gemma-2-27b-it", "gemma-2-27b", {}),
    ("google/gemma-3-270m[-it]", "gemma-3-270m", {}),
    ("google/gemma-3-1b-pt google/gemma-3-1b-it", "gemma-3-1b", {}),

    ("microsoft/phi-1_5", "phi-1.5", {}),
    ("microsoft/phi-2", "phi-2", {}),
    ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini-4k", {}),
    ("microsoft/Phi-3-medium-4k-instruct", "phi-3-medium-4k", {}),
    ("microsoft/phi-4", "phi-4", {}),

    ("zai-org/glm-4-9b-hf THUDM/glm-4-9b-hf", "glm-4-9b", {}),
    ("zai-org/glm-4-9b-chat-hf THUDM/glm-4-9b-chat-hf", "glm-4-9b", _limit(131_072, **_rope(5e6, partial_rotary_factor=0.5))),
    ("zai-org/GLM-4-9B-0414 THUDM/GLM-4-9B-0414", "glm-4-9b-0414", {}),
    ("zai-org/GLM-4-32B-0414 THUDM/GLM-4-32B-0414", "glm-4-32b-0414", {}),
    ("zai-org/chatglm3-6b THUDM/chatglm3-6b", "chatglm3-6b", {}),
    ("IEITYuan/Yuan2-2B-hf IEITYuan/Yuan2-2B-Mars-hf IEITYuan/Yuan2-2B-Janus-hf", "yuan2-2b", {}),

    ("bigscience/bloom-560m bigscience/bloomz-560m", "bloom-560m", {}),
    ("bigscience/bloom-1b1 bigscience/bloomz-1b1", "bloom-1b1", {}),
    ("bigscience/bloom-1b7 bigscience/bloomz-1b7", "bloom-1b7", {}),
    ("bigscience/bloom-3b bigscience/bloomz-3b", "bloom-3b", {}),
    ("bigscience/bloom-7b1 bigscience/bloomz-7b1[-mt]", "bloom-7b1", {}),
    ("Langboat/bloom-389m-zh", "bloom-389m-zh", {}),
    ("Langboat/bloom-800m-zh", "bloom-800m-zh", {}),
    ("Langboat/bloom-1b4-zh", "bloom-1b4-zh", {}),
    ("distilbert/distilgpt2", "distilgpt2", {}),
    ("openai-community/gpt2", "gpt2", {}),
    ("openai-community/gpt2-medium", "gpt2-medium", {}),
    ("openai-community/gpt2-large", "gpt2-large", {}),
    ("openai-community/gpt2-xl", "gpt2-xl", {}),
    ("facebook/opt-125m", "opt-125m", {}),
    ("facebook/opt-350m", "opt-350m", {}),
    ("facebook/opt-1.3b", "opt-1.3b", {}),
    ("facebook/opt-2.7b", "opt-2.7b", {}),
    ("facebook/opt-6.7b", "opt-6.7b", {}),
    ("EleutherAI/pythia-70m[-deduped]", "pythia-70m", {}),
    ("EleutherAI/pythia-160m[-deduped]", "pythia-160m", {}),
    ("EleutherAI/pythia-410m[-deduped]", "pythia-410m", {}),
    ("EleutherAI/pythia-1b[-deduped]", "pythia-1b", {}),
    ("EleutherAI/pythia-1.4b[-deduped]", "pythia-1.4b", {}),
    ("EleutherAI/pythia-2.8b[-deduped]", "pythia-2.8b", {}),
    ("EleutherAI/pythia-6.9b[-deduped]", "pythia-6.9b", {}),
    ("EleutherAI/pythia-12b[-deduped]", "pythia-12b", {}),
    ("tiiuae/falcon-7b[-instruct]", "falcon-7b", {}),
)


def _spelled_out(ids: str) -> Iterator[str]:
    """`a/b[-x|-y]` -> a/b, a/b-x, a/b-y."""
    for text in ids.split():
        before, *choices = re.split(r"[\[|\]]", text)
        yield from (before + choice + choices[-1] for choice in ("", *choices[:-1])) if choices else (before,)


@functools.cache
def _by_id() -> dict[str, Known]:
    found = {}
    for ids, name, changes in IDS:
        shape = SHAPES[name]
        facts = shape.facts | changes
        dtype = facts.pop("dtype", shape.dtype)
        for spelled in _spelled_out(ids):
            found[spelled.lower()] = Known(spelled, shape.model_type, shape.parameters, dtype, facts)
    return found


@functools.cache
def _by_bare_name() -> dict[str, Known]:
    return {name.rpartition("/")[2]: model for name, model in _by_id().items()}
