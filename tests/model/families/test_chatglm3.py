"""An original ChatGLM3 folder computes what the original computes, trains as it trains, and leaves as a plain Glm."""

from __future__ import annotations

import json

import chatglm3
import pytest
import torch
from conftest import example

from weitiao.errors import SourceError
from weitiao.model.attention import NAME
from weitiao.model.families.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, split_adapter
from weitiao.model.load import load_config, load_model, model_limit, trie_obstacle
from weitiao.model.methods import METHODS, count_parameters
from weitiao.settings.methods import FullSettings, LoraSettings
from weitiao.settings.model import ModelSettings
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import prove

LORA = METHODS["lora"]
QKV = LoraSettings(rank=4, alpha=12, targets=["query_key_value"])
IDS = torch.randint(3, 400, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatglm3.write_checkpoint(tmp_path_factory.mktemp("models") / "chatglm3")


def loaded(folder, dtype=torch.float32, **settings):
    return load_model(folder, ModelSettings(name="x", **settings), dtype).eval()


def with_lora(folder, settings=QKV, moved=0.1, dtype=torch.float32):
    """The model with an adapter that does something."""
    model = loaded(folder, dtype)
    learn_on_tries(model)
    model = LORA.attach(model, settings, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=draw)
    return model


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 37])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-6)])
def test_it_computes_what_the_formulas_say(folder, dtype, close, shift):
    positions = torch.arange(IDS.shape[1]).expand_as(IDS) + shift
    weights = {name: w.to(dtype) for name, w in chatglm3.random_weights().items()}
    expected = chatglm3.forward(weights, IDS, positions)
    got = logits(loaded(folder, dtype), position_ids=positions)
    assert expected.abs().max() > 1
    assert float((got - expected).abs().max() / expected.abs().max()) <= close


def test_a_folders_own_code_is_never_run(folder):
    """There is none to run here: asked for it, transformers would fail."""
    settings = ModelSettings(name="x", trust_remote_code=True)
    assert type(load_config(folder, settings)) is ChatGLM3Config
    assert type(load_model(folder, settings, torch.float32)) is ChatGLM3ForCausalLM


def test_what_the_config_becomes(folder):
    config = load_config(folder, ModelSettings(name="x"))
    assert model_limit(config) == 128 and config.vocab_size == 460 and config.num_key_value_heads == 2
    assert config.rms_norm_eps == 1e-5 and config.pad_token_id is None and not hasattr(config, "auto_map")
    model = loaded(folder)
    assert model.get_input_embeddings().padding_idx is None and model.config._attn_implementation == NAME
    assert trie_obstacle(model) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_held_as_asked(folder, dtype):
    assert {p.dtype for p in loaded(folder, dtype).parameters()} == {dtype}


