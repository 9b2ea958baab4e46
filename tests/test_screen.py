"""What a person sees where there is no terminal."""

from __future__ import annotations

from types import SimpleNamespace

from weitiao import screen
from weitiao.screen import Screen


def test_long_work_tells_how_far_it_is_and_stdout_stays_as_it_was(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(screen, "time", SimpleNamespace(monotonic=lambda: next(now)))  # ours alone: other threads read the clock, too
    assert list(Screen().progress(range(60), "Answering")) == list(range(60))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and lines[0] == "Answering: 2 of 60, 5:48 left" and len(lines) == 20  # 4 s each, told every 12
    assert list(Screen().progress((n for n in range(9)), "Reading rows")) == list(range(9))
    assert capsys.readouterr().err.splitlines()[0] == "Reading rows: 2"
    assert list(Screen(quiet=True).progress(range(60), "Answering")) == list(range(60)) and capsys.readouterr() == ("", "")
