"""Processes that encode rows end with the one that reads them, however it ends; and when nobody wants more of them."""

from __future__ import annotations

import os
import multiprocessing.connection
import signal
import subprocess
import sys
import threading
import time

import pytest

from weitiao.data.workers import in_order

READER = """
import os, sys, time
from weitiao.data.workers import in_order

def work(number):
    os.write(1, b"here\\n")
    time.sleep(600 * (number == 1))

def chunks():
    yield (0,)
    yield (1,)
    time.sleep(600)

if __name__ == "__main__":
    list(in_order(chunks(), work, 3, sys.argv[1] == "beside"))
"""


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_they_end_at_work_or_idle_when_their_parent_is_killed(tmp_path, how):
    script = tmp_path / "reader.py"
    script.write_text(READER, "utf-8")
    parent = subprocess.Popen([sys.executable, script, how], stdout=subprocess.PIPE, start_new_session=True)
    assert all(parent.stdout.readline() for _ in range(2))  # one is at work, one has been, one has yet to be
    parent.kill()
    try:
        rest, _ = parent.communicate(timeout=60)  # at the end of the pipe nobody is left who could write into it
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)
        raise
    assert not rest


def test_closing_it_right_behind_a_chunk_that_was_handed_over_waits_for_nothing(monkeypatch):
    """A pool's own thread that wakes late meets a chunk that is cancelled and a pool that is shut down at once: that of Python 3.11.2
    then waited for ever."""
    wait = multiprocessing.connection.wait

    def late(*args, **kwargs):
        found = wait(*args, **kwargs)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(multiprocessing.connection, "wait", late)
    parts = in_order(((n,) for n in range(9)), int, 1, beside=True)

    def two_and_no_more():
        next(parts)
        time.sleep(2)  # till the other two are done
        next(parts)  # hands over one more
        parts.close()

    thread = threading.Thread(target=two_and_no_more, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
