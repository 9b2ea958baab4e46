"""Elementwise work as this machine's compiler built it, judged by PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from weitiao.model import elementwise

KINDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=list(KINDS), ids=str)
def kind(request):
    if reason := elementwise.trouble():
        pytest.skip(reason)
    return request.param


def drawn(kind, *shape, count=3, size=4.0):
    noise = torch.Generator().manual_seed(0)
    return [(size * torch.randn(shape, generator=noise)).to(kind) for _ in range(count)]


def off(ours, exact) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_silu_times_up_and_its_gradients(kind, rows):
    gate, up, d = drawn(kind, rows, 48)
    exact = [x.double().requires_grad_() for x in (gate, up)]
    product = F.silu(exact[0]) * exact[1]
    judge = [product.detach(), *torch.autograd.grad(product, exact, d.double())]
    assert off([elementwise.silu_times_up(gate, up)], judge[:1]) < KINDS[kind]
    assert off(elementwise.silu_times_up_back(d.clone(), gate, up), judge) < KINDS[kind]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_norm_and_its_gradient(kind, rows):
    x, d = drawn(kind, rows, 48, count=2)
    (weight,) = drawn(kind, 48, count=1)
    exact = x.double().requires_grad_()
    normed = F.rms_norm(exact, (48,), weight.double(), 1e-5)
    out, factors = elementwise.norm(x, weight, 1e-5)
    assert off([out, elementwise.norm_back(d, x, weight, factors)], [normed.detach(), *torch.autograd.grad(normed, exact, d.double())]) < 2 * KINDS[kind]


def test_far_numbers_and_those_that_are_none_stay_so(kind):
    gate = torch.tensor([[0.0, -0.0, 80.0, -80.0, 1e30, -1e30, float("inf"), float("nan"), *[1.0] * 8]]).to(kind)
    ours, theirs = elementwise.silu_times_up(gate, torch.ones_like(gate)), F.silu(gate.double())
    assert bool(ours[0, 7].isnan())
    assert torch.allclose(ours[0, :7].double(), theirs[0, :7], rtol=KINDS[kind], atol=1e-15)


def test_what_it_does_not_compute_is_left_to_pytorch(kind):
    whole = torch.ones(4, 32, dtype=kind)
    assert elementwise.takes(whole, whole)
    assert not elementwise.takes(whole, whole.double())
    assert not elementwise.takes(whole[:, :17])
    assert not elementwise.takes(torch.ones(4, 24, dtype=kind))
    assert not elementwise.takes(torch.ones(32, 4, dtype=kind).t())
    assert not elementwise.takes(torch.ones(4, 32, dtype=torch.float16))


@pytest.mark.parametrize("dense", [True, False])
def test_rotary_positions_and_their_gradient_are_transformers(kind, dense):
    from transformers.models.llama import modeling_llama

    original = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", modeling_llama.apply_rotary_pos_emb)
    query, d = (x.transpose(1, 2) for x in drawn(kind, 1, 9, 3, 64, count=2))
    query = query.contiguous() if dense else query
    cos, sin = drawn(kind, 1, 9, 64, count=2, size=0.5)
    exact = query.double().requires_grad_()
    turned, _ = original(exact, exact, cos.double(), sin.double())
    assert elementwise.rotates(query, cos, sin)
    ours = [elementwise.rotate(query, cos, sin), elementwise.rotate(d, cos, sin, back=True)]
    assert off(ours, [turned.detach(), *torch.autograd.grad(turned, exact, d.double())]) < KINDS[kind]


@pytest.mark.parametrize("words", [16, 5_008])
def test_cross_entropy_and_its_gradient(kind, words):
    (logits,) = drawn(kind, 9, words, count=1)
    targets, weights = torch.randint(words, (9,), generator=torch.Generator().manual_seed(1)), torch.linspace(0, 2, 9)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none") * weights.double()
    (judge,) = torch.autograd.grad(losses.sum(), exact)
    ours = elementwise.cross_entropy(logits, targets, weights)
    assert off([ours], [losses.detach()]) < 1e-6  # bfloat16 logits are exact here, and their sums are not in bfloat16
    assert off([logits], [judge]) < KINDS[kind]


def test_the_first_call_may_be_inside_a_checkpoint(kind):
    """What the trial saves is not the layer's: the recomputed layer, which has no trial, would save less."""
    from torch.utils.checkpoint import checkpoint

    elementwise.trouble.cache_clear()
    x = torch.randn(4, 32, requires_grad=True)

    def layer(x):
        assert elementwise.takes(x.detach())
        return x.sin().cos()

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, -x.detach().sin().sin() * x.detach().cos())


def test_a_logit_that_is_no_number_is_seen_in_the_loss(kind):
    logits = torch.zeros(2, 32, dtype=kind)
    logits[1, 20] = float("nan")
    losses = elementwise.cross_entropy(logits, torch.tensor([1, 1]), torch.ones(2))
    assert bool(losses[0].isfinite()) and bool(losses[1].isnan())
