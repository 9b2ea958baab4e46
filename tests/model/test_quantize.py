"""Packed weights: loaded, counted, unpacked, moved nowhere; and what is refused before anything is loaded."""

from __future__ import annotations

import builtins
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from weitiao.errors import SettingError
from weitiao.model import load as loading
from weitiao.model import quantize
from weitiao.settings.model import ModelSettings

PLAIN = SimpleNamespace()  # the config of a checkpoint that is not quantised
KINDS = [dict(quantize="nf4"), dict(quantize="nf4", double_quantize=False), dict(quantize="fp4"), dict(quantize="int8")]


def settings(**values) -> ModelSettings:
    return ModelSettings(name="x", **values)


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model(request.param).save_pretrained(path)
    return path


def loaded(folder, dtype=torch.float32, compute=None, **values):
    if values.get("quantize"):
        pytest.importorskip("bitsandbytes")
    return loading.load_model(folder, settings(**values), dtype, compute)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_linear_layers_but_the_head_are_packed_and_count_as_what_they_stand_for(folder, kind):
    plain, packed = loaded(folder), loaded(folder, **kind)
    linears = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    head = next(n for n, m in plain.named_modules() if m is plain.get_output_embeddings())
    assert sorted(n for n, _ in quantize.packed_layers(packed)) == sorted(set(linears) - {head})
    assert sum(map(quantize.true_numel, packed.parameters())) == sum(p.numel() for p in plain.parameters())
    assert quantize.is_quantized(packed) and not quantize.is_quantized(plain)
    assert packed.is_quantized and packed.get_output_embeddings().weight.dtype is torch.float32


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_unpacked_weights_compute_what_the_packed_ones_did(folder, kind):
    plain, packed = loaded(folder).eval(), loaded(folder, **kind)
    # In train mode: what 8 bits round besides, when a CPU measures, no plain model can show.
    packed.train() if kind["quantize"] == "int8" else packed.eval()
    for module in packed.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        before, expected = plain(ids).logits, packed(ids).logits
        quantize.unpack_into(plain, packed)
        after = plain(ids).logits
    assert (after - expected).abs().max() < 5e-6
    assert (before - expected).abs().max() > 5e-5


def test_unpacking_keeps_float32_where_the_checkpoint_was_loaded_in_half(folder):
    packed = loaded(folder, torch.bfloat16, torch.bfloat16, quantize="nf4")
    _, layer = next(quantize.packed_layers(packed))
    weight = quantize.plain_weight(layer)
    assert weight.dtype is torch.float32 and not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_forward_in_eval_mode_leaves_the_gradients_as_they_were(folder, kind):
    model = loaded(folder, **kind)
    ids = torch.arange(4, 40)[None]

    def gradient():
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids).logits.float().logsumexp(-1).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(ids)
    assert torch.equal(gradient(), before)


def test_no_layer_may_be_repacked_whatever_this_cpu_can(folder, monkeypatch):
    nn = pytest.importorskip("bitsandbytes.nn.modules")
    if not hasattr(nn, "has_avx512bf16"):
        pytest.skip("this bitsandbytes does not repack")
    monkeypatch.setattr(nn, "has_avx512bf16", lambda: True)
    model = loaded(folder, quantize="nf4")
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in quantize.packed_layers(model))


def test_what_is_not_finite_is_found_in_packed_weights_too(folder, tmp_path):
    for bad, kind in ((float("inf"), "nf4"), (float("nan"), "nf4"), (float("inf"), "int8"), (float("nan"), "int8")):
        model = loaded(folder)
        name = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
        with torch.no_grad():
            model.get_submodule(name).weight[3, 3] = bad
        assert quantize.unsound(model) == f"{name}.weight"
        model.save_pretrained(tmp_path / f"{bad}{kind}")
        assert quantize.unsound(loaded(tmp_path / f"{bad}{kind}", quantize=kind)) == f"{name}.weight"
    assert quantize.unsound(loaded(folder, quantize="nf4")) is None