@pytest.mark.parametrize(("change", "name"), [
    ({"rope_ratio": 500}, "rope_ratio"), ({"pre_seq_len": 128}, "pre_seq_len"), ({"quantization_bit": 4}, "quantization_bit"),
    ({"multi_query_attention": False}, "multi_query_attention"),
])
def test_other_members_of_the_family_are_refused(tmp_path, change, name):
    chatglm3.write_checkpoint(tmp_path, **change)
    with pytest.raises(SourceError, match=name):
        load_config(tmp_path, ModelSettings(name="x"))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    weights = chatglm3.random_weights()
    del weights["transformer.encoder.layers.1.self_attention.query_key_value.bias"]
    chatglm3.write_checkpoint(tmp_path, weights)
    with pytest.raises(SourceError, match=r"lacks 1 weights, transformer\.encoder\.layers\.1\.self_attention\.query_key_value\.bias"):
        loaded(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    from weitiao.model.source import resolve

    chatglm3.write_checkpoint(tmp_path)
    for file in (*tmp_path.glob("*.safetensors"), tmp_path / "model.safetensors.index.json"):
        file.unlink()
    (tmp_path / "pytorch_model-00001-of-00007.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError) as caught:
        resolve(str(tmp_path))
    assert "pickle only (pytorch_model-00001-of-00007.bin)" in caught.value.found
    assert "opening a pickle can run any program" in caught.value.expected
    assert "*.safetensors" in caught.value.next_step
    with pytest.raises(SourceError):
        loaded(tmp_path)


def test_generating_with_the_cache_is_generating_without(folder):
    model = loaded(folder)
    ids = IDS[:, :5]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded to the left
    both = [model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=cache)
            for cache in (True, False)]
    assert torch.equal(*both) and both[0].shape == (2, 17)


def test_the_trie_is_the_rows(folder, branching):
    model = with_lora(folder, dtype=torch.float64).double()
    proof = prove(model, branching, torch.float64)
    assert proof.passed, proof.reason
    assert proof.leak_max == 0 and proof.nll_max < 1e-10 and proof.grad_rel_max < 1e-6  # Glm's norms go through float32
    assert prove(with_lora(folder), branching, torch.float32).passed


@pytest.mark.parametrize("name", ["bitfit", "prefix", "ia3", "adapter", "full", "prompt"])
def test_other_methods_are_proven_on_it(folder, name, branching):
    from weitiao import config

    model = loaded(folder)
    learn_on_tries(model)
    settings = config.parse({"data": "r.jsonl", "method": {"name": name}}).method
    model = METHODS[name].attach(model, settings, 0, None, branching)
    proof = prove(model, branching, torch.float32)
    assert proof.passed, proof.reason


def test_checkpointing_changes_no_gradient(folder):
    found = []
    for checkpointing in (False, True):
        model = with_lora(folder).train()
        if checkpointing:
            inner = model.get_base_model()
            inner.gradient_checkpointing_enable({"use_reentrant": False})
            inner.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


# -- LoRA on the fused projection --------------------------------------------------------------------------------------


def test_lora_learns_as_on_the_fused_projection_of_the_formulas(folder):
    """Gradients of A and B: ours against autograd through W + s B A in the judge's forward."""
    model = with_lora(folder, dtype=torch.float64)
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = {name: w.double() for name, w in chatglm3.random_weights().items()}
    theirs = {n: p.detach().double().requires_grad_() for n, p in ours.items()}
    for i in range(3):
        name = f"transformer.encoder.layers.{i}.self_attention.query_key_value"
        a, b = (theirs[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 12 / 4 * b @ a
    expected = chatglm3.forward(weights, IDS)
    got = model(input_ids=IDS).logits
    assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-6  # Glm's angles are float32
    for out in (got, expected):
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, parameter in ours.items():
        gradient = theirs[name].grad
        assert float((parameter.grad - gradient).abs().max() / gradient.abs().max()) < 1e-5, name


@pytest.mark.parametrize("settings", [
    QKV, LoraSettings(rank=4, targets="all-linear", rslora=True), LoraSettings(rank=4, targets=["query_key_value", "dense"], dora=True),
    LoraSettings(rank=4, targets=["query_key_value"], init="pissa"),
], ids=["qkv", "all-linear", "dora", "pissa"])
def test_an_adapter_goes_with_the_model_to_glm(folder, settings, tmp_path):
    """The saved adapter, split, read by PEFT on transformers' own Glm; three A, one matrix."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = with_lora(folder, settings)
    LORA.save(model, tmp_path / "adapter", "the/base")
    base = loaded(folder)
    base.save_pretrained(tmp_path / "glm")
    split_adapter(tmp_path / "adapter", tmp_path / "split", base.config, str(tmp_path / "glm"))
    glm = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32)
    assert type(glm).__name__ == "GlmForCausalLM"
    by_peft = PeftModel.from_pretrained(glm, tmp_path / "split").eval()
    assert float((logits(by_peft) - logits(model)).abs().max()) < 1e-5
    assert json.loads((tmp_path / "split/adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "glm")
    state = load_file(tmp_path / "split/adapter_model.safetensors")
    a = [state[f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_A.weight"] for x in "qkv"]
    assert torch.equal(a[0], a[1]) and torch.equal(a[0], a[2])


def test_an_adapter_is_read_back(folder, tmp_path):
    model = with_lora(folder)
    LORA.save(model, tmp_path, "base")
    names = json.loads((tmp_path / "adapter_config.json").read_text())
    assert names["target_modules"] == ["query_key_value"]  # PEFT's own, as of the original model
    again = with_lora(folder, moved=0.0)
    LORA.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# -- leaving as a Glm --------------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_plain_glm_that_computes_the_same(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    merged = LORA.merge(with_lora(folder))
    merged.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "glm" and config["architectures"] == ["GlmForCausalLM"] and "auto_map" not in config
    glm, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert float((logits(glm) - logits(merged)).abs().max()) < 1e-5
    assert torch.equal(logits(merged.to_glm()), logits(merged))


def test_full_tuning_is_saved_and_read_back(folder, tmp_path):
    full = METHODS["full"]
    model = full.attach(loaded(folder), FullSettings(), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    full.save(model, tmp_path, "base")
    again = full.attach(loaded(folder), FullSettings(), 0)
    full.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# -- quantised ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_is_quantised_as_it_is_loaded(folder, kind, branching):
    pytest.importorskip("bitsandbytes")
    from weitiao.model import quantize

    model = loaded(folder, quantize=kind)
    packed = {name.rpartition(".")[2] for name, _ in quantize.packed_layers(model)}
    assert packed == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}  # never the head
    learn_on_tries(model)
    tuned = LORA.attach(model, QKV, 0)
    plain = LORA.attach(loaded(folder), QKV, 0)
    assert count_parameters(tuned) == count_parameters(plain)
    assert prove(tuned, branching, torch.float32).passed


def test_one_row_is_learned_in_nf4(folder):
    pytest.importorskip("bitsandbytes")
    from weitiao.data.batch import trie_batch
    from weitiao.train.loss import summed_loss
    from weitiao.trie import build

    model = loaded(folder, quantize="nf4")
    learn_on_tries(model)
    model = LORA.attach(model, QKV, 0)
    batch = trie_batch(build([example(IDS[0].tolist(), 4)]), "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = summed_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


# -- from the command line ---------------------------------------------------------------------------------------------


def test_tutorial_4_from_rows_to_a_merged_model(tmp_path, monkeypatch, capsys):
    """Train, lose the second half, go on to the same adapter, merge, and train on from what was merged."""
    import shutil
    import sys

    from weitiao.cli import main

    def weitiao(*words):
        monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    model = chatglm3.write_tokenizer(chatglm3.write_checkpoint(tmp_path / "chatglm3"))
    rows = [{"input": f"妮露#关于{i}", "output": f"据说他是很厉害的{i}。"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["method.rank=4", "method.targets=[query_key_value]", "data.template=chatglm3_roleplay", "training.epochs=2",
                "data.system=现在模仿原神角色评价他人", "training.batch_size=4", "saving.every=2", "training.precision=fp32"]
    out = weitiao("train", "--model", model, "--data", "rows.jsonl", "--output", "run", *settings)
    assert "trie = plain rows. leak 0" in out
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    for name in ("adapter", "summary.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "from step 2 of 4" in weitiao("train", "run", "--resume")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == adapter
    assert "its tokenizer with weitiao alone" in weitiao("merge", "run")
    assert weitiao("generate", "run", "--prompt", "妮露#关于1", "--max-new-tokens", "4")
    settings[1] = "method.targets=[q_proj,k_proj,v_proj]"
    weitiao("train", "--model", "run/merged", "--data", "rows.jsonl", "--output", "again", *settings)
    assert (tmp_path / "again/adapter").is_dir()
