"""Halves and packed weights in the loop: what is skipped, what goes on exactly, what an evaluation leaves unchanged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import tiny_model
from test_loop import Recorder, losses, make_rows

from weitiao import config
from weitiao.data.templates import load_template
from weitiao.errors import SettingError, TrainingStopped
from weitiao.model import load as loading
from weitiao.model import quantize
from weitiao.model.methods import METHODS
from weitiao.settings.model import ModelSettings
from weitiao.train.folder import Checkpoint
from weitiao.train.loop import MOST_SKIPPED, Training, skip_message
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import prove
from weitiao.train.train import accelerator_for, make_accelerator

NF4 = {"quantize": "nf4"}
INT8 = {"quantize": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(path)  # as large as bitsandbytes repacks
    return path


def training(tokenizer, folder, model=None, method="lora", precision="fp32", eval_rows=(), checkpointing=False, safe=True,
             **values) -> Training:
    """A run on the tiny model, loaded as `model` says: quantize, dtype, …"""
    if model and "quantize" in model:
        pytest.importorskip("bitsandbytes")
    settings = config.parse({
        "data": "rows.jsonl", "method": method, "model": {"name": "x", **(model or {})},
        "training": {"batch_size": 6, "epochs": 2, "learning_rate": 1e-2, "precision": precision, **values},
        "evaluation": {"every": 2},
    })
    made, accelerator = METHODS[method], make_accelerator(settings)
    compute = loading.run_dtype(settings, made.TRAINS_ALL)
    loaded = loading.load_model(folder, settings.model, loading.weight_dtype(settings.model.dtype, made.TRAINS_ALL, compute), compute)
    if not safe:
        for _, layer in quantize.packed_layers(loaded):
            layer.support_avx512bf16_for_cpu = True
    learn_on_tries(loaded)
    template = load_template("auto", tokenizer)
    tuned = made.attach(loaded, settings.method, 0, template.tokenizer)
    if checkpointing:
        loading.checkpoint_activations(tuned)
    return Training(settings, None, tuned, made, "base", template, make_rows(), eval_rows, accelerator, "trie", 4096, Recorder())


def fitted(*args, **more) -> Training:
    made = training(*args, **more)
    assert made.fit()
    return made


# ---------------------------------------------------------------------------------------------------------------- fp16


def test_fp16_computes_in_fp16_on_a_cpu_too(tokenizer, folder):
    """accelerate alone takes fp16 there, and computes in float32 without a word."""
    accelerator = accelerator_for(torch.float16, cpu=True)
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float16
    half, whole = fitted(tokenizer, folder, precision="fp16"), fitted(tokenizer, folder)
    assert half.accelerator.scaler.is_enabled()
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=5e-3)
    assert {p.dtype for p in half.parameters} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_under_loss_scaling_are_those_of_float32(tokenizer, folder, method):
    made = [fitted(tokenizer, folder, method=method, precision=p, steps=3, learning_rate=1e-5) for p in ("fp16", "fp32")]
    norms = [[line["grad_norm"] for line in one.listener.lines] for one in made]
    assert norms[0] == pytest.approx(norms[1], rel=3e-3)


def overflowing(made: Training, steps) -> Training:
    """The gradient of one weight is infinite in these steps."""
    made.parameters[0].register_hook(lambda grad: grad * float("inf") if made.step + 1 in steps else grad)
    return made


def test_a_step_that_overflows_is_skipped_and_told_and_neither_weights_nor_schedule_move(tokenizer, folder):
    made = overflowing(training(tokenizer, folder, precision="fp16"), {3})
    made.fit(last=2)
    before = [p.detach().clone() for p in made.parameters]
    rate, scale = made.scheduler.get_last_lr(), made.accelerator.scaler.get_scale()
    made.fit(last=3)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))
    assert made.scheduler.get_last_lr() == rate
    assert made.accelerator.scaler.get_scale() == scale / 2
    line = made.listener.lines[-1]
    assert line["skipped"] and line["grad_norm"] is None and math.isfinite(line["loss"])
    json.dumps(line, allow_nan=False)
    assert made.listener.messages == [skip_message(3, 1, scale / 2)]
    made.fit()
    assert made.skipped == 0 and not any("skipped" in line for line in made.listener.lines[3:])


def test_many_skipped_steps_in_a_row_stop_the_run(tokenizer, folder):
    made = overflowing(training(tokenizer, folder, precision="fp16", epochs=10), range(1, 1000))
    with pytest.raises(TrainingStopped, match=f"Step {MOST_SKIPPED}: .*overflowed float16 for the {MOST_SKIPPED}th time in a row"):
        made.fit()
    assert "no weight was changed" in skip_message(5, MOST_SKIPPED - 1, 2.0)


def test_without_loss_scaling_a_gradient_that_is_not_finite_still_stops(tokenizer, folder):
    with pytest.raises(TrainingStopped, match="Step 1: the gradient is"):
        overflowing(training(tokenizer, folder, precision="bf16"), {1}).fit()


def test_a_resumed_fp16_run_is_the_uninterrupted_one_skipped_steps_included(tokenizer, folder, tmp_path):
    whole = overflowing(training(tokenizer, folder, precision="fp16"), {2, 3, 6})
    whole.fit()
    first = overflowing(training(tokenizer, folder, precision="fp16"), {2, 3, 6})
    first.fit(last=3)
    (tmp_path / "3").mkdir()
    first._write(tmp_path / "3")
    second = overflowing(training(tokenizer, folder, precision="fp16"), {2, 3, 6})
    second.restore(Checkpoint(tmp_path / "3", 3))
    assert second.skipped == 2 and second.accelerator.scaler.get_scale() == first.accelerator.scaler.get_scale()
    second.fit()
    assert second.listener.lines == whole.listener.lines[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))


def test_float16_weights_train_only_with_an_epsilon_that_float16_knows(tokenizer, folder, monkeypatch):
    def settings(epsilon, method="full", **more):
        return config.parse({"data": "x", "method": method, "model": {"dtype": "float16"}, "training": {"adam_epsilon": epsilon, **more}})

    for epsilon in (1e-8, 1e-6, 9e-5):
        with pytest.raises(SettingError, match="training.adam_epsilon=1e-4 works"):
            settings(epsilon)
    settings(1e-4)
    settings(1e-8, "lora")  # adapters are float32
    settings(1e-8, optimizer="sgd", learning_rate=0.1)
    with pytest.raises(SettingError, match="computes in another type"):
        settings(1e-4, precision="bf16")
    made = training(tokenizer, folder, {"dtype": "float16"}, "full", "auto", adam_epsilon=1e-4, learning_rate=1e-3, epochs=6)
    assert made.accelerator.scaler is None and {p.dtype for p in made.parameters} == {torch.float16}
    assert not loading.is_mixed(made.plain_model, torch.float16)
    made.fit()
    assert losses(made)[-1] < losses(made)[0] - 0.2
    monkeypatch.setattr(config, "LEAST_HALF_EPSILON", 0.0)
    broken = training(tokenizer, folder, {"dtype": "float16"}, "full", "auto", learning_rate=1e-3)
    with pytest.raises(TrainingStopped):  # the reason for the refusal
        broken.fit()


def test_lora_on_a_float16_base_trains_with_float32_adapters(tokenizer, folder):
    made = fitted(tokenizer, folder, {"dtype": "float16"}, precision="fp16")
    assert {p.dtype for p in made.parameters} == {torch.float32}
    assert losses(made) == pytest.approx(losses(fitted(tokenizer, folder)), rel=1e-2)


def test_auto_is_bf16_only_where_the_hardware_has_it(monkeypatch):
    for gpu, hardware, expected in ((False, True, torch.float32), (True, True, torch.bfloat16), (True, False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, hardware=hardware: including_emulation or hardware)
        assert loading.compute_dtype("auto") is expected
    assert [loading.compute_dtype(p) for p in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("model", [NF4, {"quantize": "fp4", "double_quantize": False}, INT8], ids=["nf4", "fp4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_in_mid_run_leaves_the_next_losses_unchanged_bit_for_bit(tokenizer, folder, model, precision):
    quiet, measuring = (fitted(tokenizer, folder, model, precision=precision, eval_rows=rows) for rows in ((), make_rows(5, seed=9)))
    assert [line["step"] for line in measuring.listener.evaluations] == [2, 4, 6, 8]
    assert measuring.listener.lines == quiet.listener.lines
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters, measuring.parameters, strict=True))
    assert losses(quiet)[-1] < losses(quiet)[0]


def repacks_here() -> bool:
    """Does bitsandbytes pack 4-bit weights anew on this CPU?"""
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return False
    return bool(has_avx512bf16())


@pytest.mark.skipif(not repacks_here(), reason="no AVX512-BF16 here")
def test_without_our_guard_an_evaluation_does_change_them(tokenizer, folder):
    """What the guard is there for: should this fail, bitsandbytes has been mended and the guard may go."""
    quiet, measuring = (fitted(tokenizer, folder, NF4, safe=False, eval_rows=rows) for rows in ((), make_rows(5, seed=9)))
    assert losses(measuring)[:2] == losses(quiet)[:2]
    assert losses(measuring) != losses(quiet)


@pytest.mark.parametrize("model", [NF4, INT8], ids=["nf4", "int8"])
def test_checkpointing_on_a_packed_base_changes_no_loss(tokenizer, folder, model):
    plain, checkpointed = (fitted(tokenizer, folder, model, checkpointing=on) for on in (False, True))
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


def test_packed_weights_train_as_the_plain_ones_they_stand_for(tokenizer, folder):
    """The judge: the same steps on a plain model that holds the unpacked weights."""
    packed = training(tokenizer, folder, NF4)
    plain = training(tokenizer, folder)
    fresh = loading.load_model(folder, ModelSettings(name="x", **NF4), torch.float32)
    unpacked = loading.load_model(folder, ModelSettings(name="x"), torch.float32)
    quantize.unpack_into(unpacked, fresh)
    values = dict(unpacked.named_parameters())
    inner = loading.causal_lm(plain.plain_model)
    for name, parameter in inner.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(values[name.replace(".base_layer", "")])
    packed.fit(), plain.fit()
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(("model", "precision"), [
    (NF4, "fp32"), (NF4, "bf16"), (NF4, "fp16"), (INT8, "fp32"), (INT8, "bf16"), ({}, "fp16"), ({"dtype": "float16"}, "fp16")],
    ids=str)
def test_the_trie_is_proven_on_packed_and_half_weights_and_a_leak_is_still_seen(tokenizer, folder, model, precision, monkeypatch):
    made = training(tokenizer, folder, model, precision=precision)
    examples = [e for row in made.rows for e in row.examples]
    compute = loading.compute_dtype(precision)
    good = prove(made.plain_model, examples, compute)
    assert good.passed and good.leak_max == 0, good
    inner = loading.causal_lm(made.plain_model).model
    forward = inner.forward

    def leaking(*args, **kwargs):  # each node reads a little of the one before it in the layout, whoever's child it is
        out = forward(*args, **kwargs)
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden + 0.1 * hidden.roll(1, dims=1)
        return out

    monkeypatch.setattr(inner, "forward", leaking)
    assert not prove(made.plain_model, examples, compute).passed


def test_a_proof_of_eight_bits_multiplies_exactly_and_puts_all_back(tokenizer, folder):
    """As a GPU trains: inputs rounded to 8 bits, outliers found over the whole batch."""
    made = training(tokenizer, folder, {"quantize": "int8", "int8_threshold": 3.0})
    bits = pytest.importorskip("bitsandbytes")

    def as_on_a_gpu(layer, x):
        layer.state.is_training = False
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        return bits.matmul(x, layer.weight, bias=layer.bias, state=layer.state)

    kind = type(next(quantize.packed_layers(made.plain_model))[1])
    forward = kind.forward
    kind.forward = as_on_a_gpu
    try:
        ids = torch.arange(4, 60)[None]
        with torch.no_grad():
            together = made.plain_model(ids.reshape(2, 28)).logits[0]
            alone = made.plain_model(ids.reshape(2, 28)[:1]).logits[0]
        assert (together - alone).abs().max() > 1e-4  # what the proof must not be blurred by
        assert prove(made.plain_model, [e for row in made.rows for e in row.examples], torch.float32).passed
        assert not any("forward" in vars(layer) for _, layer in quantize.packed_layers(made.plain_model))
    finally:
        kind.forward = forward
