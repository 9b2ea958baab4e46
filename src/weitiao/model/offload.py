"""What the backward pass waits for, in the host's memory meanwhile (training.offload_activations).

    forward    a layer's input, which checkpointing keeps  ──  copied into pinned host memory, the GPU's copy let go
    backward   asked for, to compute the layer again       ──  copied back

Both copies are queued on the stream that computes, so neither waits for the other, and no tensor is let go before it is
read. The numbers are the same bits. After torch.autograd.graph.save_on_cpu, which would move weights and trifles too.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from weitiao.config import Settings
from weitiao.errors import SettingError

LEAST = 1 << 20  # bytes; what is smaller stays: a copy costs more than it frees


def refuse_unfit(settings: Settings, kind: str) -> None:
    """kind: of device, cpu or cuda.

    Raises:
        SettingError: there is no GPU whose memory it would spare.
    """
    if settings.training.offload_activations and kind == "cpu":
        raise SettingError("training.offload_activations=true moves activations from a GPU's memory into the host's, and this run is on a CPU.",
                           "Expected a GPU.", "Leave it out: they lie in the host's memory already.")


def keep_in_host(model: nn.Module, how: type[InHost] | None = None) -> None:
    """From now on what a forward of this causal LM leaves for its backward lies in the host's memory (see `keeping`)."""
    model.keeps = functools.partial(how or InHost, model)


def keeping(model: nn.Module) -> AbstractContextManager[Any]:
    """For a forward of the model's backbone."""
    return getattr(model, "keeps", nullcontext)()


class InHost(torch.autograd.graph.saved_tensors_hooks):
    """Tensors that autograd saves inside, but for weights and small ones, are kept in the host's memory."""

    def __init__(self, model: nn.Module):
        self.weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> Any:
        if tensor.nbytes < LEAST or tensor.layout is not torch.strided or tensor.untyped_storage()._cdata in self.weights:
            return tensor
        return tensor.device, self.to_host(tensor)

    def unpack(self, kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else self.to_device(*kept)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        return held.copy_(tensor, non_blocking=True)

    def to_device(self, device: torch.device, held: torch.Tensor) -> torch.Tensor:
        return held.to(device, non_blocking=True)
