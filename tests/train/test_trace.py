"""A traced step against the step itself: bytes and what is trained; few layers against all; packed weights by their sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from weitiao.config import parse
from weitiao.model.methods import METHODS
from weitiao.train import trace as tracing
from weitiao.train.trace import TERMS, Case, as_two_segments, attention_flops, segments_of, trace
from weitiao.trie import Example, Segment, build


def rows(count: int = 6, shared: int = 20, own: int = 12) -> list[Example]:
    rng = np.random.default_rng(0)
    weights = np.r_[np.zeros(shared), np.ones(own)].astype(np.float32)
    return [Example(np.r_[np.arange(5, 5 + shared), rng.integers(4, 250, own)].astype(np.int32), weights, i) for i in range(count)]


def case(architecture: str = "llama", layers: int = 8, **words) -> Case:
    config = tiny_config(architecture)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = (list(kinds) * layers)[:layers]
    settings = parse({"data": "none"} | {k: v for k, v in words.items() if k in ("method", "training", "model")})
    compute = {"bf16": torch.bfloat16}.get(settings.training.precision, torch.float32)
    more = {k: v for k, v in words.items() if k in ("layout", "device", "checkpointing")}
    return Case(config, settings, METHODS[settings.method.name], compute, **({"checkpointing": False} | more))


SETTINGS = {
    "lora": {}, "lora bf16": {"training": {"precision": "bf16"}}, "full": {"method": "full"},
    "full bf16": {"method": "full", "training": {"precision": "bf16"}}, "checkpointing": {"checkpointing": True},
    "prompt": {"method": "prompt"}, "prefix": {"method": "prefix"}, "adapter": {"method": "adapter"}, "padded": {"layout": "padded"},
    "nf4": {"model": {"quantize": "nf4"}}, "adafactor": {"method": "full", "training": {"optimizer": "adafactor"}},
    "a GPU's ways": {"device": "cuda"}, "sgd": {"training": {"optimizer": "sgd", "learning_rate": 0.1}},
}


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS.keys())
def test_layers_that_are_alike_are_a_line(words):
    """Extrapolated from 2 and 4 layers = all 8 traced: every term at the worst moment, and the whole of every window."""
    made = case(**words)
    short, whole = trace(made, rows(), uniform=True), tracing._trace(made, 8, rows(), False)
    assert short.windows.keys() == whole.windows.keys()
    for term in TERMS:
        assert short.terms.get(term, 0) == pytest.approx(whole.terms.get(term, 0), rel=0.01, abs=4096), term
    for name in whole.windows:
        assert sum(short.windows[name].values()) == pytest.approx(sum(whole.windows[name].values()), rel=0.05), name
    assert short.work.flops == pytest.approx(whole.work.flops)


def test_layers_that_are_not_alike_are_all_traced(monkeypatch):
    counted = []
    true = tracing._trace
    monkeypatch.setattr(tracing, "_trace", lambda c, layers, *more: counted.append(layers) or true(c, layers, *more))
    trace(case("llama", method={"name": "full", "last_layers": 2}), rows())
    trace(case("gemma3"), rows())
    trace(case("llama"), rows())
    assert counted == [8, 8, 2, 4]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "qwen2"])
def test_weights_gradients_and_state_are_those_of_the_model(architecture):
    """All weights in float32 with Adam: 4 bytes each, their gradients as many, their state twice as many and a count."""
    made = case(architecture, layers=4, method="full")
    traced = trace(made, rows())
    model, _ = tracing.build_model(made, 4)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    stepping = traced.windows["optimizer"]
    assert stepping["weights"] == 4 * parameters + buffers
    assert stepping["gradients"] == 4 * parameters
    assert 8 * parameters <= stepping["optimizer"] <= 8 * parameters + 8 * len(list(model.parameters()))


def test_a_traced_step_keeps_what_a_real_one_keeps():
    """Bytes saved for the backward pass, counted on real tensors by autograd's own hooks, are the traced activations."""
    from weitiao.data.batch import trie_batch
    from weitiao.model import fused
    from weitiao.model import load as loading
    from weitiao.train.loss import learn_on_tries

    made = case("llama", layers=4, method="full")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(copy.deepcopy(made.config), dtype=torch.float32)
    loading.learn_attention(model)
    learn_on_tries(model)
    fused.fuse(model)
    batch = trie_batch(build(rows()))
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(**batch, return_hidden=True)
    assert hidden.requires_grad
    traced = trace(made, rows(), uniform=False).windows["loss"]["activations"]
    assert traced == pytest.approx(sum(kept.values()), rel=0.1)


