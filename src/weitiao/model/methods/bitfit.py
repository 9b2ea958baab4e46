"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): the biases are trained, and nothing else.

A model without biases (Llama) can be given some: `method.add_bias`, beginning at 0.

A trained bias is held in float32, since small steps vanish in half precision, while its linear or norm stays as it is held;
but F.linear refuses two dtypes. So for the time of a module's own forward its bias is replaced by a copy in the weight's
dtype, through which the gradient flows back. The parameter keeps its name and place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from weitiao.errors import RunError, SettingError
from weitiao.model.methods.layers import select
from weitiao.model.methods.method import Method
from weitiao.settings.methods import BitfitSettings

FILE = "biases.safetensors"


@dataclass(eq=False)
class Bias:
    """One that is trained: where it is, what it was, and whether it was there before."""

    module: nn.Module
    leaf: str
    untuned: torch.Tensor  # in the dtype it was held in
    added: bool
    hooks: list[Any] = field(default_factory=list)

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.leaf]

    def hold(self, value: torch.Tensor) -> nn.Parameter:
        """A new parameter of that value: graphs and optimizers do not expect one to change its dtype."""
        made = nn.Parameter(value, requires_grad=False)
        setattr(self.module, self.leaf, made)
        return made


@final
class Bitfit(Method):
    """The model's attribute `bitfit` says what is trained: full name -> Bias, every bias of the model."""

    def attach(self, model, settings: BitfitSettings, seed: int, tokenizer=None, examples=()):
        model.requires_grad_(False)
        added = add_biases(model, settings) if settings.add_bias else set()
        names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
        if not names:
            raise SettingError(
                f"{type(model).__name__} has no bias, and bitfit trains nothing else.",
                "Expected a model such as GPT-2, Bloom or Qwen2.",
                "Give its linear layers biases that begin at 0: method.add_bias=true. Or choose another method: lora.",
            )
        model.bitfit = {name: learn(*_place(model, name), name in added) for name in names}
        return model

    def save(self, model, folder: Path, base: str) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: bias.parameter.detach().contiguous() for name, bias in model.bitfit.items()}
        save_file(tensors, folder / FILE, metadata={"format": "pt", "method": "bitfit", "base": base})

    def load(self, model, folder: Path) -> None:
        from safetensors.torch import load_file

        kept, ours = load_file(folder / FILE), model.bitfit
        strange = sorted(kept.keys() ^ ours.keys())
        assert not strange, f"{folder} holds biases of another model: {strange[:3]}"
        _put(ours, kept)

    @contextmanager
    def untuned(self, model) -> Iterator[None]:
        trained = {name: bias.parameter.detach().clone() for name, bias in model.bitfit.items()}
        _put(model.bitfit, {name: bias.untuned for name, bias in model.bitfit.items()})
        try:
            yield
        finally:
            _put(model.bitfit, trained)

    def why_not_merged(self, model) -> str:
        added = [name for name, bias in model.bitfit.items() if bias.added]
        homeless = [name for name in added if name not in room_for(model)[0]] if added else []
        return f"{type(model).__name__} has no room for the biases that were added to {_linears(homeless)}." if homeless else ""

    def merge(self, model):
        """The model itself, its biases in the dtype of its weights; new ones want a config that gives them room."""
        if any(bias.added for bias in model.bitfit.values()):
            make_room(model)
        for bias in model.bitfit.values():
            bias.hold(bias.parameter.detach().to(bias.untuned.dtype))
            for hook in bias.hooks:
                hook.remove()
        del model.bitfit
        return model


def add_biases(model: nn.Module, settings: BitfitSettings) -> set[str]:
    """Biases of 0 for those of the chosen linears that have none; their names."""
    bare = {name: m for name, m in select(model, settings.targets, "method.targets").items() if m.bias is None}
    for linear in bare.values():
        weight = linear.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=weight.device))
    return {f"{name}.bias" for name in bare}


def learn(module: nn.Module, leaf: str, added: bool) -> Bias:
    """Hold a bias in float32, train it, and let its module see it in the dtype of its weight."""
    before = getattr(module, leaf).detach()
    bias = Bias(module, leaf, before.clone(), added)
    bias.hold(before.to(torch.promote_types(before.dtype, torch.float32), copy=True)).requires_grad_(True)
    weight = getattr(module, "weight", None)
    if before.dtype.itemsize < 4 or (weight is not None and not weight.is_floating_point()):
        bias.hooks += [
            module.register_forward_pre_hook(partial(_show_copy, leaf)),
            module.register_forward_hook(partial(_hide_copy, leaf), always_call=True),
        ]
    return bias


def _show_copy(leaf: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """An attribute of the instance goes before its parameter of the same name.

    A copy even where dtypes agree: bitsandbytes writes into what it finds as a bias.
    """
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else inputs[0].dtype
    vars(module)[leaf] = module._parameters[leaf].to(dtype, copy=True)


def _hide_copy(leaf: str, module: nn.Module, inputs: Any, output: Any) -> None:
    vars(module).pop(leaf, None)


def room_for(model: nn.Module) -> tuple[dict[str, torch.Size], list[str]]:
    """(name -> shape of the biases that the plain architecture can have, the config's flags that it takes)"""
    added = {name for name, bias in model.bitfit.items() if bias.added}
    config = copy.deepcopy(model.config)
    text, room = config.get_text_config(), _plain_biases(model, config)
    flags = []
    for flag in _unset_bias_flags(text):
        setattr(text, flag, True)
        wider = _plain_biases(model, config)
        if wider.keys() & added > room.keys() & added:
            room = wider
            flags.append(flag)
        else:
            setattr(text, flag, False)
    return room, flags


def make_room(model: nn.Module) -> None:
    """Set the flags by which the model's config gives biases to linears; those that then want one besides get one of 0.

    Raises:
        RunError: the architecture has no biases where some were added.
    """
    room, flags = room_for(model)
    _refuse_homeless(model, [name for name, bias in model.bitfit.items() if bias.added], room)
    for name in room.keys() - model.bitfit.keys():
        module, leaf = _place(model, name)
        zeros = torch.zeros(room[name], dtype=module.weight.dtype, device=module.weight.device)
        setattr(module, leaf, nn.Parameter(zeros, requires_grad=False))
    for flag in flags:
        setattr(model.config.get_text_config(), flag, True)


def _plain_biases(model: nn.Module, config: Any) -> dict[str, torch.Size]:
    """Name -> shape of the biases that a model made from `config` has."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(config))
    return {name: p.shape for name, p in plain.named_parameters() if name.endswith("bias")}


def _unset_bias_flags(config: Any) -> list[str]:
    """attention_bias, mlp_bias, …, of those that the config has and that say no."""
    return [name for name, value in config.to_dict().items() if name.endswith("bias") and value is False]


def _refuse_homeless(model: nn.Module, added: list[str], room: dict[str, torch.Size]) -> None:
    homeless, housed = [n for n in added if n not in room], [n for n in added if n in room]
    if homeless:
        retrain = f"Train with method.targets=[{_linears(housed)}], which have it; or use" if housed else "Use"
        raise RunError(f"{type(model).__name__} has no room for the biases that were added to {_linears(homeless)}.",
                       "Expected an architecture that can hold them, since a merged model is a plain one.",
                       f"{retrain} the run folder as it is: weitiao chat, generate and evaluate load it.")


def _linears(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[-2] for name in names))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _put(biases: dict[str, Bias], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            biases[name].parameter.copy_(value)
    torch.clear_autocast_cache()  # inside autocast, its casts of the biases before would go on being used
