"""Does the trie compute what plain rows compute, on this model and these rows?

A mean loss is blind: a layer that reads the node before it in the layout, in the place of its parent, moved a loss by 2e-7
and other branches by 5e-3. So four things are measured, and each can fail:

    leak_max       change the tokens of some branches: how far do the hidden states of all other nodes move?
                   (relative to their largest; a right model gives exactly 0)
    nll_max        nll of every learned edge, trie against one row at a time
    grad_rel_max   gradients of every trained tensor, trie (in two halves behind what they share, where the run has stems) against one row at a
                   time: |difference| / |gradient|, the worst
                   tensor; tensors whose gradient is a thousandth of the largest count against that instead
    grad_rel       the same of all tensors together, in which the rounding of half precision shows less

In train mode with every dropout at 0, so that what is proven is what trains; a method whose new weights start at zero has
them moved for the moment, since half of its gradients would be zero by themselves; 8-bit layers multiply exactly, see
`quantize.exact_products`. All is put back: weights, gradients, mode, random state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from weitiao.data.batch import learned_batch, padded_batch, trie_batch
from weitiao.data.packing import NEVER, parts
from weitiao.model.attention import TrieUnsupported
from weitiao.model.load import is_mixed, virtual_places
from weitiao.model.quantize import exact_products
from weitiao.train.evaluation import trie_batches
from weitiao.train.loss import summed_losses
from weitiao.trie import Example, Trie, build

ROWS = 8
LEAK_ROWS = 4  # of the shortest; a leaf's first, second and third neighbours are among them
TOKENS = 4_096  # of all of them together, so that a proof takes no longer than a few steps
LONGEST = 2_048  # tokens; its logits alone are 400 MB for a vocabulary like SmolLM2's
SHORT = 256
# (leak, nll, worst gradient, all gradients) that a right model stays under. In float32 the trie differs from rows by rounding (1e-6). bf16's own
# noise is 0.03 to 0.08 of all gradients together; of a single tensor 0.06 to 0.18, once 0.26 (benchmarks/noise.py); fp16's is an
# eighth of bf16's. Packed weights add none: each product takes them back to the compute type first. A leak is no rounding: other branches do not move at all.
TOLERANCES = {torch.float64: (1e-9, 1e-6, 1e-5, 1e-5), torch.float32: (1e-5, 3e-4, 1e-3, 1e-3), torch.bfloat16: (1e-3, 0.5, 0.35, 0.15),
              torch.float16: (1e-3, 0.1, 0.05, 0.02)}
NAMES = ("leak_max", "nll_max", "grad_rel_max", "grad_rel")
FOUND = (("tokens of other rows move hidden states", "noise"), ("losses of single tokens differ from plain rows'", "rounding"),
         ("gradients differ from plain rows'", "rounding"), ("all gradients together differ from plain rows'", "rounding"))  # what is told of each, and what could excuse it
# A loss is as exact as its logits are spaced: SmolLM2's go up to 47, where bf16's are 0.25 apart, and single tokens were 0.7 off between
# trie and rows, once 1.1, while both were off float32 alike (by 0.065 and 0.061, root mean square).
SPACINGS = 8  # of numbers as large as the largest logit, by which a token's loss may differ
ALIKE = 6  # times as far off as all gradients together may a tensor's be in half precision, whose rounding falls on all of them
HALF_SCALE = 2.0**10  # of the loss under fp16, as in training, so that small gradients do not round to 0


class Size(NamedTuple):
    """tokens: of a proof's rows together; longest: of one of them, the rest of which is cut off."""

    tokens: int = TOKENS
    longest: int = LONGEST


