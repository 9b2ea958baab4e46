"""How fast a GPU learns from tries, by each way of attention: tokens a second, share of its matrix-product rate, peak memory.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.jsonl             # about ten minutes on an H100, 80 GB
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny         # does the script run? (seconds; its numbers mean nothing)

Wants torch, transformers and peft, no weights (they are random), no rows (they are drawn), none of weitiao's other needs. Liger's
kernels are measured where liger-kernel is installed. A line of JSON for each case, written as soon as it is measured:

    machine     the GPU, versions, and the bf16 rate of a product of 8,192 x 8,192 matrices, which `mfu` is a share of
    attention   one layer alone, forward and backward: milliseconds, and the distance from the definition (`dense`, float32)
    step        LoRA (rank 16 on all linears), or all weights, over two jobs:
                packed   documents in rows of 2,048 tokens, all learned; `padded` lets documents of a row see each other
                shared   64 rows behind one prompt of 512 tokens, own parts of 32 to 160 tokens learned

ways    flex, varlen      model/gpu.py
        by_paths          model/attention.py: masked sdpa, segment by segment
        by_keys           the CPU's own
        padded            transformers' sdpa over rows side by side: no trie

tokens: of the rows, as a person counts them. nodes: what is computed for them, pads not counted. mfu counts what those nodes need:
4 flops a frozen weight, 6 a trained one, pairs that see each other, and the vocabulary on learned edges.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from weitiao.data.batch import padded_batch, trie_batch
from weitiao.data.packing import padded_passes, trie_passes
from weitiao.model import attention, flex, gpu, kernels, varlen
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.trie import Example, build

ROW, PROMPT, OWN = 2048, 512, (32, 160)
WAYS = {"cuda": ("flex", "varlen", "by_paths", "padded"), "cpu": ("by_keys", "padded")}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("LlamaConfig", dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                       num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)),
    "qwen2.5-7b": ("Qwen2Config", dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                       num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768)),
    "qwen2.5-1.5b": ("Qwen2Config", dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                         num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)),
    "tiny": ("LlamaConfig", dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, max_position_embeddings=4096)),
}
CASES = (("llama-2-7b", "lora"), ("qwen2.5-7b", "lora"), ("qwen2.5-1.5b", "full"))


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.began = time.perf_counter()
        self.rate = 0.0

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.began > self.options.seconds

    def note(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"kind": kind} | facts)
        print(line, flush=True)
        if self.options.out:
            with open(self.options.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int) -> list[float]:
        took = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            took.append(time.perf_counter() - began)
        return took

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --------------------------------------------------------------------------------------------------------------- rows


def rows_of(job: str, nodes: int, vocabulary: int) -> tuple[list[Example], list[Example]]:
    """(examples for tries, rows for padding) of a step of about so many nodes."""
    draw = np.random.default_rng(0)

    def text(length: int) -> np.ndarray:
        return draw.integers(5, vocabulary, length).astype(np.int32)

    def example(ids: np.ndarray, learned_from: int) -> Example:
        return Example(ids, (np.arange(len(ids)) >= learned_from).astype(np.float32))

    if job == "shared":
        prompt = text(min(PROMPT, nodes // 4))
        own = [int(n) for n in draw.integers(OWN[0], OWN[1] + 1, 64 * nodes // 8192)]
        rows = [example(np.concatenate([prompt, text(n)]), len(prompt)) for n in own]
        return rows, rows
    documents, rows = [], []
    width = min(ROW, nodes // 4)
    for _ in range(nodes // width):
        room, lengths = width, []
        while room:
            lengths.append(min(room, max(32, int(draw.lognormal(6, 0.8)))))
            room -= lengths[-1]
        parts = [text(n) for n in lengths]
        documents += [example(part, 1) for part in parts]
        rows.append(example(np.concatenate(parts), 1))
    return documents, rows


def flops(config: Any, frozen: int, trained: int, examples: list[Example], trie: bool) -> tuple[float, int]:
    """(what a step needs, its nodes)"""
    tries = [build(examples)] if trie else [build([row]) for row in examples]
    nodes = sum(map(len, tries))
    pairs = sum(float((t.subtree_end - np.arange(len(t))).sum()) for t in tries)
    edges = sum(len(t.edges()) for t in tries)
    width = config.hidden_size // config.num_attention_heads
    head = config.vocab_size * config.hidden_size
    attend = 3.5 * 4 * width * config.num_attention_heads * config.num_hidden_layers * pairs
    return nodes * (4 * frozen + 6 * trained) + attend + edges * head * (4 if frozen else 6), nodes


# ------------------------------------------------------------------------------------------------------------ one layer


@contextmanager
def only(way: str) -> Iterator[None]:
    """Attention takes this way, for the block, or fails: not another in silence."""
    def fails(*tensors: Any) -> Any:
        raise RuntimeError(f"{way} does not run here; see the warnings")

    ways = {name: module for name, module in gpu.WAYS.items() if name == way}
    with patch.object(gpu, "WAYS", ways), patch.object(attention, "by_paths", attention.by_paths if way == "by_paths" else fails):
        yield


def one_layer(bench: Bench, shape: str, job: str, nodes: int) -> None:
    config = SHAPES[shape][1]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    examples, _ = rows_of(job, nodes, config["vocab_size"])
    plan = trie_batch(build(examples), bench.device)["trie"]
    count, dtype = len(plan.depth), torch.bfloat16 if bench.device.type == "cuda" else torch.float32

    def draw(number: int) -> torch.Tensor:
        return torch.randn(1, count, number, width, device=bench.device, dtype=dtype).transpose(1, 2).requires_grad_()

    torch.manual_seed(0)
    inputs = draw(heads), draw(kv_heads), draw(kv_heads)
    grad = torch.randn(1, heads, count, width, device=bench.device, dtype=dtype)
    few = slice(0, heads // kv_heads)  # the query heads of the first key head, so that the judge's scores fit
    wide = [tensor.detach()[:, few if tensor.shape[1] == heads else slice(0, 1)].float().requires_grad_() for tensor in inputs]
    judge = attention.dense(*wide, plan, width**-0.5)
    right = [judge.detach(), *torch.autograd.grad(judge, wide, grad[:, few].float())]
    del judge
    for way in WAYS[bench.device.type][:-1]:
        def both() -> list[torch.Tensor]:
            out = attention.attend(*inputs, plan, width**-0.5, None, 0.0)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

        bench.clear()
        with only(way):
            try:
                began = time.perf_counter()
                found = both()
                bench.wait()
                first = time.perf_counter() - began
                apart = [float((a[:, : b.shape[1]].float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
                del found
                took = bench.seconds(both, 3 if way == "by_paths" else 10)
            except Exception as error:
                bench.note("attention", shape=shape, job=job, way=way, error=f"{type(error).__name__}: {str(error)[:300]}")
                continue
        bench.note("attention", shape=shape, job=job, way=way, nodes=count, segments=len(plan.segments), milliseconds=1e3 * statistics.median(took),
                   first_seconds=first, relative_difference=dict(zip(("out", "query", "key", "value"), apart)), peak_gib=bench.peak())


# -------------------------------------------------------------------------------------------------------------- a step


def make_model(bench: Bench, shape: str, method: str) -> tuple[torch.nn.Module, torch.nn.Module, kernels.Fused | None]:
    """(model with its method, the causal LM inside, Liger's kernels in it): random weights, born on the device."""
    import transformers

    kind, values = SHAPES[shape]
    config = getattr(transformers, kind)(**values, use_cache=False)
    dtype = torch.float32 if method == "full" or bench.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(bench.device):
        causal = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal.set_attn_implementation(attention.register())
    fused = kernels.fuse(causal, "auto", bench.device)
    learn_on_tries(causal)
    if method == "full":
        return causal.train(), causal, fused
    from peft import LoraConfig, get_peft_model

    causal.requires_grad_(False)
    model = get_peft_model(causal, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.to(bench.device).train(), causal, fused


def weights_of(causal: torch.nn.Module) -> tuple[int, int]:
    """(frozen, trained) weights of the linears, the head's aside."""
    head = causal.get_output_embeddings().weight
    linears = {id(m.weight): m.weight for m in causal.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head}.values()
    return sum(w.numel() for w in linears if not w.requires_grad), sum(w.numel() for w in linears if w.requires_grad)


def steps(bench: Bench, shape: str, method: str) -> None:
    bench.clear()
    model, causal, fused = make_model(bench, shape, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    for job in ("packed", "shared"):
        ways = [(way, False) for way in WAYS[bench.device.type]]
        ways[1:1] = [(ways[0][0], True)] if fused else []
        for way, with_liger in ways:
            if bench.late:
                bench.note("skipped", shape=shape, method=method, job=job, way=way, reason="out of time")
                continue
            (fused.put_on if with_liger else fused.take_off)() if fused else None
            nodes = bench.options.nodes
            while nodes >= 512 and not one_case(bench, model, causal, optimizer, trained, shape, method, job, way, with_liger, nodes):
                nodes //= 2  # out of memory
    if fused:
        fused.take_off()


def one_case(bench, model, causal, optimizer, trained, shape, method, job, way, with_liger, budget) -> bool:
    """False if it does not fit into the memory."""
    examples, rows = rows_of(job, bench.options.nodes, causal.config.vocab_size)
    taken = rows if way == "padded" else examples

    def batches() -> list[dict[str, Any]]:
        if way == "padded":
            return [padded_batch(some, 0, bench.device) for some in padded_passes(rows, budget)]
        return [trie_batch(trie, bench.device) for trie in trie_passes(examples, budget)]

    weight = float(sum(e.weights.sum() for e in taken))
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda")
    losses = []

    def step() -> None:
        total = torch.zeros((), device=bench.device)
        for batch in batches():
            with autocast:
                loss = summed_loss(model, batch)
            (loss / weight).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total) / weight)

    facts = dict(shape=shape, method=method, job=job, way=way, liger=with_liger, nodes_per_pass=budget)
    bench.clear()
    try:
        with only(way):
            (first,) = bench.seconds(step, 1)
            bench.seconds(step, 1)
            took = bench.seconds(step, 2 if way == "by_paths" else bench.options.steps)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        bench.note("step", **facts, error="out of memory")
        return False
    except Exception as error:
        optimizer.zero_grad(set_to_none=True)
        bench.note("step", **facts, error=f"{type(error).__name__}: {str(error)[:300]}")
        return True
    seconds = statistics.median(took)
    needed, nodes = flops(causal.config, *weights_of(causal), taken, way != "padded")
    tokens = sum(len(e) for e in taken)
    bench.note("step", **facts, passes=len(batches()), tokens=tokens, nodes=nodes, seconds=seconds, first_seconds=first,
               tokens_per_second=tokens / seconds, nodes_per_second=nodes / seconds, tflops=needed / seconds / 1e12,
               mfu=needed / seconds / bench.rate, peak_gib=bench.peak(), first_loss=losses[0])
    return True


def machine(bench: Bench) -> None:
    import transformers

    size = 8192 if bench.device.type == "cuda" else 512
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    bench.seconds(lambda: a @ b, 5)
    many = 10

    def products() -> None:
        for _ in range(many):
            a @ b

    bench.rate = 2 * size**3 * many / statistics.median(bench.seconds(products, 5))
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    bench.note("machine", name=name, torch=torch.__version__, transformers=transformers.__version__, matmul_tflops=bench.rate / 1e12,
               flex_block=flex.BLOCK, varlen_types=[str(t) for t in varlen.TYPES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and few nodes, to see the script run")
    parser.add_argument("--nodes", type=int, default=8192, help="of a pass; halved where they do not fit")
    parser.add_argument("--steps", type=int, default=4, help="that are timed, after two")
    parser.add_argument("--seconds", type=float, default=540, help="begin no case after so many")
    parser.add_argument("--cases", nargs="*", help="of " + ", ".join("/".join(case) for case in CASES))
    parser.add_argument("--out", help="a file that lines are added to")
    options = parser.parse_args()
    cases = [tuple(case.split("/")) for case in options.cases] if options.cases else CASES
    if options.tiny:
        cases, options.nodes, options.steps = [("tiny", "lora"), ("tiny", "full")], 1024, 1
    bench = Bench(options)
    machine(bench)
    for shape in dict.fromkeys(shape for shape, _ in cases):
        for job in ("packed", "shared"):
            one_layer(bench, shape, job, options.nodes)
    for shape, method in cases:
        steps(bench, shape, method)


if __name__ == "__main__":
    main()
