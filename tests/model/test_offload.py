"""Activations in the host's memory: the same gradients to the bit, weights left where they are, counted by the plan."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config, tiny_model

from weitiao.config import parse
from weitiao.data.batch import padded_batch, trie_batch
from weitiao.errors import SettingError
from weitiao.model import load, offload
from weitiao.train.devices import device_named
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.train.needs import Subject, Target, needs
from weitiao.train.plan import made_up
from weitiao.trie import build


class Watched(offload.InHost):
    """Moves tensors of a CPU too, as if they were a GPU's: into other memory and back."""

    moved: list[torch.Tensor] = []
    back: list[torch.Size] = []

    def to_host(self, tensor):
        self.moved.append(tensor.clone())
        return super().to_host(tensor)

    def to_device(self, device, held):
        self.back.append(held.shape)
        return held.clone()


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        summed_loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_gradients_are_the_same_to_the_bit_and_weights_stay(architecture, checkpointing, branching, monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 512)
    monkeypatch.setattr(Watched, "moved", [])
    monkeypatch.setattr(Watched, "back", [])
    model = tiny_model(architecture).train()
    learn_on_tries(model)
    if checkpointing:
        load.checkpoint_activations(model)
    batches = [trie_batch(build(branching)), padded_batch(branching, 0)]
    plain = gradients(model, batches)
    offload.keep_in_host(model, Watched)
    moved = gradients(model, batches)
    assert all(torch.equal(plain[name], moved[name]) for name in plain)
    weights = {w.shape for w in model.parameters()}
    assert Watched.moved and not any(tensor.shape in weights for tensor in Watched.moved)
    assert len(Watched.back) >= len(Watched.moved) // 2
    if checkpointing:  # a layer's input each, and what the padded way's own loss keeps
        inputs = [t for t in Watched.moved if t.shape[-1] == model.config.hidden_size]
        assert len(inputs) >= 2 * model.config.num_hidden_layers


def test_a_copy_holds_what_was_saved():
    hooks = offload.InHost(torch.nn.Linear(2, 2))
    tensor = torch.arange(12.0).view(3, 4).t()
    held = hooks.to_host(tensor)
    assert torch.equal(held, tensor) and held.data_ptr() != tensor.data_ptr() and held.stride() == tensor.stride()


def test_it_goes_with_checkpointing_and_with_a_gpu():
    settings = parse({"data": "none", "training": {"offload_activations": True}})
    assert settings.training.checkpointing is True
    with pytest.raises(SettingError, match="offload_activations goes with checkpointing=true"):
        parse({"data": "none", "training": {"offload_activations": True, "checkpointing": False}})
    with pytest.raises(SettingError, match="this run is on a CPU"):
        needs(Subject(settings, tiny_config(), made_up(16, 4)), Target("a test", "cpu", 1 << 40))


def test_the_plan_of_a_gpu_falls_by_what_is_moved():
    config = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=4,
                         max_position_embeddings=4096)
    target = Target.of_gpu(device_named("24GB"))

    def planned(**training):
        subject = Subject(parse({"data": "none", "training": {"batch_size": 1, "checkpointing": True, **training}}), config, made_up(2049, 4))  # its last token is not computed
        return needs(subject, target), next(iter(subject.lines.values())).at(2048, 1024).windows

    (kept, before), (moved, after) = planned(), planned(offload_activations=True)
    inputs = 16 * 2048 * 256 * 2  # layers x nodes x width x bf16
    assert kept.host == 0 and moved.host == pytest.approx(inputs, rel=0.1)
    assert sum(before["loss"].values()) - sum(after["loss"].values()) == pytest.approx(inputs, rel=0.1)
    assert moved.peak < kept.peak and moved.terms["weights"] == kept.terms["weights"]
