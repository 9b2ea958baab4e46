"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin, PEFT's parameters and files.

PiSSA (Meng et al. 2024, arXiv:2404.02948) takes the largest singular directions out of the base, W - s B0 A0, and trains
on from there, s B A. Its file must fit the base as it was, so it holds both, as a LoRA of twice the rank:

    s (B A - B0 A0) = s [B, -B0] [A; A0]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, final

import torch

from weitiao.errors import SettingError
from weitiao.model.methods.layers import is_conv1d, linear_names
from weitiao.model.methods.method import Method
from weitiao.settings.methods import LoraSettings

PISSA = "pissa_niter_16"  # by a randomised SVD of 16 iterations, seconds in the place of minutes; the start is exact with any


@final
class Lora(Method):
    CARRIES_TOKENS = True

    def attach(self, model, settings: LoraSettings, seed: int, tokenizer=None, examples=()):
        from peft import get_peft_model

        if settings.init == "pissa":
            refuse_packed(model)
        config = peft_config(model, settings)
        torch.manual_seed(seed)
        try:
            model = get_peft_model(model, config)  # adapters of a half-precision base are made in float32
        except ValueError as error:
            if settings.targets == "all-linear":
                raise
            raise SettingError(f"method.targets {list(settings.targets)} matches no layer of the model.",
                               f"Its linear layers are {', '.join(linear_names(model))}.") from error
        if settings.init == "pissa":
            model.pissa_start = {name: (a.detach().clone(), b.detach().clone()) for name, _, a, b in pairs(model)}
        return model

    def save(self, model, folder: Path, base: str) -> None:
        config = model.peft_config["default"]
        config.base_model_name_or_path = base
        start = getattr(model, "pissa_start", None)
        if start is None:
            model.save_pretrained(folder, save_embedding_layers=False)
            return
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, (a, b) in start.items():
            name_a, name_b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
            state[name_a] = torch.cat([state[name_a], a.to(state[name_a])])
            state[name_b] = torch.cat([state[name_b], -b.to(state[name_b])], dim=1)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        doubled(config).save_pretrained(folder)

    def load(self, model, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        if hasattr(model, "pissa_start"):
            state = take_start(model, state)
        result = set_peft_model_state_dict(model, state)
        missing = [name for name in result.missing_keys if "lora_" in name]
        assert not result.unexpected_keys and not missing, f"{folder} holds another adapter: {(result.unexpected_keys + missing)[:3]}"

    @contextmanager
    def untuned(self, model) -> Iterator[None]:
        start = getattr(model, "pissa_start", None)
        if start is None:
            with model.disable_adapter():
                yield
            return
        # Without its adapter PiSSA's base lacks its largest directions; with the first adapter it is whole.
        tuned = {name: (a.detach().clone(), b.detach().clone()) for name, _, a, b in pairs(model)}
        put(model, start)
        try:
            yield
        finally:
            put(model, tuned)

    def merge(self, model):
        return model.merge_and_unload()

    def rate_factor(self, name: str, settings: LoraSettings) -> float:
        return settings.plus_ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0


def peft_config(model, settings: LoraSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=settings.targets if settings.targets == "all-linear" else list(settings.targets),
        use_rslora=settings.rslora, use_dora=settings.dora, init_lora_weights=PISSA if settings.init == "pissa" else True,
        trainable_token_indices=getattr(model, "added_token_indices", None), task_type="CAUSAL_LM",
        fan_in_fan_out=any(is_conv1d(m) for m in model.modules()),
    )


# --------------------------------------------------------------------------------------------------------------- PiSSA


def refuse_packed(model) -> None:
    if not all(p.is_floating_point() for p in model.parameters()):
        raise SettingError("method.init=pissa takes directions out of the weights, which quantised ones cannot give.",
                           "Expected model.quantize=none.", "Leave method.init at zero on a quantised base.")


def pairs(model) -> Iterator[tuple[str, Any, torch.Tensor, torch.Tensor]]:
    """(name of the layer, the layer, A [rank, in], B [out, rank]) of every adapted layer."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield name, module, module.lora_A["default"].weight, module.lora_B["default"].weight


@torch.no_grad()
def put(model, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, _, a, b in pairs(model):
        a.copy_(values[name][0])
        b.copy_(values[name][1])


def doubled(config: Any) -> Any:
    """The configuration of the plain LoRA of twice the rank: the same scale."""
    config = deepcopy(config)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    return config


@torch.no_grad()
def take_start(model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file of twice the rank -> the trained half; the base is made to fit the other one, if it was begun elsewhere."""
    state = dict(state)
    for name, layer, a, b in pairs(model):
        rank = len(a)
        name_a, name_b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
        start = state[name_a][rank:].to(a), -state[name_b][:, rank:].to(b)
        state[name_a], state[name_b] = state[name_a][:rank].contiguous(), state[name_b][:, :rank].contiguous()
        old = model.pissa_start[name]
        if not (torch.equal(start[0], old[0]) and torch.equal(start[1], old[1])):
            change = layer.scaling["default"] * (old[1] @ old[0] - start[1] @ start[0])
            weight = layer.get_base_layer().weight
            weight += (change.T if layer.fan_in_fan_out else change).to(weight)
            model.pissa_start[name] = start
    return state
