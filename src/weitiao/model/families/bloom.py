"""Bloom on a trie: its attention module takes no attention from outside, and its ALiBi (Press et al. 2022, arXiv:2108.12409)
counts keys in the layout, where a trie must count depth.

    score(q, k) = q · k / sqrt(d) + slope · (place(k) - place(q))

The bias is a product too, of two more features of query and key, (slope, -slope · place(q)) and (place(k), 1), so any
attention over a trie computes it: no tensor of queries by keys is made. In float32 whatever the rest computes in; bfloat16
knows no place beyond 256 exactly, and transformers' own bias drifts by 4.0 at 2,048 there. Without a trie the modules are
transformers' to the letter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from weitiao.data.batch import Plan
from weitiao.model.attention import attend

FEATURES = 8  # two are used; kernels like widths that are multiples of 8


def learn_tries(model: nn.Module) -> None:
    """Teach a BloomForCausalLM's backbone the keyword `trie`."""
    from transformers.models.bloom.modeling_bloom import BloomAttention

    for module in model.modules():
        if isinstance(module, BloomAttention):
            module.forward = functools.partial(_attention, module, module.forward)
    backbone = model.base_model
    backbone.forward = _with_plan(backbone, backbone.forward)


def _with_plan(backbone: nn.Module, forward: Any) -> Any:
    """The plan goes to the layers in the place of the bias, which the backbone hands through untouched."""

    @functools.wraps(forward)
    def wrapped(*args: Any, trie: Plan | None = None, **inputs: Any) -> Any:
        if trie is None:
            return forward(*args, **inputs)
        inputs.pop("position_ids", None)  # the plan knows every node's depth
        backbone.build_alibi_tensor = lambda *a, **k: trie
        try:
            return forward(*args, **inputs)
        finally:
            del backbone.build_alibi_tensor

    return wrapped


def _attention(
    module: nn.Module, original: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: Any, attention_mask: Any,
    layer_past: Any = None, **more: Any,
) -> tuple[torch.Tensor, None]:
    """BloomAttention.forward; hidden_states [1, T, hidden]."""
    if not isinstance(alibi, Plan):
        return original(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **more)
    query, key, value = module._reshape(module.query_key_value(hidden_states))  # [1, heads, T, d]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    dropout = module.attention_dropout.p if module.training else 0.0
    context = with_alibi(query, key, value, alibi, slopes(module.num_heads, query.device), dropout, module.layer_idx)
    output = module.dense(context.flatten(2))
    return residual + F.dropout(output, p=module.hidden_dropout, training=module.training), None


def with_alibi(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, slope: torch.Tensor, dropout: float = 0.0,
    layer: int = 0,
) -> torch.Tensor:
    """query [1, heads, T, d], key and value [1, heads, V + T, d] -> [1, T, heads, d]; V keys of a prefix stand first."""
    d, dtype = query.shape[-1], query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = d**-0.5
    prefix = key.shape[2] - query.shape[2]
    places_q = (plan.depth + prefix).to(wide)
    places_k = torch.cat([torch.arange(prefix, device=query.device, dtype=wide), places_q])
    slope = (slope.to(wide) / scale)[None, :, None, None]  # [1, heads, 1, 1]; the scale comes back with the product
    ones_q, ones_k = torch.ones_like(places_q), torch.ones_like(places_k)
    query = torch.cat([query.to(wide), (slope * torch.stack([ones_q, -places_q], -1)).expand(1, -1, -1, -1)], dim=-1)
    key = torch.cat([key.to(wide), torch.stack([places_k, ones_k], -1).expand(1, key.shape[1], -1, -1)], dim=-1)
    query, key = (F.pad(x, (0, FEATURES - 2)) for x in (query, key))
    out = attend(query, key, F.pad(value.to(wide), (0, FEATURES)), plan, scale, None, dropout, layer)
    return out[..., :d].transpose(1, 2).to(dtype)


def slopes(heads: int, device: Any) -> torch.Tensor:
    """float32 [heads]: 2^(-8 i / n) for n heads, a power of two; for others every second of the doubled number's besides."""
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    return _get_alibi_slopes(heads, device)
