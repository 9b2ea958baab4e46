"""What a run will need, from config.json and the lengths of its rows: bytes term by term, time, disk; does it fit?

    settings, config, rows ── schedule ── the largest pass ── trace ── bytes at the worst moment of loading, proving, a step
                                          all passes ──────────────── time of an epoch, by the speeds of the target

No weight is read or made. The same plan settles what the settings left open (nodes a pass, checkpointing), is held against
what is measured at the end of a run, and is turned round: this much memory is there, what fits?
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from weitiao.config import Settings
from weitiao.data.packing import NEVER, WORTH, Part, padded_passes, parts, room, trie_passes, trie_rows, with_stems
from weitiao.errors import OutOfMemory, SettingError
from weitiao.model import load as loading
from weitiao.model import heap, offload, products, stream
from weitiao.model.methods import count_parameters, method_of
from weitiao.model.methods.method import Method
from weitiao.model.methods.wiring import kv_shape
from weitiao.train import memory, stepping
from weitiao.train.devices import Device
from weitiao.train.loop import Schedule, takes_stems
from weitiao.train.loss import CHUNK
from weitiao.train.proof import picked, size_for
from weitiao.train.trace import TERMS, Case, Trace, alike, attention_flops, build_model, by_keys, segments_of, trace, with_layers
from weitiao.trie import Example

Paths = Sequence[Sequence[Example]]  # of each row

FRAMEWORK = {"cpu": 96 << 20, "cuda": 32 << 20}  # libraries that load with the first step; cuBLAS' own room
# Of a CPU's products in half precision, and of all where `products` takes oneDNN's, it keeps the code: 0.76 MiB a shape, of which each
# size of pass has others; 32 of them (cli.py).
PRODUCTS = 24 << 20
CONTEXT = 600 << 20  # of a GPU, outside what PyTorch allocates
# Of what lives and dies within a step: what an allocator may keep beside it for the next one (PyTorch's on a GPU; a heap of glibc's
# kept 5 % to 118 %, weitiao's own 0 % to 4 %, see benchmarks/results.md). glibc's can be told to give back at once, which costs time:
# memory.give_back_at_once.
KEEPS = {"cpu": 1.2, "cuda": 0.08}
OWN_HEAP_KEEPS = 0.06
IN_A_STEP = 0.8  # of the speeds of a product and a sum by themselves, which find more in the cache (benchmarks/plan.md, "Time")
PASSING = ("activations", "logits", "work space")
STEP_OF_BUDGET = 256  # nodes
CALL = 32  # nodes that could be computed in the time that one more call of the model takes
TRACED_BY_SEGMENTS = 2048  # tokens
FULL_ADAMS = ("adam", "adamw", "adamw_torch", "adamw_torch_fused")  # that keep two numbers a weight, as wide as it is stepped
MOST_STEPS = 50  # that are laid out to find the largest pass and how much is shared


@dataclass(frozen=True)
class Target:
    """Where a run is to go. kind: cpu or cuda. available: bytes that it may take. bf16: has the hardware bf16?

    flops: matrix products a second, by type; bandwidth: bytes a second. None where they are not known. gives_back: does glibc give back at
    once? own_heap: are tensors in weitiao's (weitiao.model.heap)?
    """

    name: str
    kind: str
    available: int
    bf16: bool = True
    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    processes: int = 1
    gives_back: bool = False
    own_heap: bool = False

    @property
    def keeps(self) -> float:
        """What the allocator may keep, times what lives and dies within a step."""
        return 0.0 if self.gives_back else OWN_HEAP_KEEPS if self.own_heap else KEEPS[self.kind]

    @classmethod
    def of_gpu(cls, device: Device) -> Target:
        """A kind of GPU by its data sheet; of its speeds a run reaches about half, of its bandwidth about 0.7."""
        speeds = {"half": device.half, "single": device.single}
        return cls(str(device), "cuda", device.memory - CONTEXT, device.bf16,
                   {name: 0.5e12 * speed for name, speed in speeds.items() if speed}, device.bandwidth and 0.7e9 * device.bandwidth)

    @classmethod
    def here(cls, device: torch.device, processes: int = 1) -> Target:
        """This machine, as free as it is when all that is not used was given back; on a CPU tensors go to weitiao's heap from now on."""
        share = 1 if device.type == "cuda" else processes
        own_heap = device.type == "cpu" and heap.use()
        memory.give_back()
        return cls(memory.device_name(device) if device.type == "cuda" else "this machine's CPU", device.type,
                   memory.free(device) // share, device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False),
                   processes=processes, own_heap=own_heap, gives_back=device.type == "cpu" and not own_heap and memory.gives_back())

    def compute(self, settings: Settings, trains_all: bool) -> torch.dtype:
        """What a run computes in here."""
        if loading.trains_in_half(settings.model, trains_all, settings.training.precision):
            return torch.float16
        if settings.training.precision != "auto":
            return loading.PRECISIONS[settings.training.precision]
        return torch.float32 if self.kind == "cpu" else torch.bfloat16 if self.bf16 else torch.float16


