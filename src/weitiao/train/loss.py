"""Weighted next-token loss over the edges of a trie, and the forward that computes it inside the model's own call.

`learn_on_tries(model)` gives the instance of a causal LM one more keyword: called with `trie=plan` it runs its backbone,
gathers the hidden states that predict something, and returns sum(weight * nll) as a scalar; logits exist for a chunk of
learned edges at a time, nowhere else. Called without a plan it is the model it was. It has to be the model's *own*
forward: a backbone called from outside loses autocast, DDP's hooks and FSDP's gathering.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from weitiao.model import elementwise
from weitiao.model.offload import keeping
from weitiao.model.stems import Stem, memory_of
from weitiao.model.stream import head_there

CHUNK = 256  # edges whose logits exist at once: 256 x 49,152 x 4 bytes = 50 MB for a vocabulary like SmolLM2's


def learn_on_tries(model: nn.Module) -> None:
    """Teach `model` (a causal LM of transformers, not wrapped yet) the keyword `trie`; see the head of this file."""
    original = model.forward
    transform = logit_transform(model.config.get_text_config())

    @functools.wraps(original)
    def forward(
        *args: Any, trie: Any = None, return_hidden: bool = False, per_edge: bool = False, logits_at: torch.Tensor | None = None,
        **inputs: Any,
    ):
        if trie is None:
            with casts_once(), keeping(model):
                return original(*args, **inputs)
        # The backbone's last hidden state: [1, T, hidden]
        with casts_once(), keeping(model):
            hidden = model.base_model(*args, trie=trie, use_cache=False, **inputs).last_hidden_state[0]
        if return_hidden:
            return hidden
        head = model.get_output_embeddings()
        if logits_at is not None:
            return transform(head(hidden[logits_at]))
        predicting = hidden[trie.predictors]
        with head_there(head):
            if per_edge:
                return edge_nll(predicting, trie.targets, head, transform)
            return edge_loss(predicting, trie.targets, trie.weights, head, transform)

    model.forward = forward
    model.learns_on_tries = True


def casts_once() -> AbstractContextManager[None]:
    """Where gradients are taken, autocast keeps no casts of weights for a second use: in a pass a weight has one.

    Without checkpointing the backward pass keeps them anyway. With it they would all live from the first layer on, 2 bytes a trained
    weight, and be made again nevertheless.
    """
    return casts_uncached() if torch.is_grad_enabled() else nullcontext()


@contextmanager
def casts_uncached() -> Iterator[None]:
    """Also for a pass in the middle of a step whose gradients are not taken yet."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def logit_transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What some families do to logits after the head: Gemma caps them, Cohere and Granite scale them."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0
    if factor == 1.0 and not cap:
        return as_they_are

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if factor != 1.0:
            logits = logits * factor
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform


def as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits


def edge_nll(hidden, targets, head, transform, chunk: int = CHUNK) -> torch.Tensor:
    """nll of each edge, [E] fp32 (fp64 for an fp64 model), without gradients: for evaluation and the proof."""
    parts = []
    with torch.no_grad():
        for a in range(0, len(targets), chunk):
            logits = transform(head(hidden[a : a + chunk]))
            parts.append(F.cross_entropy(_wide(logits), targets[a : a + chunk], reduction="none"))
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def edge_loss(hidden, targets, weights, head, transform, chunk: int = CHUNK) -> torch.Tensor:
    """sum(weights * nll): hidden [E, hidden_size], targets [E], weights [E] -> scalar."""
    if not torch.is_grad_enabled():
        return (edge_nll(hidden, targets, head, transform, chunk) * weights).sum()
    learned_by_head = [p for p in head.parameters() if p.requires_grad]
    return _EdgeLoss.apply(hidden, targets, weights, head, transform, chunk, *learned_by_head)


