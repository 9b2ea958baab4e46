"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin, PEFT's parameters and files."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from weitiao.config import LoraSettings
from weitiao.errors import SettingError
from weitiao.model.methods.method import Method


@final
class Lora(Method):
    def attach(self, model, settings: LoraSettings, seed: int, tokenizer=None):
        from peft import LoraConfig, get_peft_model

        targets = settings.targets if settings.targets == "all-linear" else list(settings.targets)
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets,
            task_type="CAUSAL_LM", fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
        )
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)  # adapters of a half-precision base are made in float32
        except ValueError as error:
            if settings.targets == "all-linear":
                raise
            linears = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise SettingError(f"method.targets {targets} matches no layer of the model.",
                               f"Its linear layers are {', '.join(linears)}.") from error

    def save(self, model, folder: Path, base: str) -> None:
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, model, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        missing = [name for name in result.missing_keys if "lora_" in name]
        assert not result.unexpected_keys and not missing, f"{folder} holds another adapter: {(result.unexpected_keys + missing)[:3]}"

    def merge(self, model):
        return model.merge_and_unload()
