"""Yuan 2.0 (IEIT, 2023, arXiv:2311.15786): a Llama whose queries and keys read a filter over the last tokens.

    x ── norm ── u ─┬─ filter ── z ── q_proj, k_proj ─┐
                    └─ v_proj ────────────────────────┴─ attention ── o_proj ── + x      then + down(gate * silu(up))

The filter (localized filtering) reads the tokens t, t-1 and t-2, by two convolutions of two taps:

    a_t = A0 u_{t-1} + A1 u_t + b        u and a before the first token are zero
    g_t = B0 a_{t-1} + B1 a_t + c
    z_t = norm(g_t + u_t)

"The vector before" is asked for in one place, `Before`: in a row it is that of t-1; on a trie that of `parent`; across calls
it lies in the cache. Where a row is padded there is none, so no answer depends on the batch's padding.

q_proj and k_proj are stored as the original has them: of their outputs side by side, 2n heads wide, each pair of heads is the
query and the key of one. So the first half of the heads is made by q_proj alone, query and key, the second half by k_proj.

We depart from the original in what stands between rows. It hides, after every <eod> inside a row, all that came before
(reset_position_ids, reset_attention_mask); here rows are never packed end to end, so it is not reproduced, and an
<eod> between the turns of a conversation hides nothing. And its filter reads padding as if it were tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from weitiao.data.batch import Plan

FILTER_EPS = 1e-6  # of the filter's norm, whatever the config says of the others
EOD = 77_185


class YuanConfig(PreTrainedConfig):
    """The fields of the original config.json that the model reads, defaults of Yuan2-2B; others are kept as they are found."""

    model_type = "yuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 135_040
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = EOD
    eos_token_id: int | list[int] | None = EOD
    pad_token_id: int | None = EOD

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act}; Yuan2's is silu.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 2 * num_attention_heads, {self.num_attention_heads}.")


# --------------------------------------------------------------------------------------------------- the vector before


@dataclass(frozen=True, eq=False)
class Before:
    """Whose vector stands before each place's.

    padded: bool [B, T, 1], places that hold no token; None: none.
    jumps: int64 [J], the nodes of a trie that begin a segment: all that may not follow the place to their left; None: rows.
    parents: int64 [J], the nodes that these follow; -1 at a root.
    memory: what keeps vectors from one call to the next, where a trie goes on behind an earlier one (Plan.memory).

    In the trie  A B C d / e f  (d and e follow C)  e, at 4, jumps: its parent is C, at 2.
    """

    padded: torch.Tensor | None = None
    jumps: torch.Tensor | None = None
    parents: torch.Tensor | None = None
    memory: Any = None

    @classmethod
    def of(cls, mask: torch.Tensor | None, trie: Plan | None, places: int) -> Before:
        """mask: [B, cached + places], 1 at tokens; it says nothing where there is a trie."""
        if trie is not None:
            jumps = torch.tensor([segment.start for segment in trie.segments], device=trie.parent.device)
            return cls(jumps=jumps, parents=trie.parent[jumps], memory=trie.memory)
        if mask is None or mask.ndim != 2:
            return cls()
        return cls(padded=(mask[:, -places:] == 0)[..., None])

    def tokens_of(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B, T, width], zero where there is no token."""
        return vectors if self.padded is None else vectors.masked_fill(self.padded, 0)

    def __call__(self, vectors: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """[B, T, width] of the place before each; `first` [B, 1, width] stands before all of them, in a trie before each root
        ([1, J, width]: one for each of `jumps`)."""
        first = first.to(vectors)
        left = torch.cat([first[:, :1], vectors[:, :-1]], dim=1)
        if self.jumps is None or len(self.jumps) == 0:
            return left
        theirs = torch.where((self.parents < 0)[:, None], first, vectors[:, self.parents.clamp(min=0)])
        return left.index_copy(1, self.jumps, theirs)


class YuanCacheLayer(DynamicLayer):
    """Keys and values of a layer, and what its filter reads of the token before the next: u [B, 1, H] and a [B, 1, H / 2].

    The original keeps u of the last two tokens and computes a anew: the same numbers.
    """

    is_croppable = False  # what stood before an earlier token is gone

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, u: torch.Tensor, a: torch.Tensor) -> None:
        """Of [B, T, width], the last."""
        self.last = u[:, -1:], a[:, -1:]

    @classmethod
    def in_place_of(cls, plain: DynamicLayer) -> YuanCacheLayer:
        layer = cls()
        vars(layer).update(vars(plain))  # a prefix may lie in it already
        return layer

    def reset(self) -> None:
        super().reset()
        self.last = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("Yuan2's cache cannot be cut back: its filter would need the vectors before the cut.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices.to(t.device)])

    def _each(self, change) -> None:
        if self.last is not None:
            self.last = tuple(change(t) for t in self.last)


@dataclass(frozen=True, eq=False)
class MemoryLayer:
    """The same of a layer, in the memory of a plan."""

    memory: Any
    layer: int

    @property
    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.memory.last(self.layer)

    def keep(self, u: torch.Tensor, a: torch.Tensor) -> None:
        self.memory.keep_last(self.layer, (u, a))


def filter_remembers(cache: Cache, layers: int) -> None:
    """Let every growing layer of `cache` keep what the filter needs; a prefix that is only read needs nothing."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [YuanCacheLayer() for _ in range(layers - len(cache.layers))]
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = YuanCacheLayer.in_place_of(layer)
        elif not isinstance(layer, DynamicLayer) or isinstance(layer, QuantizedLayer):
            raise ValueError(f"Yuan2's filter has no place in a {type(layer).__name__}; use the default cache, "
                             "or generate with use_cache=False.")


# -------------------------------------------------------------------------------------------------------------- layers


class YuanRMSNorm(nn.Module):
    """In float32 (float64, for an input of that type), times the weight in the weight's own type."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


class Conv2d(nn.Conv2d):
    """W[..., 0] before + W[..., 1] here + bias, [B, T, in] -> [B, T, out]; weight [out, in, 2, 1] as the checkpoint has it.

    One matrix product, the weight as it lies in memory: column 2i + tap belongs to feature i. The original slides over the
    sequence, padded by 1, of which the first T outputs count; what stands before a place is given here.
    """

    def __init__(self, width: int, out: int):
        super().__init__(width, out, kernel_size=(2, 1), padding=(1, 0))

    def forward(self, before: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.stack([before, here], dim=-1).flatten(-2), self.weight.flatten(1), self.bias)


class LocalizedFiltering(nn.Module):
    """u [B, T, H] -> z [B, T, H]; see the head of this file."""

    def __init__(self, config: YuanConfig):
        super().__init__()
        self.conv1 = Conv2d(config.hidden_size, config.hidden_size // 2)
        self.conv2 = Conv2d(config.hidden_size // 2, config.hidden_size)
        self.output_layernorm = YuanRMSNorm(config.hidden_size, FILTER_EPS)

    def forward(self, u: torch.Tensor, before: Before, cache: YuanCacheLayer | MemoryLayer | None) -> torch.Tensor:
        u_read = before.tokens_of(u)
        nothing = u.new_zeros(len(u), 1, 1)
        first_u, first_a = cache.last if cache is not None and cache.last is not None else (
            nothing.expand(-1, -1, self.conv1.in_channels), nothing.expand(-1, -1, self.conv2.in_channels))
        a = before.tokens_of(self.conv1(before(u_read, first_u), u))
        g = self.conv2(before(a, first_a), a)
        if cache is not None:
            cache.keep(u_read, a)
        return self.output_layernorm(g + u)


class YuanAttention(nn.Module):
    def __init__(self, config: YuanConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.scaling = self.head_dim**-0.5
        self.is_causal, self.num_key_value_groups = True, 1  # what attention functions of transformers ask for
        width = config.hidden_size
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.lf_gate = LocalizedFiltering(config)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, u: torch.Tensor, before: Before, position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, places, width = u.shape
        cache = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        remembers = MemoryLayer(before.memory, self.layer_idx) if before.memory is not None else cache
        z = self.lf_gate(u, before, remembers if isinstance(remembers, (YuanCacheLayer, MemoryLayer)) else None)
        pairs = torch.cat([self.q_proj(z), self.k_proj(z)], dim=-1).view(rows, places, self.heads, 2, self.head_dim)
        query, key = pairs.permute(3, 0, 2, 1, 4)  # each [B, heads, T, d]
        value = self.v_proj(u).view(rows, places, self.heads, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(rows, places, width)), weights


class YuanMLP(nn.Module):
    """The activation is on up_proj, where a Llama has it on gate_proj."""

    def __init__(self, config: YuanConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class YuanDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: YuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = YuanAttention(config, layer_idx)
        self.mlp = YuanMLP(config)
        self.input_layernorm = YuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = YuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(x), **kwargs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


def rotation(positions: torch.Tensor, config: YuanConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, d] of rotary positions, the halves of d rotated into each other as a Llama's are."""
    wide = torch.promote_types(dtype, torch.float32)
    d = config.hidden_size // config.num_attention_heads
    speeds = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=positions.device, dtype=wide) / d)
    angles = (positions[..., None].to(wide) * speeds).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# -------------------------------------------------------------------------------------------------------------- models


class YuanPreTrainedModel(PreTrainedModel):
    config_class = YuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["YuanDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": YuanDecoderLayer, "attentions": YuanAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # older checkpoints hold it


class YuanModel(YuanPreTrainedModel):
    def __init__(self, config: YuanConfig):
        super().__init__(config)
        # The row of <eod>, the padding of the original, learns nothing where it is read; it does in the head.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(YuanDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = YuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None, trie: Plan | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected input_ids or inputs_embeds, and not both.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, H]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            filter_remembers(past_key_values, len(self.layers))
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask,
                                  past_key_values=past_key_values, position_ids=position_ids)
        before = Before.of(attention_mask, trie, x.shape[1])
        angles = rotation(position_ids, self.config, x.dtype)
        if trie is not None:
            kwargs["trie"] = trie
        for layer in self.layers:
            x = layer(x, before=before, position_embeddings=angles, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class YuanForCausalLM(YuanPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YuanConfig):
        super().__init__(config)
        self.model = YuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels [B, T]: shifted by one here, -100 is not learned, as in every causal LM of transformers."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(YuanConfig.model_type, YuanConfig, exist_ok=True)
AutoModel.register(YuanConfig, YuanModel, exist_ok=True)
AutoModelForCausalLM.register(YuanConfig, YuanForCausalLM, exist_ok=True)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(folder: Path) -> Any:
    from weitiao.model.families.yuan2_tokenizer import Yuan2Tokenizer

    if not any((folder / name).is_file() for name in Yuan2Tokenizer.vocab_files_names.values()):
        raise OSError("tokenizer.model, Yuan2's sentencepiece model, is missing")
    return Yuan2Tokenizer.from_pretrained(folder)