class _EdgeLoss(torch.autograd.Function):
    """The loss and its gradients in one sweep over chunks of edges, so that logits are computed once and never kept.

    The loss is a sum, so the gradient of each chunk is known as soon as its logits are; backward only scales it, in place: of a big
    vocabulary's head there is one gradient. So it can be gone through once.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weights, head, transform, chunk, *head_parameters):
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_hidden = torch.zeros_like(hidden)
        d_head = [torch.zeros_like(p) for p in head_parameters] if len(targets) else []
        add_gradients = _add_product if _is_plain_product(hidden, head, head_parameters) else _add_graph
        for a in range(0, len(targets), chunk):
            part = slice(a, a + chunk)
            loss += add_gradients(hidden[part], targets[part], weights[part], head, transform, head_parameters, d_hidden[part], d_head)
        ctx.gradients = d_hidden, *d_head
        ctx.head_parameters = head_parameters
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss of a trie was gone back through twice"
        d_hidden, *d_head = gradients
        del gradients  # autograd takes over what nobody else holds, and copies the rest
        for d in (d_hidden, *d_head):
            d.mul_(grad)
        d_head = d_head or [torch.zeros_like(p) for p in ctx.head_parameters]  # nothing learned: none is held until here
        return (d_hidden, None, None, None, None, None, *d_head)


def _is_plain_product(hidden, head, head_parameters) -> bool:
    """Is the head hidden @ weight.T in one type? Then, if its weight is trained, chunks add to one gradient, without one of their own."""
    return (type(head) is nn.Linear and head.bias is None and hidden.dtype == head.weight.dtype and not head._forward_hooks
            and not (torch.is_autocast_enabled(hidden.device.type) and torch.get_autocast_dtype(hidden.device.type) != hidden.dtype))


def _chunk_loss(logits, targets, weights, transform) -> torch.Tensor:
    return (F.cross_entropy(_wide(transform(logits)), targets, reduction="none") * weights).sum()


def _add_product(hidden, targets, weights, head, transform, head_parameters, d_hidden, d_head) -> torch.Tensor:
    """The loss of a chunk; its gradients are added to d_hidden and d_head."""
    logits = F.linear(hidden, head.weight.detach())
    loss, d_logits = (_in_place if transform is as_they_are else _by_graph)(logits, targets, weights, transform)
    d_hidden.copy_(d_logits @ head.weight.detach())
    if head_parameters:
        torch.addmm(d_head[0], d_logits.T, hidden, out=d_head[0])
    return loss


def _in_place(logits, targets, weights, transform) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its gradient by the logits), which overwrites them: weight * (softmax - one at the target)."""
    if elementwise.takes(logits) and weights.dtype is torch.float32:
        return elementwise.cross_entropy(logits, targets, weights).sum(), logits
    wide, targets, weights = _wide(logits), targets[:, None], weights[:, None]
    top, at_target = wide.amax(-1, keepdim=True), wide.gather(1, targets)
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    loss = ((total.log() + top - at_target) * weights).sum()
    wide.mul_(weights / total).scatter_add_(1, targets, -weights.to(wide.dtype))
    return loss, logits.copy_(wide)


def _by_graph(logits, targets, weights, transform) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through what a family does to its logits."""
    logits.requires_grad_()
    with torch.enable_grad():
        loss = _chunk_loss(logits, targets, weights, transform)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _add_graph(hidden, targets, weights, head, transform, head_parameters, d_hidden, d_head) -> torch.Tensor:
    """The same for any head: an adapter's, one with a bias, one that autocast casts."""
    with torch.enable_grad():
        h = hidden.detach().requires_grad_()
        loss = _chunk_loss(head(h), targets, weights, transform)
    grads = torch.autograd.grad(loss, [h, *head_parameters])
    d_hidden += grads[0]
    for total, grad in zip(d_head, grads[1:], strict=True):
        total += grad
    return loss.detach()


def padded_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum(weights * nll) the plain way: logits [B, T, V], targets and weights [B, T]. The second, independent path."""
    return (token_nll(logits, targets, weights) * weights).sum()


def token_nll(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[B, T]: the nll of each target that weighs something, 0 elsewhere."""
    learned = weights > 0
    nll = F.cross_entropy(_wide(logits[learned]), targets[learned], reduction="none")
    return nll.new_zeros(weights.shape).masked_scatter(learned, nll)


def summed_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """sum(weight * nll) of one pass through the (possibly wrapped) model, whichever kind of pass it is."""
    if "trie" in batch:
        return model(**batch)
    inputs = {k: v for k, v in batch.items() if k not in ("targets", "weights")}
    out = model(**inputs, use_cache=False)
    loss = padded_loss(out.logits, batch["targets"], batch["weights"])
    if getattr(out, "aux_loss", None) is not None:  # a router's, where the config asks for it
        loss = loss + router_coefficient(model) * out.aux_loss * batch["weights"].sum()
    return loss


def summed_losses(model: nn.Module, batches: Iterable[dict[str, Any]]) -> Iterator[torch.Tensor]:
    """`summed_loss` of each pass, in the order in which they are to go back: a stem's (weitiao.model.stems) when those behind it have."""
    waiting: list[tuple[Stem, torch.Tensor | dict[str, Any]]] = []  # its loss, or the pass that is to be computed again

    def close() -> Iterator[torch.Tensor]:
        stem, loss = waiting[-1]
        if isinstance(loss, dict):
            with stem.same_noise():
                loss = summed_loss(model, loss)
        yield stem.closed(loss)
        waiting.pop()
        stem.forget()

    try:
        for batch in batches:
            memory = memory_of(batch)
            while waiting and waiting[-1][0] is not (memory and memory.above):
                yield from close()
            if memory and memory.stem and memory.stem.again and torch.is_grad_enabled():
                memory.stem.remember_noise(batch["input_ids"].device)
                with torch.no_grad(), casts_uncached():
                    model(**batch, return_hidden=True)
                waiting.append((memory.stem, batch))
                continue
            loss = summed_loss(model, batch)
            if memory and memory.stem:
                waiting.append((memory.stem, loss))
            else:
                yield loss
        while waiting:
            yield from close()
    finally:
        for stem, _ in waiting:
            stem.forget()


def router_coefficient(model: nn.Module) -> float:
    inner = getattr(model, "module", model)  # inside DDP
    return inner.config.get_text_config().router_aux_loss_coef


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
