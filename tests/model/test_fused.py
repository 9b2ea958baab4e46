"""The fused functions against the modules they stand in for: same numbers, same gradients, less kept."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import tiny_model
from torch import nn

from weitiao import config
from weitiao.model import fused
from weitiao.model.methods import method_of

METHODS = {
    "lora": [], "lora with dropout": ["method.dropout=0.3"], "lora of the mlp alone": ["method.targets=[gate_proj,down_proj]"], "full": [],
    "bitfit": ["method.add_bias=true"], "adapter": [], "ia3": [], "dora": ["method.dora=true"],
}


def attached(name: str, kind: str = "llama", dtype=torch.float64, **more):
    settings = config.read(None, [f"method.name={'lora' if name.startswith(('lora', 'dora')) else name}", *METHODS[name]], data="x.json")
    model = method_of(settings, None).attach(tiny_model(kind, **more).to(dtype), settings.method, 0).to(dtype).train()
    torch.manual_seed(1)
    for parameter in model.parameters():  # at the start half of an adapter's gradients are exactly zero
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(4, 300, (2, 23), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # of the dropout
    loss = model(input_ids=ids, labels=ids).loss
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def count(model) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "glm"])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_model_computes_the_same_in_float64(name, kind):
    model = attached(name, kind)
    before = count(model)
    loss, gradients = loss_and_gradients(model)
    fused.fuse(model)
    assert count(model) > before or (name, kind) in (("full", "gpt2"), ("full", "glm"))
    again, ours = loss_and_gradients(model)
    assert abs(again - loss) < 1e-6  # transformers' norms compute in float32 whatever the model does
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).norm() <= 2e-6 * gradient.norm() + 1e-12, key


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_same(name):
    model = attached(name)
    loss, gradients = loss_and_gradients(model)
    fused.fuse(model)
    again, ours = loss_and_gradients(model)
    assert abs(again - loss) < 1e-6
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).norm() <= 2e-6 * gradient.norm() + 1e-12, key


def test_the_functions_alone_are_exact():
    torch.manual_seed(0)

    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias, a, b = double(2, 5, 6), double(7, 6).detach(), double(7), double(3, 6), double(7, 3)
    assert torch.autograd.gradcheck(lambda x, bias, a, b: fused.LoraLinears.apply(x, x, None, (0.7,), weight, bias, a, b), (x, bias, a, b))
    keep = (torch.rand(2, 5, 6) > 0.5) / 0.5
    assert torch.autograd.gradcheck(lambda x, a, b: fused.LoraLinears.apply(x, x * keep, None, (0.7,), weight, None, a, b), (x, a, b))
    other, bare, a2, b2 = double(4, 6).detach(), double(5, 6).detach(), double(2, 6), double(4, 2)
    for order in ((0, 1, 2), (2, 1, 0)):
        def three(x, bias, a, b, a2, b2):
            linears = [(weight, bias, a, b), (bare, None, None, None), (other, None, a2, b2)]
            scales = (0.7, 0.0, 1.3)
            return fused.LoraLinears.apply(x, x, None, tuple(scales[i] for i in order), *(t for i in order for t in linears[i]))

        assert torch.autograd.gradcheck(three, (x, bias, a, b, a2, b2))
    gate, up, down = (double(8, 6), double(2, 6), double(8, 2)), (double(8, 6), None, None), (double(6, 8), double(2, 8), double(6, 2))
    for kind in ("SiLU", "GELUTanh"):
        act = fused.ACTIVATIONS[kind]
        frozen = [gate[0].detach(), gate[1], gate[2], *up, down[0].detach(), down[1], down[2]]
        assert torch.autograd.gradcheck(lambda x, *w: fused.GatedMlp.apply(x, None, act, (0.7, 0.0, 1.3), *w), (x, *frozen))
        assert torch.autograd.gradcheck(lambda x, *w: fused.GatedMlp.apply(x, None, act, (0.0, 0.0, 0.0), w[0], None, None, w[1], None, None, w[2], None, None),
                                        (x, gate[0], up[0], down[0]))
    assert torch.autograd.gradcheck(lambda x, w: fused.RmsNorm.apply(x, w, 1e-5), (x, double(6)))


def test_long_inputs_go_in_chunks():
    torch.manual_seed(0)
    x = torch.randn(1, 2 * fused.ROWS + 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    assert torch.allclose(fused.RmsNorm.apply(x, weight, 1e-6), nn.functional.rms_norm(x, (8,), weight, 1e-6), rtol=1e-12)


def test_in_bf16_it_is_as_near_to_the_exact_gradients_as_before():
    exact = loss_and_gradients(attached("lora", dtype=torch.float32).double())[1]
    model = attached("lora", dtype=torch.float32)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()

    def distance() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = loss_and_gradients(model)[1]
        off = sum(float((gradients[k].double() - g).square().sum()) for k, g in exact.items())
        return (off / sum(float(g.square().sum()) for g in exact.values())) ** 0.5

    before = distance()
    fused.fuse(model)
    assert distance() < 1.2 * before < 0.1


def kept(model) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().model(input_ids=torch.arange(4, 250)[None])
    return sum(storages.values())


def test_it_keeps_less():
    model = attached("lora", dtype=torch.float32, hidden_size=256, intermediate_size=768)
    before = kept(model)
    fused.fuse(model)
    assert kept(model) < 0.75 * before


def test_what_a_norm_made_is_made_again_rather_than_kept(monkeypatch):
    """Linears and MLPs behind a norm: bit for bit the same, with two vectors a node and layer less."""
    model = attached("lora", hidden_size=32, dtype=torch.float32)
    fused.fuse(model)
    (loss, ours), less = loss_and_gradients(model), kept(model)
    monkeypatch.setattr(fused, "_recipe", lambda x: None)
    (plain, theirs), more = loss_and_gradients(model), kept(model)
    assert loss == plain and all(torch.equal(ours[name], g) for name, g in theirs.items())
    assert more - less == (2 * 2 - 1) * 246 * 32 * 4  # norms of both layers, tokens, hidden size, bytes; nobody else keeps what the first is given


def test_what_is_more_than_a_linear_computes_as_it_did():
    model = attached("lora")
    fused.fuse(model)
    mlp = model.get_base_model().model.layers[0].mlp
    assert fused.parts(mlp.gate_proj) is not None
    seen = []
    handle = mlp.gate_proj.register_forward_hook(lambda *_: seen.append("ran"))
    loss_and_gradients(model)
    handle.remove()
    assert seen == ["ran"] and fused.parts(mlp.gate_proj) is not None
    with model.disable_adapter():
        assert fused.parts(mlp.gate_proj).a is None
    model.merge_adapter()
    assert fused.parts(mlp.gate_proj) is None
    model.unmerge_adapter()


def test_without_its_adapter_the_model_is_the_base():
    base = tiny_model("llama").double().eval()
    model = attached("lora").eval()
    fused.fuse(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), model.disable_adapter():
        assert (model(ids).logits - base(ids).logits).abs().max() < 1e-6


@pytest.mark.parametrize("targets", ["q_proj,k_proj,v_proj", "q_proj,v_proj", "v_proj", "up_proj", "gate_proj,up_proj,k_proj"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_linears_of_one_input_compute_together_what_they_computed_alone(targets, kind, monkeypatch):
    monkeypatch.setitem(METHODS, "lora of some", [f"method.targets=[{targets}]"])
    model = attached("lora of some", kind)
    loss, gradients = loss_and_gradients(model)
    calls = []
    real = fused.OneInput.together
    monkeypatch.setattr(fused.OneInput, "together", lambda self, x: calls.append(len(made := real(self, x))) or made)
    fused.fuse(model)
    again, ours = loss_and_gradients(model)
    layers = model.config.num_hidden_layers
    assert calls == ([3] * layers if "q_proj" in targets or "k_proj" in targets or "v_proj" in targets else [])
    assert abs(again - loss) < 1e-6
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).norm() <= 2e-6 * gradient.norm() + 1e-12, key


@pytest.mark.parametrize("name", ["lora", "lora with dropout"])
@pytest.mark.parametrize("disabled", [False, True])
def test_nothing_of_a_pass_is_held_when_it_is_over(name, disabled):
    model = attached(name)
    fused.fuse(model)
    with model.disable_adapter() if disabled else contextlib.nullcontext():
        model(input_ids=torch.arange(5, 25)[None])
    for layer in model.get_base_model().model.layers:
        together = layer.self_attn.q_proj.forward.func.__self__
        assert together.input is None and not together.there


def test_a_linear_that_is_called_with_another_input_computes_it():
    model = attached("lora").eval()
    fused.fuse(model)
    attention = model.get_base_model().model.layers[0].self_attn
    plain = attached("lora").eval().get_base_model().model.layers[0].self_attn
    x, other = torch.randn(2, 1, 4, attention.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        for name, given in (("q_proj", x), ("v_proj", other), ("v_proj", x), ("v_proj", x), ("k_proj", x), ("k_proj", other), ("q_proj", other)):
            assert torch.allclose(getattr(attention, name)(given), getattr(plain, name)(given), rtol=1e-12), name