@dataclass(frozen=True)
class Plan:
    """terms: bytes at the worst moment of a step (see trace.TERMS). parts: the most bytes of each part of a run: load, proof, steps.

    kept: bytes that the allocator may keep beside them; gives_back: is it told not to? budget: nodes a pass; largest: nodes that are kept at once. tokens, nodes: an epoch's. seconds: of an epoch; None if no speed is known.
    disk: bytes by what is kept. trainable, total: parameters. host: bytes in the host's memory beside a GPU's.
    """

    target: str
    available: int
    compute: str
    layout: str
    checkpointing: bool
    budget: int
    largest: int
    terms: dict[str, int]
    parts: dict[str, int]
    kept: int
    gives_back: bool
    rows: int
    steps: int
    epochs: float
    tokens: int
    nodes: int
    seconds: float | None
    disk: dict[str, int]
    trainable: int
    total: int
    host: int = 0

    @property
    def peak(self) -> int:
        return max(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak + self.kept <= self.available

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak, "fits": self.fits}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is planned. lines: those that were traced, shared between ways of the same rows."""

    settings: Settings
    config: Any
    paths: Paths
    tokenizer: Any = None
    own_method: Method | None = None
    lines: dict[Any, Line] = field(default_factory=dict)  # those traced so far; passes of other rows are told from them too

    @functools.cached_property
    def method(self) -> Method:
        return self.own_method or method_of(self.settings, self.tokenizer)

    def case(self, target: Target, layout: str, checkpointing: bool) -> Case:
        compute = target.compute(self.settings, self.method.TRAINS_ALL)
        return Case(self.config, self.settings, self.method, compute, checkpointing, layout, target.kind, self.tokenizer)

    @functools.cached_property
    def whole(self) -> torch.nn.Module:
        """All layers with the method attached, on the meta device; not packed, so that its weights can be counted."""
        plain = self.settings.model_copy(update={"model": self.settings.model.model_copy(update={"quantize": "none"})})
        case = Case(self.config, plain, self.method, torch.float32, False, plain.training.layout, tokenizer=self.tokenizer)
        return build_model(case, self.config.get_text_config().num_hidden_layers)[0]

    @functools.cached_property
    def uniform(self) -> bool:
        return alike(self.whole, self.config)

    @functools.cached_property
    def virtual(self) -> int:
        return self.method.virtual_tokens(self.settings.method, self.tokenizer)

    @functools.cached_property
    def longest(self) -> int:
        told = getattr(self.paths, "longest", None)  # stored rows know it without being made
        return (told or max(len(path) for row in self.paths for path in row)) + self.virtual

    @functools.cached_property
    def row_tokens(self) -> np.ndarray:
        """int64 [rows]"""
        told = getattr(self.paths, "tokens", None)
        return np.array([sum(map(len, row)) for row in self.paths]) if told is None else told

    @functools.cached_property
    def schedule(self) -> Schedule:
        training = self.settings.training
        return Schedule(len(self.paths), training.batch_size, training.seed, training.epochs, training.steps)

    def step(self, number: int) -> list[Example]:
        return [path for i in self.schedule.rows_of(number) for path in self.paths[i]]

    @functools.cached_property
    def steps(self) -> list[list[Example]]:
        """The rows of the steps that are looked at: an epoch's, or the first of them, that with most tokens among them."""
        count = min(self.schedule.steps, self.schedule.steps_per_epoch)
        if count <= MOST_STEPS:
            return [self.step(n) for n in range(1, count + 1)]
        sizes = [self.row_tokens[self.schedule.rows_of(n)].sum() for n in range(1, count + 1)]
        return [self.step(n) for n in sorted({*range(1, MOST_STEPS), 1 + int(np.argmax(sizes))})]

    def passes(self, rows: Sequence[Example], layout: str, budget: int) -> list[list[Example]]:
        if layout == "padded":
            return padded_passes(rows, budget, self.virtual)
        return trie_rows(rows, room(budget, self.virtual))

    def parts(self, rows: Sequence[Example], budget: int, stems: bool) -> list[Part]:
        return parts(rows, room(budget, self.virtual), WORTH if stems else NEVER)

    def computed(self, rows: Sequence[Example], layout: str, budget: int, stems: bool) -> int:
        """How many places all passes of a step have."""
        if layout == "padded":
            return sum(self.nodes(some, layout) for some in self.passes(rows, layout, max(budget, self.longest)))
        return sum(part.nodes + self.virtual * (part.behind == 0) for part in self.parts(rows, budget, stems))

    def cost(self, rows: Sequence[Example], layout: str, budget: int, stems: bool) -> float:
        """The same with what is computed again, which is the forward pass alone, where the base is frozen half of both; and with the calls."""
        if layout == "padded":
            return self.computed(rows, layout, budget, stems)
        return sum(part.nodes * (1.5 if part.again else 1.0) + self.virtual * (part.behind == 0) + CALL for part in self.parts(rows, budget, stems))

    def nodes(self, rows: Sequence[Example], layout: str) -> int:
        """How many places a pass of these rows has."""
        if layout == "padded":
            return len(rows) * (max(map(len, rows)) + self.virtual)
        return sum(trie.computed for trie in trie_passes(rows, 1 << 40)) + self.virtual


