"""ChatGLM3 on transformers' Glm: the checkpoint's own weight names, its fused query_key_value, no code from the folder.

    transformer ─┬─ embedding.word_embeddings
                 ├─ encoder ─┬─ layers.N ─┬─ input_layernorm, post_attention_layernorm
                 │           │            ├─ self_attention.{query_key_value, dense}
                 │           │            └─ mlp.{dense_h_to_4h, dense_4h_to_h}
                 │           └─ final_layernorm
                 └─ output_layer

The modules are named as the checkpoint names its weights, so that a checkpoint is read, quantised and spread as any other,
and an adapter on query_key_value is the one that PEFT makes of the original model. The computing is Glm's, which it equals
but for the fused projection:

    query_key_value [(heads + 2 groups) d, hidden]  =  q_proj [heads d] over k_proj [groups d] over v_proj [groups d]

What is saved as a model is plain Glm (`to_glm`): transformers and others read it without us. A checkpoint goes the same way
with `write_plain`, and an adapter with `split_adapter`: A is the same for all three, B is cut into their rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import (
    GlmDecoderLayer,
    GlmModel,
    GlmPreTrainedModel,
    GlmRMSNorm,
    GlmRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from weitiao.errors import SourceError

# ------------------------------------------------------------------------------------------------------------- config

# Glm's name -> the original's.
FIELDS = {
    "vocab_size": "padded_vocab_size", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads", "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length", "rms_norm_eps": "layernorm_epsilon", "attention_bias": "add_qkv_bias",
    "attention_dropout": "attention_dropout",
}
# What else the original's code can do, and what of it is meant here; a field that is missing is as expected.
EXPECTED = {
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "add_bias_linear": False,
    "multi_query_attention": True, "original_rope": True, "rope_ratio": 1, "interleaved_qkv": False, "pre_seq_len": None,
    "quantization_bit": 0, "fp32_residual_connection": False, "tie_word_embeddings": False, "hidden_dropout": 0.0,
}


class ChatGLM3Config(GlmConfig):
    """Glm's fields, read from the original's."""

    model_type = "chatglm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        return super().from_dict(glm_fields(config_dict) if "num_layers" in config_dict else config_dict, **options)


def glm_fields(original: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json in Glm's words.

    Raises:
        SourceError: it is another member of the family, which computes otherwise.
    """
    for name, expected in EXPECTED.items():
        if original.get(name, expected) != expected:
            raise SourceError(f"config.json has {name} = {original[name]}; that is not ChatGLM3-6B, though it is called chatglm.",
                              f"Expected {name} = {expected}.", "Use ChatGLM3-6B, or the model in the form that transformers knows (glm).")
    missing = sorted({*FIELDS.values(), "multi_query_group_num"} - {"attention_dropout"} - original.keys())
    if missing:
        raise SourceError(f"config.json lacks {missing[0]}.", "Expected the config.json of a ChatGLM3 checkpoint.",
                          "Copy or download that file again.")
    return {
        **{ours: original[theirs] for ours, theirs in FIELDS.items() if theirs in original},
        "model_type": ChatGLM3Config.model_type,
        "num_key_value_heads": original["multi_query_group_num"],
        "rope_theta": 10_000.0, "partial_rotary_factor": 0.5,
        "dtype": original.get("dtype", original.get("torch_dtype")),
        "bos_token_id": original.get("bos_token_id"), "eos_token_id": original.get("eos_token_id", 2),
        # As padding_idx the original's 0 would keep a gradient from that row of the embedding, and Glm's own is beyond the table.
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }


def as_glm(config: ChatGLM3Config) -> GlmConfig:
    return GlmConfig.from_dict({**config.to_dict(), "model_type": "glm", "architectures": ["GlmForCausalLM"]})


# -------------------------------------------------------------------------------------------------------------- model


def parts(config: GlmConfig) -> list[int]:
    """Rows of queries, keys and values in query_key_value."""
    shared = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, shared, shared]


