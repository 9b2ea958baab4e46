"""Where things are in a decoder: its layers, their linear modules, and which of those begin and end a sublayer.

    layer ─┬─ attention   linears that read the stream (queries, keys, values) … one that ends it
           ├─ MLP         linears … one that ends it
           └─ norms       no linears

What a module is, is told from its place and its shape: layers are the ModuleList of as many modules as the config has
layers; a sublayer is a child of a layer that holds linears; it ends in its last linear that is as wide as the stream. One
thing shapes cannot tell: which linears make queries, keys and values. For those there is a table of names, since Yuan
registers q_proj and k_proj, as wide as the stream, behind the o_proj that ends its attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from weitiao.errors import SettingError, nearest

QUERIES = {"q_proj", "query", "wq", "q_attn"}
KEYS_AND_VALUES = {  # made apart, then made together
    "k_proj", "v_proj", "key", "value", "wk", "wv", "kv_b_proj",
    "query_key_value", "c_attn", "qkv_proj", "qkv", "Wqkv", "wqkv", "kv_proj",
}

OTHER_METHODS = "Choose a method that can be told its layers: lora, or ia3 with method.targets and method.feedforward."


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, bitsandbytes' kinds of it, and the Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear whose weight is held as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def width(linear: nn.Module) -> int:
    """How many features it puts out."""
    return linear.nf if is_conv1d(linear) else linear.out_features


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the layers of a causal LM.

    Raises:
        SettingError: the model has none that can be recognised.
    """
    config = _text_config(model)
    count = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise SettingError(
            f"No layers are found in {type(model).__name__}.",
            f"Looked for an nn.ModuleList of {count} layers, as its config says.",
            "Choose a method that needs to know no layers: full, or lora with method.targets.",
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))  # experts of a layer are a list too


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> linear, for every linear inside the decoder layers; never the head."""
    name, layers = decoder_layers(model)
    return {f"{name}.{path}": module for path, module in layers.named_modules() if is_linear(module)}


def linear_names(model: nn.Module) -> list[str]:
    """q_proj, k_proj, …: the distinct last names of the linears inside the decoder layers."""
    return list(dict.fromkeys(_last(name) for name in linears(model)))


def select(model: nn.Module, names: Sequence[str] | Literal["all-linear"], setting: str) -> dict[str, nn.Module]:
    """The linears whose name ends in one of `names`, such as q_proj or mlp.c_proj.

    Raises:
        SettingError: one of the names belongs to no linear; `setting` is where it stands.
    """
    known = linears(model)
    if names == "all-linear":
        return known
    for name in names:
        if not any(_ends_in(full, name) for full in known):
            there = linear_names(model)
            raise SettingError(f"{setting} names {name!r}, and no linear layer of the model is called so.",
                               f"Its linear layers are {', '.join(there)}.", nearest(name, there))
    return {full: module for full, module in known.items() if any(_ends_in(full, name) for name in names)}


def sublayer_ends(model: nn.Module, kind: Literal["attention", "mlp"]) -> dict[str, nn.Module]:
    """Full name -> the linear that writes into the residual stream, one for each layer that has a sublayer of the kind.

    Raises:
        SettingError: a sublayer does not end in a linear (a mixture of experts), or none is recognised.
    """
    name, layers = decoder_layers(model)
    hidden = _text_config(model).hidden_size
    found = {}
    for i, layer in enumerate(layers):
        sublayer = _sublayer(layer, kind)
        if not sublayer and kind == "attention":
            continue  # layers of another kind stand among those with attention in some families
        end = _end(sublayer, hidden)
        if end is None or _has_experts(layer, end):
            raise SettingError(
                f"{name}.{i} has no linear layer that ends its {kind}.",
                f"Looked for one that puts out {hidden} features and does not stand beside experts.", OTHER_METHODS,
            )
        found[f"{name}.{i}.{end}"] = sublayer[end]
    if not found:
        raise _not_found(model, kind)
    return found


def keys_and_values(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> the linears that make keys and values, alone or together with queries.

    By the table; where the table knows none, by shape: what attention has beside its end, if that is one linear (all made
    together), or the two last of equal width (queries come first, and are wider where keys are shared).

    Raises:
        SettingError: neither tells.
    """
    name, layers = decoder_layers(model)
    hidden = _text_config(model).hidden_size
    found = {}
    for i, layer in enumerate(layers):
        sublayer = _sublayer(layer, "attention")
        for path in _keys_and_values_in(sublayer, hidden):
            found[f"{name}.{i}.{path}"] = sublayer[path]
    if not found:
        raise _not_found(model, "keys and values")
    return found


def within_layer(model: nn.Module, names: Iterable[str]) -> list[str]:
    """model.layers.0.mlp.c_proj, model.layers.1.mlp.c_proj, … -> mlp.c_proj: what tells it from attn.c_proj."""
    prefix = decoder_layers(model)[0]
    return sorted({name.removeprefix(prefix + ".").split(".", 1)[1] for name in names})


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind the last layer: of the modules beside the layers, the last that holds vectors alone."""
    name, layers = decoder_layers(model)
    beside = [m for m in model.get_submodule(name.rpartition(".")[0]).children() if m is not layers]
    norms = [m for m in beside if {p.ndim for p in m.parameters()} == {1}]
    return norms[-1] if norms else None


def _sublayer(layer: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Path in the layer -> linear, for its attention or its MLP; empty if it has none."""
    groups = _groups(layer)
    if kind == "attention":
        return next((group for child, group in groups.items() if _is_attention(layer, child)), {})
    others = [group for child, group in groups.items() if not _is_attention(layer, child)]
    return max(others, key=lambda group: sum(m.weight.numel() for m in group.values()), default={})  # routers and gates are small


def _groups(layer: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Child of the layer -> its linears by their path; those of the layer itself (OPT's fc1, fc2) stand under ''."""
    groups: dict[str, dict[str, nn.Module]] = {}
    for path, module in layer.named_modules():
        if is_linear(module):
            child = path.split(".")[0] if "." in path else ""
            groups.setdefault(child, {})[path] = module
    return groups


def _is_attention(layer: nn.Module, child: str) -> bool:
    return bool(child) and "att" in (child + type(layer.get_submodule(child)).__name__).lower()


def _end(sublayer: dict[str, nn.Module], hidden: int) -> str | None:
    wide = [path for path, m in sublayer.items() if width(m) == hidden and _last(path) not in QUERIES | KEYS_AND_VALUES]
    return wide[-1] if wide else None


def _has_experts(layer: nn.Module, end: str) -> bool:
    """Does the linear belong to a mixture of experts? Then what it puts out is only part of what the sublayer adds."""
    return hasattr(layer.get_submodule(end.split(".")[0]), "experts")


def _keys_and_values_in(sublayer: dict[str, nn.Module], hidden: int) -> list[str]:
    named = [path for path in sublayer if _last(path) in KEYS_AND_VALUES]
    if named:
        return named
    inner = [path for path in sublayer if path != _end(sublayer, hidden)]
    if len(inner) == 3 and width(sublayer[inner[1]]) == width(sublayer[inner[2]]):
        return inner[1:]
    return inner if len(inner) == 1 else []


def _not_found(model: nn.Module, what: str) -> SettingError:
    return SettingError(
        f"In the layers of {type(model).__name__} no linear layers that belong to {what} are recognised.",
        f"Its linear layers are {', '.join(linear_names(model))}.", OTHER_METHODS,
    )


def _ends_in(full: str, name: str) -> bool:
    return full == name or full.endswith("." + name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()
