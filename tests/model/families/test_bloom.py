"""Bloom on a trie: its ALiBi by depth, against transformers' own on plain rows."""

import numpy as np
import pytest
import torch
from conftest import example, tiny_model

from weitiao.data.batch import trie_batch
from weitiao.model.families.bloom import slopes, with_alibi
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import prove
from weitiao.trie import build


def plain_alibi(query, key, value, slope, scale):
    """The definition, on one plain row: softmax(q k scale + slope (place(k) - place(q))) v, float64."""
    t = torch.arange(query.shape[2])
    scores = query.double() @ key.double().transpose(-1, -2) * scale + slope.double()[None, :, None, None] * (t[None] - t[:, None])
    return scores.masked_fill(t[None] > t[:, None], -torch.inf).softmax(-1) @ value.double()


@pytest.mark.parametrize("heads", [4, 6])
def test_the_slopes_of_a_power_of_two_and_of_another_number(heads):
    expected = {4: [2**-2, 2**-4, 2**-6, 2**-8], 6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]}[heads]
    assert slopes(heads, "cpu").tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "length", "most"), [
    (torch.float64, 300, 1e-12), (torch.float32, 300, 1e-5), (torch.float32, 2000, 1e-4), (torch.bfloat16, 2000, 0.02)])
def test_one_plain_row_is_the_definition_however_long(dtype, length, most):
    """In bf16 the result is rounded, the bias is not: transformers' drifts by 4.0 at this length."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, length, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    plan = trie_batch(build([example(np.arange(4, 4 + length), 1)]))["trie"]
    out = with_alibi(query, key, value, plan, slopes(4, "cpu")).transpose(1, 2)
    assert float((out.double() - plain_alibi(query, key, value, slopes(4, "cpu"), 8**-0.5)).abs().max()) < most
    assert out.dtype is dtype


def test_a_trie_of_one_row_is_transformers_bloom_and_without_a_trie_nothing_changes():
    ids = torch.randint(4, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    model = tiny_model("bloom").double().eval()
    learn_on_tries(model)
    plain = type(model)(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        theirs = plain.transformer(ids).last_hidden_state[0]
        ours = model(**trie_batch(build([example(ids[0].numpy(), 1)])), return_hidden=True)
        assert float((ours - theirs).abs().max()) < 1e-6
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("heads", [4, 8])
def test_it_is_proven_as_others_are_and_a_place_that_is_off_is_caught(branching, heads, monkeypatch):
    model = tiny_model("bloom", n_head=heads)
    learn_on_tries(model)
    proof = prove(model, branching, torch.float32)
    assert proof.passed and proof.leak_max == 0.0, proof.reason

    from dataclasses import replace

    from weitiao.model.families import bloom

    real = bloom.with_alibi
    monkeypatch.setattr(bloom, "with_alibi", lambda q, k, v, plan, *more: real(
        q, k, v, replace(plan, depth=torch.arange(len(plan.depth))), *more))
    wrong = prove(model, branching, torch.float32)
    assert not wrong.passed and wrong.leak_max == 0.0 and "plain rows'" in wrong.reason


def test_dropout_takes_the_other_way_and_at_zero_both_agree():
    g = torch.Generator().manual_seed(0)
    plan = trie_batch(build([example(range(4, 20), 1), example([4, 5, 6, *range(30, 40)], 1)]))["trie"]
    query, key, value = (torch.randn(1, 4, len(plan.depth), 8, generator=g) for _ in range(3))
    by_keys = with_alibi(query, key, value, plan, slopes(4, "cpu"))
    by_paths = with_alibi(query, key, value, plan, slopes(4, "cpu"), dropout=1e-12)
    assert float((by_keys - by_paths).abs().max()) < 1e-5
