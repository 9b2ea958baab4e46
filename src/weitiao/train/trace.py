"""One optimizer step on tensors that have shapes and no numbers -> what it keeps in memory, and when; what it computes.

    config.json ── the model and its method, of 2 and of 4 layers, on fake tensors ── forward, loss, backward, optimizer
                   each storage: born, gone, bytes, what for          each product: flops; each operation: bytes moved
                   ── what a layer adds ── the whole model

It is the program's own step, so whatever a method, a precision or a family keeps is counted without a formula for it.
Layers that are alike are not traced one by one: every window of a step grows by the same with each of them. Where they
are not alike (windows in some layers, the last few trained) all are traced.

Some things have nothing to run here, and stand-ins with their bytes: packed weights (bitsandbytes has no kernels for fake tensors),
a GPU's attention over a trie (`gpu.Kept`), and a CPU's, which is traced as two segments whatever their number (`as_two_segments`).
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from weitiao.config import Settings
from weitiao.data.batch import Plan, learned_batch, padded_batch
from weitiao.model import attention, elementwise, flex, fused, offload, stream
from weitiao.model import load as loading
from weitiao.model.methods.layers import decoder_layers, is_conv1d
from weitiao.model.methods.method import Method
from weitiao.settings.model import ModelSettings
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.train.optimizer import SEARCHERS, make_optimizer, takes_fused
from weitiao.train.stepping import ByWeight
from weitiao.trie import Example, Segment, build

WINDOWS = ("forward", "loss", "backward, upper half", "backward, lower half", "optimizer")
TERMS = ("weights", "quantisation", "adapter", "gradients", "optimizer", "activations", "logits", "work space")
FEW, MORE = 2, 4  # layers that are traced in the place of many; even, so that a backward pass has two halves
STREAMED = 2  # so many more, where a half has to hold the two that are there at once


@dataclass(frozen=True)
class Work:
    """What a step computes: flops of matrix products (two a multiply-add) and bytes read and written, by operation count."""

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.moved * factor, self.calls * factor)


@dataclass(frozen=True)
class Trace:
    """windows: bytes by term (see TERMS) at the worst moment of each part of a step. work: of one pass, forward and
    backward; stepping: of the optimizer alone. host: bytes of a GPU's run that lie in the host's memory."""

    windows: Mapping[str, Mapping[str, float]]
    work: Work
    stepping: Work
    host: float = 0.0

    @property
    def worst(self) -> str:
        return max(self.windows, key=lambda name: sum(self.windows[name].values()))

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term at the worst moment of the step."""
        return {name: round(value) for name, value in self.windows[self.worst].items()}

    @property
    def peak(self) -> int:
        return round(sum(self.windows[self.worst].values()))


@dataclass(frozen=True, eq=False)
class Case:
    """What is traced. config: transformers' config of the model. device: cpu or cuda, whose kernels are taken to run."""

    config: Any
    settings: Settings
    method: Method
    compute: torch.dtype
    checkpointing: bool
    layout: str = "trie"
    device: str = "cpu"
    tokenizer: Any = None


def trace(case: Case, rows: Sequence[Example], accumulates: bool = False, uniform: bool | None = None) -> Trace:
    """A step whose largest pass holds these rows.

    accumulates: does the step have more than one pass? Then gradients are there while the next one is computed.
    uniform: are its layers alike? Found out if it is not given.
    """
    layers = case.config.get_text_config().num_hidden_layers
    counts = [count + STREAMED * case.settings.model.stream for count in (FEW, MORE)]
    if layers <= counts[1] or not (alike(build_model(case, layers)[0], case.config) if uniform is None else uniform):
        return _trace(case, layers, rows, accumulates)
    few, more = (_trace(case, count, rows, accumulates) for count in counts)
    return _extrapolate(few, more, (layers - counts[0]) / (counts[1] - counts[0]))