class NoPlan(Exception):
    """Why a model cannot be traced, in a few words."""


def needs(subject: Subject, target: Target, layout: str | None = None) -> Plan:
    """The plan of a run on a target; what its settings leave open is settled so that it fits, if it can.

    Raises:
        NoPlan: the model cannot be built or run without numbers.
        SettingError: the method does not suit the model.
    """
    with torch.random.fork_rng(devices=[]):  # a method that is attached draws its start
        return _settled(subject, target, layout)


def _settled(subject: Subject, target: Target, layout: str | None) -> Plan:
    asked = subject.settings.training.checkpointing
    for module in (offload, stream):
        module.refuse_unfit(subject.settings, target.kind)
    try:
        layout = layout or _layout(subject, target)
        planned = _plan(subject, target, layout, bool(asked))
        if not planned.fits and target.kind == "cpu" and not (target.gives_back or target.own_heap):
            target = replace(target, gives_back=True)
            planned = _plan(subject, target, layout, bool(asked))
        if not planned.fits and asked is None:
            planned = _plan(subject, target, layout, True)
        return planned
    except SettingError:
        raise
    except Exception as error:  # a model's own code, which may do anything, and may not take fewer layers
        if told := OutOfMemory.of(error):
            raise told from error
        raise NoPlan(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}") from error


def standing(subject: Subject, target: Target) -> int:
    """Bytes of weights, gradients and Adam's state, without anything that passes: no run needs less. Nothing is traced."""
    case = subject.case(target, "trie", False)
    for module in (offload, stream):
        module.refuse_unfit(subject.settings, target.kind)
    attached, inner = build_model(case, subject.config.get_text_config().num_hidden_layers)
    elsewhere = {id(weight) for weight in stream.resting(inner)} if subject.settings.model.stream else set()
    weights = sum(p.numel() * p.element_size() for p in attached.parameters() if id(p) not in elsewhere)
    trained = [p for p in attached.parameters() if p.requires_grad]
    training = subject.settings.training
    wide = 4 if stepping.rounding_in_force(subject.settings) != "nearest" else 0
    state = sum(2 * p.numel() * (wide or p.element_size()) for p in trained) if training.optimizer in FULL_ADAMS else 0
    return weights + state + (0 if training.step_in_backward else sum(p.numel() * p.element_size() for p in trained))


