"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a small network makes the virtual tokens, and is trained in their place.

The network and its size are PEFT's. What it makes is added to the start, and its last layer begins at 0, as in residual
prompt tuning (Razdaibiedina et al. 2023, arXiv:2305.03937): from PEFT's random start hardly anything is learned.
"""

from __future__ import annotations

from typing import final

from weitiao.model.methods.prompt import embeddings
from weitiao.model.methods.virtual import Network, VirtualMethod, VirtualTokens, hidden_size, peft_sizes
from weitiao.model.methods.wiring import embed_first
from weitiao.settings.methods import PtuningSettings


@final
class Ptuning(VirtualMethod):
    def peft_config(self, model, settings: PtuningSettings, places: int):
        from peft import PromptEncoderConfig, PromptEncoderReparameterizationType

        return PromptEncoderConfig(
            num_virtual_tokens=places, encoder_reparameterization_type=PromptEncoderReparameterizationType(settings.encoder.upper()),
            encoder_hidden_size=settings.encoder_hidden or hidden_size(model), encoder_num_layers=settings.encoder_layers,
            encoder_dropout=settings.encoder_dropout, **peft_sizes(model),
        )

    def make(self, model, settings: PtuningSettings, config, ids) -> VirtualTokens:
        from peft import PromptEncoder

        start, scale = embeddings(model, ids, config.num_virtual_tokens)
        return VirtualTokens(Network(PromptEncoder(config)), scale, start)

    def wire(self, model, forward):
        return embed_first(model, forward)
