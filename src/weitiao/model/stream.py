"""A frozen base in the host's memory, a decoder layer of it at a time on the device (model.stream).

    forward     layer 0 ── layer 1 ── … ── head ── loss        while one computes, the next one is copied
    backward    layer 0 ── layer 1 ── …  ──┘                   each is brought again, computed again, gone back through

On the device are the adapter, what it needs for training, norms behind the layers, and the frozen weights of two layers; or of the head and
one. The rest lies in one pinned block of the host's memory a layer, so that a layer is one copy, on a stream of its own. Embeddings are looked up
in the host's memory. A weight's `data` is where it is at the moment: at rest it is the host's, so all that reads weights still can.

A layer is checkpointed whole, and by torch's reentrant way: its first forward leaves no graph. Otherwise whatever computes inside
(bitsandbytes' products keep their weight beside autograd; ours keep theirs with it) would hold on to the copies of all layers. Its
graph lives from the moment its weights are there again to the moment the next layer's are asked for.

accelerate's hooks were looked at: on a layer they lie outside transformers' checkpoint, so that a layer that is computed again finds
no weights; on every module they take trained weights away too, and put new ones into their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weitiao.config import Settings
from weitiao.errors import SettingError
from weitiao.model.methods.layers import decoder_layers

ALIGNED = 256  # bytes; where a weight may begin in a block


def refuse_unfit(settings: Settings, kind: str, processes: int = 1) -> None:
    """kind: of device, cpu or cuda.

    Raises:
        SettingError: there is no GPU, or there are several processes.
    """
    if not settings.model.stream:
        return
    if kind == "cpu":
        raise SettingError("model.stream=true keeps the frozen weights in the host's memory, away from a GPU's, and this run is on a CPU.",
                           "Expected a GPU.", "Leave it out: they lie in the host's memory already.")
    if processes > 1:
        raise SettingError(f"model.stream=true with {processes} processes, each of which would keep all frozen weights in the host's memory.",
                           "Expected one process.", "Leave model.stream out.")


class Block:
    """The frozen weights of one module: in the host's memory all the time, and on the device for a while."""

    def __init__(self, module: nn.Module, pinned: bool):
        tensors = list(_frozen(module))
        starts, size = [], 0
        for tensor, _ in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.places = [(put, start, tensor.nbytes, tensor.dtype, tensor.shape)
                       for start, (tensor, put) in zip(starts, tensors, strict=True)]
        self.at_rest = list(self._views(self.host))
        for (tensor, _), view in zip(tensors, self.at_rest, strict=True):
            view.copy_(tensor)
        self.rest()

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        for _, start, size, dtype, shape in self.places:
            yield flat[start : start + size].view(dtype).view(shape)

    def use(self, flat: torch.Tensor) -> None:
        """Let the module compute with this copy of its weights."""
        self._put(self._views(flat))

    def rest(self) -> None:
        self._put(self.at_rest)

    def _put(self, views: Iterable[torch.Tensor]) -> None:
        for (put, *_), view in zip(self.places, views, strict=True):
            put(view)


def _frozen(module: nn.Module) -> Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], None]]]:
    """(what is frozen in a module, how another tensor is put into its place); of packed weights their scales too."""
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is None or parameter.requires_grad:
                continue
            yield parameter.data, functools.partial(_put, child, parameter)
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield state.absmax, functools.partial(setattr, state, "absmax")
                if state.nested:
                    yield state.state2.absmax, functools.partial(setattr, state.state2, "absmax")