def _layout(subject: Subject, target: Target) -> str:
    """trie, unless something stands against it that can be seen without weights."""
    asked = subject.settings.training.layout
    if asked != "auto":
        return asked
    from weitiao.train.tree import of_config

    with torch.device("meta"):
        model = of_config(with_layers(subject.config, 1), subject.settings)
    return "padded" if loading.trie_obstacle(model) else "trie"


@dataclass(frozen=True, eq=False)
class Line:
    """What passes of any size need, from two that were traced: all terms grow with the nodes but for the logits, of which no more
    than a chunk of learned edges exists at once.

    sizes: (nodes, learned edges) of the two. width: bytes of the hidden states that an edge is predicted from, and of their gradient.
    """

    traces: tuple[Trace, Trace]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    width: int

    def at(self, nodes: int, edges: int) -> Trace:
        small, large = self.traces
        (few, _), (many, _) = self.sizes
        share = (nodes - few) / max(1, many - few)
        windows = {
            name: {term: max(0.0, self._logits(name, edges) if term == "logits" else _between(small, large, name, term, share))
                   for term in small.windows[name].keys() | terms.keys()}
            for name, terms in large.windows.items()
        }
        return Trace(windows, small.work + (large.work + small.work * -1.0) * share, large.stepping, small.host + (large.host - small.host) * share)

    def _logits(self, window: str, edges: int) -> float:
        """constant + chunk * min(edges, CHUNK) + width * edges"""
        chunks = [min(e, CHUNK) for _, e in self.sizes]
        rest = [t.windows[window].get("logits", 0.0) - self.width * e for t, (_, e) in zip(self.traces, self.sizes, strict=True)]
        a_chunk = (rest[1] - rest[0]) / (chunks[1] - chunks[0]) if chunks[0] != chunks[1] else 0.0
        return rest[1] + a_chunk * (min(edges, CHUNK) - chunks[1]) + self.width * edges


def _between(small: Trace, large: Trace, window: str, term: str, share: float) -> float:
    a, b = (traced.windows[window].get(term, 0.0) for traced in (small, large))
    return a + (b - a) * share


