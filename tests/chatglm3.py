"""A tiny ChatGLM3 as its hub gives it, and its forward written anew from the formulas: the judge of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

CONFIG = dict(
    model_type="chatglm", architectures=["ChatGLMModel"], num_layers=3, hidden_size=48, ffn_hidden_size=40, kv_channels=16,
    num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, padded_vocab_size=460, seq_length=128,
    layernorm_epsilon=1e-5, rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False,
    add_bias_linear=False, add_qkv_bias=True, original_rope=True, attention_dropout=0.0, hidden_dropout=0.0, use_cache=True,
    tie_word_embeddings=False, torch_dtype="float16", eos_token_id=2, pad_token_id=0,
    auto_map={"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
)
FULL_SIZE = CONFIG | dict(num_layers=28, hidden_size=4096, ffn_hidden_size=13696, kv_channels=128, num_attention_heads=32,
                          padded_vocab_size=65024, seq_length=8192)


def random_weights(seed: int = 0, c: dict = CONFIG) -> dict[str, torch.Tensor]:
    """float32, by the original's names; norms and biases away from their trivial values."""
    draw = torch.Generator().manual_seed(seed)
    h, inner, v = c["hidden_size"], c["ffn_hidden_size"], c["padded_vocab_size"]
    q, kv = c["num_attention_heads"] * c["kv_channels"], c["multi_query_group_num"] * c["kv_channels"]
    shapes = {"transformer.embedding.word_embeddings.weight": (v, h), "transformer.output_layer.weight": (v, h),
              "transformer.encoder.final_layernorm.weight": (h,)}
    for i in range(c["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (h,), layer + "post_attention_layernorm.weight": (h,),
            layer + "self_attention.query_key_value.weight": (q + 2 * kv, h), layer + "self_attention.query_key_value.bias": (q + 2 * kv,),
            layer + "self_attention.dense.weight": (h, q), layer + "mlp.dense_h_to_4h.weight": (2 * inner, h),
            layer + "mlp.dense_4h_to_h.weight": (h, inner),
        }
    weights = {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {name: w + 1 if "layernorm" in name else w for name, w in weights.items()}


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    """config.json and two shards, with the buffer that real ones hold."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    weights = (weights or random_weights()) | {"transformer.rotary_pos_emb.inv_freq": torch.ones(CONFIG["kv_channels"] // 4)}
    names, where = sorted(weights), {}
    for part, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


TEXT = [
    "你好，我是人工智能助手。据说他是很厉害的植物学家。那他分辨蘑菇的本领肯定很厉害，至少不会吃到毒蘑菇…好羡慕呀。",
    "现在模仿原神角色评价他人 妮露#关于提纳里 妮露#关于柯莱 她偶尔会来看我的演出，是一位很热心的见习巡林员呢。",
    "What is the capital of France? Paris. A sophisticated role for a user, a system or an assistant.",
]


def write_tokenizer(folder: Path) -> Path:
    """A byte-falling-back sentencepiece model of 420 pieces, under the files of the original."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }))
    return folder


# ------------------------------------------------------------------------------------------------------------ the judge


def forward(weights: dict[str, torch.Tensor], ids: torch.Tensor, positions: torch.Tensor | None = None, c: dict = CONFIG) -> torch.Tensor:
    """Logits [B, T, V] in the weights' type: no cache, no mask but the causal one."""
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(c["num_layers"]):
        w = {name.removeprefix(f"transformer.encoder.layers.{i}."): t for name, t in weights.items()}
        x = x + attention(w, norm(x, w["input_layernorm.weight"], c), positions, c)
        first, second = (norm(x, w["post_attention_layernorm.weight"], c) @ w["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(first) * second) @ w["mlp.dense_4h_to_h.weight"].T
    return norm(x, weights["transformer.encoder.final_layernorm.weight"], c) @ weights["transformer.output_layer.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor, c: dict) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + c["layernorm_epsilon"]).sqrt() * weight


def attention(w: dict[str, torch.Tensor], x: torch.Tensor, positions: torch.Tensor, c: dict) -> torch.Tensor:
    heads, groups, d = c["num_attention_heads"], c["multi_query_group_num"], c["kv_channels"]
    qkv = x @ w["self_attention.query_key_value.weight"].T + w["self_attention.query_key_value.bias"]
    q, k, v = qkv.split([heads * d, groups * d, groups * d], dim=-1)
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        qh = turned(q[..., head * d : (head + 1) * d], positions)
        kh = turned(k[..., group * d : (group + 1) * d], positions)
        scores = qh @ kh.transpose(1, 2) / d**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[..., group * d : (group + 1) * d])
    return torch.cat(outputs, dim=-1) @ w["self_attention.dense.weight"].T


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pairs (0, 1), (2, 3), … of the first half of a head turn by their position; as complex numbers, to be another way."""
    half = x.shape[-1] // 2
    theta = 10_000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = positions[..., None].to(torch.float64) * theta
    pairs = torch.view_as_complex(x[..., :half].double().reshape(*x.shape[:-1], half // 2, 2).contiguous())
    moved = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)
    return torch.cat([moved, x[..., half:]], dim=-1)