def test_packed_weights_are_not_moved_and_what_is_added_is(folder):
    packed = loaded(folder, quantize="nf4")
    before = [id(p) for p in packed.parameters()]
    assert loading.place(packed, torch.device("cpu")) is packed
    assert [id(p) for p in packed.parameters()] == before


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_is_passed_on(folder, device_map):
    for kind in ({}, {"quantize": "nf4"}):
        model = loaded(folder, device_map=device_map, **kind)
        with torch.no_grad():
            assert model(torch.arange(4, 12)[None]).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- refused


def refused(match: str, made: ModelSettings, config=PLAIN, trains_all=False, processes=1) -> None:
    with pytest.raises(SettingError, match=match):
        quantize.refuse_unfit(made, config, trains_all, processes)


def test_training_packed_weights_themselves_is_refused_and_lora_named():
    refused("method=lora", settings(quantize="nf4"), trains_all=True)
    refused("checkpoint is quantised.*\n.*\n.*method=lora", settings(), SimpleNamespace(quantization_config={"bits": 4}), trains_all=True)


def test_quantising_twice_is_refused():
    refused("quantised already", settings(quantize="int8"), SimpleNamespace(quantization_config={"bits": 4}))
    quantize.refuse_unfit(settings(), SimpleNamespace(quantization_config={"bits": 4}), False)


def test_a_missing_bitsandbytes_is_told_with_its_cure(monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(r"pip install 'weitiao\[bitsandbytes\]'", settings(quantize="nf4"))
    quantize.refuse_unfit(settings(), PLAIN, False)


def test_device_maps_that_cannot_be():
    refused("2 processes", settings(device_map="auto"), processes=2)
    quantize.refuse_unfit(settings(), PLAIN, False, processes=2)
    for name in ("autp", "cuda:99"):
        with pytest.raises(SettingError, match="Expected auto, balanced"):
            loading.home(settings(device_map=name))
    assert loading.home(settings(device_map="cpu")).type == "cpu"


# --------------------------------------------------------------------------------------------------------- what is told


def test_how_weights_are_held_is_told():
    assert quantize.describe(settings(), torch.bfloat16) == "bfloat16"
    assert quantize.describe(settings(quantize="nf4"), torch.bfloat16) == "nf4 (double quantised)"
    assert quantize.describe(settings(quantize="fp4", double_quantize=False), torch.bfloat16) == "fp4"
    assert quantize.describe(settings(quantize="int8"), torch.bfloat16) == "int8"


def test_products_in_another_dtype_are_told_in_a_line_and_the_usual_ones_are_not(folder):
    plain = loaded(folder)
    for compute in (torch.float32, torch.bfloat16, torch.float16):
        assert quantize.dtype_notes(plain, compute) == []
    (note,) = quantize.dtype_notes(plain.half(), torch.float32)
    assert "held in float16 and multiply in it, not in float32" in note and "model.dtype=float32" in note
    (note,) = quantize.dtype_notes(plain, torch.bfloat16)
    assert "cast to bfloat16 for every product" in note
    assert quantize.dtype_notes(plain, torch.float16) == []


def test_four_bits_that_multiply_in_another_dtype_are_told(folder):
    packed = loaded(folder, torch.bfloat16, torch.float32, quantize="nf4")
    (note,) = quantize.dtype_notes(packed, torch.bfloat16)
    assert "4-bit matrices multiply in float32" in note and "not in bfloat16" in note
    assert quantize.dtype_notes(loaded(folder, torch.bfloat16, torch.bfloat16, quantize="nf4"), torch.bfloat16) == []


def test_eight_bits_are_told_in_one_line_and_their_warnings_are_not_shown(folder, caplog):
    packed = loaded(folder, quantize="int8").eval()
    (note,) = quantize.dtype_notes(packed, torch.float32)
    assert "8-bit matrices" in note and "rounded to float16" in note
    with caplog.at_level(logging.WARNING), torch.no_grad():
        packed(torch.arange(4, 12)[None])
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [r.getMessage() for r in caplog.records] == ["something else"]
