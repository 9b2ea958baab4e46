"""A prefix that several passes of a step go on behind, forward and back, is computed once.

    forward    stem ── keys, values of each layer ──┬── pass 1, and back ──┐
                                                    ├── pass 2, and back ──┤  their gradients, added up
    backward   stem ◁───────────────────────────────┴──────────────────────┘

The chain rule, and nothing else: a loss depends on a stem through what attention reads of it (and through what stands in its own
last place). So a step's gradients are those of one large trie, whose activations would all be there at once; of passes these
are there one at a time, and the stem's. A stem that is `again` keeps none either: it hands out keys and values, and is computed once
more when it goes back, as a checkpointed layer is (Chen et al. 2016, arXiv:1604.06174), by tokens in the place of layers. So a row of
any length goes through in pieces, of which keys and values are all that stays.

`weitiao.data.packing.parts` says which prefixes are worth it, and which are computed again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from weitiao.data.batch import Plan
from weitiao.model.attention import attend_within

Name = Hashable  # (layer, which of its tensors)


@dataclass(eq=False)
class Stem:
    """What passes read of a run of places, and what comes back.

    above: the stem that it goes on behind. end: one past its last place. kept: of each layer keys and values,
    [1, kv_heads, end - above.end, d] each (virtual tokens that stand before the first are among them), and whatever else it reads of
    the token before, [1, 1, width]; with their graph, unless they are computed `again`. gradients: by the same names, of the passes that have gone back, in float32 or wider.
    """

    above: Stem | None
    end: int
    again: bool = False
    kept: dict[Name, torch.Tensor] = field(default_factory=dict)
    gradients: dict[Name, torch.Tensor] = field(default_factory=dict)
    noise: Any = None

    def chain(self) -> list[Stem]:
        """From the first place on, itself last."""
        found, stem = [], self
        while stem is not None:
            found.append(stem)
            stem = stem.above
        return found[::-1]

    def lend(self, name: Name, like: torch.Tensor | None = None) -> torch.Tensor:
        """What is kept, for a pass of its own: its gradient comes into `gradients`, and goes no further for now.

        like: the pass's own, which wants a gradient where a stem's does, but for virtual tokens above it. None: they may differ.
        """
        kept = self.kept[name]
        wanted = kept.requires_grad
        if self.again:
            wanted = like is None or like.requires_grad or kept.shape[2] > self.end - (self.above.end if self.above else 0)
        return _Lent.apply(torch.zeros((), requires_grad=wanted and torch.is_grad_enabled()), self, name)

    def add(self, name: Name, gradient: torch.Tensor) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)

    def closed(self, loss: torch.Tensor) -> torch.Tensor:
        """The stem's own loss, from which it goes back with what was lent in mind: when all passes behind it have."""
        return _Closed.apply(loss, self, *self.kept.values())

    def remember_noise(self, device: torch.device) -> None:
        """The state of what dropout draws from, before a stem is computed that will be computed again."""
        self.noise = device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def same_noise(self) -> Iterator[None]:
        device, state, on_gpu = self.noise
        with torch.random.fork_rng(devices=[] if on_gpu is None else [device]):
            torch.set_rng_state(state)
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, device)
            yield

    def forget(self) -> None:
        self.kept.clear()
        self.gradients.clear()


class _Lent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, stem, name):
        ctx.stem, ctx.name = stem, name
        return stem.kept[name].detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.stem.add(ctx.name, gradient)
        return None, None, None


class _Closed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, stem, *kept):
        ctx.stem, ctx.names, ctx.types = stem, tuple(stem.kept), [t.dtype for t in kept]
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        """What came back holds the scale of the loss already."""
        found = (ctx.stem.gradients.pop(name, None) for name in ctx.names)
        return gradient, None, *(g if g is None else g.to(t) for g, t in zip(found, ctx.types, strict=True))


@dataclass(eq=False)
class Behind:
    """Plan.memory of a pass: above, what it goes on behind; stem, what it computes for others. One of them at least is there."""

    above: Stem | None
    stem: Stem | None
    plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        return self.above is not None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        own = key, value
        if self.stem is not None:
            self.stem.kept[layer, "key"], self.stem.kept[layer, "value"] = own
        if self.above is not None:
            key, value = (torch.cat([*(stem.lend((layer, name), new) for stem in self.above.chain()), new], dim=2)
                          for name, new in zip(("key", "value"), own, strict=True))
        if id(plan) not in self.plans:  # what an attention makes of a plan is made once for all layers
            self.plans[id(plan)] = replace(plan, memory=None)
        return attend_within(query, key, value, self.plans[id(plan)], scale, window, dropout)

    def last(self, layer: int) -> tuple[torch.Tensor, ...] | None:
        """What a layer kept of the place before the roots."""
        if self.above is None:
            return None
        return tuple(self.above.lend(name) for name in self.above.kept if name[0] == layer and name[1] not in ("key", "value"))

    def keep_last(self, layer: int, vectors: tuple[torch.Tensor, ...]) -> None:
        """vectors: [1, T, width] each; a stem is a single run."""
        if self.stem is not None:
            for i, vector in enumerate(vectors):
                self.stem.kept[layer, i] = vector[:, -1:]


def memory_of(batch: dict[str, Any]) -> Behind | None:
    """The memory of a pass that is a stem, or goes on behind one."""
    memory = getattr(batch.get("trie"), "memory", None)
    return memory if isinstance(memory, Behind) else None