class ChatGLM3Attention(nn.Module):
    def __init__(self, config: GlmConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout, self.is_causal = self.head_dim**-0.5, config.attention_dropout, True
        self.parts = parts(config)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.parts), bias=config.attention_bias)
        self.dense = nn.Linear(self.parts[0], config.hidden_size, bias=False)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = hidden_states.shape[:-1]  # [B, T]
        fused = self.query_key_value(hidden_states).split(self.parts, dim=-1)
        query, key, value = (x.reshape(*shape, -1, self.head_dim).transpose(1, 2) for x in fused)  # [B, heads, T, d]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.dense(out.reshape(*shape, -1).contiguous()), weights


class ChatGLM3MLP(nn.Module):
    def __init__(self, config: GlmConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class ChatGLM3Layer(GlmDecoderLayer):
    """Glm's layer under the checkpoint's names."""

    def __init__(self, config: GlmConfig, layer_idx: int):
        super(GlmDecoderLayer, self).__init__()
        self.input_layernorm = GlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attention = ChatGLM3Attention(config, layer_idx)
        self.post_attention_layernorm = GlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ChatGLM3MLP(config)

    @property
    def self_attn(self) -> nn.Module:
        return self.self_attention


class ChatGLM3PreTrainedModel(GlmPreTrainedModel):
    config_class = ChatGLM3Config
    base_model_prefix = "transformer"
    _no_split_modules = ["ChatGLM3Layer"]
    _can_record_outputs = {"hidden_states": ChatGLM3Layer, "attentions": ChatGLM3Attention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]


class ChatGLM3Model(ChatGLM3PreTrainedModel, GlmModel):
    """Glm's backbone under the checkpoint's names; the head lies in it, and is used by the causal LM alone."""

    def __init__(self, config: ChatGLM3Config):
        super(GlmModel, self).__init__(config)
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)})
        self.encoder = nn.ModuleDict({
            "layers": nn.ModuleList(ChatGLM3Layer(config, i) for i in range(config.num_hidden_layers)),
            "final_layernorm": GlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        })
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_emb = GlmRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    embed_tokens = property(lambda self: self.embedding["word_embeddings"])
    layers = property(lambda self: self.encoder["layers"])
    norm = property(lambda self: self.encoder["final_layernorm"])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding["word_embeddings"] = value


class ChatGLM3ForCausalLM(ChatGLM3PreTrainedModel, GlmForCausalLM):
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}
    _tp_plan = _pp_plan = _fsdp_plan = None

    def __init__(self, config: ChatGLM3Config):
        super(GlmForCausalLM, self).__init__(config)
        self.transformer = ChatGLM3Model(config)
        self.vocab_size = config.vocab_size
        self.post_init()

    model = property(lambda self: self.transformer)
    lm_head = property(lambda self: self.transformer.output_layer)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.transformer.output_layer = value

    def to_glm(self) -> GlmForCausalLM:
        """The same model as transformers' own; it shares every weight but the projections."""
        config = as_glm(self.config)
        with torch.device("meta"):
            glm = GlmForCausalLM(config)
        glm.load_state_dict(glm_state(self.state_dict(), self.config), assign=True)
        glm.model.rotary_emb = GlmRotaryEmbedding(config)
        glm.generation_config = self.generation_config
        return glm.train(self.training)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """A plain Glm folder."""
        self.to_glm().save_pretrained(save_directory, **options)

    @torch.no_grad()
    def load_plain(self, folder: Path) -> None:
        """Take the weights of a plain Glm folder."""
        glm = GlmForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for name, weight in self.state_dict().items():
            weight.copy_(torch.cat([glm[new] for new, _ in glm_names(name, self.config)]))


AutoConfig.register(ChatGLM3Config.model_type, ChatGLM3Config, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM3Config, ChatGLM3ForCausalLM, exist_ok=True)


# ---------------------------------------------------------------------------------------------------- the way to Glm

