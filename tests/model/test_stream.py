"""A frozen base that is brought layer by layer: the same gradients to the bit, never more than two layers of it at once."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from conftest import tiny_config, tiny_model

from weitiao.config import parse
from weitiao.data.batch import padded_batch, trie_batch
from weitiao.errors import SettingError
from weitiao.model import fused, load, quantize, stream
from weitiao.model.methods import METHODS
from weitiao.train.devices import device_named
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.train.needs import Subject, Target, needs, standing
from weitiao.train.plan import made_up
from weitiao.trie import build


class Watched(stream.Stream):
    """Brings into other memory of a CPU, and knows what of it is still there."""

    def __init__(self, *given):
        self.alive: set[int] = set()
        self.most = self.count = 0
        super().__init__(*given)

    def copied(self, host):
        flat = super().copied(host)
        self.count += 1
        self.alive.add(self.count)
        weakref.finalize(flat.untyped_storage(), self.alive.discard, self.count)  # a storage lives as long as any view of it
        self.most = max(self.most, len(self.alive))
        return flat


def made(architecture="llama", method="lora", quantized=None, fuse=True, **more):
    """(wrapped model, causal LM), with the method attached and its zeros moved, so that every gradient says something."""
    model = quantized() if quantized else tiny_model(architecture, **more)
    learn_on_tries(model)
    settings = parse({"data": "none", "method": method}).method
    attached = METHODS[settings.name].attach(model, settings, 0, None)
    if fuse:
        fused.fuse(attached)
    torch.manual_seed(7)
    for parameter in attached.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    return attached.train(), load.causal_lm(attached)


def gradients(model, batches, compute=None):
    model.zero_grad()
    losses = []
    for batch in batches:
        with torch.autocast("cpu", dtype=compute or torch.bfloat16, enabled=compute is not None):
            loss = summed_loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_the_same(build_it, branching, compute=None) -> Watched:
    """Not streamed = streamed, to the bit, on tries and on padded rows, and again after that."""
    batches = [trie_batch(build(branching)), padded_batch(branching, 0)]
    whole, inner = build_it()
    load.checkpoint_activations(inner)
    expected = gradients(whole, batches, compute)
    parts, inner = build_it()
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    load.checkpoint_activations(inner, streamed=True)
    watched = stream.keep_in_host(inner, torch.device("cpu"), Watched)
    for _ in range(2):
        found = gradients(parts, batches, compute)
        assert found.keys() == expected.keys() and len(found) > 1
        for name, gradient in expected.items():
            assert torch.equal(gradient, found[name]), name
    with torch.no_grad():
        hidden = parts(**batches[0], return_hidden=True), whole(**batches[0], return_hidden=True)
        assert torch.equal(*hidden)
        assert torch.equal(parts(**batches[0], per_edge=True), whole(**batches[0], per_edge=True))
    for number in list(watched.here):
        watched.let_go(number)
    assert not watched.alive  # nothing holds on to what was brought
    assert all(torch.equal(p, before[name]) for name, p in parts.named_parameters())
    return watched


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "prompt", {"name": "lora", "dropout": 0.3}], ids=str)
def test_gradients_are_the_same_to_the_bit_and_two_layers_are_there_at_once(method, branching):
    def build_it():
        return made(method=method, num_hidden_layers=5, **({"attention_bias": True} if method == "bitfit" else {}))

    if isinstance(method, dict):  # noise of dropout: the same generator in the same order
        build_it = functools.partial(_with_seed, build_it)
    watched = is_the_same(build_it, branching)
    assert watched.most == 2
    assert watched.count > 4 * 5  # again in every backward pass


def _with_seed(build_it):
    attached, inner = build_it()
    attached.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)
    return attached, inner


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "bloom", "gemma3"])
def test_other_families_and_tied_heads(architecture, branching):
    for tied in (True, False):
        watched = is_the_same(lambda: made(architecture, tie_word_embeddings=tied), branching)
        assert watched.most == 2


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
def test_functions_that_keep_their_weights_and_casts_of_them(compute, fuse, branching):
    assert is_the_same(lambda: made(fuse=fuse, num_hidden_layers=4), branching, compute).most == 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_come_with_their_scales(kind, branching, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=4).save_pretrained(tmp_path)
    settings = parse({"data": "none", "model": {"name": "tiny", "quantize": kind}}).model

    def build_it():
        return made(quantized=lambda: load.load_model(tmp_path, settings, torch.float32))

    watched = is_the_same(build_it, branching)
    assert watched.most == 2
    _, inner = build_it()
    weight = dict(quantize.packed_layers(inner))["model.layers.0.mlp.up_proj.base_layer"].weight
    found = [tensor.dtype for tensor, _ in stream._frozen(inner.model.layers[0].mlp.up_proj.base_layer)]
    assert weight.dtype in found and (len(found) == 3 if kind == "nf4" else len(found) == 1)


def test_it_goes_with_what_is_frozen_and_with_a_gpu():
    settings = parse({"data": "none", "model": {"name": "tiny", "stream": True}})
    assert settings.training.checkpointing is True
    subject, cpu = Subject(settings, tiny_config(), made_up(16, 4)), Target("a test", "cpu", 1 << 40)
    for refused in (lambda: needs(subject, cpu), lambda: standing(subject, cpu)):
        with pytest.raises(SettingError, match="model.stream=true keeps the frozen weights in the host's memory"):
            refused()
    with pytest.raises(SettingError, match="Expected one process"):
        stream.refuse_unfit(settings, "cuda", 2)
    for words, told in (({"method": "full"}, "trains the weights themselves"), ({"method": "prefix"}, "keys and values"),
                        ({"training": {"checkpointing": False}}, "checkpointing=false says not to"),
                        ({"model": {"stream": True, "device_map": "auto"}}, "device_map=auto says where they lie")):
        with pytest.raises(SettingError, match=told):
            parse({"data": "none", "model": {"stream": True}, **words})


def test_the_plan_of_a_gpu_holds_two_layers_of_all():
    config = tiny_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8,
                         max_position_embeddings=4096)
    target = Target.of_gpu(device_named("24GB"))

    def planned(**model):
        subject = Subject(parse({"data": "none", "model": {"name": "tiny", **model}, "training": {"batch_size": 1, "checkpointing": True}}), config, made_up(256, 4))
        return needs(subject, target), standing(subject, target)

    (whole, least_whole), (streamed, least) = planned(), planned(stream=True)
    layer = (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512) * 2
    assert whole.host == 0 and streamed.host == pytest.approx(16 * layer + 2 * 300 * 512 * 2, rel=0.01)
    assert streamed.terms["weights"] == pytest.approx(2 * layer, rel=0.05)
    assert whole.terms["weights"] == pytest.approx(16 * layer + 2 * 300 * 512 * 2, rel=0.01)
    assert streamed.peak < whole.peak - 13 * layer and streamed.trainable == whole.trainable and streamed.total == whole.total
    assert least_whole - least == streamed.host


@pytest.mark.parametrize("quantized", ["none", "nf4"])
def test_a_run_is_the_run_that_is_not_streamed(quantized, model_folder, rows_file, tmp_path, monkeypatch):
    """From loading to answers, with the other memory of a CPU in a GPU's place."""
    if quantized != "none":
        pytest.importorskip("bitsandbytes")
    from weitiao.screen import Screen
    from weitiao.train.train import train

    monkeypatch.setattr(stream, "refuse_unfit", lambda *_: None)
    made_here = []
    monkeypatch.setattr(stream, "keep_in_host", functools.partial(_recorded, made_here, stream.keep_in_host))

    def run(streams):
        settings = parse({
            "data": {"train": str(rows_file), "eval": str(rows_file)}, "model": {"name": str(model_folder), "quantize": quantized, "stream": streams},
            "training": {"steps": 3, "batch_size": 8, "checkpointing": True}, "samples": {"prompts": ["What is 1 and 1?"], "max_new_tokens": 4},
            "output": str(tmp_path / f"run-{streams}"),
        })
        folder = train(settings, Screen(quiet=True))
        lines = [{name: line[name] for name in line if name in ("loss", "grad_norm", "eval_loss")} for line in folder.read_metrics()]
        return lines, (folder.path / "answers.jsonl").read_text("utf-8"), (folder.path / "adapter" / "adapter_model.safetensors").read_bytes()

    assert run(True) == run(False)
    assert len(made_here) == 1 and made_here[0].count > 20


def _recorded(made_here, keep, model, device):
    made_here.append(keep(model, device, Watched))
    return made_here[-1]
