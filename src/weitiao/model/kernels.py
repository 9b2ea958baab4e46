"""Fused kernels for what stands between a model's matrix products: norms, rope, SwiGLU and its kin, where Liger has them
(Hsu et al. 2024, arXiv:2410.10989). One of its kernels reads and writes once what PyTorch reads and writes several times, and
keeps less for the backward pass. They run on a GPU; the package is optional.

Its loss is left out: `train.loss` already computes logits on learned edges only and never twice; Liger's, asked for one loss an edge,
would take the product with the vocabulary once more in the backward pass, and wait for the GPU in between.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from weitiao.errors import SettingError

ABSENT = object()
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass(frozen=True, eq=False)
class Fused:
    """What Liger put into a model, as (names of a module or of a Python module, name, plain, fused); plain may be ABSENT."""

    names: list[tuple[dict[str, Any], str, Any, Any]]

    def take_off(self) -> None:
        for holder, name, plain, _ in self.names:
            if plain is ABSENT:
                holder.pop(name, None)
            else:
                holder[name] = plain

    def put_on(self) -> None:
        for holder, name, _, fused in self.names:
            holder[name] = fused

    @contextmanager
    def without(self) -> Iterator[None]:
        """The model as it would be without them, for the block."""
        self.take_off()
        try:
            yield
        finally:
            self.put_on()


def refuse_unfit(asked: str, config: Any, device: torch.device) -> None:
    """Told before rows are read and weights are loaded. asked: training.kernels; config: the model's.

    Raises:
        SettingError: Liger is asked for and cannot be had.
    """
    reason, cure = _obstacle(config.model_type, device) if asked == "liger" else ("", "")
    if reason:
        raise SettingError(f"training.kernels=liger, but {reason}.", "Expected training.kernels=auto, or plain.", cure)


def fuse(model: torch.nn.Module, asked: str, device: torch.device) -> Fused | None:
    """Liger's kernels put into this model, unless training.kernels=plain or they cannot be had.

    model: a causal LM of transformers as it was loaded, no method attached. device: where it is going.
    """
    if asked == "plain" or _obstacle(model.config.model_type, device)[0]:
        return None
    return _fused(model)


def _obstacle(kind: str, device: torch.device) -> tuple[str, str]:
    """(why they cannot be had, what would help), or two empty texts."""
    if device.type != "cuda":
        return f"its kernels run on a GPU, and this run is on a {device.type.upper()}", ""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except Exception as error:  # without triton, or beside another transformers, it fails in ways of its own
        return f"the package liger-kernel cannot be imported ({type(error).__name__}: {str(error)[:150]})", "pip install 'weitiao[liger]'"
    if kind not in known:
        return f"it has none for a {kind}", ""
    return "", ""


def _fused(model: torch.nn.Module) -> Fused:
    """Liger binds its forwards to the model's own modules, but puts its rope, and its classes, into the Python module for all models to
    come: the classes are taken back, and the rope serves GPUs alone."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    family = vars(sys.modules[type(model).__module__])
    holders = [family, *(vars(module) for module in model.modules())]
    before = [dict(holder) for holder in holders]
    _apply_liger_kernel_to_instance(model, **LOSSES)
    names = []
    for holder, plain in zip(holders, before, strict=True):
        for name, new in list(holder.items()):
            if callable(new) and (old := plain.get(name, ABSENT)) is not new:
                if holder is family:
                    holder[name] = old
                if not isinstance(old, type):
                    names.append((holder, name, old, _on_a_gpu(new, old) if holder is family else new))
    made = Fused(names)
    made.put_on()
    return made


def _on_a_gpu(fused: Callable, plain: Callable) -> Callable:
    """Other models of the family may be elsewhere."""

    @functools.wraps(plain)
    def chosen(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if query.is_cuda else plain)(query, *args, **kwargs)

    return chosen