def test_gradients_are_there_while_the_next_pass_is_computed():
    made = case("llama", layers=4, method="full")
    alone, one_of_many = trace(made, rows()), trace(made, rows(), accumulates=True)
    assert alone.windows["forward"].get("gradients", 0) == 0
    assert one_of_many.windows["forward"]["gradients"] == one_of_many.windows["optimizer"]["gradients"] > 0
    assert one_of_many.peak > alone.peak


def test_checkpointing_keeps_little():
    kept, recomputed = (trace(case(checkpointing=on), rows()) for on in (False, True))
    assert recomputed.windows["loss"]["activations"] < kept.windows["loss"]["activations"] / 3
    assert recomputed.work.flops > 1.2 * kept.work.flops


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("nf4", 4)])
def test_packed_weights_have_the_bytes_that_bitsandbytes_gives_them(quantize, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = parse({"data": "none", "model": {"quantize": quantize}}).model
    features = (128, 256)
    packed = tracing.Packed(features, None, settings, torch.float32)
    assert packed.weight.numel() == 128 * 256 * bits // 8
    if quantize == "nf4":
        weight = bitsandbytes.nn.Params4bit(torch.randn(256, 128), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
        state = weight.quant_state
        held = sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax, state.state2.code, state.offset))
        assert weight.numel() == packed.weight.numel() and packed.scales.numel() == held
    else:
        assert packed.scales.numel() == 4 * 256


def test_an_optimizer_that_cannot_be_traced_is_tried_on_a_small_tensor():
    made = case("llama", layers=4, method="full", training={"optimizer": "adamw_torch"})
    parameters = [((64, 100), torch.float32), ((50,), torch.float32)]
    assert tracing.state_by_experiment(parameters, made) == pytest.approx(8 * 6450, rel=0.01)


def test_a_state_in_8_bits_takes_less():
    pytest.importorskip("bitsandbytes", reason="it brings the optimizer")
    plain, packed = (trace(case("llama", layers=4, method="full", training={"optimizer": name}), rows()) for name in ("adamw", "adamw_bnb_8bit"))
    share = packed.windows["optimizer"]["optimizer"] / plain.windows["optimizer"]["optimizer"]
    assert 0.25 <= share < 0.8  # matrices of less than 4,096 weights, as most of this model's, stay in float32


def test_two_segments_stand_for_many():
    from weitiao.data.batch import trie_batch

    plan = trie_batch(build(rows()))["trie"]
    assert len(plan.segments) == 7
    assert as_two_segments(plan).segments == [Segment(0, 20, 92), Segment(20, 92, 92)]


def test_attention_is_counted_by_the_pairs_that_see_each_other():
    """4 d for each pair of a query and a key; 20 shared tokens, 6 x 12 behind them, of which the last are not computed."""
    config = tiny_config("llama")
    width = config.hidden_size // config.num_attention_heads
    pairs = 20 * 21 / 2 + 20 * 66 + 6 * 11 * 12 / 2
    assert attention_flops(config, segments_of(rows())) == 4 * width * config.num_attention_heads * config.num_hidden_layers * pairs