@dataclass(frozen=True)
class Proof:
    leak_max: float
    nll_max: float
    grad_rel_max: float
    grad_rel: float
    limits: tuple[float, ...]  # of these four
    dtype: str
    passed: bool
    rows: int
    nodes: int
    row_tokens: int
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prove(
    model: torch.nn.Module, examples: Sequence[Example], compute: torch.dtype, device: str = "cpu", size: Size = Size(),
    frugal: bool = False, stems: bool = True,
) -> Proof:
    """Measure the four on at most `ROWS` examples.

    Args:
        model: with its method attached and the keyword `trie` taught; not wrapped for several processes.
        compute: what it computes in; bf16 on float32 weights runs under autocast, as in training.
        size: of the proof, by `size_for` where memory is not to hold more than a run's steps.
        frugal: compare sketches of gradients (see `sketched`), where memory does not hold all of them, let alone twice.
        stems: will passes go on behind prefixes that they share (weitiao.model.stems)? Then those do whose gradients are compared.
    """
    examples = picked(examples, size)
    few = build(examples[:LEAK_ROWS])
    trie = build(examples)
    facts = {"rows": len(examples), "nodes": trie.computed, "row_tokens": sum(len(e) for e in examples)}
    dtype = str(compute).removeprefix("torch.")
    autocast = torch.autocast(torch.device(device).type, dtype=compute, enabled=is_mixed(model, compute))
    try:
        with _undisturbed(model), autocast:
            scale = HALF_SCALE if compute is torch.float16 else 1.0
            leak_max = leak(model, few, device)
            nll_max, largest = _nll_difference(model, trie, examples, device)
            gradients = _gradient_difference(model, trie, examples, device, scale, sketched if frugal else _gradients, stems)
    except TrieUnsupported as reason:
        return Proof(*[float("nan")] * 4, (), dtype, False, reason=str(reason), **facts)
    measured, limits = (leak_max, nll_max, *gradients), _limits(model, compute, largest, gradients[1])
    passed = all(value <= limit for value, limit in zip(measured, limits, strict=True))
    worst = next((f"{what} by {v:.2g}, and {t:g} is the most that {why} explains"
                  for (what, why), v, t in zip(FOUND, measured, limits, strict=True) if not v <= t), "")
    return Proof(*measured, limits, dtype, passed, reason=worst, **facts)


def leak(model: torch.nn.Module, trie: Trie, device: str = "cpu") -> float:
    """The largest move of a hidden state that should not have moved, relative to the largest hidden state.

    Leaves of the trie are changed in rounds, so chosen that of any two leaves each is watched in a round that changes
    the other. A trie of one branch has its second half changed, and its first half watched.
    """
    hidden = _hidden(model, trie, trie.token, device)
    worst = 0.0
    for changed in _rounds(trie):
        tokens = trie.token.copy()
        # Another id of the same row set: certainly inside the embedding.
        tokens[changed] = np.where(tokens[changed] == tokens[0], tokens.max(), tokens[0])
        moved = (_hidden(model, trie, tokens, device) - hidden).abs().amax(dim=-1)
        watched = torch.from_numpy(~changed).to(moved.device)
        worst = max(worst, float(moved[watched].max()))
    return worst / max(float(hidden.abs().max()), 1e-30)