def _extrapolate(few: Trace, more: Trace, steps: float) -> Trace:
    """Each figure is a line in the number of layers. steps: from few to all, counted in those from few to more."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * steps

    windows = {
        name: {term: max(0.0, line(few.windows[name].get(term, 0.0), more.windows[name].get(term, 0.0)))
               for term in few.windows[name].keys() | more.windows[name].keys()}
        for name in more.windows
    }
    return Trace(windows, *(Work(*(line(getattr(a, f.name), getattr(b, f.name)) for f in fields(Work)))
                            for a, b in ((few.work, more.work), (few.stepping, more.stepping))), line(few.host, more.host))


def alike(model: nn.Module, config: Any) -> bool:
    """Does each layer hold, and have trained of it, what every other does?"""
    _, layers = decoder_layers(loading.causal_lm(model))
    shapes = {tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()) for layer in layers}
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    return len(shapes) == 1 and len(kinds) <= 1


# ------------------------------------------------------------------------------------------------ a model without numbers


def build_model(case: Case, layers: int, trained: bool = True) -> tuple[nn.Module, nn.Module]:
    """(the model with its method attached, the causal LM inside it), of so many layers, on the meta device."""
    from transformers import AutoModelForCausalLM

    settings = case.settings
    dtype = loading.weight_dtype(settings.model.dtype, case.method.TRAINS_ALL, case.compute)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            with_layers(case.config, layers), dtype=dtype, trust_remote_code=settings.model.trust_remote_code,
        )
        if settings.model.quantize != "none":
            pack(model, settings.model, case.compute)
        if case.layout == "trie":
            loading.learn_attention(model)
        learn_on_tries(model)
        attached = case.method.attach(model, _without_start(settings), settings.training.seed, case.tokenizer) if trained else model
        fused.fuse(attached)
    if case.checkpointing:
        loading.checkpoint_activations(model, streamed=settings.model.stream)
    return attached, model


def _without_start(settings: Settings) -> Any:
    """The same tree from a start that wants no numbers."""
    chosen = settings.method
    if getattr(chosen, "init", None) == "pissa":
        return chosen.model_copy(update={"init": "zero"})
    if getattr(chosen, "init", None) in ("rows", "vocabulary") and chosen.text is None:
        return chosen.model_copy(update={"init": "random"})
    return chosen


def with_layers(config: Any, layers: int) -> Any:
    """The config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if text.num_hidden_layers != layers:
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = layers
        if kinds:
            text.layer_types = kinds[:layers]
    return config


