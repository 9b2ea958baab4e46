"""How far a step is from its floor: the matrix products it needs, at the rate that this machine reaches on them.

    python benchmarks/floor.py --data FOLDER [--jobs resume/lora/fp32 resume/lora/bf16 alpaca/lora/fp32 alpaca/lora/bf16] [--steps 2] [--nodes 4096] [--threads 2]

FOLDER holds the rows' files (benchmarks/jobs.py). For each job, in a process of its own:

1. The products of one real step of weitiao are counted twice: by torch's FlopCounterMode on forward and backward as they run, and by a
   formula from the shapes of the model's linear layers. A frozen weight needs no gradient, nor does the input of the first layer's q, k
   and v below a frozen embedding; the head is needed where something is learned. Attention is listed apart: what its kernels were
   given, against the pairs (node, ancestor) that are visible.
2. The products seen are timed alone, with their shapes, strides and type, least of several; the fastest is the machine's peak.
3. Steps are timed. floor = products of the formula / peak; "each at its own rate" is what the step's own products take alone, so what
   lies between the two is lost to their shapes, and what lies above to everything else.

Steps are judged by the wall clock, and beside it by processor time / threads, which other work on the machine disturbs less.
About a minute a job on 2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jobs import Job, Watch, as_weitiao_reads, training_of

DEFAULT = ["resume/lora/fp32", "resume/lora/bf16", "alpaca/lora/fp32", "alpaca/lora/bf16"]
FIRST_INPUTS = ("q_proj", "k_proj", "v_proj")  # they read the embedding
MEASURED = 0.98  # of the products' work is timed; the small rest is taken at the slowest rate seen
AIM = 1.5


class Operand(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Product(NamedTuple):
    """A matrix product [.., m, k] x [.., k, n] as it was called."""

    dtype: Any
    left: Operand
    right: Operand

    @property
    def flops(self) -> int:
        *batch, m, k = self.left.shape
        return 2 * m * k * self.right.shape[-1] * (batch[0] if batch else 1)


class Step(NamedTuple):
    """What a step has to compute: nodes of its tries, learned edges, (node, ancestor or itself) pairs."""

    nodes: int
    edges: int
    pairs: int


def shape_of(training: Any, number: int) -> Step:
    from weitiao.data.packing import trie_passes

    examples = [e for i in training.schedule.rows_of(number) for e in training.rows[i].examples]
    tries = trie_passes(examples, 1 << 40)  # whatever the passes, what rows share has to be computed once
    computed = [t.of(t.needed()) for t in tries]
    return Step(sum(map(len, computed)), sum(len(t.edges()) for t in tries), sum(int((t.depth + 1).sum()) for t in computed))


def needed(model: Any, step: Step) -> tuple[int, int]:
    """(flops of all linear layers, flops of attention) of forward and backward, by the formula.

    A layer [k, n] at m places: 2mkn forward, again for the gradient of its input, again for that of its weight if it is trained.
    Attention: 2 products forward, 4 backward, over visible pairs.
    """
    from torch import nn

    from weitiao.model.load import causal_lm
    from weitiao.model.methods.layers import decoder_layers

    inner = causal_lm(model)
    head, first = inner.get_output_embeddings(), decoder_layers(inner)[1][0]
    frozen_below = not inner.get_input_embeddings().weight.requires_grad
    reads_embedding = {id(m) for name, m in first.named_modules() if any(f"{part}." in f"{name}." for part in FIRST_INPUTS) and "lora_B" not in name}
    linear = 0
    for module in inner.modules():
        if isinstance(module, nn.Linear):
            places = step.edges if module is head else step.nodes
            times = 1 + (not (frozen_below and id(module) in reads_embedding)) + module.weight.requires_grad
            linear += 2 * places * module.in_features * module.out_features * times
    config = inner.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return linear, 6 * 2 * step.pairs * width * config.num_attention_heads * config.num_hidden_layers


class NoModules:
    """In the place of the counter's tracker of modules, whose hooks forbid an autograd.grad within a forward, as our loss does one."""

    parents = {"Global"}

    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


class Counted:
    """FlopCounterMode over a block, which also keeps the products it sees. Attention kernels of the CPU are taught to it."""

    def __init__(self) -> None:
        import torch
        from torch.utils.flop_counter import FlopCounterMode, flop_registry

        aten = torch.ops.aten
        self.products: Counter[Product] = Counter()

        def keeping(op: Any, first: int) -> Any:
            def formula(*args: Any, out_val: Any, **kwargs: Any) -> int:
                a, b = args[first : first + 2]
                self.products[Product(a.dtype, *(Operand(tuple(x.shape), x.stride()) for x in (a, b)))] += 1
                return flop_registry[op](*args, out_val=out_val, **kwargs)

            formula._get_raw = True  # with tensors in the place of their shapes
            return formula

        def attention(products: int, first: int) -> Any:
            def formula(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
                (batch, heads, queries, width), key = shapes[first], shapes[first + 1]
                return products * 2 * batch * heads * queries * key[-2] * width

            return formula

        self.mode = FlopCounterMode(display=False, custom_mapping={
            aten.mm: keeping(aten.mm, 0), aten.bmm: keeping(aten.bmm, 0), aten.addmm: keeping(aten.addmm, 1), aten.addmm_: keeping(aten.addmm, 1), aten.baddbmm: keeping(aten.baddbmm, 1),
            aten._scaled_dot_product_flash_attention_for_cpu: attention(2, 0),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention(5, 1),  # scores once more
        })
        self.mode.mod_tracker = NoModules()

    def flops(self) -> tuple[int, int]:
        """(matrix products, attention kernels)"""
        by_op = {str(op): n for op, n in self.mode.get_flop_counts().get("Global", {}).items()}
        attention = sum(n for op, n in by_op.items() if "attention" in op)
        return sum(by_op.values()) - attention, attention


def seconds_alone(product: Product, least: float = 0.25) -> float:
    """The least time of one call by itself."""
    import torch

    def operand(one: Operand) -> Any:
        whole = torch.empty_strided(one.shape, one.stride, dtype=product.dtype)
        return whole.normal_()

    a, b = operand(product.left), operand(product.right)
    call = torch.bmm if a.dim() == 3 else torch.mm
    call(a, b)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < 200):
        began = time.perf_counter()
        call(a, b)
        times.append(time.perf_counter() - began)
    return min(times)


