"""Passes behind a prefix that is computed once learn what rows alone do: per architecture and method, in float64."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import example, tiny_model

from weitiao.data.batch import padded_batch
from weitiao.data.packing import parts
from weitiao.model import attention
from weitiao.model.load import virtual_places
from weitiao.model.methods import METHODS
from weitiao.model.stems import Stem, memory_of
from weitiao.settings.methods import LoraSettings, PrefixSettings, PromptSettings
from weitiao.train.evaluation import make_passes, mean_loss, trie_batches
from weitiao.train.loss import learn_on_tries, summed_losses

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "glm", "gpt2", "cohere", "granite", "bloom", "yuan"]


@pytest.fixture(scope="module")
def rows():
    """A prefix that is learned in part, one below it, a third below that, and rows that share nothing."""
    draw = np.random.default_rng(3)
    first, second, third = (draw.integers(4, 60, n) for n in (9, 7, 5))
    made = [example([*first, *draw.integers(60, 200, 8)], 9 - i % 2, i) for i in range(4)]  # every second learns the last of the prefix
    made += [example([*first, *second, *draw.integers(60, 200, 6 + i)], 16, 4 + i) for i in range(3)]
    made += [example([*first, *second, *third, *draw.integers(60, 200, 9)], 21, 7 + i, weight=0.5) for i in range(3)]
    made += [example(draw.integers(200, 280, 8), 1, 10), example(first, 4, 11)]
    return made


def behind_stems(examples, budget, virtual=0):
    found = list(trie_batches(parts(examples, budget, worth=1), "cpu", virtual))
    assert any(memory_of(batch) and memory_of(batch).stem for batch in found)
    return found


def kept_at_most(found) -> int:
    """Nodes whose activations are there at once."""
    above, most = [], 0
    for part in found:
        while above and above[-1].end > part.behind:
            above.pop()
        most = max(most, part.nodes + sum(stem.nodes for stem in above if not stem.again))
        above += [part] if part.end else []
    return most


def gradients(model, batches):
    """(loss, gradient by name)"""
    model.zero_grad()
    total = 0.0
    for loss in summed_losses(model, batches):
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def worst(ours, theirs) -> float:
    floor = 1e-6 * max(g.norm() for g in theirs.values())
    return max(float((ours[name] - g).norm() / max(g.norm(), floor)) for name, g in theirs.items())


def tuned(name, method=None, settings=None):
    model = tiny_model(name)
    learn_on_tries(model)
    model = (METHODS[method].attach(model, settings, seed=0) if method else model).double().train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.1)
    return model


@pytest.mark.parametrize("budget", [7, 16, 30, 38, 60])  # the longest row has 30 tokens
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_rows_one_by_one(name, budget, rows):
    model = tuned(name)
    loss, ours = gradients(model, behind_stems(rows, budget))
    expected, theirs = gradients(model, [padded_batch([row], pad_id=0) for row in rows])
    assert loss == pytest.approx(expected, rel=1e-7)
    assert worst(ours, theirs) < 2e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "yuan", "mistral"])
@pytest.mark.parametrize(("method", "settings"), [
    ("lora", LoraSettings(dropout=0.0)), ("prompt", PromptSettings(init="random", virtual_tokens=5)),
    ("prefix", PrefixSettings(init="random", virtual_tokens=5)), ("prefix", PrefixSettings(init="random", virtual_tokens=5, projection=True)),
])
def test_so_are_those_of_methods_that_put_something_first(name, method, settings, rows):
    model = tuned(name, method, settings)
    theirs = gradients(model, [padded_batch([row], pad_id=0) for row in rows])
    for budget in (11, 38):
        ours = gradients(model, behind_stems(rows, budget, virtual_places(model)))
        assert ours[0] == pytest.approx(theirs[0], rel=1e-7)
        assert worst(ours[1], theirs[1]) < 2e-6


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_way_to_attend_sees_the_stem(name, rows, monkeypatch):
    model = tuned(name)
    expected = gradients(model, behind_stems(rows, 38))
    monkeypatch.setattr(attention, "OWN", {})
    monkeypatch.setattr(attention, "_has_flash_kernel", lambda *_: False)
    found = gradients(model, behind_stems(rows, 38))
    assert found[0] == pytest.approx(expected[0], rel=1e-9) and worst(found[1], expected[1]) < 1e-7


def test_nothing_is_computed_twice_and_every_pass_keeps_to_its_budget(rows):
    model = tuned("llama")
    (whole,) = make_passes(rows, "trie", 10_000, 0, "cpu")
    batches = behind_stems(rows, 38)
    assert sum(batch["input_ids"].numel() for batch in batches) == whole["input_ids"].numel()
    assert kept_at_most(parts(rows, 38, worth=1)) <= 38
    loss, _ = gradients(model, batches)
    assert loss == pytest.approx(gradients(model, [whole])[0], rel=1e-9)


def test_half_precision_sums_what_comes_back_in_float32(rows):
    model = tuned("llama").to(torch.bfloat16)
    stem = Stem(None, 3)
    stem.add("a", torch.ones(2, dtype=torch.bfloat16))
    for _ in range(300):
        stem.add("a", torch.ones(2, dtype=torch.bfloat16))
    assert stem.gradients["a"].tolist() == [301.0, 301.0]  # bfloat16 stands still at 256
    ours = gradients(model, behind_stems(rows, 38))[1]
    exact = gradients(model.double(), [padded_batch([row], pad_id=0) for row in rows])[1]
    norm = sum(float(g.double().norm() ** 2) for g in exact.values()) ** 0.5
    assert sum(float((ours[n].double() - g).norm() ** 2) for n, g in exact.items()) ** 0.5 < 0.03 * norm


@pytest.mark.parametrize("budget", [1, 5, 11, 16, 23, 38])
def test_no_more_than_the_budget_is_kept_at_once_and_rows_of_any_length_go_through(budget, rows):
    model = tuned("llama")
    found = parts(rows, budget, worth=1)
    assert kept_at_most(found) <= budget
    assert any(part.again for part in found) is (budget < 38)
    loss, ours = gradients(model, trie_batches(found, "cpu"))
    expected, theirs = gradients(model, [padded_batch([row], pad_id=0) for row in rows])
    assert loss == pytest.approx(expected, rel=1e-7) and worst(ours, theirs) < 2e-6


def test_what_is_computed_again_drops_out_what_it_did_before(rows):
    """Else keys that passes read would not be those that they are differentiated by: held against small moves of a weight."""
    model = tuned("llama", "lora", LoraSettings(dropout=0.5))
    weight = next(p for name, p in model.named_parameters() if p.requires_grad and "layers.0" in name and "k_proj.lora_A" in name)
    batches = behind_stems(rows, 11)

    def loss() -> float:
        torch.manual_seed(5)
        return gradients(model, batches)[0]

    loss()
    slope, at = weight.grad.clone(), weight.detach().clone()
    direction = torch.sign(slope)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -1e-5):
            weight.copy_(at + step * direction)
            with torch.enable_grad():
                ends.append(loss())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope.abs().sum()), rel=1e-3)


def test_layers_below_the_trained_ones_are_not_gone_back_through(rows, monkeypatch):
    model = tuned("llama")
    for name, p in model.named_parameters():
        p.requires_grad = "layers.1" in name
    came_back = set()
    add = Stem.add
    monkeypatch.setattr(Stem, "add", lambda self, name, gradient: (came_back.add(name[0]), add(self, name, gradient)))
    ours = gradients(model, behind_stems(rows, 11))
    theirs = gradients(model, [padded_batch([row], pad_id=0) for row in rows])
    assert came_back == {1}
    assert ours[0] == pytest.approx(theirs[0], rel=1e-7) and worst(ours[1], theirs[1]) < 2e-6


@pytest.mark.parametrize("broken_off", [False, True])
def test_nothing_stays_of_a_step(broken_off, rows):
    """However it ends: a stem lets go of what it kept."""
    model = tuned("llama")
    batches = behind_stems(rows, 38)
    losses = summed_losses(model, batches)
    next(losses).backward()
    stems = [memory_of(batch).stem for batch in batches if memory_of(batch) and memory_of(batch).stem]
    kept = [weakref.ref(t) for stem in stems for t in stem.kept.values()]
    assert kept
    if broken_off:
        losses.close()
    else:
        for loss in losses:
            loss.backward()
    del losses
    loss = None
    gc.collect()
    assert not any(stem.kept or stem.gradients for stem in stems)
    assert not any(ref() is not None for ref in kept)


def test_frozen_below_a_layer_a_stem_has_nothing_to_go_back_for(rows):
    """With the head alone trained, no key has a gradient."""
    model = tuned("llama")
    for name, p in model.named_parameters():
        p.requires_grad = "lm_head" in name
    ours = gradients(model, behind_stems(rows, 38))
    theirs = gradients(model, [padded_batch([row], pad_id=0) for row in rows])
    assert ours[0] == pytest.approx(theirs[0], rel=1e-7) and worst(ours[1], theirs[1]) < 2e-6


def test_evaluation_goes_on_behind_stems_too(rows, monkeypatch):
    from types import SimpleNamespace

    from weitiao.train import evaluation

    monkeypatch.setattr(evaluation, "WORTH", 1)
    model = tuned("llama")
    stored = [SimpleNamespace(examples=[row]) for row in rows]
    counted = []
    model.register_forward_pre_hook(lambda module, args, more: counted.append(more["input_ids"].numel()), with_kwargs=True)

    def measured(budget, layout="trie"):
        counted.clear()
        return mean_loss(model, stored, layout, budget, 0, "cpu", torch.no_grad), sum(counted)

    (small, nodes), (large, whole), (padded, _) = measured(38), measured(10_000), measured(60, "padded")
    assert small == pytest.approx(large, rel=1e-9) == pytest.approx(padded, rel=1e-7)
    assert nodes == whole