def test_the_work_of_a_step_is_that_of_its_products():
    """Forward 2, backward 4 flops a weight and node where all is trained: the linears of the layers, and the head on learned edges."""
    made = case("llama", layers=4, method="full")
    model, _ = tracing.build_model(made, 4)
    linears = sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name)
    head = model.get_output_embeddings().weight.numel()
    nodes = int(build(rows()).needed().sum())
    assert trace(made, rows()).work.flops == pytest.approx(6 * (linears * nodes + head * 72), rel=0.03)


STEPPED = {
    "stochastic": {}, "compensated": {"rounding": "compensated"}, "inside": {"step_in_backward": True},
    "inside, 8 bits": {"step_in_backward": True, "optimizer": "adamw_bnb_8bit"}, "adafactor": {"optimizer": "adafactor"},
}


@pytest.mark.parametrize("words", STEPPED.values(), ids=STEPPED.keys())
def test_weights_stepped_one_at_a_time_have_their_state_counted(words):
    """bf16: 2 bytes a weight, gradients too unless they are let go; Adam's two means in float32; the other half of a weight."""
    if "8bit" in words.get("optimizer", ""):
        pytest.importorskip("bitsandbytes", reason="it brings the optimizer")
    made = case("llama", layers=4, method="full", model={"name": "tiny", "dtype": "bfloat16"}, training=words)
    traced = trace(made, rows())
    parameters = sum(p.numel() for p in tracing.build_model(made, 4)[0].parameters())
    stepping = traced.windows["optimizer"]
    inside = "step_in_backward" in words
    assert stepping.get("gradients", 0) == pytest.approx(0 if inside else 2 * parameters, rel=0.05)
    expected = {"stochastic": 8, "compensated": 10, "inside": 8}
    for name, bytes_a_weight in expected.items():
        if STEPPED[name] is words:
            assert stepping["optimizer"] == pytest.approx(bytes_a_weight * parameters, rel=0.02)
    if words.get("optimizer") == "adafactor":
        assert 0 < stepping["optimizer"] < parameters
    if inside:
        assert traced.windows["backward, upper half"]["gradients"] < parameters  # not all of them: half of their 2 bytes each


def test_paged_states_are_not_the_gpus():
    pytest.importorskip("bitsandbytes", reason="it brings the optimizer")
    words = {"method": "full", "training": {"optimizer": "paged_adamw_8bit"}}
    assert trace(case("llama", layers=4, device="cuda", **words), rows()).windows["optimizer"]["optimizer"] == 0
    assert trace(case("llama", layers=4, **words), rows()).windows["optimizer"]["optimizer"] > 0


def test_what_only_asks_or_makes_room_moves_nothing():
    lives = tracing.Lives()
    with lives:
        lives.begin("forward")
        x = torch.ones(64, 64)
        before = lives.works()[0].moved
        x.new_empty(64, 64), torch.empty_like(x), torch.empty_strided((64, 64), (1, 64)), torch.ops.prim.device.default(x)
        assert lives.works()[0].moved == before
        x + x
    assert lives.works()[0].moved == before + 3 * 4 * 64 * 64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_our_own_kernels_are_a_cpus_and_are_counted_there(device, monkeypatch):
    """In bf16 a chunk's logits are overwritten by their gradient, where PyTorch's way makes them float32; and what is moved is counted."""
    from weitiao.model import elementwise

    if reason := elementwise.trouble():
        pytest.skip(reason)
    made = case(device=device, training={"precision": "bf16"})
    made.config.vocab_size, made.config.hidden_size, made.config.intermediate_size = 32_000, 64, 128
    ours = trace(made, rows())
    monkeypatch.setattr(elementwise, "trouble", lambda: "not built")
    theirs = trace(made, rows())
    if device == "cuda":
        assert ours == theirs
    else:
        logits = [max(window.get("logits", 0) for window in found.windows.values()) for found in (ours, theirs)]
        assert logits[0] < 0.6 * logits[1]
        assert 0.2 * theirs.work.moved < ours.work.moved < theirs.work.moved
