"""How virtual tokens reach the model: the backbone's forward is wrapped, so that the causal LM, its loss and `generate` see
the ordinary tokens only.

                 a trie                                     rows side by side, padded left or right
    embed_first  V nodes are the root that every node       V embeddings stand right before the first token of each row
                 sees: [V + T] nodes go through, [T] return
    cache_first  V keys and values are seen by every node   they lie in the cache of every layer before all rows

Positions of the ordinary tokens begin at V in all of them. Windows count virtual places as they count others. PEFT's own
way (0.21) drops positions, breaks under checkpointing and takes no trie.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

# -------------------------------------------------------------------------------------------- embeddings before a row


def embed_first(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The backbone's forward with `model.virtual()` [V, hidden] embedded before every row; the hidden states of [T] return."""
    takes_positions = "position_ids" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def wrapped(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, trie=None, **more):
        virtual = model.virtual
        virtual.reached = True
        inputs = {"past_key_values": past_key_values, **({"trie": trie} if trie is not None else {}), **more}
        if not virtual.on:
            return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **inputs)
        if trie is not None and trie.goes_on:
            return forward(input_ids, attention_mask=attention_mask, **_positions(position_ids, 0, takes_positions), **inputs)
        places = model.virtual_places
        if past_key_values is not None and past_key_values.get_seq_length() > 0:  # they are in the cache already
            return forward(input_ids, attention_mask=with_places(attention_mask, places), inputs_embeds=inputs_embeds,
                           **_positions(position_ids, places, takes_positions), **inputs)
        embeds = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        made = virtual().to(embeds)[None].expand(len(embeds), -1, -1)
        width = embeds.shape[1]
        if trie is not None:
            inputs["trie"] = trie.under(places)
            positions, place, mask = inputs["trie"].depth[None], None, attention_mask
        else:
            place = first_tokens(attention_mask)
            mask = with_places(attention_mask, places)
            positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
        embeds = _insert(embeds, made, place)
        if takes_positions:
            inputs["position_ids"] = positions
        out = forward(inputs_embeds=embeds, attention_mask=mask, **inputs)
        out.last_hidden_state = _take_out(out.last_hidden_state, place, places, width)
        return out

    return wrapped


def first_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:
    """int64 [B], where each row's first token is; None if that is the first place in all of them."""
    if mask is None:
        return None
    first = (mask != 0).long().argmax(dim=1)
    return first if bool(first.any()) else None


def with_places(mask: torch.Tensor | None, places: int) -> torch.Tensor | None:
    """[B, T] -> [B, places + T]: as many ones more in each row, its padding left where it is. None stays None."""
    if mask is None:
        return None
    left = (mask != 0).long().argmax(dim=1, keepdim=True)
    at = torch.arange(places + mask.shape[1], device=mask.device)[None]
    # Before the pads' end the mask itself; then ones; then the mask, moved by the places.
    source = torch.where(at < left, at, (at - places).clamp(min=0)).expand(len(mask), -1)
    return torch.where((at >= left) & (at < left + places), 1, mask.gather(1, source)).to(mask.dtype)


def _insert(embeds: torch.Tensor, made: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    if place is None:
        return torch.cat([made, embeds], dim=1)
    return torch.stack([torch.cat([e[:p], m, e[p:]]) for e, m, p in zip(embeds, made, place.tolist(), strict=True)])


def _take_out(hidden: torch.Tensor, place: torch.Tensor | None, places: int, width: int) -> torch.Tensor:
    if place is None:
        return hidden[:, places:]
    return torch.stack([torch.cat([h[:p], h[p + places :]]) for h, p in zip(hidden, place.tolist(), strict=True)])


def _positions(position_ids: torch.Tensor | None, places: int, takes: bool) -> dict[str, Any]:
    return {"position_ids": position_ids + places} if takes and position_ids is not None else {}


# ------------------------------------------------------------------------------------- keys and values in every layer


class PrefixLayer(DynamicLayer):
    """The cache of one layer that holds a prefix and remembers nothing else, so that reading it twice (checkpointing) is once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True  # [1, kv_heads, V, d]
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states, value_states, *args, **kwargs):
        return (torch.cat([_like(self.keys, key_states), key_states], dim=-2),
                torch.cat([_like(self.values, value_states), value_states], dim=-2))


def _like(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return prefix.to(states).expand(len(states), -1, -1, -1)


def cache_first(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The backbone's forward with the prefix `model.virtual()` in every layer's cache."""
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    model.prefix_places = model.virtual_places
    for module in model.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):  # ours is only read, so a recomputed layer may have it
            module._can_checkpoint_with_cache = True

    @functools.wraps(forward)
    def wrapped(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, trie=None, **more):
        virtual = model.virtual
        virtual.reached = True
        inputs = {**({"trie": trie} if trie is not None else {}), **more}
        if not virtual.on:
            return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, **inputs)
        if trie is not None and trie.goes_on:
            return forward(input_ids, attention_mask=attention_mask, **_positions(position_ids, 0, takes_positions), **inputs)
        places = model.virtual_places
        if past_key_values is None:
            past_key_values = Cache(layers=[PrefixLayer(*pair) for pair in keys_and_values(model)])
        elif past_key_values.get_seq_length() == 0:  # generate's own: it is filled, and grows
            rows = len(input_ids if input_ids is not None else more["inputs_embeds"])
            for layer, pair in enumerate(keys_and_values(model)):
                past_key_values.update(*(t.to(_cache_dtype(model)).expand(rows, -1, -1, -1) for t in pair), layer)
        if trie is None and attention_mask is not None:
            ones = torch.ones_like(attention_mask[:, :1]).expand(-1, places)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
            if position_ids is None:
                positions = (attention_mask.long().cumsum(-1) - 1)[:, places:]
                position_ids = positions[:, -_width(input_ids, more):] - places
        with _layers_alone_checkpoint(model.base_model):
            return forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                           **_positions(position_ids, places, takes_positions), **inputs)

    return wrapped


@contextmanager
def _layers_alone_checkpoint(backbone: nn.Module) -> Iterator[None]:
    """GPT-2's backbone hands its layers no cache while it is told that they checkpoint; they know it themselves."""
    told = getattr(backbone, "gradient_checkpointing", None)
    if told:
        backbone.gradient_checkpointing = False
    try:
        yield
    finally:
        if told:
            backbone.gradient_checkpointing = told


def _width(input_ids: torch.Tensor | None, more: dict[str, Any]) -> int:
    return (input_ids if input_ids is not None else more["inputs_embeds"]).shape[1]


def _cache_dtype(model: nn.Module) -> torch.dtype:
    """What the model's keys come in: as autocast computes, or as its norms hold them."""
    device = model.get_input_embeddings().weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.get_input_embeddings().weight.dtype


def keys_and_values(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[V, layers * 2 * kv_heads * d] -> a pair of [1, kv_heads, V, d] for each layer. The order is PEFT's."""
    heads, d = kv_shape(model)
    flat = model.virtual()
    parts = flat.view(len(flat), -1, heads, d).permute(1, 2, 0, 3)  # [layers * 2, kv_heads, V, d]
    return [(parts[i][None], parts[i + 1][None]) for i in range(0, len(parts), 2)]


def kv_shape(model: nn.Module) -> tuple[int, int]:
    """(key-value heads, width of a head)"""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, d
