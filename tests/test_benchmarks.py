"""The benchmark's table is made from stored lines alone, and counts nothing whose losses disagree."""

import sys
from pathlib import Path

import pytest

from benchmarks import peers

BENCHMARKS = Path(peers.__file__).parent


def line(peer: str, speed: float, peak: int, number: int, **more):
    return {"kind": "run", "call": "now", "job": "resume/lora/fp32", "peer": peer, "options": {"micro": 4} if peer != "weitiao" else {}, "round": number,
            "rows_a_second": speed, "learned_a_second": 10 * speed, "peak": peak * peers.GIB, "losses": [1.0], **more}


def two_rounds(peer: str, **more):
    return [one for number, speed in enumerate((2.0, 4.0))
            for one in (line("weitiao", speed, 4, number), line(peer, 1.0, 8, number, **more))]


def test_ratios_are_taken_round_by_round():
    *_, row = peers.table(two_rounds("trainer", differ=1e-6)).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0:2] == ["resume/lora/fp32", "trainer (micro 4)"]
    assert cells[4] == "3.00 (2.00–4.00)" and cells[7] == "0.50 (0.50–0.50)"


def test_a_job_whose_losses_differ_is_not_counted():
    assert "not counted" in peers.table(two_rounds("trainer", differ=2e-3))


def test_a_peer_that_did_not_run_is_named_with_its_reason():
    assert "not run: killed" in peers.table([line("weitiao", 1.0, 4, 0), line("trl", 1.0, 4, 0, error="killed, as for memory")])


def test_every_peer_has_an_environment_and_a_runner():
    for name, peer in peers.PEERS.items():
        assert peer.environment in peers.ENVIRONMENTS and (BENCHMARKS / "peers" / peer.runner).is_file(), name


def test_a_job_is_named_by_its_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from jobs import Job

    sys.modules.pop("jobs")
    assert Job.named("resume/lora/bf16") == Job("resume", "lora", "bf16", "smollm2-135m")
    with pytest.raises(ValueError, match="Expected rows/method/precision"):
        Job.named("resume/lora")


def test_packing_keeps_a_step_together(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    from common import Given

    sys.modules.pop("common")
    given = Given.__new__(Given)
    given.batch, given.rows = 3, [{"input_ids": [0] * n} for n in (5, 1, 3, 2, 2, 2)]
    lengths = [[len(row["input_ids"]) for row in block] for block in given.packed(2)]
    assert lengths == [[5], [3, 1], [2, 2], [2]]