def _put(module: nn.Module, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    parameter.data = tensor
    if type(parameter).__name__ == "Int8Params":  # the first forward moves its other name for the same to the module's state
        holder = parameter if parameter.CB is not None else module.state
        holder.CB = tensor


class Stream:
    """Blocks in the order in which a forward uses them, and which of them are on the device."""

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks = [Block(module, device.type == "cuda") for module in modules]
        self.here: dict[int, torch.cuda.Event | None] = {}  # number of a block on the device -> when its copy is whole

    def bring(self, number: int, then: int) -> None:
        """Block `number` is there for what is computed from here on; `then`, if there is such a one, is on its way; the rest is let go."""
        for other in [n for n in self.here if n not in (number, then)]:
            self.let_go(other)
        self._send(number)
        if self.side:
            torch.cuda.current_stream(self.device).wait_event(self.here[number])
        if 0 <= then < len(self.blocks):
            self._send(then)

    def let_go(self, number: int) -> None:
        if number in self.here:
            del self.here[number]
            self.blocks[number].rest()

    def _send(self, number: int) -> None:
        if number in self.here:
            return
        block, arrived = self.blocks[number], None
        if self.side:
            # The memory may be that of a block just let go, which what is queued already still reads. What is queued later does not.
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                flat = self.copied(block.host)
            arrived = self.side.record_event()
        else:
            flat = self.copied(block.host)
        block.use(flat)
        self.here[number] = arrived

    def copied(self, host: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(host, device=self.device, pin_memory=False).copy_(host, non_blocking=True)


def keep_in_host(model: nn.Module, device: torch.device, kind: type[Stream] = Stream) -> Stream:
    """Put a causal LM with its method attached on the device, but for its frozen weights, which are brought when they are used."""
    modules, embedding = streamed(model)
    made = kind(modules, device)
    stays = {id(tensor) for tensor in (*resting(model), *(embedding.buffers() if embedding is not None else ()))}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in stays:
            tensor.data = tensor.data.to(device)
    for module in model.modules():
        _move_trifles(module, device)
    head, number = model.get_output_embeddings(), len(decoder_layers(model)[1])
    if head in modules:
        head.brought = functools.partial(_in_use, made, number, head, head.forward)
    if embedding is not None:
        embedding.forward = functools.partial(_looked_up, made, number, embedding.forward)
    for i, module in enumerate(modules):
        module.forward = functools.partial(_brought, made, i, module.forward)
    model.runs_on = device
    if getattr(model, "hf_device_map", None):
        model.hf_device_map = {"": device}
    return made


def streamed(model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """(layers, and the head if it is a frozen linear; the embedding if it is frozen), of a causal LM with its method attached."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    frozen_head = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    frozen_embedding = not any(p.requires_grad for p in embedding.parameters())
    if getattr(head, "weight", None) is getattr(embedding, "weight", None):  # one table: it rests for both or for neither
        frozen_head = frozen_embedding = frozen_head and frozen_embedding
    return [*decoder_layers(model)[1], *([head] if frozen_head else [])], embedding if frozen_embedding else None


def resting(model: nn.Module) -> list[nn.Parameter]:
    """The weights that lie in the host's memory, each once."""
    modules, embedding = streamed(model)
    found = {id(p): p for module in (*modules, embedding) if module is not None for p in module.parameters() if not p.requires_grad}
    return list(found.values())


def head_there(head: nn.Module) -> AbstractContextManager[Any]:
    """For products with the head's weights, which nothing needs afterwards."""
    return getattr(head, "brought", nullcontext)()


def _move_trifles(module: nn.Module, device: torch.device) -> None:
    """What packed weights have beside them that is no parameter: tables, and a scale a row."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        state.code = state.code.to(device)
        if state.nested:
            state.offset, state.state2.code = state.offset.to(device), state.state2.code.to(device)
    if type(weight).__name__ == "Int8Params":
        for holder in (weight, module.state):
            if holder.SCB is not None:
                holder.SCB = holder.SCB.to(device)


def _brought(made: Stream, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's forward with its weights there; where gradients are taken, computed again in the backward pass with them there again."""

    def run(*inputs: Any) -> Any:
        made.bring(number, number - 1 if torch.is_grad_enabled() else number + 1)
        return original(*inputs, **kwargs)

    if not args:
        args = (kwargs.pop("hidden_states"),)
    if not torch.is_grad_enabled():
        return run(*args)
    hidden = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
    return checkpoint(run, hidden, *args[1:], use_reentrant=True)


@contextmanager
def _in_use(made: Stream, number: int, head: nn.Module, original: Callable[..., Any]) -> Iterator[None]:
    """In here a call of the head is a plain one, whose graph, if it leaves any, is gone through in here."""
    wrapped, head.forward = head.forward, original
    made.bring(number, number - 1 if torch.is_grad_enabled() else number + 1)
    try:
        yield
    finally:
        head.forward = wrapped
        made.let_go(number)


def _looked_up(made: Stream, head: int, original: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    made.let_go(head)  # whose weight may be the same
    return original(ids.cpu()).to(made.device)
