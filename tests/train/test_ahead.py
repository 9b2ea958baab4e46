"""The next step's passes are made while this one computes: the same passes, and nothing of it stays behind."""

from __future__ import annotations

import threading

import pytest
import torch
from test_loop import losses, make_rows, training

from weitiao.train import loop
from weitiao.train.ahead import Ahead


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_step_gets_its_own_and_one_more_is_made_meanwhile():
    made, second = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 5:
            second.set()
        return -step

    with Ahead(make, last=7) as work_of:
        assert work_of(4) == -4
        assert second.wait(10) and made == [(4, True), (5, False)]  # and no third one
        assert [work_of(step) for step in (5, 6, 7)] == [-5, -6, -7]
    assert made == [(4, True), (5, False), (6, False), (7, False)] and not at_work()


def test_an_error_is_raised_where_its_step_asks():
    def make(step):
        if step == 2:
            raise ZeroDivisionError("step 2")
        return step

    with pytest.raises(ZeroDivisionError, match="step 2"), Ahead(make, last=5) as work_of:
        assert work_of(1) == 1
        work_of(2)
    assert not at_work()


class Never(Ahead):
    """Each step's work when it is asked for: the judge."""

    def __call__(self, step):
        return self.make(step)


@pytest.mark.parametrize("layout", ["trie", "padded"])
def test_the_losses_are_those_without_it_bit_for_bit(tokenizer, monkeypatch, layout):
    ahead = training(tokenizer, make_rows(), layout, budget=30)
    assert ahead.fit()
    monkeypatch.setattr(loop, "Ahead", Never)
    plain = training(tokenizer, make_rows(), layout, budget=30)
    assert plain.fit()
    assert ahead.listener.lines == plain.listener.lines and len(losses(ahead)) == 8
    assert all(torch.equal(a, b) for a, b in zip(ahead.parameters, plain.parameters, strict=True))
    assert not at_work()


def test_ctrl_c_and_a_stop_end_it(tokenizer):
    interrupted = training(tokenizer, make_rows())

    def on_step(line, seconds):
        raise KeyboardInterrupt

    interrupted.listener.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit()
    assert interrupted.step == 1 and not at_work()
    stopped = training(tokenizer, make_rows(), stop=lambda: True)
    assert not stopped.fit() and stopped.step == 0 and not at_work()
