"""Bottleneck adapters: a small network behind a sublayer, before its output joins the residual stream.

    h ── the linear that ends the sublayer ── + ── residual ──
                                       └ down ─ act ─ up ┘        up begins at 0, so the model begins as it was

Houlsby et al. 2019 (arXiv:1902.00751): behind attention and behind the MLP of each layer. Pfeiffer et al. 2020
(arXiv:2005.00247): behind the MLP alone. We depart from both in training no norms, and from Pfeiffer in that it acts before
the residual is added, where every family has a linear to hang it on; Bloom adds its residual inside attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional as F

from weitiao.model.methods.layers import sublayer_ends, width
from weitiao.model.methods.method import Method
from weitiao.settings.methods import AdapterSettings

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
WEIGHTS, FACTS = "adapters.safetensors", "adapter.json"


class Bottleneck(nn.Module):
    """h + up(act(down(h))), in its own float32 whatever h comes in (autocast aside); up begins at 0."""

    def __init__(self, hidden: int, bottleneck: int, activation: str, dropout: float):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        self.act, self.dropout = ACTIVATIONS[activation], nn.Dropout(dropout)
        self.enabled = True
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden], in h's dtype."""
        if not self.enabled:
            return h
        inner = self.act(self.down(h.to(self.down.weight.dtype)))
        return h + self.up(self.dropout(inner)).to(h.dtype)


@final
class Adapter(Method):
    WHY_NOT_MERGED = "Bottleneck adapters cannot be merged: between down and up is a nonlinearity, which no weight can take in."
    HOW_LOADED = "They are loaded beside the base: weitiao chat, generate and evaluate do so from the run folder."

    def attach(self, model, settings: AdapterSettings, seed: int, tokenizer=None, examples=()):
        kinds = ("attention", "mlp") if settings.style == "houlsby" else ("mlp",)
        ends = [linear for kind in kinds for linear in sublayer_ends(model, kind).values()]
        model.requires_grad_(False)
        torch.manual_seed(seed)
        for linear in ends:
            made = Bottleneck(width(linear), settings.bottleneck, settings.activation, settings.dropout)
            linear.bottleneck = made.to(linear.weight.device)
            linear.register_forward_hook(_through_bottleneck)
        model.adapter_facts = {"style": settings.style, "bottleneck": settings.bottleneck, "activation": settings.activation}
        return model

    def save(self, model, folder: Path, base: str) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in _weights(model).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "method": "adapter", "base": base})
        (folder / FACTS).write_text(json.dumps({**model.adapter_facts, "base": base}, indent=2) + "\n", "utf-8")

    def load(self, model, folder: Path) -> None:
        from safetensors.torch import load_file

        facts = json.loads((folder / FACTS).read_text("utf-8"))
        assert facts.items() >= model.adapter_facts.items(), f"{folder} holds other adapters: {facts}, not {model.adapter_facts}"
        kept, ours = load_file(folder / WEIGHTS), _weights(model)
        assert kept.keys() == ours.keys(), f"{folder} holds adapters of another model: {sorted(kept.keys() ^ ours.keys())[:3]}"
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(kept[name])

    @contextmanager
    def untuned(self, model) -> Iterator[None]:
        bottlenecks = [m for m in model.modules() if isinstance(m, Bottleneck)]
        for module in bottlenecks:
            module.enabled = False
        try:
            yield
        finally:
            for module in bottlenecks:
                module.enabled = True


def _through_bottleneck(linear: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return linear.bottleneck(output)


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> weight, of all bottlenecks."""
    return {
        f"{place}.{name}": p
        for place, module in model.named_modules() if isinstance(module, Bottleneck)
        for name, p in module.named_parameters()
    }
