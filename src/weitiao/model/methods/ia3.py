"""IA3 (Liu et al. 2022, arXiv:2205.05638): keys, values and the MLP's inner activations are rescaled, each feature by a
number of its own that begins at 1. PEFT's parameters and files.

Where queries, keys and values are made by one linear (GPT-2, Bloom, ChatGLM) queries are rescaled with them, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch

from weitiao.errors import SettingError
from weitiao.model.methods.layers import is_conv1d, keys_and_values, select, sublayer_ends, within_layer
from weitiao.model.methods.method import Method
from weitiao.settings.methods import Ia3Settings


@final
class Ia3(Method):
    def attach(self, model, settings: Ia3Settings, seed: int, tokenizer=None, examples=()):
        from peft import IA3Config, get_peft_model

        outputs, inputs = rescaled(model, settings)
        config = IA3Config(
            target_modules=sorted({*outputs, *inputs}), feedforward_modules=inputs, task_type="CAUSAL_LM",
            fan_in_fan_out=any(is_conv1d(m) for m in model.modules()),
        )
        with _quantised_as_plain(model):
            return get_peft_model(model, config)  # its vectors are float32 whatever the base is held in

    def save(self, model, folder: Path, base: str) -> None:
        model.peft_config["default"].base_model_name_or_path = base
        # Its own alone: the rows of added tokens are saved by who trains them.
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])

    def load(self, model, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        missing = [name for name in result.missing_keys if "ia3_" in name]
        strange = result.unexpected_keys + missing
        assert not strange, f"{folder} holds another adapter: {strange[:3]}"

    def decays(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return False  # its factors stand for 1, not for 0

    def merge(self, model):
        return model.merge_and_unload()


@contextmanager
def _quantised_as_plain(model: torch.nn.Module) -> Iterator[None]:
    """PEFT's IA3 for quantised linears answers in float32 to a bf16 model, which then fails (0.21); its IA3 for plain
    ones does right by both, and takes the quantised for plain where the model does not say that it is quantised."""
    flags = [name for name in ("is_loaded_in_8bit", "is_loaded_in_4bit") if getattr(model, name, False)]
    for name in flags:
        setattr(model, name, False)
    try:
        yield
    finally:
        for name in flags:
            setattr(model, name, True)


def rescaled(model: torch.nn.Module, settings: Ia3Settings) -> tuple[list[str], list[str]]:
    """Names within a layer of (linears whose outputs, linears whose inputs are rescaled).

    Raises:
        SettingError: a name that is not there, or one that stands in both.
    """
    if settings.targets == "auto":
        outputs = keys_and_values(model)
    else:
        outputs = select(model, settings.targets, "method.targets")
    if settings.feedforward == "auto":
        inputs = sublayer_ends(model, "mlp")
    else:
        inputs = select(model, settings.feedforward, "method.feedforward")
    both = within_layer(model, outputs.keys() & inputs.keys())
    if both:
        raise SettingError(f"{', '.join(both)} is named by method.targets and by method.feedforward.",
                           "Expected each linear layer in one of them: its outputs are rescaled, or its inputs.",
                           "Name it more closely, such as attn.c_proj and mlp.c_proj.")
    return within_layer(model, outputs), within_layer(model, inputs)
