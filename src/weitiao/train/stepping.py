"""How a step reaches the weights where it does not take them all at once: a piece at a time, in fp32, rounded back.

    gradient of a weight ── a piece of weight and gradient, in fp32 ── the optimizer's own step on it ── rounded back

Two rungs of the memory ladder are made of it.

bf16 weights (training.rounding). They have 8 bits, so that a step of less than 1/512 of a weight rounds to nothing: at a usual
rate most steps of most weights. Either of two ways keeps what they would lose:

    stochastic     up or down at random, by how near each is, so that the steps add up on the average (Gupta et al. 2015,
                   arXiv:1502.02551). No memory. The noise is a function of (seed, step, piece)
    compensated    the 16 bits that bf16 leaves off are kept beside it, as the optimizer's state: the two together are the
                   weight in fp32, bit for bit (split SGD, Kalamkar et al. 2020, arXiv:2005.04680). 2 bytes a weight

The optimizer sees fp32 in both, so its own state is fp32 (or 8 bits) too: Adam's mean of squares stands still in bf16 as well.

Steps inside the backward pass (training.step_in_backward, as in LOMO, Lv et al. 2023, arXiv:2306.09782): a weight is stepped
as soon as its gradient is whole, and the gradient let go, so that all of them are never there together.

An optimizer that treats every number by itself is handed pieces of `PIECE` numbers, so that the fp32 scratch is theirs; any
other is handed whole weights. It is made over stand-ins, which hold a piece only while it is stepped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weitiao.config import Settings
from weitiao.errors import SettingError

PIECE = 1 << 22  # numbers stepped at once: 16 MiB of scratch for each fp32 tensor of theirs; a multiple of bitsandbytes' blocks of 256
BLOCK = 256

# Those that treat every number by itself: torch's and bitsandbytes'.
ELEMENTWISE = re.compile(r"adamw?(_torch(_fused)?)?|sgd|rmsprop|adagrad|adadelta|rprop|(paged_)?(adamw|ademamix|lion)(_8bit|_32bit)|"
                         r"ademamix|adamw_bnb_8bit|rmsprop_bnb(_8bit|_32bit)?")
# Those that want all weights at once: one search, one count of steps, or one norm for all.
ALL_AT_ONCE = ("lbfgs", "stable_adamw", "grokadamw", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision")


def rounding_in_force(settings: Settings) -> str:
    """nearest, stochastic or compensated: the last two where weights in bf16 are trained."""
    training = settings.training
    if settings.method.name != "full" or settings.model.dtype != "bfloat16":
        return "nearest"
    return "stochastic" if training.rounding == "auto" else training.rounding


def is_by_weight(settings: Settings) -> bool:
    return settings.training.step_in_backward or rounding_in_force(settings) != "nearest"


def refuse_unfit(settings: Settings, compute: torch.dtype, processes: int = 1) -> None:
    """Told before anything is loaded.

    Raises:
        SettingError: the optimizer, the loss scaling or several processes do not go with steps of a weight at a time.
    """
    if not is_by_weight(settings):
        return
    training = settings.training
    cause = ("training.step_in_backward=true" if training.step_in_backward else
             f"Rounding of bf16 weights (training.rounding={rounding_in_force(settings)})")
    if training.optimizer in ALL_AT_ONCE:
        raise SettingError(f"{cause} steps one weight at a time, and training.optimizer={training.optimizer} wants all at once.",
                           "Expected another optimizer, such as adamw or adafactor.",
                           "" if training.step_in_backward else "Or leave model.dtype out: trained weights are float32 then.")
    if compute is torch.float16:
        raise SettingError(f"{cause} does not go with fp16: a step whose gradient overflows is to be skipped, and is known too late.",
                           "Expected training.precision=bf16 or fp32.")
    if training.step_in_backward and processes > 1:
        raise SettingError(f"training.step_in_backward=true steps as this process's gradients come, and there are {processes} processes: "
                           "the others' have to be added first.", "Expected one process.", "Leave training.step_in_backward out.")


@dataclass(eq=False)
class Piece:
    """Numbers [start, stop) of a weight, flat. stand_in: what the optimizer knows of it; empty between steps."""

    weight: torch.nn.Parameter
    start: int
    stop: int
    number: int
    stand_in: torch.nn.Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.stop - self.start == self.weight.numel()
        return tuple(self.weight.shape) if whole else (self.stop - self.start,)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These numbers, as they lie; whole weights keep their shape."""
        return tensor if self.stop - self.start == tensor.numel() else tensor.view(-1)[self.start : self.stop]


