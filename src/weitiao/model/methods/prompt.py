"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): embeddings of virtual tokens before every row are all that is trained."""

from __future__ import annotations

from typing import final

import torch

from weitiao.model.methods.virtual import Table, VirtualMethod, VirtualTokens, peft_sizes, spread
from weitiao.model.methods.wiring import embed_first
from weitiao.settings.methods import PromptSettings


@final
class Prompt(VirtualMethod):
    def peft_config(self, model, settings: PromptSettings, places: int):
        from peft import PromptTuningConfig

        return PromptTuningConfig(num_virtual_tokens=places, **peft_sizes(model))

    def make(self, model, settings: PromptSettings, config, ids) -> VirtualTokens:
        start, scale = embeddings(model, ids, config.num_virtual_tokens)
        return VirtualTokens(Table(start / scale), scale)

    def wire(self, model, forward):
        return embed_first(model, forward)


@torch.no_grad()
def embeddings(model, ids: torch.Tensor | None, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(start [places, hidden], spread []) in float32: the tokens' own embeddings, or noise of the same spread."""
    table = model.get_input_embeddings()
    device = table.weight.device
    sample = table(torch.arange(min(4096, table.weight.shape[0]), device=device)).float()
    scale = torch.tensor(spread(sample), device=device)
    if ids is None:
        return torch.randn(places, sample.shape[1], device=device) * scale, scale
    return table(ids.to(device)).float(), scale