FUSED, SPLIT = "query_key_value", ("q_proj", "k_proj", "v_proj")
TABLES = {"word_embeddings": "embed_tokens", "output_layer": "lm_head"}
# Parts of names, the original's -> Glm's.
NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm", "transformer.output_layer": "lm_head", "self_attention.": "self_attn.",
    ".dense.": ".o_proj.", ".dense_h_to_4h.": ".gate_up_proj.", ".dense_4h_to_h.": ".down_proj.",
}


def glm_names(name: str, config: GlmConfig) -> Iterator[tuple[str, slice]]:
    """(name in Glm, the rows of the original's that it holds), in their order."""
    name = _renamed(name)
    if FUSED not in name:
        yield name, slice(None)
        return
    start = 0
    for ours, rows in zip(SPLIT, parts(config), strict=True):
        yield name.replace(FUSED, ours), slice(start, start + rows)
        start += rows


def glm_state(state: dict[str, torch.Tensor], config: GlmConfig) -> dict[str, torch.Tensor]:
    """Weights or an adapter, by Glm's names. LoRA's A reads what all three read, so each has it whole; so with IA3's inputs."""
    made = {}
    for name, tensor in state.items():
        for new, rows in glm_names(name, config):
            is_input = "lora_A" in name or tensor.shape[0] == 1
            made[new] = tensor if rows == slice(None) else (tensor if is_input else tensor[rows]).clone()
    return made


def write_plain(folder: Path, target: Path) -> None:
    """The checkpoint in `folder` as plain Glm in `target`, a new folder: file by file, each weight in its own type."""
    from safetensors.torch import load_file, save_file

    config = ChatGLM3Config.from_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    target.mkdir(parents=True)
    as_glm(config).save_pretrained(target)
    where, size = {}, 0
    for file in files:
        stored = {name: weight for name, weight in load_file(folder / file).items() if not name.endswith("rotary_pos_emb.inv_freq")}
        state = glm_state(stored, config)
        save_file(state, target / file, {"format": "pt"})
        where |= dict.fromkeys(state, file)
        size += sum(weight.nbytes for weight in state.values())
    if index.is_file():
        new = {"metadata": {"total_size": size}, "weight_map": where}
        (target / index.name).write_text(json.dumps(new, indent=2) + "\n", "utf-8")


def split_adapter(folder: Path, target: Path, config: GlmConfig, base: str) -> None:
    """PEFT's adapter of a ChatGLM3 in `folder` -> in `target` the one that does exactly the same to its `to_glm()`.

    config: the base's. base: where a reader of the file finds the Glm, such as a merged or converted folder.
    """
    from safetensors.torch import load_file, save_file

    facts = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(facts.get(field), list):
            facts[field] = sorted({new for name in facts[field] for new in _split_target(name)})
    if facts.get("trainable_token_indices"):
        facts["trainable_token_indices"] = {TABLES.get(name, name): ids for name, ids in facts["trainable_token_indices"].items()}
    facts |= {"base_model_name_or_path": base, "auto_mapping": None}
    target.mkdir(parents=True, exist_ok=True)
    state = glm_state(load_file(folder / "adapter_model.safetensors"), config)
    save_file(state, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _split_target(name: str) -> list[str]:
    """query_key_value -> q_proj, k_proj, v_proj; mlp.dense_4h_to_h -> mlp.down_proj; whole names alike."""
    name = _renamed(f".{name}.").strip(".")
    return [name.replace(FUSED, new) for new in SPLIT] if FUSED in name else [name]


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


# ---------------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(folder: Path) -> Any:
    from weitiao.model.families.chatglm3_tokenizer import ChatGLM3Tokenizer

    if not any((folder / name).is_file() for name in ChatGLM3Tokenizer.vocab_files_names.values()):
        raise OSError("tokenizer.model, ChatGLM3's sentencepiece model, is missing")
    return ChatGLM3Tokenizer.from_pretrained(folder)
