"""Liger's kernels in a model and out again, with a package of the same shape in its place: the kernels themselves want a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from tests.conftest import tiny_config, tiny_model
from weitiao.errors import SettingError
from weitiao.model import kernels
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import compare

GPU = torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """Does what liger_kernel does to a Llama: binds forwards to its modules, puts a class and a rope into the family's Python module.
    `liger.factor` is what its norm is wrong by."""
    from transformers.models.llama import modeling_llama

    package = types.SimpleNamespace(factor=1.0, asked=None)

    def norm(self, hidden):
        wide = hidden.float()
        return (self.weight * wide * (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).to(hidden.dtype) * package.factor

    def apply(model, **asked):
        package.asked = asked
        modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (), {})
        modeling_llama.apply_rotary_pos_emb = lambda *args, **kwargs: 1 / 0
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.__dict__["forward"] = norm.__get__(module)
                module.in_place = True

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    patch = sys.modules["liger_kernel.transformers.monkey_patch"]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN, patch._apply_liger_kernel_to_instance = {"llama": apply}, apply
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)
    return package


def test_they_are_bound_to_this_model_and_taken_off_without_a_trace(liger):
    from transformers.models.llama import modeling_llama

    model = tiny_model()
    plain_class, plain_rope, ids = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb, torch.arange(4, 12)[None]
    before = model(ids).logits
    fused = kernels.fuse(model, "auto", GPU)
    assert liger.asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the trie's loss is its own
    assert "forward" in vars(model.model.norm) and "forward" not in vars(model)
    assert modeling_llama.LlamaRMSNorm is plain_class and modeling_llama.apply_rotary_pos_emb is not plain_rope
    assert (model(ids).logits - before).abs().max() < 1e-4  # and its rope leaves a CPU alone
    with fused.without():
        assert "forward" not in vars(model.model.norm) and modeling_llama.apply_rotary_pos_emb is plain_rope
        assert torch.equal(model(ids).logits, before)
    assert "forward" in vars(model.model.norm)
    fused.take_off()
    assert torch.equal(model(ids).logits, before) and modeling_llama.apply_rotary_pos_emb is plain_rope


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.03, False)])
def test_gradients_tell_whether_they_may_stay(liger, branching, factor, same):
    liger.factor = factor
    model = tiny_model()
    fused = kernels.fuse(model, "auto", GPU)
    learn_on_tries(model)
    worst, found = compare(model, branching, torch.float32, "cpu", fused.without)
    assert found is same and (worst < 1e-4) is same
    assert "forward" in vars(model.model.norm)


def test_auto_takes_them_where_they_are_to_be_had(liger):
    assert kernels.fuse(tiny_model(), "plain", GPU) is None
    assert kernels.fuse(tiny_model(), "auto", torch.device("cpu")) is None
    assert kernels.fuse(tiny_model("gpt2"), "auto", GPU) is None


def test_who_insists_is_told_why_not(liger, monkeypatch):
    kernels.refuse_unfit("liger", tiny_config(), GPU)
    kernels.refuse_unfit("auto", tiny_config("gpt2"), GPU)
    with pytest.raises(SettingError, match="run on a GPU, and this run is on a CPU"):
        kernels.refuse_unfit("liger", tiny_config(), torch.device("cpu"))
    with pytest.raises(SettingError, match="it has none for a gpt2"):
        kernels.refuse_unfit("liger", tiny_config("gpt2"), GPU)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(SettingError, match="liger-kernel cannot be imported") as refusal:
        kernels.refuse_unfit("liger", tiny_config(), GPU)
    assert "pip install 'weitiao[liger]'" in str(refusal.value)


@pytest.mark.parametrize(("factor", "kept", "told"), [
    (1.0, "auto", "Liger's fused kernels; gradients as PyTorch's"), (1.03, "plain", "give other gradients than PyTorch's here"),
    ("no triton", "plain", "do not run here (TypeError"),
])
def test_a_run_keeps_them_only_where_they_are_right_and_goes_on_alike(liger, monkeypatch, model_folder, rows_file, tmp_path, capsys, factor, kept, told):
    import importlib.metadata

    from weitiao.config import parse
    from weitiao.train.train import train

    liger.factor = factor
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8" if name == "liger-kernel" else version(name))
    monkeypatch.setattr(kernels, "_obstacle", lambda kind, device: ("", ""))  # of a CPU
    run = train(parse({"model": str(model_folder), "data": str(rows_file), "training": {"steps": 1, "batch_size": 4},
                       "output": str(tmp_path / "run")}))
    assert told in " ".join(capsys.readouterr().out.split())
    assert run.settings().training.kernels == kept
    assert ("liger-kernel" in run.read_json("environment.json")) is (kept == "auto")
    assert run.read_json("proof.json")["passed"]
