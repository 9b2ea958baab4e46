"""A GPU's ways to attend, on a CPU: FlexAttention's masks and torch's own judge of its kernel; the flash kernel's two calls with a
plain kernel in its place. What only a GPU can tell, that the kernels run there, is asked of a GPU."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention

from tests.conftest import example, tiny_model
from weitiao.data.batch import trie_batch
from weitiao.model import attention, flex, gpu, varlen
from weitiao.model.attention import dense
from weitiao.trie import build

CPU = torch.device("cpu")


def plan_of(rows):
    return trie_batch(build(rows))["trie"]


def random_plan(seed: int):
    """Rows that leave each other anywhere along a long prefix, some nested, some apart; 100 to 1,000 nodes."""
    rng = np.random.default_rng(seed)
    prefix, rows = rng.integers(4, 60, 300), []
    for i in range(rng.integers(2, 9)):
        shared = rng.integers(0, 301)
        middle = prefix[:shared] if rng.random() < 0.8 else rng.integers(4, 8, rng.integers(1, 5))
        rows.append(example([*middle, *rng.integers(4, 7, rng.integers(2, 120))], 1, i))
    return plan_of(rows)


def tensors(plan, prefix=0, dtype=torch.float64, heads=4, kv_heads=2, width=16):
    torch.manual_seed(0)
    nodes = len(plan.depth)
    return [torch.randn(1, count, places, width, dtype=dtype, requires_grad=True)
            for count, places in ((heads, nodes), (kv_heads, prefix + nodes), (kv_heads, prefix + nodes))]


def with_gradients(function, inputs):
    torch.manual_seed(1)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype).to(out.device))]


def largest_difference(ours, theirs, inputs):
    return max(float((a - b).abs().max()) for a, b in zip(with_gradients(ours, inputs), with_gradients(theirs, inputs), strict=True))


@pytest.fixture
def backward_on_a_cpu(monkeypatch):
    """Told not to refuse: outside of a compiler it is plain matrix products, whose gradients are right."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


# ------------------------------------------------------------------------------------------------------ FlexAttention


@pytest.mark.parametrize("window", [None, 1, 7, 130])
@pytest.mark.parametrize("prefix", [0, 5, 128, 200])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(prefix, window):
    """Under a window some are called partly seen of which nothing is, and none is missing."""
    for seed in range(12):
        plan = random_plan(seed)
        ours = flex.block_mask(plan, prefix, window, CPU)
        judge = flex_attention.create_block_mask(ours.mask_mod, 1, 1, len(plan.depth), prefix + len(plan.depth), device="cpu")
        (whole, partly), (whole_there, partly_there) = ((dense_of(m.full_kv_num_blocks, m.full_kv_indices), dense_of(m.kv_num_blocks, m.kv_indices))
                                                        for m in (ours, judge))
        if window is None:
            assert (whole == whole_there).all() and (partly == partly_there).all()
            for name in ("q_num_blocks", "full_q_num_blocks"):
                assert torch.equal(getattr(ours, name), getattr(judge, name))
        else:
            assert not (whole & ~whole_there).any()
            assert not ((whole_there | partly_there) & ~(whole | partly)).any()


