"""What the heap keeps of a training step, and what giving it back costs, on a CPU under Linux with glibc.

    python benchmarks/heap.py                          # as torch and glibc are found
    THP_MEM_ALLOC_ENABLE=1 python benchmarks/heap.py   # large tensors on huge pages, as `weitiao` starts torch
    THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_THRESHOLD_=131072 python benchmarks/heap.py     # and all that is freed given back at once
    THP_MEM_ALLOC_ENABLE=1 python benchmarks/heap.py --own         # large tensors in weitiao's own heap (model/heap.py), as it trains

Three steps of LoRA on smollm2-135m in float32, one thread: 12 rows a step, 8 of their tokens in 10 shared. Prints, for each
step, seconds of the processor for the program and for the system, and the peak of the resident memory beside the loaded model.
"""

from __future__ import annotations

import argparse
import resource
from unittest import mock

import numpy as np
import torch

from weitiao.config import parse
from weitiao.data.batch import trie_batch
from weitiao.model import heap
from weitiao.model import load as loading
from weitiao.model.methods import METHODS
from weitiao.model.source import resolve
from weitiao.screen import quiet_libraries
from weitiao.settings.model import ModelSettings
from weitiao.train import memory
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.trie import Example, build

STEPS, ROWS, SHARED, OWN = 3, 12, 300, 200


def rows(step: int) -> list[Example]:
    draw = np.random.default_rng(step)
    own = OWN + int(draw.integers(-60, 60))  # steps differ in size, which is what leaves holes
    weights = np.r_[np.zeros(SHARED + own - 40), np.ones(40)].astype(np.float32)
    return [Example(np.r_[np.arange(100, 100 + SHARED), draw.integers(0, 40_000, own)].astype(np.int32), weights, i) for i in range(ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", action="store_true")
    own = parser.parse_args().own
    quiet_libraries()
    torch.set_num_threads(1)
    with mock.patch.object(heap, "use", heap.use if own else lambda: False):
        model = loading.load_model(resolve("smollm2-135m"), ModelSettings(), torch.float32)
    learn_on_tries(model)
    model = METHODS["lora"].attach(model, parse({"data": "none"}).method, 42)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    memory.give_back()
    before = memory.used("cpu")
    keeping = heap.kept()
    keeping.__enter__()  # as the steps of a run do
    for step in range(STEPS):
        memory.reset_peak("cpu")
        began = resource.getrusage(resource.RUSAGE_SELF)
        summed_loss(model, trie_batch(build(rows(step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        done = resource.getrusage(resource.RUSAGE_SELF)
        print(f"step {step + 1}: {done.ru_utime - began.ru_utime:5.1f} s program, {done.ru_stime - began.ru_stime:4.1f} s system, "
              f"peak {(memory.peak('cpu') - before) / 2**30:.2f} GiB, kept afterwards {(memory.used('cpu') - before) / 2**30:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
