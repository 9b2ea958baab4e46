"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): keys and values of virtual tokens in every layer.

They begin as the keys and values that the model itself makes of real tokens, which the paper found to matter most
(section 7.4), each layer in units of its own spread.
"""

from __future__ import annotations

from typing import final

import torch

from weitiao.config import PrefixSettings
from weitiao.model.methods.virtual import (
    Network, Table, VirtualMethod, VirtualTokens, cache_first, kv_shape, peft_sizes, real_keys_and_values, spread, start_ids,
)


@final
class Prefix(VirtualMethod):
    def peft_config(self, model, settings: PrefixSettings, places: int):
        from peft import PrefixTuningConfig

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