def dense_of(counts: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    listed = np.zeros(indices.shape[2:], bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        listed[row, indices[0, 0, row, :count].numpy()] = True
    return listed


def test_the_mask_is_the_definition():
    for seed in range(6):
        plan = random_plan(seed)
        limits = flex.bounds(plan, 3, 9)
        assert limits.end[3:].tolist() == plan.subtree_end.tolist()
        assert limits.place.tolist() == (plan.depth + 3).tolist()
        q, k = torch.meshgrid(torch.arange(len(plan.depth)), torch.arange(len(plan.depth)), indexing="ij")
        sees = (k <= q) & (q < plan.subtree_end[k]) & (plan.depth[q] - plan.depth[k] < 9)
        assert torch.equal(flex.block_mask(plan, 0, 9, CPU).mask_mod(0, 0, q, k), sees)


@pytest.mark.parametrize(("prefix", "window"), [(0, None), (0, 7), (5, None), (5, 7)])
def test_flex_equals_the_dense_mask(branching, backward_on_a_cpu, prefix, window):
    for plan in (plan_of(branching), random_plan(1), random_plan(2)):
        inputs = tensors(plan, prefix)
        assert largest_difference(lambda q, k, v: flex.attend(q, k, v, plan, 0.3, window), lambda q, k, v: dense(q, k, v, plan, 0.3, window),
                                  inputs) < 1e-12


def test_a_pass_makes_its_mask_once_and_a_prompt_before_it_another(branching):
    plan = plan_of(branching)
    assert flex.block_mask(plan, 0, None, CPU) is flex.block_mask(plan, 0, None, CPU)
    assert flex.block_mask(plan, 0, 5, CPU) is not flex.block_mask(plan, 0, None, CPU)
    under = plan.under(3)
    assert flex.block_mask(under, 0, None, CPU).seq_lengths == (len(plan.depth) + 3,) * 2
    assert flex.bounds(under, 0).end.tolist() == under.subtree_end.tolist()


def test_one_kernel_serves_passes_of_every_length(backward_on_a_cpu):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    kernel = torch.compile(flex_attention.flex_attention, backend=counter, dynamic=True, fullgraph=True)
    plans = [plan for plan in map(random_plan, range(12)) if len(plan.depth) > flex.BLOCK]
    assert len({len(plan.depth) for plan in plans}) > 5
    for plan in plans:
        query, key, value = tensors(plan, dtype=torch.float32, heads=12, kv_heads=3)
        mask = flex.block_mask(plan, 0, None, CPU)
        out = kernel(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
        assert (out - dense(query, key, value, plan, 0.3)).abs().max() < 1e-5
    assert counter.frame_count == 1


# -------------------------------------------------------------------------------------------------- two calls of flash


class Plain:
    """The kernel's contract, spelled out: one row after the other, with the log-sum-exp that it is given."""

    @staticmethod
    def forward(query, key, value, cu_q, cu_k, most_q, most_k, causal, scale):
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
        for q, k in Plain.rows(cu_q, cu_k, most_q, most_k):
            scores = Plain.scores(query[q], key[k], causal, scale)
            lse[:, q] = scores.logsumexp(-1)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), Plain.grouped(value[k], query))
        return out, lse

    @staticmethod
    def backward(grad, query, key, value, out, lse, cu_q, cu_k, most_q, most_k, causal, scale):
        assert all(tensor.is_contiguous() for tensor in (grad, out, lse))
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        for q, k in Plain.rows(cu_q, cu_k, most_q, most_k):
            weights = (Plain.scores(query[q], key[k], causal, scale) - lse[:, q, None]).exp()
            delta = (grad[q] * out[q]).sum(-1).T[..., None]
            d_scores = weights * (torch.einsum("qhd,khd->hqk", grad[q], Plain.grouped(value[k], query)) - delta) * scale
            d_query[q] = torch.einsum("hqk,khd->qhd", d_scores, Plain.grouped(key[k], query))
            d_key[k] = torch.einsum("hqk,qhd->khd", d_scores, query[q]).unflatten(1, (key.shape[1], -1)).sum(2)
            d_value[k] = torch.einsum("hqk,qhd->khd", weights, grad[q]).unflatten(1, (key.shape[1], -1)).sum(2)
        return d_query, d_key, d_value

    @staticmethod
    def rows(cu_q, cu_k, most_q, most_k):
        rows = [(slice(*q), slice(*k)) for q, k in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True)]
        assert max(q.stop - q.start for q, _ in rows) == most_q and max(k.stop - k.start for _, k in rows) == most_k
        return rows

    @staticmethod
    def scores(query, key, causal, scale):
        scores = torch.einsum("qhd,khd->hqk", query, Plain.grouped(key, query)) * scale
        return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -math.inf) if causal else scores

    @staticmethod
    def grouped(key, query):
        return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@pytest.mark.parametrize("prefix", [0, 5])
def test_two_calls_equal_the_dense_mask(branching, prefix):
    for plan in (plan_of(branching), *map(random_plan, range(8))):
        assert largest_difference(lambda q, k, v: varlen.attend(q, k, v, plan, 0.3, None, Plain), lambda q, k, v: dense(q, k, v, plan, 0.3),
                                  tensors(plan, prefix)) < 1e-12


