"""What a decoder layer computes, in fewer passes over memory: LoRA's linears, gated MLPs, RMS norms, rotary positions.

On a CPU half of a step's time goes into reading and writing what products leave behind: copies between types, a scaled
update beside a product and their sum, an activation and what it is multiplied with. Here each of these three is one
function with its gradient written out, so that

    an update is added by the product itself          y = x W^T, then y += scale (x A^T) B^T in place
    what has one input is computed together           queries, keys, values; gate and up: x A^T is one product for all their A,
                                                      and the gradients of x are summed by the products
    nothing is copied to another type per linear      the input is cast once, A and B each time: they are small
    what is cheap is computed again, not kept         of an MLP gate and up stay; of a norm its input, from which the linears behind it
                                                      have theirs again

`fuse(model)` puts them into an instance; parameters, names and files stay those of transformers and PEFT. A module that
holds or does anything more (a bias in an MLP, DoRA, 8 or 4 bits, a hook, a second adapter) computes as it did. On a CPU
with a compiler the elementwise part is one pass over memory (`elementwise`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weitiao.model import elementwise

ROWS = 256  # of a chunk of elementwise work: what it touches stays in the processor's cache

# Modules of transformers whose forward is down(act(gate(x)) * up(x)), and those whose forward is weight * x / rms(x).
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP", "Olmo2MLP"}
RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"}
# Those beside which stands an apply_rotary_pos_emb(query, key, cos, sin) that pairs halves.
ROTARY = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "SmolLM3Attention"}


class Activation(NamedTuple):
    """An elementwise function and its gradient: (gradient of what comes out, what went in) -> gradient of what went in."""

    of: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS = {
    "SiLU": Activation(F.silu, torch.ops.aten.silu_backward), "SiLUActivation": Activation(F.silu, torch.ops.aten.silu_backward),
    "GELUTanh": Activation(functools.partial(F.gelu, approximate="tanh"), functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    "PytorchGELUTanh": Activation(functools.partial(F.gelu, approximate="tanh"), functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}


def fuse(model: nn.Module) -> None:
    """Let the modules of a causal LM (PEFT's adapters attached, if any) compute by the functions below, where they can."""
    for module in model.modules():
        kind = type(module).__name__
        if _is_lora(module):
            _put(module, _lora_forward)
        elif kind in GATED and type(module.act_fn).__name__ in ACTIVATIONS:
            _put(module, _gated_forward)
        elif kind in RMS_NORMS:
            _put(module, _norm_forward)
        elif kind in ROTARY and type(module).__module__.startswith("transformers.models."):
            _rotate_by_ours(sys.modules[type(module).__module__])
    for module in model.modules():  # now that their linears are what they will be
        if type(module).__name__ in ROTARY:
            _compute_together([module.q_proj, module.k_proj, module.v_proj])


def _put(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    if "forward" not in vars(module):  # something else has put its own there, and goes before
        module.forward = functools.partial(forward, module, module.forward)


def _compute_together(linears: list[nn.Module]) -> None:
    """Where one of them has LoRA, and none a forward that something else has put there."""
    ours = [getattr(vars(linear).get("forward"), "func", None) for linear in linears]
    if _lora_forward in ours and all(forward is _lora_forward or "forward" not in vars(linear) for linear, forward in zip(linears, ours)):
        OneInput(linears)


# --------------------------------------------------------------------------------------------------------------- LoRA


class Parts(NamedTuple):
    """A linear as numbers: y = x weight^T + bias + scale (x a^T) b^T. weight [out, in], a [rank, in], b [out, rank]; a and b are
    None where nothing is added."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.0


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    return type(module) is Linear and (type(module.base_layer) is nn.Linear or type(module.base_layer).__name__ == "Conv1D")


def _plain(module: nn.Module) -> bool:
    """Nothing hangs on it that its forward would run."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def parts(module: nn.Module, dropout: bool = False) -> Parts | None:
    """Of nn.Linear, and of PEFT's LoRA on one or on a Conv1D with one adapter in force; None if it does anything more.

    dropout: may LoRA drop out?
    """
    if not _plain(module):
        return None
    if type(module) is nn.Linear:
        return Parts(module.weight, module.bias)
    if not _is_lora(module) or module.merged or getattr(module, "lora_variant", None) or not _plain(module.base_layer):
        return None
    base = module.base_layer
    weight = base.weight if type(base) is nn.Linear else base.weight.t()
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return Parts(weight, base.bias)
    name = active[0]
    a, b = module.lora_A[name], module.lora_B[name]
    drops = type(module.lora_dropout[name]) is not nn.Identity and module.lora_dropout[name].training
    if len(active) > 1 or weight.requires_grad or (drops and not dropout) or b.bias is not None or not (_plain(a) and _plain(b)):
        return None
    return Parts(weight, base.bias, a.weight, b.weight, module.scaling[name])


def _in_type(found: Parts, x: torch.Tensor) -> tuple[torch.Tensor, Parts] | None:
    """Input and weights in what autocast computes in, or in what they share; None if they share nothing."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    else:
        kind = x.dtype
        if any(t is not None and t.dtype is not kind for t in found[:4]):
            return None
    return x.to(kind), Parts(*(t if t is None else t.to(kind) for t in found[:4]), found.scale)


def _lora_forward(module: nn.Module, original: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    found = None if args or kwargs else parts(module, dropout=True)
    cast = found and found.a is not None and _in_type(found, x)
    if not cast:
        return original(x, *args, **kwargs)
    inputs, linear = cast
    (name,) = (name for name in module.active_adapters if name in module.lora_A)
    (out,) = LoraLinears.apply(inputs, module.lora_dropout[name](inputs), _recipe(inputs), (linear.scale,), *linear[:4])
    return out


class LoraLinears(torch.autograd.Function):
    """y_i = x weight_i^T + bias_i + scale_i (dropped a_i^T) b_i^T: x and dropped [..., in] -> a [..., out_i] each. The weights are frozen.

    dropped is x after dropout; the very same tensor where there is none. recipe: how x was made, if it need not be kept. tensors:
    weight, bias, a and b of each linear, a and b of one of them at least.
    """

    @staticmethod
    def forward(ctx, x, dropped, recipe, scales, *tensors):
        linears = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        outs = [F.linear(x, weight, bias) for weight, bias, _, _ in linears]
        stacked, parts = _stack([a for _, _, a, _ in linears])
        inner = _rows(dropped) @ stacked.t()
        for out, part, scale, (_, _, _, b) in zip(outs, parts, scales, linears, strict=True):
            if b is not None:
                _rows(out).addmm_(inner[:, part], b.t(), alpha=scale)
        ctx.same = dropped is x
        ctx.eps, kept = _kept(dropped, recipe if ctx.same else None)
        ctx.save_for_backward(*kept, inner, stacked, *(weight for weight, _, _, _ in linears), *(b for _, _, _, b in linears))
        ctx.scales, ctx.parts = scales, parts
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        made_of, norm, inner, stacked, *tensors = ctx.saved_tensors
        dropped = _again(made_of, norm, ctx.eps)
        weights, bs = tensors[: len(grads)], tensors[len(grads) :]
        shape, grads, flat = dropped.shape, [_rows(grad) for grad in grads], _rows(dropped)
        narrow = _narrow(grads, bs, ctx.scales)
        d_stacked = narrow.t() @ flat
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            for grad, weight in zip(grads, weights, strict=True):
                d_x = grad @ weight if d_x is None else torch.addmm(d_x, grad, weight)
            if ctx.same:
                d_x.addmm_(narrow, stacked)
            d_x = d_x.view(shape)
        if ctx.needs_input_grad[1] and not ctx.same:
            d_dropped = (narrow @ stacked).view(shape)
        gradients: list[torch.Tensor | None] = []
        for i, (grad, part, scale) in enumerate(zip(grads, ctx.parts, ctx.scales, strict=True)):
            gradients += [None, grad.sum(0) if ctx.needs_input_grad[5 + 4 * i] else None]
            gradients += [None, None] if part is None else [d_stacked[part], _of_b(grad, inner[:, part], scale)]
        return d_x, d_dropped, None, None, *gradients


def _stack(matrices: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, list[slice | None]]:
    """(those that are there below each other, where each stands): [rank_i, in] each -> [sum of ranks, in]"""
    there, parts, ranks = [], [], 0
    for matrix in matrices:
        parts.append(None if matrix is None else slice(ranks, ranks + len(matrix)))
        if matrix is not None:
            there.append(matrix)
            ranks += len(matrix)
    return (torch.cat(there) if len(there) > 1 else there[0] if there else None), parts


def _narrow(grads: Sequence[torch.Tensor], bs: Sequence[torch.Tensor | None], scales: Sequence[float]) -> torch.Tensor:
    """scale_i grad_i b_i side by side, of those with a b: [N, out_i] -> [N, sum of ranks]"""
    found = [(grad @ b).mul_(scale) for grad, b, scale in zip(grads, bs, scales, strict=True) if b is not None]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


class OneInput:
    """Linears of one input (queries, keys, values), computed when the first of them is called; the others hand out what is there.

    What is called with another tensor than the first was, or cannot be computed so, computes as it did.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules
        self.input: torch.Tensor | None = None
        self.there: dict[int, torch.Tensor] = {}
        for number, module in enumerate(modules):
            module.forward = functools.partial(self.forward, number, module.forward)

    def forward(self, number: int, original: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if number == 0:
            self.there = {} if args or kwargs else self.together(x)
            self.input = x if self.there else None  # held no longer than the others ask for it
        if x is not self.input or number not in self.there:
            return original(x, *args, **kwargs)
        out = self.there.pop(number)
        if not self.there:
            self.input = None
        return out

    def together(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        found = [parts(module) for module in self.modules]
        if any(linear is None or linear.weight.requires_grad for linear in found) or all(linear.a is None for linear in found):
            return {}
        cast = [_in_type(linear, x) for linear in found]
        if any(pair is None for pair in cast):
            return {}
        inputs = cast[0][0]
        linears = [linear for _, linear in cast]
        return dict(enumerate(LoraLinears.apply(inputs, inputs, _recipe(inputs), tuple(linear.scale for linear in linears), *(t for linear in linears for t in linear[:4]))))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., features] -> [N, features]"""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])


# ----------------------------------------------------------------------------------------------------------- gated MLP


def _gated_forward(module: nn.Module, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    linears = [parts(child) for child in (module.gate_proj, module.up_proj, module.down_proj)]
    if any(found is None or found.bias is not None for found in linears) or not _plain(module.act_fn):
        return original(x)
    cast = [_in_type(found, x) for found in linears]
    if any(pair is None for pair in cast):
        return original(x)
    gate, up, down = (linear for _, linear in cast)
    return GatedMlp.apply(cast[0][0], _recipe(cast[0][0]), ACTIVATIONS[type(module.act_fn).__name__], (gate.scale, up.scale, down.scale),
                          *(tensor for linear in (gate, up, down) for tensor in (linear.weight, linear.a, linear.b)))


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) over linears with or without LoRA (Shazeer 2020, arXiv:2002.05202): x [..., hidden] -> [..., hidden].

    Kept for the backward pass: x or the recipe by which it was made, gate and up, and what is as narrow as a rank.
    """

    @staticmethod
    def forward(ctx, x, recipe, act, scales, *weights):
        flat = _rows(x)
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = weights[:3], weights[3:6], weights[6:]
        stacked, (of_gate, of_up) = _stack([ag, au])
        inner = None if stacked is None else flat @ stacked.t()
        gate, up = flat @ wg.t(), flat @ wu.t()
        for out, part, b, scale in ((gate, of_gate, bg, scales[0]), (up, of_up, bu, scales[1])):
            if part is not None:
                out.addmm_(inner[:, part], b.t(), alpha=scale)
        active = _activated(act, gate, up)
        out = active @ wd.t()
        down_inner = None
        if ad is not None:
            down_inner = active @ ad.t()
            out.addmm_(down_inner, bd.t(), alpha=scales[2])
        ctx.eps, kept = _kept(x, recipe)
        ctx.save_for_backward(*kept, gate, up, stacked, inner, down_inner, *weights)
        ctx.act, ctx.scales, ctx.parts = act, scales, (of_gate, of_up)
        return out.view(x.shape[:-1] + out.shape[-1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        made_of, norm, gate, up, stacked, inner, down_inner, *weights = ctx.saved_tensors
        (wg, _, bg), (wu, _, bu), (wd, ad, bd) = weights[:3], weights[3:6], weights[6:]
        shape, grad = grad.shape, _rows(grad)
        trained = [ctx.needs_input_grad[4 + 3 * i] for i in range(3)]
        d_active = grad @ wd
        d_down = None if ad is None else _narrow([grad], [bd], ctx.scales[2:])
        if ad is not None:
            d_active.addmm_(d_down, ad)
        active, d_gate, d_up = _activated_back(ctx.act, d_active, gate, up)
        of_down = (grad.t() @ active if trained[2] else None, *_update_gradients(grad, active, d_down, down_inner, ctx.scales[2]))
        del active
        both = [d_gate, d_up]
        x = _rows(_again(made_of, norm, ctx.eps))
        narrow = None if stacked is None else _narrow(both, [bg, bu], ctx.scales[:2])
        d_stacked = None if stacked is None else narrow.t() @ x
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.addmm(d_gate @ wg, d_up, wu)
            if stacked is not None:
                d_x.addmm_(narrow, stacked)
            d_x = d_x.view(shape[:-1] + x.shape[-1:])
        of_both: list[torch.Tensor | None] = []
        for d, part, scale, is_trained in zip(both, ctx.parts, ctx.scales[:2], trained[:2], strict=True):
            of_both.append(d.t() @ x if is_trained else None)
            of_both += [None, None] if part is None else [d_stacked[part], _of_b(d, inner[:, part], scale)]
        return d_x, None, None, None, *of_both, *of_down


def _activated(act: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up, [N, intermediate] each"""
    if act.of is F.silu and elementwise.takes(gate, up):
        return elementwise.silu_times_up(gate, up)
    inner = torch.empty_like(gate)
    for part in _chunks(gate):
        torch.mul(act.of(gate[part]), up[part], out=inner[part])
    return inner


def _activated_back(act: Activation, d: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(act(gate) * up, the gradient of gate, that of up) from d, the product's, which is overwritten."""
    if act.of is F.silu and elementwise.takes(d, gate, up):
        return elementwise.silu_times_up_back(d, gate, up)
    inner, d_gate = torch.empty_like(gate), torch.empty_like(gate)
    for part in _chunks(gate):
        active = act.of(gate[part])
        torch.mul(active, up[part], out=inner[part])
        d_gate[part] = act.gradient(d[part] * up[part], gate[part])
        d[part].mul_(active)
    return inner, d_gate, d


def _update_gradients(grad, x, narrow, inner, scale: float) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(of a, of b), None where there are none. narrow = scale grad b, inner = x a^T, [N, rank] each."""
    return (None, None) if narrow is None else (narrow.t() @ x, _of_b(grad, inner, scale))


def _of_b(grad: torch.Tensor, inner: torch.Tensor, scale: float) -> torch.Tensor:
    """scale grad^T inner: [N, out], [N, rank] -> [out, rank]. The wide matrix stands right, where no library wants it transposed."""
    return torch.mul((inner.t() @ grad).t(), scale, out=grad.new_empty(grad.shape[1], inner.shape[1]))


def _chunks(x: torch.Tensor) -> list[slice]:
    step = ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + step) for start in range(0, len(x), step)]


# ---------------------------------------------------------------------------------------------------------------- norm


def _norm_forward(module: nn.Module, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    if module.weight.dtype is not x.dtype or not _plain(module):
        return original(x)
    out = RmsNorm.apply(x, module.weight, module.variance_epsilon)
    out.recipe = Recipe(x.detach(), module.weight, module.variance_epsilon)
    return out


class Recipe(NamedTuple):
    """How a norm's output was made: whoever keeps it for the backward pass may keep these, which are kept anyway."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float


def _recipe(x: torch.Tensor) -> Recipe | None:
    return getattr(x, "recipe", None)


def _kept(x: torch.Tensor, recipe: Recipe | None) -> tuple[float, tuple[torch.Tensor, torch.Tensor | None]]:
    """(eps, (x, None) as it is, or what the norm was given and its weight)"""
    return (0.0, (x, None)) if recipe is None else (recipe.eps, (recipe.x, recipe.weight.detach()))


def _again(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else _normed(x, weight, eps)[0]


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * x / rms(x), 1 / rms(x) [N, 1] in float32 at least)"""
    flat = _rows(x)
    if elementwise.takes(flat, weight):
        out, factors = elementwise.norm(flat, weight, eps)
        return out.view(x.shape), factors
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = flat.new_empty(len(flat), 1, dtype=wide)
    for part in _chunks(flat):
        length = torch.linalg.vector_norm(flat[part], dim=-1, keepdim=True, dtype=wide)
        torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps), out=factors[part])
        torch.mul((flat[part] * factors[part]).to(x.dtype), weight, out=_rows(out)[part])
    return out, factors


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467), over the last dimension.

    The mean is taken, and x divided, in float32 at least, then rounded to x's type, as transformers does.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, factors = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, factors = ctx.saved_tensors
        flat, given = _rows(x), _rows(grad)
        if not ctx.needs_input_grad[1] and elementwise.takes(given, flat, weight):
            return elementwise.norm_back(given, flat, weight, factors).view(x.shape), None, None
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.zeros_like(weight, dtype=factors.dtype) if ctx.needs_input_grad[1] else None
        for part in _chunks(flat):
            normed = flat[part] * factors[part]
            d = given[part] * weight.to(factors.dtype)
            share = torch.linalg.vecdot(d, normed).div_(x.shape[-1])[:, None]
            if d_weight is not None:
                d_weight += (given[part] * normed).sum(0)
            _rows(d_x)[part] = d.sub_(normed.mul_(share)).mul_(factors[part])
        return d_x if ctx.needs_input_grad[0] else None, None if d_weight is None else d_weight.to(weight.dtype), None


# -------------------------------------------------------------------------------------------------------------- rotary


def _rotate_by_ours(modeling: Any) -> None:
    """Let a file of transformers turn queries and keys by `Rotated`, where it can. No layer holds this function: it is replaced where
    it stands, once, for all models of this file."""
    original = modeling.apply_rotary_pos_emb
    if hasattr(original, "by_weitiao"):
        return

    @functools.wraps(original)
    def apply_rotary_pos_emb(query, key, cos, sin, *args, **kwargs):
        if args or kwargs or not (elementwise.rotates(query, cos, sin) and elementwise.rotates(key, cos, sin)):
            return original(query, key, cos, sin, *args, **kwargs)
        return Rotated.apply(query, cos, sin), Rotated.apply(key, cos, sin)

    apply_rotary_pos_emb.by_weitiao = True
    modeling.apply_rotary_pos_emb = apply_rotary_pos_emb


class Rotated(torch.autograd.Function):
    """`elementwise.rotate` and its gradient, which turns back. cos and sin are not learned."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return elementwise.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return elementwise.rotate(grad if grad.stride(-1) == 1 else grad.contiguous(), cos, sin, back=True), None, None
