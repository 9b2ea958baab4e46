"""Large tensors in a heap of their own: where they lie, that none lies in another, and that holes stay few."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from weitiao.model import compiled, heap


@pytest.fixture(autouse=True)
def in_use():
    if not heap.use():
        pytest.skip("no heap of our own can be built here")


def bytes_of(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def test_it_holds_large_tensors_and_no_small_ones():
    assert heap.holds(bytes_of(heap.LEAST)) and not heap.holds(bytes_of(heap.LEAST - 1))


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, (1 << 21) - 1, 1 << 21, 5_000_001])
def test_tensors_begin_where_torch_asks(size):
    assert bytes_of(size).data_ptr() % 64 == 0
    if size >= 1 << 21 and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        assert bytes_of(size).data_ptr() % 4096 == 0  # whole pages, of which torch advises huge ones


def test_what_is_freed_is_taken_again_and_counted():
    before = heap.used().now
    first = bytes_of(1 << 20)
    at, there = first.data_ptr(), heap.used()
    assert 1 << 20 <= there.now - before <= (1 << 20) + 8192
    del first
    assert heap.used().now == before and heap.used().most == before
    assert bytes_of(1 << 20).data_ptr() == at


def test_free_neighbours_become_one():
    row = [bytes_of(1 << 20) for _ in range(5)]
    first = min(tensor.data_ptr() for tensor in row)
    for i in (1, 3, 0, 4, 2):  # with a free one before it, behind it, and both
        row[i] = None
    whole = bytes_of(5 << 20)
    assert whole.data_ptr() == first


def scattered(seed: int, rounds: int, faults: list[str]) -> None:
    draw, alive = random.Random(seed), []
    for _ in range(rounds):
        if alive and draw.random() < 0.5:
            tensor, value = alive.pop(draw.randrange(len(alive)))
            if not bool((tensor == value).all()):
                faults.append(f"{value} was written over")
        else:
            value = draw.randrange(256)
            alive.append((torch.full((draw.choice([1 << 10, 1 << 16, 70_001, 1 << 18, 3_000_000]) + draw.randrange(4096),), value, dtype=torch.uint8), value))
    faults += [f"{value} was written over" for tensor, value in alive if not bool((tensor == value).all())]


def test_no_tensor_lies_in_another_whoever_asks():
    before, faults = heap.used().now, []
    threads = [threading.Thread(target=scattered, args=(seed, 300, faults)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and heap.used().now == before


def test_passes_of_other_sizes_leave_few_holes():
    """Activations as a stack, and after each pass something small that stays: what makes holes of a heap for everything."""
    heap.used()
    before, stays = heap.used().now, []
    for nodes in (600, 606, 580, 611, 640, 590, 643):
        stack = [torch.empty(nodes * width, dtype=torch.float32) for _ in range(30) for width in (576, 1536, 1536, 192)]
        for i in range(30):
            del stack[-4:]
            if i % 10 == 0:
                stays.append(bytes_of(100_000))
    found = heap.used()
    assert found.reached - before <= 1.1 * (found.most - before)


def test_trimming_gives_what_is_free_back_and_nothing_else():
    import psutil

    def resident() -> int:
        return psutil.Process().memory_info().rss

    kept, large = torch.ones(1 << 20, dtype=torch.uint8), torch.ones(256 << 20, dtype=torch.uint8)
    there = resident()
    del large
    assert resident() > there - (64 << 20)  # for the next one
    heap.trim()
    assert resident() < there - (200 << 20) and bool((kept == 1).all())


def test_a_forked_child_has_its_own():
    before = torch.full((1 << 20,), 7, dtype=torch.uint8)
    child = os.fork()
    if not child:
        mine = torch.full((1 << 20,), 9, dtype=torch.uint8)
        right = bool((mine == 9).all()) and bool((before == 7).all()) and heap.holds(mine)
        before.fill_(1)
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0 and bool((before == 7).all())


def test_where_nothing_may_be_built_tensors_stay_where_they_were():
    said = subprocess.run(
        [sys.executable, "-c", "import torch; from weitiao.model import heap; print(heap.use()); heap.trim(); print(int(torch.ones(1 << 20).sum()))"],
        env=os.environ | {"WEITIAO_COMPILE": "0"}, capture_output=True, text=True, check=True,
    ).stdout.split()
    assert said == ["False", str(1 << 20)]


def test_where_addresses_are_short_tensors_stay_where_they_were():
    """ulimit -v, as some clusters set it."""
    compiled.loaded()  # there already, so that nothing has to be built in there
    said = subprocess.run(
        [sys.executable, "-c", "import resource, torch; from weitiao.model import heap; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); "
         "print(heap.use()); print(int(torch.ones(1 << 20).sum()))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()
    assert said == ["False", str(1 << 20)]