def test_each_level_meets_a_node_once(branching):
    plan = plan_of(branching)
    calls = varlen.calls(plan, 2, CPU)
    assert len(calls.levels) == 4  # the prefix, the first tokens of most rows, the next of some, and inside the answer
    assert sum(level.stop - level.start for level in calls.levels) == len(calls.queries)
    for level in calls.levels:
        assert len(calls.queries[level].unique()) == level.stop - level.start
    assert len(calls.keys.unique()) == len(calls.keys)
    assert varlen.calls(plan, 2, CPU) is calls


def test_what_the_flash_kernel_takes():
    def heads(dtype, width):
        return torch.empty(1, 4, 9, width, dtype=dtype)

    assert varlen.takes(heads(torch.bfloat16, 128), heads(torch.bfloat16, 128), None)
    assert not varlen.takes(heads(torch.bfloat16, 128), heads(torch.bfloat16, 128), 5)
    assert not varlen.takes(heads(torch.float32, 128), heads(torch.float32, 128), None)
    assert not varlen.takes(heads(torch.bfloat16, 20), heads(torch.bfloat16, 20), None)


# -------------------------------------------------------------------------------------------------------- which of them


def test_a_plan_without_a_gpu_keeps_what_the_kernel_would(branching):
    plan = plan_of(branching)
    query, key, value = tensors(plan, dtype=torch.bfloat16)
    with attention.as_on("cuda"):
        out = attention.attend_within(query, key, value, plan, 0.3, 5, 0.0)
        assert out.shape == query.shape and type(out.grad_fn).__name__ == "KeptBackward"
        assert [g.shape for g in torch.autograd.grad(out.sum(), (query, key, value))] == [query.shape, key.shape, value.shape]
        noisy = attention.attend_within(query, key, value, plan, 0.3, None, 0.5)  # by paths
        assert type(noisy.grad_fn).__name__ != "KeptBackward" and noisy.isfinite().all()


def test_a_way_that_does_not_run_is_told_once_and_left(monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no triton here\nand a page of trace")

    gpu.works.cache_clear()
    monkeypatch.setattr(flex, "attend", fails)
    with pytest.warns(UserWarning, match="flex does not run on this GPU: no triton here. Another way"):
        assert not gpu.works("flex", CPU, torch.float32, 4, 2, 16, 16)
    assert not gpu.works("flex", CPU, torch.float32, 4, 2, 16, 16)
    gpu.works.cache_clear()


def test_a_way_that_runs_leaves_noise_and_checkpoints_alone(backward_on_a_cpu):
    gpu.works.cache_clear()
    saved = []
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        assert gpu.works("flex", CPU, torch.float32, 4, 2, 16, 16)
    assert not saved and torch.equal(before, torch.random.get_rng_state())
    gpu.works.cache_clear()


def test_a_model_that_attends_by_flex_passes_the_proof(branching, backward_on_a_cpu, monkeypatch):
    """The whole way through a model: gemma3's windows in some layers and none in others."""
    from weitiao.train.loss import learn_on_tries
    from weitiao.train.proof import prove

    taken = []
    monkeypatch.setattr(attention, "attend_within", lambda q, k, v, plan, scale, window, dropout: taken.append(window) or flex.attend(q, k, v, plan, scale, window))
    model = tiny_model("gemma3").double()
    learn_on_tries(model)
    proof = prove(model, branching, torch.float64)
    assert proof.passed and proof.leak_max == 0 and proof.grad_rel_max < 1e-6
    assert {None, 4} == set(taken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels run on a GPU")
@pytest.mark.parametrize("name", gpu.WAYS)
def test_on_a_gpu_each_way_is_as_exact_as_bf16_allows(name):
    for seed in range(4):
        plan = random_plan(seed)
        inputs = [tensor.detach().cuda().requires_grad_() for tensor in tensors(plan, dtype=torch.bfloat16, width=64)]
        there = replace(plan, **{f.name: getattr(plan, f.name).cuda() for f in fields(plan) if isinstance(getattr(plan, f.name), torch.Tensor)})
        ours = with_gradients(lambda q, k, v: gpu.WAYS[name].attend(q, k, v, there, 0.125, None), inputs)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        theirs = with_gradients(lambda q, k, v: dense(q, k, v, there, 0.125), wide)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.double() - b).norm() < 0.02 * b.norm()

