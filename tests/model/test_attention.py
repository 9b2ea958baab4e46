"""Three ways to attend over a trie, and one judge: the dense mask."""

from __future__ import annotations

import pytest
import torch

from weitiao.data.batch import trie_batch
from weitiao.model import attention
from weitiao.model.attention import ByKeys, TrieUnsupported, by_paths, dense, trie_attention
from weitiao.trie import build


@pytest.fixture
def plan(branching):
    return trie_batch(build(branching))["trie"]


def tensors(plan, dtype=torch.float64, heads=4, kv_heads=2, d=8):
    torch.manual_seed(0)
    nodes = len(plan.depth)
    shapes = [(1, heads, nodes, d), (1, kv_heads, nodes, d), (1, kv_heads, nodes, d)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(function, inputs, cotangent):
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, cotangent)
    return [out.detach(), *grads]


def test_by_keys_equals_the_dense_mask_in_float64(plan):
    inputs = tensors(plan)
    cotangent = torch.randn_like(inputs[0])
    judged = with_gradients(lambda q, k, v: ByKeys.apply(q, k, v, plan.segments, 0.3), inputs, cotangent)
    judge = with_gradients(lambda q, k, v: dense(q, k, v, plan, 0.3), inputs, cotangent)
    for ours, theirs in zip(judged, judge, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_by_paths_equals_the_dense_mask_under_any_window(plan, window):
    inputs = tensors(plan)
    cotangent = torch.randn_like(inputs[0])
    judged = with_gradients(lambda q, k, v: by_paths(q, k, v, plan, 0.3, window), inputs, cotangent)
    judge = with_gradients(lambda q, k, v: dense(q, k, v, plan, 0.3, window), inputs, cotangent)
    for ours, theirs in zip(judged, judge, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_by_keys_in_bf16_is_as_close_as_bf16_allows(plan):
    inputs = tensors(plan, torch.bfloat16)
    exact = dense(*(x.double() for x in inputs), plan, 0.3)
    ours = ByKeys.apply(*inputs, plan.segments, 0.3)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() < 0.02


def test_without_a_plan_it_is_sdpa_to_the_letter(plan):
    query, key, value = tensors(plan, torch.float32, heads=4, kv_heads=4)
    module = torch.nn.Module()
    module.is_causal = True
    ours, _ = trie_attention(module, query, key, value, None, scaling=0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    assert torch.equal(ours, theirs.transpose(1, 2))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_changes_the_scores_is_refused_by_name(plan, name):
    with pytest.raises(TrieUnsupported, match=name):
        trie_attention(torch.nn.Module(), *tensors(plan), None, trie=plan, **{name: 1.0})


def test_dropout_is_honoured_and_leaves_the_mean(plan):
    torch.manual_seed(0)
    query, key, value = tensors(plan)
    draws = torch.stack([trie_attention(torch.nn.Module(), query, key, value, None, dropout=0.2, scaling=0.3, trie=plan)[0]
                         for _ in range(400)])
    exact = dense(query, key, value, plan, 0.3).transpose(1, 2)
    assert draws.std(0).max() > 0.05
    assert (draws.mean(0) - exact).abs().max() < 0.3


def test_it_is_registered_in_transformers():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention.register()
    assert ALL_ATTENTION_FUNCTIONS[name] is trie_attention
    assert name in ALL_MASK_ATTENTION_FUNCTIONS
