"""What a decoder layer computes, in fewer passes over memory: LoRA's linears, gated MLPs, RMS norms, rotary positions.

On a CPU half of a step's time goes into reading and writing what products leave behind: copies between types, a scaled
update beside a product and their sum, an activation and what it is multiplied with. Here each of these three is one
function with its gradient written out, so that

    an update is added by the product itself          y = x W^T, then y += scale (x A^T) B^T in place
    nothing is copied to another type per linear      the input is cast once, A and B each time: they are small
    what is cheap is computed again, not kept         of an MLP its input, gate and up stay; of a norm its input

`fuse(model)` puts them into an instance; parameters, names and files stay those of transformers and PEFT. A module that
holds or does anything more (a bias in an MLP, DoRA, 8 or 4 bits, a hook, a second adapter) computes as it did. On a CPU
with a compiler the elementwise part is one pass over memory (`elementwise`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
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


def _put(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    if "forward" not in vars(module):  # something else has put its own there, and goes before
        module.forward = functools.partial(forward, module, module.forward)


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
    return LoraLinear.apply(inputs, module.lora_dropout[name](inputs), *linear)


class LoraLinear(torch.autograd.Function):
    """x weight^T + bias + scale (dropped a^T) b^T: x and dropped [..., in] -> [..., out]. The weight is frozen.

    dropped is x after dropout; the very same tensor where there is none.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):
        out = F.linear(x, weight, bias)
        inner = F.linear(dropped, a)
        _rows(out).addmm_(_rows(inner), b.t(), alpha=scale)
        ctx.save_for_backward(dropped, inner, weight, a, b)
        ctx.scale, ctx.same = scale, dropped is x
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dropped, inner, weight, a, b = ctx.saved_tensors
        shape, grad = dropped.shape, _rows(grad)
        d_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        d_inner = grad @ b
        d_b = (grad.t() @ _rows(inner)).mul_(ctx.scale)
        d_a = (d_inner.t() @ _rows(dropped)).mul_(ctx.scale)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = grad @ weight
            if ctx.same:
                d_x.addmm_(d_inner, a, alpha=ctx.scale)
            d_x = d_x.view(shape)
        if ctx.needs_input_grad[1] and not ctx.same:
            d_dropped = (d_inner @ a).mul_(ctx.scale).view(shape)
        return d_x, d_dropped, None, d_bias, d_a, d_b, None


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
    return GatedMlp.apply(cast[0][0], ACTIVATIONS[type(module.act_fn).__name__], (gate.scale, up.scale, down.scale),
                          *(tensor for linear in (gate, up, down) for tensor in (linear.weight, linear.a, linear.b)))


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) over linears with or without LoRA (Shazeer 2020, arXiv:2002.05202): x [..., hidden] -> [..., hidden].

    Kept for the backward pass: x, gate and up, and what is as narrow as a rank.
    """

    @staticmethod
    def forward(ctx, x, act, scales, *weights):
        flat = _rows(x)
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = weights[:3], weights[3:6], weights[6:]
        gate, gate_inner = _project(flat, wg, ag, bg, scales[0])
        up, up_inner = _project(flat, wu, au, bu, scales[1])
        inner = _activated(act, gate, up)
        out, down_inner = _project(inner, wd, ad, bd, scales[2])
        ctx.save_for_backward(flat, gate, up, gate_inner, up_inner, down_inner, *weights)
        ctx.act, ctx.scales = act, scales
        return out.view(x.shape[:-1] + out.shape[-1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate, up, gate_inner, up_inner, down_inner, *weights = ctx.saved_tensors
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = weights[:3], weights[3:6], weights[6:]
        shape, grad = grad.shape, _rows(grad)
        trains = [ctx.needs_input_grad[3 + 3 * i] for i in range(3)]
        d_inner = grad @ wd
        d_down = None if ad is None else grad @ bd
        if ad is not None:
            d_inner.addmm_(d_down, ad, alpha=ctx.scales[2])
        inner, d_gate, d_up = _activated_back(ctx.act, d_inner, gate, up)
        gradients = _weight_gradients(grad, inner, d_down, down_inner, ctx.scales[2], trains[2])
        del inner
        d_x = None
        both: list[tuple] = []
        for d, weight, a, b, kept, scale, trained in (
            (d_gate, wg, ag, bg, gate_inner, ctx.scales[0], trains[0]), (d_up, wu, au, bu, up_inner, ctx.scales[1], trains[1]),
        ):
            narrow = None if a is None else d @ b
            both.append(_weight_gradients(d, x, narrow, kept, scale, trained))
            if ctx.needs_input_grad[0]:
                d_x = d @ weight if d_x is None else d_x.addmm_(d, weight)
                if a is not None:
                    d_x.addmm_(narrow, a, alpha=scale)
        return d_x if d_x is None else d_x.view(shape[:-1] + x.shape[-1:]), None, None, *both[0], *both[1], *gradients


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


def _project(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> tuple:
    """(x weight^T + scale (x a^T) b^T, x a^T): x [N, in] -> [N, out], [N, rank] or None"""
    out = x @ weight.t()
    if a is None:
        return out, None
    inner = x @ a.t()
    return out.addmm_(inner, b.t(), alpha=scale), inner


def _weight_gradients(grad, x, narrow, inner, scale: float, trained: bool) -> tuple:
    """(of the weight, of a, of b), None for what is not trained. narrow = grad b, inner = x a^T, [N, rank] each."""
    if narrow is None:
        return grad.t() @ x if trained else None, None, None
    return None, (narrow.t() @ x).mul_(scale), (grad.t() @ inner).mul_(scale)


def _chunks(x: torch.Tensor) -> list[slice]:
    step = ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + step) for start in range(0, len(x), step)]


# ---------------------------------------------------------------------------------------------------------------- norm


def _norm_forward(module: nn.Module, original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    if module.weight.dtype is not x.dtype or not _plain(module):
        return original(x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467), over the last dimension.

    The mean is taken, and x divided, in float32 at least, then rounded to x's type, as transformers does.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = _rows(x)
        if elementwise.takes(flat, weight):
            out, factors = elementwise.norm(flat, weight, eps)
            ctx.save_for_backward(x, weight, factors)
            return out.view(x.shape)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide = torch.promote_types(x.dtype, torch.float32)
        factors = flat.new_empty(len(flat), 1, dtype=wide)
        for part in _chunks(flat):
            length = torch.linalg.vector_norm(flat[part], dim=-1, keepdim=True, dtype=wide)
            torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps), out=factors[part])
            torch.mul((flat[part] * factors[part]).to(x.dtype), weight, out=_rows(out)[part])
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