def _line(subject: Subject, target: Target, layout: str, checkpointing: bool, rows: Sequence[Example], accumulates: bool) -> Line:
    """Two passes of like rows, traced: that of these rows, and one of half of them."""
    case = subject.case(target, layout, checkpointing)
    rows = _few_segments(case, subject, rows)
    half = list(rows[: len(rows) // 2]) if len(rows) > 1 else [_part(row, max(2, len(row) // 2)) for row in rows]
    training = subject.settings.training
    key = (layout, checkpointing, target.kind, case.compute, accumulates, subject.settings.model.model_dump_json(),
           subject.settings.method.model_dump_json(), training.optimizer, training.optimizer_options, training.rounding, training.step_in_backward, training.offload_activations)
    if key not in subject.lines:
        traces = tuple(trace(case, some, accumulates, subject.uniform) for some in (half, rows))
        sizes = tuple((subject.nodes(some, layout), edges_of(some)) for some in (half, rows))
        subject.lines[key] = Line(traces, sizes, 2 * subject.config.get_text_config().hidden_size * case.compute.itemsize)
    return subject.lines[key]


def _few_segments(case: Case, subject: Subject, rows: Sequence[Example]) -> Sequence[Example]:
    """Fewer rows of the pass, where attention goes by each of a trie's segments and tracing many takes long."""
    if case.layout != "trie" or by_keys(case, max(map(len, rows)) + subject.virtual):
        return rows
    chosen: list[Example] = []
    for row in rows:
        if chosen and sum(map(len, chosen)) + len(row) > TRACED_BY_SEGMENTS:
            break
        chosen.append(row)
    return chosen


def edges_of(rows: Sequence[Example]) -> int:
    return sum(int((row.weights > 0).sum()) for row in rows)


def _plan(subject: Subject, target: Target, layout: str, checkpointing: bool) -> Plan:
    settings, method = subject.settings, subject.method
    case = subject.case(target, layout, checkpointing)
    asked = settings.training.nodes_per_pass
    stems = layout == "trie" and takes_stems(checkpointing, target.processes)
    most = asked or _most(subject, target, layout, case.compute, stems)
    largest_step = max(subject.steps, key=lambda rows: sum(map(len, rows)))
    passes = subject.passes(largest_step, layout, most)
    rows = max(passes, key=lambda rows: sum(map(len, rows)))
    line = _line(subject, target, layout, checkpointing, rows, len(passes) > 1)
    budget = asked or _budget(line, subject.nodes(rows, layout), edges_of(rows), target, libraries(case, target), most)
    if not asked and stems and (budget < most or len(passes) > 1):  # there will be stems, of the longest row's places at most
        held = subject.longest * _bytes_of_a_place(subject, case)
        budget = _budget(line, subject.nodes(rows, layout), edges_of(rows), target, libraries(case, target) + held, most)
    rows, nodes, edges, kept = _largest(subject, largest_step, layout, budget, stems)
    traced = line.at(nodes, edges)
    terms = _terms(traced, target, libraries(case, target))
    if kept:
        terms["activations"] = terms.get("activations", 0) + kept * _bytes_of_a_place(subject, case)
    total_nodes, tokens = _epoch(subject, layout, budget, stems)
    again = subject.cost(largest_step, layout, budget, stems) / subject.computed(largest_step, layout, budget, stems)
    trainable, total = count_parameters(subject.whole)
    if pages := _file_pages(terms["weights"], total - trainable, case, target):
        terms["file pages"] = pages
    return Plan(
        target.name, target.available, str(case.compute)[6:], layout, checkpointing, budget, nodes, terms,
        {"load": _load(terms, total, case.compute, case, target), "proof": _proof(case, subject, line, terms, budget, stems), "steps": sum(terms.values())},
        round(target.keeps * sum(terms.get(name, 0) for name in PASSING)), target.gives_back,
        len(subject.paths), subject.schedule.steps, subject.schedule.steps / subject.schedule.steps_per_epoch, tokens, total_nodes,
        _seconds(case, subject, target, line.at(subject.nodes(rows, layout), edges_of(rows)), rows, subject.nodes(rows, layout), again * total_nodes), _disk(settings, method, traced, trainable, total),
        trainable, total, round(traced.host),
    )


def _largest(subject: Subject, rows: Sequence[Example], layout: str, budget: int, stems: bool) -> tuple[Sequence[Example], int, int, int]:
    """(rows of the pass with which most is kept at once, the nodes that are, the learned edges of its own, the most places of stems above one)"""
    if layout == "padded" or not stems:
        rows = max(subject.passes(rows, layout, max(budget, subject.longest)), key=lambda some: subject.nodes(some, layout))
        return rows, subject.nodes(rows, layout), edges_of(rows), 0
    found = list(with_stems(subject.parts(rows, budget, stems)))
    at_once = [part.nodes + sum(stem.nodes for stem in above if not stem.again) + subject.virtual for part, above in found]
    largest = found[int(np.argmax(at_once))][0]
    edges = int(largest.computed()[largest.trie.parent[largest.trie.edges()]].sum())
    return largest.rows, max(at_once), edges, max(part.behind for part, _ in found)  # they need not be of the same pass


def _bytes_of_a_place(subject: Subject, case: Case) -> int:
    """Of a stem: keys and values as it keeps them and as a pass reads them, and their gradients in float32. 0 where a config does not tell."""
    try:
        heads, width = kv_shape(loading.causal_lm(subject.whole))
    except (AttributeError, TypeError):
        return 0
    return 2 * case.config.get_text_config().num_hidden_layers * heads * width * (2 * case.compute.itemsize + 4)


def _part(row: Example, tokens: int) -> Example:
    """A shorter row of which as large a share is learned: every so manieth token."""
    chosen = np.linspace(0, len(row) - 1, tokens).astype(int)
    return Example(row.ids[:tokens], row.weights[chosen], row.row)


def libraries(case: Case, target: Target) -> int:
    """Bytes of what is loaded with the first step, oneDNN's code of products among them: half precision goes by it, computed in or held in."""
    held = loading.weight_dtype(case.settings.model.dtype, case.method.TRAINS_ALL, case.compute)
    by_onednn = products.is_quicker() or not {case.compute, held}.isdisjoint(loading.HALVES)
    return FRAMEWORK[target.kind] + PRODUCTS * (target.kind == "cpu" and by_onednn)


def _most(subject: Subject, target: Target, layout: str, compute: torch.dtype, stems: bool) -> int:
    """Nodes of a pass at most, however much memory there is: few, unless they would make too much be computed once more."""
    asked = subject.settings.training.memory
    few, most = memory.NODES[target.kind][asked], memory.NODES[target.kind]["fast"]
    if asked is None and target.kind == "cpu" and compute.itemsize < 4:
        few *= memory.IN_HALVES
    if stems:
        if asked == "balanced":
            return few
        most = max(most, subject.longest)

    def cost(nodes: int) -> float:
        return sum(subject.cost(rows, layout, nodes, stems) for rows in subject.steps)

    least = cost(most)
    while few < most and cost(few) > memory.MORE * least:
        few *= 2
    return few


def _budget(line: Line, nodes: int, edges: int, target: Target, libraries: int, most: int) -> int:
    """Nodes of a pass: as many as `most`, fewer where they would not fit."""
    room = target.available - libraries

    def fits(count: int) -> bool:
        windows = line.at(count, round(edges * count / nodes)).windows.values()
        return max(sum(w.values()) + target.keeps * sum(w.get(name, 0.0) for name in PASSING) for w in windows) <= room

    if fits(most):
        return most
    low, high = memory.LEAST_NODES // STEP_OF_BUDGET, -(-most // STEP_OF_BUDGET)  # low is taken whether it fits or not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP_OF_BUDGET) else (low, middle)
    return low * STEP_OF_BUDGET


def _terms(traced: Trace, target: Target, libraries: int) -> dict[str, int]:
    terms = {name: traced.terms.get(name, 0) for name in TERMS}
    if target.processes > 1:  # DDP gathers gradients in buckets of its own
        terms["gradients"] += sum(traced.windows["optimizer"].get(name, 0) for name in ("gradients",))
    terms["framework"] = libraries
    return {name: round(value) for name, value in terms.items() if value}


def _file_pages(weights: int, count: int, case: Case, target: Target) -> int:
    """Of packed weights, the pages of the checkpoint that they were read from: they stay in memory with the file's mapping as long as
    another weight (the embedding) lies in it as it was stored."""
    quantize = case.settings.model.quantize
    stored = getattr(case.config, "dtype", None) or torch.float32
    dtype = loading.weight_dtype(case.settings.model.dtype, case.method.TRAINS_ALL, case.compute)
    if target.kind != "cpu" or quantize == "none" or stored is not dtype:
        return 0
    packed = (count * dtype.itemsize - weights) / (dtype.itemsize - (1.0 if quantize == "int8" else 0.5))
    return round(max(0.0, packed) * stored.itemsize)


def _load(terms: dict[str, int], total: int, compute: torch.dtype, case: Case, target: Target) -> int:
    """The weights, and beside them the pages of the file that they are read from, unless they are those pages."""
    held = terms.get("weights", 0) + terms.get("quantisation", 0) + terms.get("file pages", 0)
    if target.kind != "cpu" or "file pages" in terms:
        return held
    stored = getattr(case.config, "dtype", None) or torch.float32
    dtype = loading.weight_dtype(case.settings.model.dtype, case.method.TRAINS_ALL, compute)
    mapped = stored is dtype and case.settings.model.quantize == "none"
    return held + (FRAMEWORK["cpu"] if mapped else total * stored.itemsize)  # by the end of which the libraries are there, or most of the pages


def _proof(case: Case, subject: Subject, line: Line, terms: dict[str, int], budget: int, stems: bool) -> int:
    """Plain rows beside the trie: all logits of a row, and two sets of gradients, but no optimizer's states yet."""
    if case.layout != "trie":
        return 0
    frugal = case.settings.proves_frugally
    rows = picked(subject.step(1), size_for(case.config, budget, frugal))
    longest = rows[-1:]
    standing = sum(terms.get(name, 0) for name in ("weights", "quantisation", "adapter", "framework", "file pages"))
    gradients = 0 if frugal else line.traces[1].windows["optimizer"].get("gradients", 0)  # let go as they come; sketches are held
    passes = (*PASSING, "gradients") if frugal else PASSING

    def passing(nodes: int, edges: int) -> float:
        windows = line.at(nodes, edges).windows.values()
        return max(sum(w.get(name, 0.0) for name in passes) for w in windows)

    a_row, nodes = subject.nodes(longest, "padded"), subject.nodes(rows, "trie")
    vocabulary = subject.config.get_text_config().vocab_size
    # Of a row all logits are there, or their gradients, and beside these twice those that are learned, in float32.
    logits = vocabulary * (a_row * case.compute.itemsize + 2 * 4 * edges_of(longest))
    at_once = max(a_row, -(-nodes // 2))
    return round(standing + max(gradients + passing(at_once, edges_of(rows)), 2 * gradients + passing(a_row, 0) + logits))


def _epoch(subject: Subject, layout: str, budget: int, stems: bool) -> tuple[int, int]:
    """(nodes, tokens) of an epoch, from the steps that were looked at."""
    tokens = int(subject.row_tokens.sum())
    seen = sum(sum(map(len, rows)) for rows in subject.steps)
    nodes = sum(subject.computed(rows, layout, budget, stems) for rows in subject.steps)
    return round(nodes * tokens / max(1, seen)), tokens


def _seconds(
    case: Case, subject: Subject, target: Target, traced: Trace, rows: Sequence[Example], nodes: int, total_nodes: float,
) -> float | None:
    """Of an epoch: products by their speed, the rest by the bytes it moves."""
    target = with_speeds(target, case.config, case.compute)
    speed = target.flops.get("single" if case.compute is torch.float32 else "half")
    if not speed or not target.bandwidth:
        return None
    segments = segments_of(rows) if case.layout == "trie" else None
    factor = 4.5 if case.checkpointing else 3.5  # the backward of attention computes it again
    pairs = attention_flops(case.config, segments, subject.virtual) * factor if segments else 0.0
    one = (traced.work.flops + pairs) / speed + traced.work.moved / target.bandwidth
    steps = subject.schedule.steps_per_epoch
    return one * total_nodes / nodes + steps * (traced.stepping.flops / speed + traced.stepping.moved / target.bandwidth)


@functools.lru_cache(maxsize=8)
def _speeds_here(hidden: int, inner: int, dtype: torch.dtype) -> tuple[float, float]:
    """(flops of a product of the model's own shape, bytes moved by an addition), a second, on this machine's CPU."""
    products.use()
    a, b = (torch.ones(shape, dtype=dtype) for shape in ((512, hidden), (inner, hidden)))
    x = torch.ones(1 << 23)

    def best(function: Callable[[], Any], tries: int = 5) -> float:
        took = []
        for _ in range(tries):
            began = time.perf_counter()
            function()
            took.append(time.perf_counter() - began)
        return sorted(took)[len(took) // 2]

    with heap.kept():  # as steps do; to get the pages of a sum from the system takes longer than to add
        flops = 2 * 512 * hidden * inner / best(lambda: a @ b.T)
        return flops, 3 * 4 * x.numel() / best(lambda: x + x)


def with_speeds(target: Target, config: Any, compute: torch.dtype) -> Target:
    """The same with the speeds of this machine, measured, if it is this one."""
    if target.kind != "cpu" or target.flops:
        return target
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    flops, bandwidth = _speeds_here(text.hidden_size, inner, compute)
    return replace(target, flops={"single" if compute is torch.float32 else "half": IN_A_STEP * flops}, bandwidth=IN_A_STEP * bandwidth)


def _disk(settings: Settings, method: Method, traced: Trace, trainable: int, total: int) -> dict[str, int]:
    """What is kept: checkpoints with their optimizer, and what is published."""
    learned = 4 * (total if method.FOLDER == "model" else trainable)
    one = learned + round(traced.windows["optimizer"].get("optimizer", 0))
    kept = settings.saving.keep + 1  # the newest is written before the oldest is taken away
    return {"a checkpoint": one, f"{kept} checkpoints": kept * one, method.FOLDER: learned}
