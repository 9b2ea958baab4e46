"""The loss of a trie is the loss of its rows, and so is every gradient: per architecture, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import example, tiny_model

from weitiao.data.batch import learned_batch, padded_batch, trie_batch
from weitiao.data.packing import padded_passes, trie_passes
from weitiao.train.loss import CHUNK, edge_loss, edge_nll, learn_on_tries, summed_loss
from weitiao.trie import build

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "glm", "gpt2", "cohere", "granite", "yuan"]


def gradients(model, batches):
    """(summed loss, gradient by name)"""
    model.zero_grad()
    total = sum(summed_loss(model, batch) for batch in batches)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def relative(ours, theirs) -> float:
    """|difference| / |gradient|, the worst tensor; a gradient that is 0 by nature (a key's bias) counts against the largest."""
    floor = 1e-6 * max(g.norm() for g in theirs.values())
    return max(float((ours[n] - g).norm() / max(g.norm(), floor)) for n, g in theirs.items())


def in_float64(name: str, **more):
    """A model whose norms and rope compute in float64 too, where its family does not force them to float32."""
    model = tiny_model(name, **more).double().train()
    learn_on_tries(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("budget", [10_000, 25])
@pytest.mark.parametrize("batch_of", [trie_batch, learned_batch])
def test_trie_equals_rows_one_by_one(name, batch_of, budget, branching):
    model = in_float64(name)
    loss, ours = gradients(model, [batch_of(trie) for trie in trie_passes(branching, budget)])
    expected, theirs = gradients(model, [padded_batch([row], pad_id=0) for row in branching])
    assert loss == pytest.approx(expected, rel=1e-7)
    # transformers computes norms and softmax in float32 in most families, so 1e-7 is what rounding leaves of 1e-16
    assert relative(ours, theirs) < 2e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_padded_rows_equal_rows_one_by_one(name, branching):
    model = in_float64(name)
    loss, ours = gradients(model, [padded_batch(rows, pad_id=3) for rows in padded_passes(branching, 60)])
    expected, theirs = gradients(model, [padded_batch([row], pad_id=0) for row in branching])
    assert loss == pytest.approx(expected, rel=1e-7)
    assert relative(ours, theirs) < 2e-6


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_checkpointing_changes_nothing(name, branching):
    model = in_float64(name)
    batches = [trie_batch(trie) for trie in trie_passes(branching, 40)]
    loss, plain = gradients(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = gradients(model, batches)
    assert again == loss
    assert relative(checkpointed, plain) < 1e-12


def test_transformers_own_loss_is_the_judge(branching):
    """A trie of one row, against the loss that transformers computes from labels."""
    model = in_float64("llama")
    row = branching[0]
    ids = torch.from_numpy(row.ids.astype("int64"))[None]
    labels = torch.where(torch.from_numpy(row.weights)[None] > 0, ids, -100)
    expected = model(input_ids=ids, labels=labels).loss.item()
    ours = summed_loss(model, trie_batch(trie_passes([row], 99)[0])).item() / row.weights.sum()
    assert ours == pytest.approx(expected, rel=1e-6)


def test_chunks_of_edges_add_up_to_the_whole():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 20, bias=False).double()
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 20, (37,)), torch.rand(37, dtype=torch.float64)
    results = []
    for chunk in (5, CHUNK):
        loss = edge_loss(hidden, targets, weights, head, lambda x: 3 * torch.tanh(x / 3), chunk)
        results.append((loss.detach(), *torch.autograd.grad(loss * 0.7, [hidden, head.weight])))
    nll = torch.nn.functional.cross_entropy(3 * torch.tanh(head(hidden) / 3), targets, reduction="none")
    plain = (nll * weights).sum()
    results.append((plain.detach(), *torch.autograd.grad(plain * 0.7, [hidden, head.weight])))
    for other in results[:2]:
        for ours, theirs in zip(other, results[2], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_evaluation_needs_no_gradients_and_gives_the_same_loss(branching):
    model = in_float64("llama")
    batch = trie_batch(trie_passes(branching, 999)[0])
    with torch.no_grad():
        silent = summed_loss(model, batch)
    assert not silent.requires_grad
    assert silent.item() == pytest.approx(summed_loss(model, batch).item(), rel=1e-12)
    nll = model(**batch, per_edge=True)
    assert float((nll * batch["trie"].weights).sum()) == pytest.approx(silent.item(), rel=1e-9)


def test_no_edges_no_nll():
    assert len(edge_nll(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.nn.Linear(4, 5), lambda x: x)) == 0


def test_a_model_called_without_a_plan_is_the_model_it_was():
    plain, taught = tiny_model("qwen2"), tiny_model("qwen2")
    learn_on_tries(taught)
    ids = torch.randint(4, 60, (2, 7))
    assert torch.equal(plain(input_ids=ids).logits, taught(input_ids=ids).logits)


def test_a_plain_head_adds_its_chunks_without_a_gradient_of_their_own():
    """Beside the logits of a chunk: the head's gradient once, in all of forward and backward. Same numbers as any other head's."""
    from weitiao.train import loss as module

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 4096, bias=False)
    hidden = torch.randn(12, 8, requires_grad=True)
    targets, weights = torch.randint(0, 4096, (12,)), torch.rand(12)
    found = []
    for plain in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_is_plain_product", lambda *_: plain)
            loss = edge_loss(hidden, targets, weights, head, lambda x: x, 3)
        found.append((loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with torch.profiler.profile(profile_memory=True) as profile:
        edge_loss(hidden, targets, weights, head, lambda x: x, 3).backward()
    held = worst = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            worst = max(worst, held)
    assert 1 <= worst / (4 * head.weight.numel()) < 3  # the gradient, and a chunk's logits with their own gradient: 3 x 4096 each


@pytest.mark.parametrize("checkpointing", [True, False])
def test_casts_of_weights_are_not_kept_and_gradients_are_the_same(checkpointing):
    """bf16 under autocast beside float32 weights, with the cache of casts and without: bit for bit."""
    from weitiao.model.load import checkpoint_activations
    from weitiao.train import loss as module

    model = tiny_model()
    learn_on_tries(model)
    if checkpointing:
        checkpoint_activations(model.train())
    batch = trie_batch(build([example(range(4, 24), 5), example([*range(4, 15), *range(40, 50)], 5, 1)]))
    found, kept = [], []
    seen = lambda *_: kept.append(torch.is_autocast_cache_enabled())  # noqa: E731
    model.model.layers[0].mlp.register_forward_pre_hook(seen)
    for once in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
            if not once:
                patch.setattr(module, "casts_once", contextlib.nullcontext)
            loss = summed_loss(model, batch)
            assert torch.is_autocast_cache_enabled()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept == ([False, False, True, True] if checkpointing else [False, True])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        summed_loss(model, batch)
    assert kept[-1]  # an evaluation uses them again, pass after pass
