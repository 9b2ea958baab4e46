"""Large tensors in a heap of their own: where they lie, that none lies in another, and that holes stay few."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from weitiao.model import compiled, heap


@pytest.fixture
def in_use():
    if not heap.use():
        pytest.skip("no heap of our own can be built here")
    with heap.kept():
        yield


def bytes_of(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def told(program: str, **environment: str) -> list[str]:
    """The words that a process of its own prints."""
    head = "import torch, psutil; from weitiao.model import heap\ndef new(n): return torch.empty(n, dtype=torch.uint8)\n"
    done = subprocess.run([sys.executable, "-c", head + program], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_holds_large_tensors_and_no_small_ones(in_use):
    assert heap.holds(bytes_of(heap.LEAST)) and not heap.holds(bytes_of(heap.LEAST - 1))


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, (1 << 21) - 1, 1 << 21, 5_000_001])
def test_tensors_begin_where_a_vector_does(in_use, size):
    assert bytes_of(size).data_ptr() % 64 == 0


def test_tensors_of_huge_pages_begin_where_a_page_does(in_use):
    """As torch, which advises huge ones of them, wants it."""
    program = "heap.use(); print(*(new(n).data_ptr() % 4096 for n in (1 << 21, 5_000_001)))"
    assert told(program, THP_MEM_ALLOC_ENABLE="1") == ["0", "0"]


def test_what_is_freed_is_taken_again_and_counted(in_use):
    before = heap.used().now
    first = bytes_of(1 << 20)
    at, there = first.data_ptr(), heap.used()
    assert 1 << 20 <= there.now - before <= (1 << 20) + 8192
    del first
    assert heap.used().now == before and heap.used().most == before
    assert heap.used().reached >= before  # of what is still there
    assert bytes_of(1 << 20).data_ptr() == at


def test_free_neighbours_become_one(in_use):
    program = """heap.use()
row = [new(1 << 20) for _ in range(5)]
first = row[0].data_ptr()
for i in (1, 3, 0, 4, 2): row[i] = None  # with a free one before it, behind it, and both
print(new(5 << 20).data_ptr() - first, heap.used().now - 5 * 2**20 < 1 << 16)"""
    assert told(program, THP_MEM_ALLOC_ENABLE="0") == ["0", "True"]


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


def test_no_tensor_lies_in_another_whoever_asks(in_use):
    before, faults = heap.used().now, []
    threads = [threading.Thread(target=scattered, args=(seed, 300, faults)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and heap.used().now == before


def test_passes_of_other_sizes_leave_few_holes(in_use):
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


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def test_what_is_kept_goes_back_when_it_is_trimmed_and_nothing_else(in_use):
    stays, large = torch.ones(1 << 20, dtype=torch.uint8), torch.ones(256 << 20, dtype=torch.uint8)
    there = resident()
    del large
    assert resident() > there - (64 << 20)  # for the next one
    heap.trim()
    assert resident() < there - (200 << 20) and bool((stays == 1).all())


def test_outside_of_steps_what_is_large_goes_back_at_once(in_use):
    program = """heap.use()
def resident(): return psutil.Process().memory_info().rss >> 20
large = torch.ones(256 << 20, dtype=torch.uint8); there = resident(); del large; print(there - resident() > 200)
with heap.kept():
    with heap.kept(): large = torch.ones(256 << 20, dtype=torch.uint8)
    there = resident(); del large; print(there - resident() < 64)
print(there - resident() > 200)"""
    assert told(program) == ["True", "True", "True"]


def test_what_finds_no_room_goes_to_the_c_library(in_use):
    program = """import types
psutil.virtual_memory = lambda: types.SimpleNamespace(total=8 << 20)
heap.use()
row = [torch.full((3 << 20,), i, dtype=torch.uint8) for i in range(4)]
print(*(heap.holds(t) for t in row), heap.holds(new(64 << 20)), *(int(t.unique()) for t in row))
del row
print(heap.used().now)"""
    assert told(program) == ["True", "True", "False", "False", "False", "0", "1", "2", "3", "0"]


def test_a_second_use_changes_nothing(in_use):
    program = """heap.use()
large = torch.full((1 << 20,), 7, dtype=torch.uint8)
print(heap._put_in_place() is not None, heap.holds(large)); del large; print(heap.used().now)"""
    assert told(program) == ["True", "True", "0"]


def test_a_forked_child_has_its_own(in_use):
    program = """import os
heap.use(); torch.set_num_threads(1)  # those of OpenMP are not forked
before = torch.full((1 << 20,), 7, dtype=torch.uint8)
child = os.fork()
if not child:
    right = False
    try:
        mine = torch.full((1 << 20,), 9, dtype=torch.uint8)
        right = int(mine.unique()) == 9 and int(before.unique()) == 7 and heap.holds(mine)
        before.fill_(1)
    finally:
        os._exit(0 if right else 1)
print(os.waitpid(child, 0)[1], int(before.unique()))"""
    assert told(program) == ["0", "7"]


@pytest.mark.parametrize("named", ["WEITIAO_HEAP", "WEITIAO_COMPILE"])
def test_it_can_be_forbidden(named):
    program = "print(heap.use(), heap.holds(new(1 << 20))); heap.trim()\nwith heap.kept(): print(int(torch.ones(1 << 20).sum()))"
    assert told(program, **{named: "0"}) == ["False", "False", str(1 << 20)]


def test_where_addresses_are_counted_tensors_stay_where_they_were():
    """ulimit -v, as some clusters set it."""
    with pytest.MonkeyPatch.context() as patch:  # built already, so that no compiler has to run in there
        patch.delenv("WEITIAO_HEAP", raising=False)
        try:
            compiled.loaded("heap")
        except compiled.NotBuilt as reason:
            pytest.skip(str(reason))
    program = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45)); print(heap.use(), int(torch.ones(1 << 20).sum()))"
    assert told(program) == ["False", str(1 << 20)]
