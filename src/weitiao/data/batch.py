"""A pass -> a plain dict of tensors, the keyword arguments of one call of the model. torch is first imported here.

A trie becomes one row of T nodes with its `Plan` (who sees whom, who predicts what); rows to be padded become the
ordinary batch of transformers with `targets` and `weights` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from weitiao.data.packing import Part
from weitiao.trie import Example, Segment, Trie


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model needs of a trie beside its tokens.

    segments: the unbranching runs, for attention.
    subtree_end: int64 [T], depth: int64 [T] (sees(q, k) = k <= q < subtree_end[k]).
    parent: int64 [T], the node before it, -1 at a root; for layers that read the token before, as a convolution does.
    longest: tokens of its longest row, 1 + the largest depth.
    predictors: int64 [E], the node that predicts each learned edge; targets: int64 [E]; weights: float32 [E].
    made: what an attention made of it once for all layers, by a name of its own.
    memory: what keeps keys and values from one call of the model to the next (weitiao.model.decode, weitiao.model.stems); None: nothing does.
    """

    segments: list[Segment]
    subtree_end: torch.Tensor
    depth: torch.Tensor
    parent: torch.Tensor
    longest: int
    predictors: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    memory: Any = None
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def goes_on(self) -> bool:
        """Does it stand behind places that an earlier call has computed, virtual ones among them? `depth` counts them all."""
        return self.memory is not None and self.memory.goes_on

    def under(self, places: int) -> Plan:
        """What attention needs when `places` more nodes stand above all roots, in one run; who predicts what stays."""
        nodes = places + len(self.depth)
        above = torch.arange(places, device=self.depth.device)
        return replace(
            self,
            segments=[Segment(0, places, nodes), *(Segment(s + places, e + places, b + places) for s, e, b in self.segments)],
            subtree_end=torch.cat([torch.full_like(above, nodes), self.subtree_end + places]),
            depth=torch.cat([above, self.depth + places]),
            # a chain from -1, and what was a root follows its last node
            parent=torch.cat([above - 1, torch.where(self.parent < 0, places - 1, self.parent + places)]),
            longest=self.longest + places,
        )


def trie_batch(trie: Trie, device: torch.device | str = "cpu") -> dict[str, Any]:
    """input_ids and position_ids [1, T], and the plan.

    The attention mask is a token of the kind "already made": transformers leaves a 4-D mask alone, so no T x T mask
    is ever built, and our attention reads the plan instead.
    """
    return _batch(trie, np.ones(len(trie), bool), device)


def learned_batch(trie: Trie, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The same loss and gradients without the nodes that nothing learned asks for: T is trie.needed().sum()."""
    return _batch(trie, trie.needed(), device)


def part_batch(part: Part, device: torch.device | str = "cpu", virtual: int = 0) -> dict[str, Any]:
    """The same of a part of a step: of what its rows learn, what its own nodes predict.

    virtual: virtual tokens before every row. A pass that goes on behind a stem finds them there, and counts them as places.
    """
    batch = _batch(part.trie, part.computed(), device)
    if part.behind and virtual:
        plan = batch["trie"]
        batch["trie"] = plan = replace(plan, depth=plan.depth + virtual, longest=plan.longest + virtual)
        batch["position_ids"] = plan.depth[None]
    return batch


def _batch(trie: Trie, nodes: np.ndarray, device: torch.device | str) -> dict[str, Any]:
    """nodes: bool [T], those that the model sees; what they predict is learned."""
    computed, place, edges = trie.of(nodes), np.cumsum(nodes) - 1, trie.edges()
    edges = edges[nodes[trie.parent[edges]]]
    plan = Plan(
        segments=computed.segments(),
        subtree_end=_tensor(computed.subtree_end, device),
        depth=_tensor(computed.depth, device),
        parent=_tensor(computed.parent, device),
        longest=int(computed.depth.max()) + 1,
        predictors=_tensor(place[trie.parent[edges]], device),
        targets=_tensor(trie.token[edges], device),
        weights=_tensor(trie.weight[edges], device),
    )
    return {
        "input_ids": _tensor(computed.token[None], device),
        "position_ids": plan.depth[None],
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "trie": plan,
    }


def padded_batch(rows: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """input_ids, attention_mask, targets [B, T] and weights [B, T], padded to the right.

    targets[b, t] is the token that position t predicts (the next one), weights[b, t] how much that is learned.
    """
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    targets = np.zeros((len(rows), width), np.int64)
    weights = np.zeros((len(rows), width), np.float32)
    for b, row in enumerate(rows):
        n = len(row)
        input_ids[b, :n], mask[b, :n] = row.ids, 1
        targets[b, : n - 1], weights[b, : n - 1] = row.ids[1:], row.weights[1:]
    return {
        "input_ids": _tensor(input_ids, device),
        "attention_mask": _tensor(mask, device),
        "targets": _tensor(targets, device),
        "weights": _tensor(weights, device),
    }


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":  # from pinned memory a copy does not wait for what the GPU is doing
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