def alone(products: Counter[Product]) -> tuple[float, float, Product]:
    """(seconds of all calls, each by itself; the peak in flop/s; the product that reaches it)"""
    work = sum(p.flops * n for p, n in products.items())
    done, seconds, rates = 0, 0.0, {}
    for product, calls in sorted(products.items(), key=lambda item: -item[0].flops * item[1]):
        if done > MEASURED * work:
            break
        once = seconds_alone(product)
        rates[product] = product.flops / once
        seconds += once * calls
        done += product.flops * calls
    best = max(rates, key=rates.get)
    return seconds + (work - done) / min(rates.values()), rates[best], best


def measure(job: Job, data: Path, steps: int, nodes: int | None) -> None:
    import torch

    class Clock(Watch):
        def __init__(self) -> None:
            super().__init__()
            self.processor = [time.process_time()]

        def on_step(self, line: dict[str, Any], seconds: float) -> None:
            super().on_step(line, seconds)
            self.processor.append(time.process_time())

    with tempfile.TemporaryDirectory() as place:
        prepared = as_weitiao_reads(job, data, Path(place), steps + 2)
    clock, counted = Clock(), Counted()
    training = training_of(prepared, clock, nodes)
    training.fit(1)  # the first step warms up
    with counted.mode:
        training.fit(2)
    training.fit(steps + 2)
    shapes = [shape_of(training, number) for number in range(1, steps + 3)]

    linear, attention = needed(training.plain_model, shapes[1])
    seen_linear, seen_attention = counted.flops()
    print(f"\n{job.name}: {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"  step 2: {shapes[1].nodes:,} nodes, {shapes[1].edges:,} learned edges, {shapes[1].pairs:,} visible pairs")
    print(f"  products:  {linear / 1e9:8.1f} GFLOP by the formula, {seen_linear / 1e9:8.1f} counted, {seen_linear / linear - 1:+.3%}")
    given = (f"{seen_attention / 1e9:8.1f} given to PyTorch's kernels, x {seen_attention / attention:.2f} (whole squares, scores once more)"
             if seen_attention else "by weitiao's own kernel, which is not counted")
    print(f"  attention: {attention / 1e9:8.1f} GFLOP by the formula, {given}")
    own, peak, best = alone(counted.products)
    print(f"  peak: {peak / 1e9:,.0f} GFLOP/s at {list(best.left.shape)} x {list(best.right.shape)} {str(best.dtype)[6:]}; "
          f"step 2's products each at its own rate: {own:.2f} s, its floor {linear / peak:.2f} s")
    ratios, with_attention, by_processor, of_alone = [], [], [], []
    own_rate = linear / own
    for i, shape in enumerate(shapes[2:], start=2):
        linear, attention = needed(training.plain_model, shape)
        floor, seconds = linear / peak, clock.seconds[i]
        processor = (clock.processor[i + 1] - clock.processor[i]) / torch.get_num_threads()
        ratios.append(seconds / floor)
        by_processor.append(processor / floor)
        of_alone.append(seconds / (linear / own_rate))
        with_attention.append(seconds / ((linear + attention) / peak))
        print(f"  step {i + 1}: floor {floor:.2f} s (with attention {(linear + attention) / peak:.2f}), measured {seconds:.2f} s, "
              f"x {ratios[-1]:.2f}; processor time / threads {processor:.2f} s, x {by_processor[-1]:.2f}")
    print(f"  median: x {statistics.median(ratios):.2f} of the floor by the clock (x {statistics.median(with_attention):.2f} with attention in it), "
          f"x {statistics.median(by_processor):.2f} by processor time; aim {AIM}. x {statistics.median(of_alone):.2f} of the products each at its own rate", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that warms up and one that is counted")
    parser.add_argument("--nodes", type=int, help="of a pass; default: as weitiao chooses them")
    parser.add_argument("--threads", type=int, help="default: torch's own, OMP_NUM_THREADS")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        return measure(Job.named(options.jobs[0]), options.data, options.steps, options.nodes)
    for name in options.jobs:
        subprocess.run([sys.executable, __file__, "--child", "--data", options.data, "--jobs", name, "--steps", str(options.steps),
                        *(word for name in ("nodes", "threads") if getattr(options, name) for word in (f"--{name}", str(getattr(options, name))))], check=True)


if __name__ == "__main__":
    main()