def _rounds(trie: Trie) -> Iterator[np.ndarray]:
    """bool [T] masks of the nodes to change."""
    leaves = [s for s in trie.segments() if s.below == s.end]
    if len(leaves) == 1:
        changed = np.zeros(len(trie), bool)
        changed[max(1, len(trie) // 2) :] = True
        yield changed
        return
    # Two leaves differ in a bit of their numbers; the round of that bit, or of its opposite, parts them.
    for bit in range((len(leaves) - 1).bit_length()):
        for wanted in (0, 1):
            changed = np.zeros(len(trie), bool)
            for number, leaf in enumerate(leaves):
                if number >> bit & 1 == wanted:
                    changed[leaf.start : leaf.end] = True
            yield changed


def _hidden(model, trie: Trie, tokens: np.ndarray, device: str) -> torch.Tensor:
    batch = trie_batch(trie, device)
    batch["input_ids"] = torch.from_numpy(tokens[None].copy()).to(device)
    with torch.no_grad():
        return model(**batch, return_hidden=True).float()


def _gradient_difference(
    model, trie: Trie, examples: Sequence[Example], device: str, scale: float, gradients: Callable[..., Any], stems: bool,
) -> tuple[float, float]:
    """(of the worst tensor, of all together), by the trie and by one row at a time."""
    weight = sum(float(e.weights.sum()) for e in examples)
    # In two passes at least, so that none is larger than a run's, and whatever they share is a stem, however short.
    passes = parts(examples, max(len(trie) // 2, max(map(len, examples))), worth=1 if stems else NEVER)
    batches = list(trie_batches(passes, device, virtual_places(model)))
    by_trie = {name: g.clone() for name, g in gradients(model, batches, weight, scale)}
    rows = [padded_batch([e], pad_id=0, device=device) for e in examples]
    return _differences(by_trie, gradients(model, rows, weight, scale))


def _differences(ours: dict[str, torch.Tensor], theirs: Iterable[tuple[str, torch.Tensor]]) -> tuple[float, float]:
    """|difference| / |gradient|: (the largest of all tensors, of all of them together). In place, and summed in float64 without a copy:
    an embedding's gradient alone may be a gigabyte."""
    norms = np.array([(_norm(ours[name].sub_(g)), _norm(g)) for name, g in theirs]).reshape(-1, 2)
    floor = max(1e-3 * norms[:, 1].max(initial=0.0), 1e-30)
    together = np.linalg.norm(norms, axis=0)
    return float((norms[:, 0] / norms[:, 1].clip(floor)).max(initial=0.0)), float(together[0] / max(together[1], 1e-30))


def compare(
    model: torch.nn.Module, examples: Sequence[Example], compute: torch.dtype, device: str,
    otherwise: Callable[[], AbstractContextManager[Any]], size: Size = Size(),
) -> tuple[float, bool]:
    """On one plain row at a time, are the model's gradients those that it gives inside `otherwise`? (the worst relative difference,
    whether that is rounding)"""
    examples = picked(examples, size)
    batches = [padded_batch([e], pad_id=0, device=device) for e in examples]
    weight = sum(float(e.weights.sum()) for e in examples)
    scale = HALF_SCALE if compute is torch.float16 else 1.0
    with _undisturbed(model), torch.autocast(torch.device(device).type, dtype=compute, enabled=is_mixed(model, compute)):
        ours = {name: g.clone() for name, g in _gradients(model, batches, weight, scale)}
        with otherwise():
            differences = _differences(ours, _gradients(model, batches, weight, scale))
    return differences[0], all(found <= most for found, most in zip(differences, _limits(model, compute, 0.0, differences[1])[2:], strict=True))


def _limits(model: torch.nn.Module, compute: torch.dtype, largest: float, together: float) -> tuple[float, float, float, float]:
    """What may be found, where logits go up to `largest` and all gradients together are `together` off: see `TOLERANCES`."""
    dtypes = {d for d in (compute, *(p.dtype for p in model.parameters())) if d in TOLERANCES}
    leak_max, nll_max, grad_rel_max, grad_rel = max(TOLERANCES[d] for d in dtypes)
    eps = max(torch.finfo(d).eps for d in dtypes)
    if eps > torch.finfo(torch.float32).eps:  # a tensor that is much further off than the others is more than rounding
        grad_rel_max = min(grad_rel_max, ALIKE * together + grad_rel_max / 16)
    return leak_max, max(nll_max, SPACINGS * eps * 2.0 ** math.floor(math.log2(max(largest, 1.0)))), grad_rel_max, grad_rel


SKETCH, FOLDED = 4096, 1 << 22  # numbers a sketch has; numbers that are given their signs at once, a multiple of those


def sketched(model, batches: Sequence[dict[str, Any]], weight: float, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """`_gradients`, each folded to 4,096 numbers as soon as it is there, and let go.

    Every number is given a sign at random, the same each time, and those 4,096 apart are added up: a linear map that keeps squared
    lengths on the average, within about sqrt(2 / 4096) = 2 % (a count sketch, Charikar et al. 2002, with one place after the other). So
    what is said of differences and lengths of gradients can be said of those of their sketches.
    """
    found: dict[str, torch.Tensor] = {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def fold(name: str, number: int, weight: torch.nn.Parameter) -> None:
        flat, weight.grad = weight.grad.detach().reshape(-1), None
        signs = torch.Generator(flat.device).manual_seed(number)
        for part in flat.split(FOLDED):
            sign = torch.randint(0, 2, part.shape, generator=signs, device=part.device, dtype=torch.int8).mul_(2).sub_(1)
            signed = torch.nn.functional.pad(part.float().mul_(sign), (0, -len(part) % SKETCH))
            found[name] = found.get(name, 0.0) + signed.view(-1, SKETCH).sum(dim=0)

    handles = [p.register_post_accumulate_grad_hook(functools.partial(fold, name, i)) for i, (name, p) in enumerate(named)]
    try:
        for loss in summed_losses(model, batches):
            (loss * (scale / weight)).backward()
    finally:
        for handle in handles:
            handle.remove()
    yield from found.items()


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _nll_difference(model, trie: Trie, examples: Sequence[Example], device: str) -> tuple[float, float]:
    """(the worst of all learned edges of all rows, the largest logit that predicts one): looked up in the trie, and computed by the original
    forward on the row alone."""
    with torch.no_grad():
        by_edge = model(**learned_batch(trie, device), per_edge=True).double().cpu().numpy()
    at = dict(zip(trie.edges().tolist(), by_edge.tolist(), strict=True))
    worst = largest = 0.0
    for example in examples:
        path = _path(trie, example)
        if trie.depth[path].tolist() != list(range(len(path))):
            return float("inf"), largest
        batch = padded_batch([example], pad_id=0, device=device)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[0]
        for t in np.flatnonzero(example.weights):
            row = logits[t - 1].double()
            top, target = float(row.max()), float(row[int(example.ids[t])])
            nll = float(torch.logsumexp(row, -1)) - target
            worst = max(worst, abs(nll - at[path[t]]))
            largest = max(largest, *(abs(logit) for logit in (top, target) if math.isfinite(logit)), 0.0)
    return worst, largest


def _path(trie: Trie, example: Example) -> list[int]:
    """The nodes of a row, found by walking down the trie from its root."""
    children: dict[tuple[int, int], int] = {}
    for i, (parent, token) in enumerate(zip(trie.parent.tolist(), trie.token.tolist(), strict=True)):
        children[parent, token] = i
    path, here = [], -1
    for token in example.ids.tolist():
        here = children[here, token]
        path.append(here)
    return path


def _gradients(
    model, batches: Sequence[dict[str, Any]], weight: float, scale: float,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients of `scale` times the summed loss of all batches over `weight`, the examples' own: one after the other, so that no
    more than the model's own are held."""
    model.zero_grad(set_to_none=True)
    for loss in summed_losses(model, batches):
        (loss * (scale / weight)).backward()
    yield from ((name, p.grad.detach()) for name, p in model.named_parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)


def size_for(config: Any, budget: int, frugal: bool = False) -> Size:
    """Where passes have `budget` nodes: a plain row goes alone, and for its gradients a proof's trie in two halves, neither larger than those.

    Larger only where no shorter row would show well that the model's windows are kept. frugal: short rows, windows or not.
    """
    window = getattr(config.get_text_config(), "sliding_window", None) or 0
    longest = SHORT if frugal else LONGEST if budget < 2 * window < 2 * LONGEST else min(LONGEST, max(budget, SHORT))
    return Size(min(TOKENS, budget + longest), longest)


def picked(examples: Sequence[Example], size: Size = Size()) -> list[Example]:
    """The shortest few, since a proof costs passes, and the longest that there is room for, since windows show only there."""
    by_length = sorted((shortened(e, size.longest) for e in examples), key=len)
    few = by_length[:ROWS]
    while len(few) > 2 and sum(map(len, few)) > size.tokens:
        few.pop()
    room = size.tokens - sum(map(len, few[:-1]))
    bearable = [e for e in by_length[len(few) :] if len(e) <= room]
    return few[:-1] + (bearable[-1:] or few[-1:])


def shortened(row: Example, most: int) -> Example:
    """Its first tokens, so that rows share what they share. Where nothing of these is learned the last of them are, for a proof."""
    weights = row.weights[:most].copy()
    if not weights.any():
        weights[-max(1, len(weights) // 8) :] = 1
        weights[0] = 0
    return Example(row.ids[:most], weights, row.row)


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Train mode, no dropout, zero-started weights moved; and everything as it was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        torch.manual_seed(0)
        stack.enter_context(_without_dropout(model))
        stack.enter_context(exact_products(model))
        zeros = [p for p in model.parameters() if p.requires_grad and not p.detach().any()]
        for parameter in zeros:
            parameter.data.normal_(std=0.02)
        try:
            yield
        finally:
            for parameter in zeros:
                parameter.data.zero_()
            model.zero_grad(set_to_none=True)


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Every nn.Dropout, and every dropout rate that attention modules keep as a number, at 0."""
    modes = {module: module.training for module in model.modules()}
    kept: list[tuple[Any, str, float]] = []
    model.train()
    for module in model.modules():
        for name in ("p",) if isinstance(module, torch.nn.Dropout) else ("attention_dropout", "attn_pdrop", "dropout"):
            value = vars(module).get(name)
            if isinstance(value, float) and value > 0:
                kept.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        for module, mode in modes.items():
            module.training = mode
