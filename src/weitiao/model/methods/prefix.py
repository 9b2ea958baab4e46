"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of virtual tokens in every layer.

They begin as the keys and values that the model itself makes of real tokens, which the paper found to matter most
(section 7.4), each layer in units of its own spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from transformers.cache_utils import Cache, DynamicLayer

from weitiao.errors import SettingError
from weitiao.model.load import TRIE_LAYERS
from weitiao.model.methods.virtual import Network, Table, VirtualMethod, VirtualTokens, peft_sizes, spread, start_ids
from weitiao.model.methods.wiring import cache_first, kv_shape
from weitiao.settings.methods import PrefixSettings


@final
class Prefix(VirtualMethod):
    def peft_config(self, model, settings: PrefixSettings, places: int):
        from peft import PrefixTuningConfig

        refuse_other_attention(model)

        heads, d = kv_shape(model)
        sizes = peft_sizes(model) | {"num_attention_heads": heads, "token_dim": heads * d}
        return PrefixTuningConfig(
            num_virtual_tokens=places, prefix_projection=settings.projection,
            encoder_hidden_size=settings.projection_hidden or heads * d, **sizes,
        )

    def make(self, model, settings: PrefixSettings, config, ids) -> VirtualTokens:
        from peft import PrefixEncoder

        device = model.get_input_embeddings().weight.device
        noise = ids is None
        start = real_keys_and_values(model, start_ids(PrefixSettings(), config.num_virtual_tokens, None, model, 0) if noise else ids)
        parts = start.view(len(start), config.num_layers * 2, -1)
        scale = torch.tensor([spread(parts[:, i]) for i in range(parts.shape[1])], device=device)
        scale = scale[:, None].expand(-1, parts.shape[2]).reshape(-1)  # [layers * 2 * kv_heads * d]
        if noise:
            start = torch.randn_like(start) * scale
        if settings.projection:
            return VirtualTokens(Network(PrefixEncoder(config)), scale, start)
        return VirtualTokens(Table(start / scale), scale)

    def wire(self, model, forward):
        return cache_first(model, forward)


def refuse_other_attention(model) -> None:
    """State-space and linear layers keep no keys, and latent attention keeps them compressed."""
    config = model.config.get_text_config()
    strange = sorted(set(getattr(config, "layer_types", None) or []) - TRIE_LAYERS)
    strange += ["latent attention"] if getattr(config, "kv_lora_rank", None) else []
    if strange:
        raise SettingError(f"{type(model).__name__} has {', '.join(strange)}, where a prefix of keys and values has no place.",
                           "Expected full or sliding attention in every layer.", "Choose method=prompt, or lora.")


@torch.no_grad()
def real_keys_and_values(model: torch.nn.Module, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """What the model itself makes of some tokens: [V, layers * 2 * kv_heads * d] float32, as the prefix is laid out.

    Raises:
        SettingError: its keys and values are not all of that shape.
    """
    expected = (1, kv_shape(model)[0], len(ids), kv_shape(model)[1])
    embedding = model.get_input_embeddings().weight
    cache = Cache(layers=[DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
    training = model.training
    model.eval()
    model.base_model(input_ids=torch.as_tensor(ids, device=embedding.device)[None], past_key_values=cache, use_cache=True)
    model.train(training)
    if any(t is None or tuple(t.shape) != expected for layer in cache.layers for t in (layer.keys, layer.values)):
        raise SettingError(f"{type(model).__name__} does not keep keys and values of one shape in every layer.",
                           "Expected attention as a Llama's, where a prefix can stand before them.", "Choose method=prompt, or lora.")
    parts = [t[0].float().transpose(0, 1) for layer in cache.layers for t in (layer.keys, layer.values)]  # [V, kv_heads, d]
    return torch.stack(parts, dim=1).flatten(1)
