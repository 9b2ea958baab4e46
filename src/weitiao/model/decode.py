"""Prompts -> the ids that answer each: a prefix that prompts share is computed and kept once, and rows leave the batch as
they stop, others taking their place.

    prompts     A B C d e        A B C f g        A B h

    stems       [A B] ── [C]                   runs of places that several prompts share (virtual tokens are such a run)
    tails               d e … | f g … | h …    what a row has for itself; its answer grows behind it

A pass computes the tokens of some prompts behind the stem that all of them share, as a trie (model/attention.py), and puts
keys and values where they belong, a stem's or a row's. A step takes one token of every row: to the model it is a trie of
single nodes, and only its attention differs: all rows below a stem are one product with keys that lie there once, a row's
tail is its own, and both are merged by log-sum-exp (as in Hydragen, Juravsky et al. 2024, arXiv:2402.05099, here over a tree
of prefixes). Nothing is padded but tails, to the longest of the batch, and those neither on a CPU with a kernel for them (`tails`). Rows join and leave as in Orca (Yu et al. 2022).

Positions, which virtual tokens take too, are called places: a prompt's first token stands at the number of virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from weitiao.data.batch import Plan, trie_batch
from weitiao.model import tails
from weitiao.model.attention import attend_within, merge, part
from weitiao.model.load import device_of
from weitiao.trie import Example, Segment, build_with_paths, common_prefix

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values
Choose = Callable[[torch.Tensor, Sequence[int], Sequence[list[int]]], list[int]]  # logits [rows, vocabulary], prompts, answers so far -> ids

NODES = 2048  # of one pass; its activations are a few hundred times the width of the model each
WORTH = 512  # keys that a stem spares its rows to read; below, one more call in every layer costs more


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(eq=False)
class Stem:
    """A run of places that several prompts share.

    start, end: places start..end-1. rows: the prompts below it, by their place in the order. above: the stem that it grows from.
    kept: keys and values of each layer, [1, kv_heads, end - start, d] each; empty until they are computed. vectors: of each layer
    whatever else it reads of the token before, [1, 1, width] each (Yuan2's filter does).
    """

    start: int
    end: int
    rows: range
    above: Stem | None
    kept: dict[int, Pair] = field(default_factory=dict)
    vectors: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def chain(self) -> list[Stem]:
        """From the first place on, itself last. There is no gap between them."""
        return [*(self.above.chain() if self.above else []), self]


def arrange(prompts: Sequence[np.ndarray], virtual: int = 0, worth: int | None = None) -> tuple[list[int], list[Stem | None]]:
    """(the order in which prompts are taken, the lowest stem above each in that order).

    Prompts below one branch stay together, the longest first, so that the last rows of a batch are short ones. The last token of
    a prompt is in no stem: every row computes something of its own.
    """
    by_ids = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">u4").tobytes())
    shared = [0, *(common_prefix(prompts[a], prompts[b]) for a, b in zip(by_ids, by_ids[1:]))]
    lengths = [len(prompts[i]) for i in by_ids]
    worth = WORTH if worth is None else worth
    order: list[int] = []
    stems: list[Stem | None] = []
    root = Stem(0, virtual, range(len(prompts)), None) if virtual else None
    todo = [(0, len(prompts), root)]  # prompts a..b-1 of by_ids, which share all of the stem
    while todo:
        a, b, stem = todo.pop()
        if b - a == 1:
            order.append(by_ids[a])
            stems.append(stem)
            continue
        start = stem.end if stem else 0
        branch = min(shared[a + 1 : b])
        end = virtual + min(branch, min(lengths[a:b]) - 1)
        if (b - a - 1) * (end - start) >= worth:
            stem = Stem(start, end, range(len(order), len(order) + b - a), stem)
        cuts = [a, *(k for k in range(a + 1, b) if shared[k] == branch), b]
        todo += sorted(((x, y, stem) for x, y in zip(cuts, cuts[1:])), key=lambda part: max(lengths[part[0] : part[1]]))
    return order, stems


# -------------------------------------------------------------------------------------------------- one call of the model


@dataclass(eq=False)
class Pass:
    """The memory of a pass: some prompts behind `above`, their keys and values taken to `stems` and to the tails of `batch`.

    stems: those that are new, with the nodes of the trie that are theirs. tails: nodes, the row of each, its place in the row's
    tail. ends: the last node of each row. nodes: how many there are.
    """

    above: Stem | None
    virtual: int  # virtual tokens that this pass itself computes: it is the first
    batch: Batch
    stems: list[tuple[Stem, torch.Tensor]]
    tails: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ends: torch.Tensor
    nodes: int

    @property
    def goes_on(self) -> bool:
        return not self.virtual

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        own = key, value
        if self.above is not None and not self.virtual:
            before = [stem.kept[layer] for stem in self.above.chain()]
            key, value = (torch.cat([*(pair[i] for pair in before), own[i]], dim=2) for i in (0, 1))
        elif self.virtual:
            self.above.kept[layer] = tuple(t[:, :, : self.virtual].clone() for t in own)
            own = tuple(t[:, :, self.virtual :] for t in own)
        for stem, nodes in self.stems:
            stem.kept[layer] = tuple(t[:, :, nodes] for t in own)
        self.batch.take(layer, own, *self.tails)
        return attend_within(query, key, value, replace(plan, memory=None), scale, window, dropout)

    def last(self, layer: int) -> tuple[torch.Tensor, ...] | None:
        """What a layer kept of the place before the roots."""
        return self.above.vectors.get(layer) if self.above is not None and not self.virtual else None

    def keep_last(self, layer: int, vectors: tuple[torch.Tensor, ...]) -> None:
        """vectors: [1, T, width] each, virtual tokens among them where they are nodes."""
        embedded = vectors[0].shape[1] - self.nodes
        if embedded:
            self.above.vectors[layer] = tuple(v[:, embedded - 1 : embedded] for v in vectors)
        for stem, nodes in self.stems:
            stem.vectors[layer] = tuple(v[:, embedded + nodes[-1:]] for v in vectors)
        theirs = tuple(v[0, embedded + self.ends] for v in vectors)
        old = self.batch.vectors.get(layer)
        self.batch.vectors[layer] = tuple(map(torch.cat, zip(old, theirs))) if old else theirs


@dataclass(eq=False)
class Row:
    """A prompt that is being answered.

    prompt: which one; start: the place where its answer begins; limit: the most ids of it; stem: above it; said: ids so far.
    """

    prompt: int
    start: int
    limit: int
    stem: Stem | None
    said: list[int] = field(default_factory=list)

    @property
    def place(self) -> int:
        """Of the last token there is, which is the next to be read."""
        return self.start + len(self.said) - 1

    @property
    def first(self) -> int:
        """The place where its tail begins."""
        return self.stem.end if self.stem else 0

    @property
    def tail(self) -> int:
        """How long its tail is when its last token has been read."""
        return self.place + 1 - self.first

    @property
    def longest(self) -> int:
        """What its tail may come to."""
        return self.start + self.limit - self.first


class Batch:
    """The rows being answered and their tails; the memory of a step.

    tails: of each layer [slots, kv_heads, room, d]; row i has slot i. Where PyTorch's kernel of a CPU reads them they are float32
    whatever the rest is: it is more than twice as fast on them where a query is a single token. Room is made for whole answers at once:
    tails that grow leave holes in the C library's heap, 6 GiB of them where 1.5 are used.
    """

    goes_on = True

    def __init__(self, device: torch.device, at_once: int, places: int | None):
        self.device, self.at_once, self.places = device, at_once, places
        self.rows: list[Row] = []
        self.tails: dict[int, Pair] = {}
        self.vectors: dict[int, tuple[torch.Tensor, ...]] = {}  # [rows, width] each; see Stem
        self.room = 0  # for the longest tail that there may come to be

    # ------------------------------------------------------------------------------------------------ who is in it

    def join(self, rows: Sequence[Row]) -> None:
        """Rows that are about to be computed; what they have said is nothing yet."""
        self.rows += rows
        self.room = max(row.longest for row in self.rows)
        self._look_again()

    def leave(self, gone: Sequence[int]) -> None:
        """The last rows move to the slots of those that are gone."""
        stay = len(self.rows) - len(gone)
        holes = [i for i in gone if i < stay]
        movers = [i for i in range(stay, len(self.rows)) if i not in gone]
        for keys, values in self.tails.values():
            keys[holes], values[holes] = keys[movers], values[movers]
        at = [*range(stay)]
        for hole, mover in zip(holes, movers, strict=True):
            at[hole] = mover
        self.vectors = {layer: tuple(v[at] for v in vectors) for layer, vectors in self.vectors.items()}
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[stay:]
        self._look_again()

    def _look_again(self) -> None:
        """Which rows are below which stem: None for all of them."""
        below: dict[Stem, list[int]] = {}
        for i, row in enumerate(self.rows):
            for stem in row.stem.chain() if row.stem else []:
                below.setdefault(stem, []).append(i)
        self.stems = [(stem, None if len(rows) == len(self.rows) else torch.tensor(rows, device=self.device))
                      for stem, rows in below.items()]

    # ------------------------------------------------------------------------------------------------------ a step

    def plan(self) -> Plan:
        """One node a row, at the row's place."""
        count, places = len(self.rows), [row.place for row in self.rows]
        self.place = torch.tensor(places, device=self.device)
        self.at = self.place - torch.tensor([row.first for row in self.rows], device=self.device)
        self.width = max(row.tail for row in self.rows)
        self.row = torch.arange(count, device=self.device)
        self.masks: dict[Any, torch.Tensor | None] = {}
        none = self.row[:0]
        single = [Segment(i, i + 1, i + 1) for i in range(count)]
        return Plan(single, self.row + 1, self.place, torch.full_like(self.row, -1), max(places) + 1, none, none, none, self)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, scale: float, window: int | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        assert not dropout, "an answer is given in eval mode"
        self.take(layer, (key, value), None, self.row, self.at)
        heads = query[0].unflatten(0, (key.shape[1], -1))  # [kv_heads, group, rows, d]
        out, lse = self._attend_to_tails(layer, query, heads, scale, window)
        for stem, rows in self.stems:
            some = heads if rows is None else heads[:, :, rows]
            o, l = part(some.flatten(1, 2)[None], *stem.kept[layer], self._stem_mask(stem, rows, heads.dtype, window, heads.shape[1]), scale)
            o, l = o[0].unflatten(1, some.shape[1:3]).permute(2, 0, 1, 3), l[0].unflatten(1, some.shape[1:3]).permute(2, 0, 1)
            if rows is None:
                merge(out, lse, o, l)
            else:
                theirs = out[rows], lse[rows]
                merge(*theirs, o, l)
                out[rows], lse[rows] = theirs
        return out.flatten(1, 2).transpose(0, 1)[None].to(value.dtype)  # [1, heads, rows, d]

    def _attend_to_tails(
        self, layer: int, query: torch.Tensor, heads: torch.Tensor, scale: float, window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [1, kv_heads * group, rows, d], the same as heads [kv_heads, group, rows, d] -> out [rows, kv_heads, group, d] and lse."""
        if tails.takes(query, *self.tails[layer]):
            first = (self.at - window + 1).clamp_(min=0) if window else torch.zeros_like(self.at)
            return tails.attend(query, *self.tails[layer], first, self.at, scale)
        keys, values = (t[: len(self.rows), :, : self.width] for t in self.tails[layer])
        return part(heads.permute(2, 0, 1, 3).to(keys.dtype), keys, values, self._tail_mask(keys.dtype, window), scale)

    def last(self, layer: int) -> tuple[torch.Tensor, ...]:
        return tuple(v[None] for v in self.vectors[layer])

    def keep_last(self, layer: int, vectors: tuple[torch.Tensor, ...]) -> None:
        self.vectors[layer] = tuple(v[0] for v in vectors)

    def take(self, layer: int, pair: Pair, nodes: torch.Tensor | None, rows: torch.Tensor, at: torch.Tensor) -> None:
        """Nodes of [1, kv_heads, T, d] (None: all) -> places `at` of the tails of `rows`."""
        for tail, new in zip(self._tails(layer, pair), pair, strict=True):
            if tails.takes(*pair):
                tails.put(tail, new[0], nodes, rows, at)
                continue
            new = new[0].transpose(0, 1)
            tail[rows, :, at] = (new if nodes is None else new[nodes]).to(tail.dtype)

    def slots(self, room: int) -> int:
        """How many rows there may be with tails of that length."""
        return self.at_once if self.places is None else max(1, min(self.at_once, self.places // room))

    def _tails(self, layer: int, pair: Pair) -> Pair:
        """With room for what is to come."""
        old, slots = self.tails.get(layer), self.slots(self.room)
        if old is None or old[0].shape[2] < self.room or len(old[0]) < len(self.rows):
            narrow = tails.takes(*pair)
            self.tails[layer] = tuple(self._larger(slots, new, None if old is None else old[i], narrow) for i, new in enumerate(pair))
        return self.tails[layer]

    def _larger(self, slots: int, like: torch.Tensor, old: torch.Tensor | None, narrow: bool) -> torch.Tensor:
        """narrow: in the type of `like` on a CPU, too."""
        shape = max(slots, len(self.rows)), like.shape[1], self.room, like.shape[3]
        if self.device.type == "cpu":  # numpy's zeros take no memory before they are written
            kind = like.dtype if narrow or like.dtype is torch.float64 else torch.float32
            made = torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * kind.itemsize), np.uint8)).view(kind)
        else:
            made = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            count, room = min(len(old), len(made)), min(old.shape[2], self.room)
            made[:count, :, :room] = old[:count, :, :room]
        return made

    def _tail_mask(self, dtype: torch.dtype, window: int | None) -> torch.Tensor | None:
        """[rows, 1, 1, width]: a tail's places up to the row's own, inside the window; None where all are seen."""
        key = None, window
        if key not in self.masks:
            here = torch.arange(self.width, device=self.device)
            seen = here <= self.at[:, None]
            if window:
                seen &= self.at[:, None] - here < window
            self.masks[key] = None if bool(seen.all()) else _added(seen[:, None, None], dtype)
        return self.masks[key]

    def _stem_mask(self, stem: Stem, rows: torch.Tensor | None, dtype: torch.dtype, window: int | None, group: int) -> torch.Tensor | None:
        """[1, 1, group * rows, end - start]; None where all is seen."""
        if not window:
            return None
        key = stem, window
        if key not in self.masks:
            place = self.place if rows is None else self.place[rows]
            seen = place[:, None] - torch.arange(stem.start, stem.end, device=self.device) < window
            self.masks[key] = None if bool(seen.all()) else _added(seen.repeat(group, 1)[None, None], dtype)
        return self.masks[key]


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 2)


# ------------------------------------------------------------------------------------------------------------ the story


def decode(
    model: torch.nn.Module, prompts: Sequence[np.ndarray], limits: Sequence[int], stops: Sequence[int], choose: Choose,
    at_once: int, virtual: int = 0, places: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(which prompt, its new ids, the stop with them), in the order in which they end.

    Args:
        model: one that `learn_on_tries` has taught, in eval mode.
        prompts: int32 ids each. limits: the most new ids of each, at least 1. stops: ids that end an answer.
        at_once: the most rows in the batch. virtual: virtual tokens before every row.
        places: the most places that the tails of the batch may come to have, padding and what is still to be said counted.

    Raises:
        TrieUnsupported: its attention asks for something that a trie cannot give; told at the first row.
    """
    order, stems = arrange(prompts, virtual)
    batch = Batch(device_of(model), min(at_once, len(prompts)), places)
    unanswered = {stem: len(stem.rows) for lowest in stems if lowest for stem in lowest.chain()}
    taken = 0
    while taken < len(order) or batch.rows:
        free = batch.at_once - len(batch.rows)
        fresh = 0  # rows from here on get a token
        joining = _who_joins(prompts, limits, order, stems, taken, free, batch, virtual) if free * 8 >= batch.at_once or not batch.rows else []
        if joining:
            fresh = len(batch.rows)
            taken += len(joining)
            logits = _join(model, prompts, joining, batch, virtual)
        else:
            plan = batch.plan()
            ids = torch.tensor([row.said[-1] for row in batch.rows], device=batch.device)
            logits = model(**_inputs(ids, plan), logits_at=batch.row)
        rows = batch.rows[fresh:]
        for row, token in zip(rows, choose(logits, [row.prompt for row in rows], [row.said for row in rows]), strict=True):
            row.said.append(token)
        gone = [i for i, row in enumerate(batch.rows[fresh:], fresh) if row.said[-1] in stops or len(row.said) == row.limit]
        done = [batch.rows[i] for i in gone]
        if gone:
            batch.leave(gone)
        for row in done:
            for stem in row.stem.chain() if row.stem else []:
                unanswered[stem] -= 1
                if not unanswered[stem]:
                    stem.kept.clear()
                    stem.vectors.clear()
            yield row.prompt, row.said


def _who_joins(prompts, limits, order, stems, taken: int, free: int, batch: Batch, virtual: int) -> list[Row]:
    """The next rows that fit one pass and the batch, all of them below one stem that is computed already, if there is such a one."""
    above = _computed(stems[taken]) if taken < len(order) else None
    behind = above.end - virtual if above else 0  # the first token of a prompt that is computed
    longest = max((row.longest for row in batch.rows), default=0)
    rows: list[Row] = []
    nodes = 0
    before = np.zeros(0, np.int32)
    for k in range(taken, min(taken + free, above.rows.stop if above else len(order))):
        prompt = prompts[order[k]]
        nodes += len(prompt) - max(behind, common_prefix(before, prompt))
        row = Row(order[k], virtual + len(prompt), limits[order[k]], stems[k])
        longest = max(longest, row.longest)
        # The slots become fewer when a longer row comes.
        too_much = nodes > NODES or len(batch.rows) + len(rows) >= batch.slots(longest)
        if too_much and (rows or batch.rows):
            break
        rows.append(row)
        before = prompt
    return rows


def _computed(stem: Stem | None) -> Stem | None:
    """The lowest one on the way up that is."""
    while stem is not None and not stem.kept:
        stem = stem.above
    return stem


def _join(model: torch.nn.Module, prompts: Sequence[np.ndarray], rows: list[Row], batch: Batch, virtual: int) -> torch.Tensor:
    """Compute what is new of some prompts; the logits behind their last tokens, [rows, vocabulary]."""
    above = _computed(rows[0].stem)
    first = bool(virtual) and above is None
    root = rows[0].stem.chain()[0] if first else above
    behind = above.end - virtual if above else 0
    ids = [prompts[row.prompt][behind:] for row in rows]
    trie, paths = build_with_paths([Example(own, np.zeros(len(own), np.float32)) for own in ids])
    shift = virtual + behind  # from a place to a token of ids
    stems: dict[Stem, np.ndarray] = {}
    for row, path in zip(rows, paths, strict=True):
        for stem in row.stem.chain() if row.stem else []:
            if not stem.kept and stem is not (root if first else None):
                stems.setdefault(stem, path[stem.start - shift : stem.end - shift])
    tails = [path[row.first - shift :] for row, path in zip(rows, paths, strict=True)]
    slots = np.arange(len(batch.rows), len(batch.rows) + len(rows)).repeat([len(tail) for tail in tails])
    batch.join(rows)

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(batch.device)

    memory = Pass(
        root, virtual if first else 0, batch, [(stem, there(nodes)) for stem, nodes in stems.items()],
        (there(np.concatenate(tails)), there(slots), there(np.concatenate([np.arange(len(tail)) for tail in tails]))),
        there(np.array([path[-1] for path in paths])), len(trie),
    )
    inputs = trie_batch(trie, batch.device)
    plan = inputs["trie"]
    moved = 0 if first else shift
    plan = replace(plan, depth=plan.depth + moved, longest=plan.longest + moved, memory=memory)
    return model(**_inputs(inputs["input_ids"][0], plan), logits_at=memory.ends)


def _inputs(ids: torch.Tensor, plan: Plan) -> dict[str, Any]:
    return {"input_ids": ids[None], "position_ids": plan.depth[None], "trie": plan,
            "attention_mask": torch.zeros(1, 1, 1, 1, device=ids.device)}