@dataclass(eq=False)
class ByWeight:
    """Steps weights one at a time.

    rounding: nearest, stochastic or compensated. limit: to what length gradients are scaled down, 0: never; clipping: each weight's
    by itself, or by the length of all, which `measuring` found before.
    """

    rounding: str
    seed: int
    elementwise: bool
    in_backward: bool
    clipping: str = "whole"
    limit: float = 0.0
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.pieces: dict[torch.nn.Parameter, list[Piece]] = {}
        self.count = 0
        self.step_number = 0
        self.due = False  # is the gradient of the pass under way the step's whole one?
        self.norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.factor: torch.Tensor | None = None  # that the gradient is scaled by
        self.on_gradient: Callable[[torch.nn.Parameter], None] = self.take

    @classmethod
    def of(cls, settings: Settings) -> ByWeight | None:
        """None where the optimizer takes all weights at once."""
        training = settings.training
        if not is_by_weight(settings):
            return None
        return cls(rounding_in_force(settings), training.seed, bool(ELEMENTWISE.fullmatch(training.optimizer)), training.step_in_backward,
                   training.clipping_in_force, training.max_grad_norm)

    def stand_ins(self, weight: torch.nn.Parameter) -> list[torch.nn.Parameter]:
        """What the optimizer is to be made over in the place of a weight; the same when asked again."""
        if weight in self.pieces:
            return [piece.stand_in for piece in self.pieces[weight]]
        count = max(1, -(-weight.numel() // PIECE)) if self.elementwise else 1
        size = max(1, -(-weight.numel() // count // BLOCK) * BLOCK) if count > 1 else weight.numel()
        dtype = torch.float32 if self._is_rounded(weight) else weight.dtype
        for start in range(0, weight.numel(), size):
            stand_in = torch.nn.Parameter(torch.empty(0, dtype=dtype, device=weight.device))
            self.pieces.setdefault(weight, []).append(Piece(weight, start, min(start + size, weight.numel()), self.count, stand_in))
            self.count += 1
        return [piece.stand_in for piece in self.pieces[weight]]

    def _is_rounded(self, weight: torch.nn.Parameter) -> bool:
        return self.rounding != "nearest" and weight.dtype is torch.bfloat16

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer made over the stand-ins."""
        self.optimizer = optimizer
        self._find_groups()
        if self.in_backward:
            for weight in self.pieces:
                weight.register_post_accumulate_grad_hook(self._arrived)

    def _find_groups(self) -> None:
        self.group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}

    def _arrived(self, weight: torch.nn.Parameter) -> None:
        if self.due:
            self.on_gradient(weight)
            weight.grad = None

    # --------------------------------------------------------------------------------------------------- a whole step

    def step(self, number: int) -> None:
        """All weights whose gradients are there, one after the other."""
        self.step_number = number
        for weight in self.pieces:
            if weight.grad is not None:
                self.take(weight)
                weight.grad = None

    @property
    def steps_at_once(self) -> bool:
        """Are weights stepped by the first gradients that come, and not by those of a second backward pass?"""
        return self.in_backward and self.clipping != "measured"

    def gathering(self, number: int) -> AbstractContextManager[None]:
        """For the backward passes that a step begins with."""
        return self.stepping(number) if self.steps_at_once else self.measuring() if self.in_backward else nullcontext()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Backward passes in here change nothing; `norm` tells how long their gradients were."""
        self.norms, self.on_gradient = {}, self._measure
        try:
            yield
        finally:
            self.on_gradient = self.take

    @contextmanager
    def stepping(self, number: int) -> Iterator[None]:
        """Backward passes in here step each weight; by the length of all gradients, if that was measured before."""
        self.step_number = number
        if self.clipping == "measured":
            self.factor = self._scale(self._length())
        else:
            self.norms, self.on_gradient = {}, self._scale_and_take
        try:
            yield
        finally:
            self.on_gradient, self.factor = self.take, None

    @property
    def norm(self) -> float:
        """Length of all gradients of the last step, before any was scaled."""
        return float(self._length()) if self.norms else 0.0

    def _length(self) -> torch.Tensor:
        norms = [self.norms[weight] for weight in self.pieces if weight in self.norms]  # summed in this order, in whichever they came
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def _scale(self, norm: torch.Tensor) -> torch.Tensor | None:
        return (self.limit / (norm + 1e-6)).clamp(max=1.0) if self.limit else None

    def _measure(self, weight: torch.nn.Parameter) -> None:
        self.norms[weight] = torch.linalg.vector_norm(weight.grad, dtype=torch.promote_types(weight.grad.dtype, torch.float32))

    def _scale_and_take(self, weight: torch.nn.Parameter) -> None:
        self._measure(weight)
        self.factor = self._scale(self.norms[weight])
        self.take(weight)

    # -------------------------------------------------------------------------------------------------- a single weight

    @torch.no_grad()
    def take(self, weight: torch.nn.Parameter) -> None:
        """Step one weight by its gradient."""
        assert self.optimizer is not None
        groups, gradient = self.optimizer.param_groups, weight.grad.contiguous()
        for piece in self.pieces[weight]:
            group = self.group_of[piece.stand_in]
            members = group["params"]
            # A copy of the list, never of the group: learning rates are set in it.
            group["params"], self.optimizer.param_groups = [piece.stand_in], [group]
            try:
                self._take(piece, piece.of(weight.detach()), piece.of(gradient))
            finally:
                group["params"], self.optimizer.param_groups = members, groups
                piece.stand_in.grad = None
                piece.stand_in.data = piece.stand_in.data.new_empty(0)

    def _take(self, piece: Piece, held: torch.Tensor, gradient: torch.Tensor) -> None:
        stand_in, rounded = piece.stand_in, self._is_rounded(piece.weight)
        state = self.optimizer.state
        kept = state[stand_in].pop("compensation", None) if stand_in in state else None
        stand_in.data = joined(held, kept) if rounded else held
        gradient = gradient.to(stand_in.dtype)
        stand_in.grad = gradient if self.factor is None else gradient * self.factor.to(gradient)
        self.optimizer.step()
        if not rounded:
            return
        if self.rounding == "stochastic":
            noise = torch.Generator(held.device).manual_seed(_seed(self.seed, self.step_number, piece.number))
            round_stochastically(stand_in.data, held, noise)
        else:
            state[stand_in]["compensation"] = split(stand_in.data, held)

    def restored(self) -> None:
        """After the optimizer's state was read: that makes new groups, and floats of what belongs to a float weight."""
        self._find_groups()
        for state in self.optimizer.state.values():
            if "compensation" in state:
                state["compensation"] = state["compensation"].to(torch.int16)


def paged_again(optimizer: Any) -> None:
    """A state that was read back lies on the CPU, or all on the GPU: put what was paged into paged memory again (bitsandbytes, CUDA)."""
    if not getattr(optimizer, "is_paged", False):
        return
    from bitsandbytes import functional

    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if name.startswith("state") and weight.device.type == "cuda" and value.numel() >= 1e5 and not getattr(value, "is_paged", False):
                state[name] = functional.get_paged(*value.shape, dtype=value.dtype, device=weight.device)
                state[name].copy_(value)


# ------------------------------------------------------------------------------------------------------- fp32 in halves


def joined(half: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """bf16 and the 16 bits that belong below it (int16; None: 0) -> fp32."""
    if low is None:
        return half.float()
    return (half.contiguous().view(torch.int16).to(torch.int32) << 16).add_(low.view_as(half)).view(torch.float32)


def split(wide: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Write the nearest bf16 of `wide` (fp32) into `half`; the 16 bits that are left over, as int16: wide's bits are half's << 16 plus these.

    1.00390625 = 0x3F808000 -> 0x3F81 and -0x8000: halves go away from 0, for 16 bits hold -0x8000 and not 0x8000.
    """
    bits = wide.view(torch.int32)
    high = (bits + 0x8000) >> 16
    half.copy_(high.to(torch.int16).view(torch.bfloat16).view_as(half))
    return (bits - (high << 16)).to(torch.int16)


def round_stochastically(wide: torch.Tensor, half: torch.Tensor, noise: torch.Generator) -> None:
    """Write `wide` (fp32; it is used up) into `half` (bf16), up with the probability of how near the upper of its two neighbours is."""
    bits = wide.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=noise, device=bits.device, dtype=torch.int32)
    bits &= -(1 << 16)
    half.copy_(wide)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