class Packed(nn.Linear):
    """Stands for a linear whose weight is held in 8 or 4 bits: it has the bytes, and takes them out for every product."""

    def __init__(self, features: tuple[int, int], bias: nn.Parameter | None, settings: ModelSettings, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.compute = compute
        self.weight = nn.Parameter(torch.empty(packed_bytes(self.in_features * self.out_features, settings), dtype=torch.uint8), requires_grad=False)
        self.bias = bias
        self.scales = nn.Parameter(torch.empty(scale_bytes(features, settings), dtype=torch.uint8), requires_grad=False)
        # PEFT copies what a 4-bit layer puts out before it adds to it; bitsandbytes keeps what goes into an 8-bit one.
        self.clones, self.keeps = settings.quantize != "int8", settings.quantize == "int8"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = _PackedProduct.apply(inputs.to(self.compute), self.weight, (self.out_features, self.in_features), self.keeps)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return (out.clone() if self.clones else out).to(inputs.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, packed, shape, keeps):
        ctx.shape, ctx.inputs = shape, inputs if keeps else None
        return F.linear(inputs, inputs.new_empty(shape))

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


def packed_bytes(weights: int, settings: ModelSettings) -> int:
    return weights if settings.quantize == "int8" else (weights + 1) // 2


def scale_bytes(features: tuple[int, int], settings: ModelSettings) -> int:
    """int8: a float32 a row. 4 bits: a float32 for each 64 weights; double quantised: a byte, and a float32 for each 256 of those."""
    weights = features[0] * features[1]
    if settings.quantize == "int8":
        return 4 * features[1]
    blocks = -(-weights // 64)
    return blocks + 4 * -(-blocks // 256) + 1024 + 4 if settings.double_quantize else 4 * blocks + 64


def pack(model: nn.Module, settings: ModelSettings, compute: torch.dtype) -> None:
    """Put `Packed` where transformers would put bitsandbytes' layers: every linear but the head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is not head and (isinstance(child, nn.Linear) or is_conv1d(child)) and not isinstance(child, Packed):
                features = tuple(child.weight.shape) if is_conv1d(child) else (child.in_features, child.out_features)
                setattr(parent, name, Packed(features, child.bias, settings, compute))


# ----------------------------------------------------------------------------------------------------- one traced step


def _trace(case: Case, layers: int, rows: Sequence[Example], accumulates: bool) -> Trace:
    attached, model = build_model(case, layers)
    batch = _batch(case, rows)
    learned = batch["weights"].flatten().nonzero()[:, 0] if case.layout == "padded" else None
    lives = Lives()
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake, attention.as_on(case.device):
        _off_meta(attached)
        batch = {key: _fake(value, fake) for key, value in batch.items()}
        resting = _streamed(model, lives) if case.settings.model.stream else []
        _seed(lives, attached, case, resting)
        if case.checkpointing and case.settings.training.offload_activations:
            _moves_to_host(model, lives)
        trained = [p for p in attached.parameters() if p.requires_grad]
        by_weight = ByWeight.of(case.settings)
        for weight in trained:
            weight.register_post_accumulate_grad_hook(lambda weight: lives.relabel([weight.grad], "gradients"))
            if by_weight:
                by_weight.stand_ins(weight)  # fake as it is
        with unset_fake_temporarily():  # bitsandbytes' make tables, whose numbers they look at
            optimizer = make_optimizer(attached, case.settings.training, case.settings.learning_rate, by_weight=by_weight,
                                       rate_factor=lambda name: case.method.rate_factor(name, case.settings.method), decays=case.method.decays,
                                       fused=takes_fused(case.device, loss_scaled=case.compute is torch.float16))
        if by_weight:
            by_weight.clipping = "each" if by_weight.clipping == "measured" else by_weight.clipping  # the pass that measures holds no more
            if _is_foreign(optimizer):
                optimizer.step = lambda: None
        if case.device == "cuda":
            _as_on_a_gpu(optimizer)
        attached.train()
        autocast = torch.autocast("cpu", dtype=case.compute, enabled=loading.is_mixed(attached, case.compute))
        with lives, elementwise.planned(lives.move) if case.device == "cpu" else nullcontext():
            for last in (False, True) if accumulates else (True,):
                lives.begin("forward")
                with autocast, _told_of_the_loss(model, lives):
                    loss = summed_loss(attached, batch) if case.layout == "trie" else _padded_loss(attached, batch, learned)
                lives.begin("backward")
                if by_weight:
                    by_weight.due = last
                with by_weight.gathering(1) if by_weight else nullcontext():
                    loss.backward()
                del loss
            lives.begin("optimizer")
            state = _steps_by_weight(by_weight, optimizer, lives) if by_weight else _step(optimizer, trained, case, lives)
        if by_weight and _is_foreign(optimizer) and _is_resident(case):
            state += state_by_experiment([(piece.shape, piece.stand_in.dtype) for pieces in by_weight.pieces.values() for piece in pieces], case)
    windows = lives.windows()
    for name in windows:  # from the second step on the state is there all the time
        windows[name]["optimizer"] = state
    return Trace({name: dict(windows[name]) for name in WINDOWS if name in windows}, *lives.works(), lives.host + sum(p.nbytes for p in resting))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of an operation that fake tensors cannot do, a page long: it comes as an exception besides."""
    told = logging.getLogger("torch._subclasses.fake_tensor")
    before, told.disabled = told.disabled, True
    try:
        yield
    finally:
        told.disabled = before


def _batch(case: Case, rows: Sequence[Example]) -> dict[str, Any]:
    if case.layout != "trie":
        return padded_batch(rows, 0)
    batch = learned_batch(build(rows))
    if by_keys(case, batch["trie"].longest):
        batch["trie"] = as_two_segments(batch["trie"])
    return batch


def _padded_loss(model: nn.Module, batch: dict[str, Any], learned: torch.Tensor) -> torch.Tensor:
    """`loss.padded_loss` with the learned places [E] given, since they cannot be found without numbers."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    wide = logits.flatten(0, 1)[learned].to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, batch["targets"].flatten()[learned], reduction="none")
    return (nll * batch["weights"].flatten()[learned]).sum()


def by_keys(case: Case, longest: int) -> bool:
    """Does attention go by the keys of segments, so that it keeps the same however many there are?"""
    config = case.config.get_text_config()
    window = getattr(config, "sliding_window", None) if _slides(config) else None
    if any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")):
        return False
    if case.device == "cuda":  # one kernel for all segments, windows included
        return head_width(config) >= flex.LEAST_WIDTH
    return not (window and window < longest)


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "use_sliding_window", True))


def as_two_segments(plan: Plan) -> Plan:
    """The same nodes with one branching in the place of many: what attention keeps is the same, and its largest call too."""
    nodes = len(plan.depth)
    below = max(((s.below - s.end, s.end) for s in plan.segments), default=(0, 0))
    first = nodes - below[0]
    if not below[0] or not 0 < first < nodes:
        return replace(plan, segments=[Segment(0, nodes, nodes)])
    return replace(plan, segments=[Segment(0, first, nodes), Segment(first, nodes, nodes)])


def segments_of(rows: Sequence[Example]) -> list[Segment]:
    trie = build(rows)
    return trie.of(trie.needed()).segments()


def attention_flops(config: Any, segments: Sequence[Segment], prefix: int = 0) -> float:
    """Of one forward pass over all layers: 4 d for each pair of a query and a key that it sees, in each head."""
    text = config.get_text_config()
    width = head_width(text)
    pairs = sum((s.end - s.start) * ((s.end - s.start + 1) / 2 + (s.below - s.end)) for s in segments)
    pairs += prefix * sum(s.end - s.start for s in segments)
    return 4.0 * width * text.num_attention_heads * text.num_hidden_layers * pairs


def _off_meta(model: nn.Module) -> None:
    """Give every tensor a storage of its own, and shared ones (a tied head) one between them; `to_empty` would part those."""
    made: dict[int, torch.Tensor] = {}

    def storage(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: storage(tensor) for name, tensor in held.items() if tensor is not None})


def _fake(value: Any, fake: FakeTensorMode) -> Any:
    if isinstance(value, torch.Tensor):
        return fake.from_tensor(value)
    if isinstance(value, Plan):
        return replace(value, **{f.name: _fake(getattr(value, f.name), fake) for f in fields(value)
                                 if isinstance(getattr(value, f.name), torch.Tensor)})
    return value


def _seed(lives: Lives, model: nn.Module, case: Case, resting: Sequence[nn.Parameter]) -> None:
    """What is there before the step, but for what rests in the host's memory."""
    elsewhere = {id(weight) for weight in resting}
    for name, parameter in model.named_parameters():
        if id(parameter) in elsewhere:
            continue
        scales = name.endswith(".scales")
        term = "quantisation" if scales else "adapter" if parameter.requires_grad and not case.method.TRAINS_ALL else "weights"
        lives.see(parameter, term)
    for buffer in model.buffers():
        lives.see(buffer, "weights")


def _streamed(model: nn.Module, lives: Lives) -> list[nn.Parameter]:
    """What is brought is weights as long as it is there. Those that rest in the host's memory."""

    class Counted(stream.Stream):
        def copied(self, host: torch.Tensor) -> torch.Tensor:
            flat = torch.empty_like(host).copy_(host)
            lives.relabel([flat], "weights")
            return flat

    stream.keep_in_host(model, torch.device("cpu"), Counted)
    return stream.resting(model)


def _moves_to_host(model: nn.Module, lives: Lives) -> None:
    """What autograd keeps is let go where it goes into the host's memory, and made anew when it is asked for."""

    class Counted(offload.InHost):
        def to_host(self, tensor: torch.Tensor) -> Any:
            lives.host += tensor.nbytes
            return tensor.shape, tensor.stride(), tensor.dtype

        def to_device(self, device: torch.device, held: Any) -> torch.Tensor:
            shape, strides, dtype = held
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    offload.keep_in_host(model, Counted)


@contextmanager
def _told_of_the_loss(model: nn.Module, lives: Lives) -> Iterator[None]:
    """When the backbone is done, the head begins."""
    handle = model.base_model.register_forward_hook(lambda *_: lives.begin("loss"))
    try:
        yield
    finally:
        handle.remove()


def _as_on_a_gpu(optimizer: torch.optim.Optimizer) -> None:
    """torch's own optimizers take all weights at once there, and so hold temporaries of all of them."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def _step(optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], case: Case, lives: Lives) -> int:
    """Take the step; the bytes of the state it leaves."""
    name = case.settings.training.optimizer
    if name in SEARCHERS:
        return _searcher_state(optimizer, trained)
    try:
        optimizer.step()
    except RuntimeError:  # fake tensors have no kernels of another library, and no numbers: its state by an experiment, its work by none
        return _is_resident(case) * state_by_experiment([(tuple(p.shape), p.dtype) for p in trained], case)
    return _is_resident(case) * _kept(optimizer, lives)


def _kept(optimizer: torch.optim.Optimizer, lives: Lives) -> int:
    leaves = pytree.tree_leaves(dict(optimizer.state))
    leaves += [value for leaf in leaves if type(leaf).__name__.endswith("Projector") for value in pytree.tree_leaves(vars(leaf))]
    kept = [t for t in leaves if isinstance(t, torch.Tensor)]
    lives.relabel(kept, None)
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())


def _steps_by_weight(by_weight: ByWeight, optimizer: torch.optim.Optimizer, lives: Lives) -> int:
    """Take what steps are left to take, of weights one at a time; the bytes of the state they leave."""
    if not by_weight.in_backward:
        by_weight.step(1)
    torch.empty(1)  # so that this part of the step is there
    return _kept(optimizer, lives)


def _is_foreign(optimizer: torch.optim.Optimizer) -> bool:
    """Does it have kernels of its own, which fake tensors cannot run through?"""
    return not type(optimizer).__module__.startswith(("torch.", "transformers.", "galore_torch.", "apollo_torch."))


def _is_resident(case: Case) -> bool:
    """Paged states of bitsandbytes lie in the host's memory as soon as a GPU's is short."""
    return not (case.device == "cuda" and case.settings.training.optimizer.startswith("paged"))


def _searcher_state(optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]) -> int:
    """L-BFGS joins all gradients to one vector, and keeps two for each step it remembers, and a few to search along."""
    history = optimizer.param_groups[0]["history_size"]
    return (2 * history + 6) * sum(p.numel() * p.element_size() for p in trained)


@functools.lru_cache(maxsize=64)
def _state_of(shape: tuple[int, ...], dtype: torch.dtype, training: str) -> int:
    from weitiao.settings.training import TrainingSettings

    settings = TrainingSettings.model_validate_json(training)
    module = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(shape, dtype=dtype))})
    module["weight"].grad = torch.zeros(shape, dtype=dtype)
    optimizer = make_optimizer(module, settings, 1e-4)
    optimizer.step()
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(dict(optimizer.state)) if isinstance(t, torch.Tensor))


def state_by_experiment(trained: Sequence[tuple[tuple[int, ...], torch.dtype]], case: Case) -> int:
    """A real step on a small tensor of each number of dimensions; its state a weight is taken for the rest. trained: shapes and types."""
    small = {1: (8192,), 2: (128, 128)}
    total = 0.0
    with unset_fake_temporarily():
        for shape, dtype in trained:
            tried = small[1 if len(shape) < 2 else 2]
            state = _state_of(tried, dtype, case.settings.training.model_dump_json(exclude_defaults=True))
            total += state / np.prod(tried) * np.prod(shape)
    return round(total)


class Lives(TorchDispatchMode):
    """When each storage is born and gone, and in which part of a step; what each operation computes and moves.

    A storage is told by its Python object, which torch keeps as long as the storage itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.part = "before"
        self.parts: list[tuple[int, str]] = []  # (first tick, part)
        self.born: list[int] = []
        self.gone: list[int | None] = []
        self.size: list[int] = []
        self.term: list[str | None] = []
        self.known: dict[int, tuple[int, Any]] = {}  # storage -> (its number here, the reference that tells its end)
        self.work: dict[str, Work] = defaultdict(Work)
        self.host = 0  # bytes that the last pass keeps in the host's memory

    def begin(self, part: str) -> None:
        self.part = part
        self.host *= part != "forward"
        self.parts.append((self.clock, part))

    def move(self, moved: int) -> None:
        """Bytes that a kernel of our own would read and write, which nothing dispatches."""
        self.work[self.part] += Work(moved=float(moved), calls=1.0)

    def see(self, tensor: torch.Tensor, term: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        number = len(self.born)
        self.known[key] = number, weakref.ref(storage, functools.partial(self._end, key, number))
        self.born.append(self.clock)
        self.gone.append(None)
        self.size.append(storage.nbytes())
        self.term.append(term)

    def _end(self, key: int, number: int, _: Any) -> None:
        self.gone[number] = self.clock
        self.known.pop(key, None)

    def relabel(self, tensors: Sequence[torch.Tensor], term: str | None) -> None:
        """These serve for something else than what they were born in; None: they are counted elsewhere."""
        for tensor in tensors:
            if (found := self.known.get(tensor.untyped_storage()._cdata)) is not None:
                self.term[found[0]] = term

    TERM_OF = {"forward": "activations", "loss": "logits"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.clock += 1
        term = self.TERM_OF.get(self.part, "work space")
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self.see(tensor, term)
        self.work[self.part] += _work(func, args, kwargs, out, made)
        return out

    def windows(self) -> dict[str, dict[str, float]]:
        """Bytes by term at the worst moment of each part."""
        end = self.clock + 1
        terms = sorted({t for t in self.term if t})
        alive = np.zeros((len(terms), end + 1))
        for born, gone, size, term in zip(self.born, self.gone, self.size, self.term, strict=True):
            if term:
                alive[terms.index(term), born] += size
                alive[terms.index(term), min(end, gone if gone is not None else end)] -= size
        alive = alive.cumsum(axis=1)[:, :end]
        total = alive.sum(axis=0)
        found: dict[str, dict[str, float]] = {}
        for name, start, stop in self._spans(end):
            if stop > start:
                worst = start + int(total[start:stop].argmax())
                found[name] = {term: float(alive[i, worst]) for i, term in enumerate(terms)}
        return found

    def _spans(self, end: int) -> Iterator[tuple[str, int, int]]:
        """(window, first tick, one past the last); of parts that come twice, the second."""
        stops = [start for start, _ in self.parts[1:]] + [end]
        for (start, part), stop in zip(self.parts, stops):
            if part == "backward":
                middle = (start + stop) // 2
                yield WINDOWS[2], start, middle
                yield WINDOWS[3], middle, stop
            else:
                yield part, start, stop

    def works(self) -> tuple[Work, Work]:
        times = max(1, sum(part == "forward" for _, part in self.parts))
        passing = sum((self.work[part] for part in ("forward", "loss", "backward")), Work()) * (1 / times)
        return passing, self.work["optimizer"]


# Nothing is read or written by these, nor by prim::device, which asks where a tensor is.
UNMOVED = {f"aten::{name}" for name in ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}


def _work(func: Any, args: Any, kwargs: Any, out: Any, made: Sequence[torch.Tensor]) -> Work:
    name = func._schema.name
    if func.is_view or name.startswith("prim::") or name in UNMOVED:
        return Work()
    count = flop_registry.get(torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket)
    flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
    read = sum(t.numel() * t.element_size() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    written = sum(t.numel() * t.element_size() for t in made)
    return Work(flops, float(read + written), 1.0)
