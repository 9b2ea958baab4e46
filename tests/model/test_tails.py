"""Keys of a row's own as this machine's compiler built their attention, judged by softmax in float64."""

from __future__ import annotations

import pytest
import torch

from weitiao.model import compiled, tails
from weitiao.model.attention import part


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kind(request):
    if reason := tails.trouble():
        pytest.skip(reason)
    return request.param


def drawn(kind, rows=5, key_heads=2, group=3, width=64, room=200):
    noise = torch.Generator().manual_seed(0)
    query = torch.randn(1, rows, key_heads * group, width, generator=noise).to(kind).transpose(1, 2)  # as a projection leaves it
    keys, values = (torch.randn(rows + 1, key_heads, room, width, generator=noise).to(kind) for _ in range(2))
    last = torch.randint(0, room, (rows,), generator=noise)
    first = (last * torch.rand(rows, generator=noise)).long()
    first[0], last[0], first[1], last[1] = 0, room - 1, 7, 7
    return query, keys, values, first, last


@pytest.mark.parametrize("shape", [{}, {"group": 1}, {"group": 4}, {"group": 9, "key_heads": 1}, {"width": 16}, {"width": 80}, {"width": 128}, {"width": 256},
                                   {"room": 8}, {"room": 64}, {"room": 1000, "rows": 2}, {"rows": 2, "key_heads": 7}], ids=str)
def test_each_row_attends_from_its_first_place_to_its_last(kind, shape):
    query, keys, values, first, last = drawn(kind, **shape)
    out, lse = tails.attend(query, keys, values, first, last, 0.2)
    assert out.dtype is lse.dtype is torch.float32 and out.shape[:3] == lse.shape
    for row in range(len(first)):
        own = slice(int(first[row]), int(last[row]) + 1)
        scores = 0.2 * query[0, :, row].double().unflatten(0, lse.shape[1:]) @ keys[row, :, own].double().transpose(1, 2)
        torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[row].double(), scores.softmax(-1) @ values[row, :, own].double(), rtol=1e-5, atol=1e-5)


def test_the_second_way_gives_the_same(kind):
    query, keys, values, _, last = drawn(kind)
    out, lse = tails.attend(query, keys, values, torch.zeros_like(last), last, 0.2)
    mask = torch.zeros(len(last), 1, 1, 200).masked_fill_(torch.arange(200) > last[:, None, None, None], -1e30)
    heads = query[0].unflatten(0, (2, 3)).permute(2, 0, 1, 3).float()
    theirs = part(heads, keys[:-1].float(), values[:-1].float(), mask, 0.2)
    torch.testing.assert_close(out, theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, theirs[1], rtol=1e-5, atol=1e-5)


def test_scores_far_apart_leave_no_number_behind_that_is_none(kind):
    query, keys, values, first, last = drawn(kind)
    out, lse = tails.attend(10_000 * query, keys, values, first, last, 1.0)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    best = (query[0, :, 0].double().unflatten(0, (2, 3)) @ keys[0].double().transpose(1, 2)).argmax(-1)
    torch.testing.assert_close(out[0], torch.stack([values[0, h, best[h]].float() for h in range(2)]), rtol=1e-3, atol=1e-3)


def test_what_is_no_number_stays_none_in_its_own_row_alone(kind):
    query, keys, values, first, last = drawn(kind)
    values[2, 0, last[2]] = float("nan")
    out, _ = tails.attend(query, keys, values, first, last, 0.2)
    assert bool(out[2, 0].isnan().all()) and bool(out[[0, 1, 3, 4]].isfinite().all()) and bool(out[2, 1].isfinite().all())


def test_nodes_are_put_where_they_belong(kind):
    _, keys, *_ = drawn(kind)
    new = torch.randn(50, 2, 64).to(kind).transpose(0, 1)  # [kv_heads, T, d]
    nodes, rows, at = torch.tensor([3, 49, 3, 0]), torch.tensor([4, 0, 1, 1]), torch.tensor([199, 0, 5, 6])
    expected = keys.clone()
    expected[rows, :, at] = new.transpose(0, 1)[nodes]
    tails.put(keys, new, nodes, rows, at)
    assert torch.equal(keys, expected)
    tails.put(keys, new[:, :3], None, rows[:3], at[:3].int())
    expected[rows[:3], :, at[:3]] = new.transpose(0, 1)[:3]
    assert torch.equal(keys, expected)
    for wrong in ((torch.tensor([50]), rows[:1], at[:1]), (nodes[:1], torch.tensor([6]), at[:1]), (nodes[:1], rows[:1], torch.tensor([200])), (nodes[:1], rows[:1], torch.tensor([-1]))):
        with pytest.raises(IndexError):
            tails.put(keys, new, *wrong)
    assert torch.equal(keys, expected)


def test_one_thread_gives_the_same_bits(kind):
    given = drawn(kind)
    threads = torch.get_num_threads()
    many = tails.attend(*given, 0.2)
    try:
        torch.set_num_threads(1)
        one = tails.attend(*given, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize(("kind_of_keys", "width", "taken"), [
    (torch.float32, 64, True), (torch.bfloat16, 16, True), (torch.float64, 64, False), (torch.float16, 64, False), (torch.float32, 24, False),
])
def test_what_it_does_not_compute_is_left_to_others(kind_of_keys, width, taken):
    if reason := tails.trouble():
        pytest.skip(reason)
    assert tails.takes(torch.zeros(1, 1, 1, width, dtype=kind_of_keys)) is taken


def test_keys_and_values_of_different_width_are_left_to_others():
    assert not tails.takes(torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 16))
    assert not tails.takes(torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 32).bfloat16())


def test_without_a_compiler_it_says_why(monkeypatch):
    def none():
        raise compiled.NotBuilt("No C compiler is here (gcc).")

    monkeypatch.setattr(compiled, "loaded", none)
    assert tails.trouble.__wrapped__() == "No C compiler is here (gcc)."
