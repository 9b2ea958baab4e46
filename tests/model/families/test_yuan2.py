"""Yuan2 against its formulas written down once more, with plain convolutions, in float64; and all that a model here must do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import example, tiny_model
from safetensors.torch import load_file, save_file
from test_matrix import difference, gradients
from torch import nn
from torch.nn import functional as F

from weitiao import config as settings
from weitiao.data.batch import padded_batch, trie_batch
from weitiao.errors import SourceError
from weitiao.model import families
from weitiao.model.families import yuan2
from weitiao.model.families.yuan2 import YuanConfig, YuanForCausalLM
from weitiao.model.load import load_config, load_model, model_limit, trie_obstacle
from weitiao.model.load import checkpoint_activations
from weitiao.model.methods import METHODS, count_parameters, trainable_summary
from weitiao.settings.methods import LoraSettings
from weitiao.settings.model import ModelSettings
from weitiao.train import proof as proving
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import prove
from weitiao.trie import build

PAD = 3


def tiny(dtype=torch.float64, **more) -> YuanForCausalLM:
    """Two layers of four heads, with the trie's attention; weights so large that the filter shows, and no end."""
    return tiny_model("yuan", **{"vocabulary": 60, "initializer_range": 0.2, "eos_token_id": None} | more).to(dtype)


def some_ids(*shape, seed=0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


def taught(dtype=torch.float64) -> YuanForCausalLM:
    model = tiny(dtype)
    learn_on_tries(model)
    return model.train()


# ------------------------------------------------------------------------------------------------ the model once more


class Original:
    """Yuan2 of a state dict, straight from its published form: no cache, no mask of padding, one row."""

    def __init__(self, state: dict[str, torch.Tensor], config: YuanConfig):
        self.w, self.c = state, config

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.c.num_hidden_layers):
            name = f"model.layers.{i}."
            x = x + self.attention(name + "self_attn.", self.norm(name + "input_layernorm.weight", x))
            h = self.norm(name + "post_attention_layernorm.weight", x)
            gate, up, down = (self.w[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            x = x + (gate @ h[..., None] * F.silu(up @ h[..., None])).transpose(-1, -2)[..., 0, :] @ down.T
        return self.norm("model.norm.weight", x) @ self.w["model.embed_tokens.weight"].T

    def norm(self, name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.w[name]

    def conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[B, width, T, 1] -> the first T of the T + 1 rows that a padding of one on both sides gives."""
        weight = self.w[name + "weight"]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], (2, 1), stride=(1, 1), padding=(1, 0)).to(x.dtype)
        layer.load_state_dict({"weight": weight, "bias": self.w[name + "bias"]})
        return layer(x)[:, :, : x.shape[2]]

    def attention(self, name: str, u: torch.Tensor) -> torch.Tensor:
        rows, places, width = u.shape
        n, d = self.c.num_attention_heads, width // self.c.num_attention_heads
        g = self.conv(name + "lf_gate.conv2.", self.conv(name + "lf_gate.conv1.", u.transpose(1, 2)[..., None]))
        z = self.norm(name + "lf_gate.output_layernorm.weight", g[..., 0].transpose(1, 2) + u)
        both = torch.cat([z @ self.w[name + "q_proj.weight"].T, z @ self.w[name + "k_proj.weight"].T], dim=-1)
        query, key = both.view(rows, places, n, 2 * d).split(d, dim=-1)
        query, key = self.rotate(query), self.rotate(key)
        value = (u @ self.w[name + "v_proj.weight"].T).view(rows, places, n, d)
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / d**0.5
        scores = scores.masked_fill(~torch.ones(places, places).tril().bool(), -torch.inf)
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value).reshape(rows, places, width)
        return out @ self.w[name + "o_proj.weight"].T

    @staticmethod
    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Pairs (i, i + d / 2) as complex numbers, turned by t / 10000^(2i / d)."""
        places, d = x.shape[1], x.shape[-1]
        turn = torch.arange(places, dtype=x.dtype)[:, None] * 10_000 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(turn), turn)[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("length", [1, 2, 3, 12])
def test_it_is_the_original_in_float64(length):
    model, ids = tiny(), some_ids(2, length)
    expected = Original(model.state_dict(), model.config)(ids)
    for training in (False, True):
        with torch.no_grad():
            assert float((model.train(training)(input_ids=ids).logits - expected).abs().max()) < 1e-10


def test_the_first_tokens_filter_reads_nothing_before_it():
    """a before the start is zero, not what the first convolution makes of zeros: its bias would show."""
    filter_ = tiny().model.layers[0].self_attn.lf_gate
    u = torch.randn(1, 1, 32, dtype=torch.float64)
    a = filter_.conv1.weight[:, :, 1, 0] @ u[0, 0] + filter_.conv1.bias
    g = filter_.conv2.weight[:, :, 1, 0] @ a + filter_.conv2.bias + u[0, 0]
    expected = g * torch.rsqrt(g.square().mean() + 1e-6) * filter_.output_layernorm.weight
    assert torch.allclose(filter_(u, yuan2.Before(), None)[0, 0], expected, atol=1e-12)


# ------------------------------------------------------------------------------------------------- counts and names


def test_counts_of_the_2b():
    with torch.device("meta"):
        model = YuanForCausalLM(YuanConfig())
        assert count_parameters(model) == (2_088_724_480, 2_088_724_480)
        learn_on_tries(model)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        tuned = METHODS["lora"].attach(model, LoraSettings(rank=8, targets=targets), 0)
    assert count_parameters(tuned) == (9_043_968, 2_097_768_448)
    assert trainable_summary(*count_parameters(tuned)) == (
        "trainable params: 9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311")


def names_of(layers: int) -> set[str]:
    inside = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
              "self_attn.lf_gate.conv1.weight", "self_attn.lf_gate.conv1.bias", "self_attn.lf_gate.conv2.weight",
              "self_attn.lf_gate.conv2.bias", "self_attn.lf_gate.output_layernorm.weight", "mlp.up_proj.weight",
              "mlp.gate_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    return {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
        f"model.layers.{i}.{name}" for i in range(layers) for name in inside}


def test_weights_bear_the_names_and_shapes_of_the_original():
    with torch.device("meta"):
        state = YuanForCausalLM(YuanConfig()).state_dict()
    assert set(state) == names_of(24)
    shapes = {name: tuple(state[f"model.layers.0.{name}"].shape) for name in (
        "self_attn.lf_gate.conv1.weight", "self_attn.lf_gate.conv2.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")}
    assert list(shapes.values()) == [(1024, 2048, 2, 1), (2048, 1024, 2, 1), (8192, 2048), (2048, 8192)]
    assert tuple(state["lm_head.weight"].shape) == (135_040, 2048)


# ------------------------------------------------------------------------------------------- a checkpoint as published

PUBLISHED = {
    "_name_or_path": "yuan_model_2b", "architectures": ["YuanForCausalLM"], "model_type": "yuan",
    "auto_map": {"AutoConfig": "configuration_yuan.YuanConfig", "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"},
    "bos_token_id": 57, "eos_token_id": 57, "pad_token_id": 57, "mask_token_id": 57, "eod_token_id": 57, "sep_token_id": 57,
    "eod_token": 57, "sep_token": 58, "causal_mask": True, "dropout": 0.1, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 64, "model_max_length": 64,
    "num_attention_heads": 4, "num_hidden_layers": 2, "reset_attention_mask": True, "reset_position_ids": True,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "tokenizer_class": "YuanTokenizer", "torch_dtype": "bfloat16",
    "transformers_version": "4.30.0.dev0", "use_cache": True, "use_flash_attention": False, "use_loss_mask": False,
    "vocab_size": 60,
}


def publish(folder, head: bool, **more) -> dict[str, torch.Tensor]:
    """A folder as the model's makers gave it, with random weights; returns them."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name in sorted(names_of(2) - {"lm_head.weight"}):
        shape = {"embed_tokens": (60, 32), "conv1.weight": (16, 32, 2, 1), "conv1.bias": (16,), "conv2.weight": (32, 16, 2, 1),
                 "up_proj": (48, 32), "gate_proj": (48, 32), "down_proj": (32, 48), "norm": (32,), "conv2.bias": (32,)}
        state[name] = torch.randn(next((s for part, s in shape.items() if part in name), (32, 32)), generator=generator) * 0.2
    if head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(PUBLISHED | more), "utf-8")
    return state


@pytest.mark.parametrize("head", [False, True], ids=["no head", "head"])
@pytest.mark.parametrize("trust", [False, True])
def test_a_published_folder_loads_without_its_code(head, trust, tmp_path):
    state = publish(tmp_path / "yuan", head)
    asked = ModelSettings(name="x", trust_remote_code=trust)
    config = load_config(tmp_path / "yuan", asked)
    assert type(config) is YuanConfig and model_limit(config) == 64 and config.eod_token == 57
    model = load_model(tmp_path / "yuan", asked, torch.float32)
    assert type(model) is YuanForCausalLM and trie_obstacle(model) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    expected = Original({n: t.double() for n, t in state.items()}, config)(some_ids(1, 9))
    with torch.no_grad():
        assert float((model.double().eval()(input_ids=some_ids(1, 9)).logits - expected).abs().max()) < 1e-10


def test_a_published_folder_that_lacks_weights_is_refused(tmp_path):
    state = publish(tmp_path, head=False)
    state.pop("model.layers.1.self_attn.lf_gate.conv2.bias")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 weights, model.layers.1.self_attn.lf_gate.conv2.bias"):
        load_model(tmp_path, ModelSettings(name="x"), torch.float32)


def test_another_activation_is_refused(tmp_path):
    publish(tmp_path, head=False, hidden_act="gelu")
    with pytest.raises(SourceError, match="config.json"):
        load_config(tmp_path, ModelSettings(name="x"))


def test_a_folder_without_a_readable_config_is_left_to_transformers(tmp_path):
    families.of_model(tmp_path)
    (tmp_path / "config.json").write_text("[1", "utf-8")
    families.of_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]", "utf-8")
    families.of_model(tmp_path)


def test_only_a_yuan_folder_imports_the_family(tmp_path):
    import subprocess
    import sys

    (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    script = ("import sys; from pathlib import Path; from weitiao.model import families\n"
              f"families.of_model(Path({str(tmp_path)!r})); assert not any('yuan2' in m for m in sys.modules)\n")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_saved_and_reloaded_it_is_the_same(tmp_path):
    model, ids = tiny(torch.float32).eval(), some_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names_of(2) - {"lm_head.weight"}
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "yuan"
    again = load_model(tmp_path, ModelSettings(name="x"), torch.float32).eval()
    plain = YuanForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("implementation", ["weitiao", "sdpa", "eager"])
@pytest.mark.parametrize("prompt", [1, 2, 5])
@pytest.mark.parametrize("step", [1, 3])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_row_at_once(prompt, step, implementation):
    model, ids = tiny().eval(), some_ids(2, prompt + 6)
    model.set_attn_implementation(implementation)
    whole = model(input_ids=ids, use_cache=False).logits
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for t in range(prompt, prompt + 6, step):
        out = model(input_ids=ids[:, t : t + step], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    difference = float((torch.cat(logits, 1) - whole).abs().max())
    assert difference < (1e-6 if implementation == "eager" else 1e-9)  # transformers' eager softmax is float32


@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_greedy_answers_with_a_cache_are_those_without(prompt):
    model, ids = tiny().eval(), some_ids(1, prompt, seed=prompt)
    asked = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert model.generate(**asked).tolist() == model.generate(**asked, use_cache=False).tolist() == grown(model, ids, 8).tolist()


@torch.no_grad()
def grown(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_beams_with_a_cache_are_those_without():
    """Beams part and die, so the filter's memory has to be reordered with the keys."""
    model = tiny().eval()
    for seed in range(4):
        ids = some_ids(2, 4, seed=seed)
        asked = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=4,
                     num_return_sequences=3)
        assert model.generate(**asked).tolist() == model.generate(**asked, use_cache=False).tolist()


@torch.no_grad()
def test_a_cache_follows_its_rows():
    model, ids = tiny().eval(), some_ids(3, 6)
    chosen = torch.tensor([2, 0, 2])
    expected = model(input_ids=ids[chosen], use_cache=False).logits[:, -1:]
    for follow in ("reorder_cache", "batch_select_indices"):
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        getattr(cache, follow)(chosen)
        ours = model(input_ids=ids[chosen, 5:], past_key_values=cache, use_cache=True).logits
        assert float((ours - expected).abs().max()) < 1e-9
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, dim=0)
    ours = model(input_ids=twice[:, 5:], past_key_values=cache, use_cache=True).logits
    assert float((ours - model(input_ids=twice, use_cache=False).logits[:, -1:]).abs().max()) < 1e-9
    with pytest.raises(NotImplementedError):
        cache.layers[0].crop(-1)
    cache.reset()
    ours = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
    assert float((ours - model(input_ids=ids, use_cache=False).logits[:, -1:]).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["static", "quantized"])
def test_a_cache_without_room_for_the_filter_is_refused(kind):
    from transformers import StaticCache
    from transformers.cache_utils import Cache, QuantizedLayer

    class Packed(QuantizedLayer):
        def __init__(self): ...
        def _quantize(self, tensor, axis): ...
        def _dequantize(self, tensor): ...

    model = tiny().eval()
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else Cache(
        layers=[Packed(), Packed()])
    with pytest.raises(ValueError, match="has no place"):
        model(input_ids=some_ids(1, 4), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 2, 5])
@torch.no_grad()
def test_padded_rows_are_what_they_are_alone(side, padding):
    model = tiny().eval()
    rows = some_ids(1, 9), some_ids(1, 9 - padding, seed=1)
    pads = torch.full((1, padding), PAD)
    short = torch.cat([pads, rows[1]] if side == "left" else [rows[1], pads], dim=1)
    ids = torch.cat([rows[0], short])
    mask = torch.ones_like(ids)
    mask[1] = (torch.cat([pads, rows[1] * 0], 1) if side == "left" else torch.cat([rows[1] * 0, pads], 1))[0] == 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    theirs = both[1, padding:] if side == "left" else both[1, :-padding]
    assert float((both[0] - model(input_ids=rows[0]).logits[0]).abs().max()) < 1e-9
    assert float((theirs - model(input_ids=rows[1]).logits[0]).abs().max()) < 1e-9
    other = ids.clone()
    other[mask == 0] = 17  # nor does it matter what the padding is
    again = model(input_ids=other, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(again[mask == 1], both[mask == 1])


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_a_left_padded_batch_are_those_alone(beams):
    model = tiny().eval()
    rows = [some_ids(1, n, seed=n) for n in (1, 2, 5, 9)]
    ids = torch.cat([F.pad(row, (9 - row.shape[1], 0), value=PAD) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
    asked = dict(max_new_tokens=7, do_sample=False, num_beams=beams)
    together = model.generate(input_ids=ids, attention_mask=mask, **asked)
    for row, ours in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **asked)
        assert ours[9:].tolist() == alone[0, row.shape[1] :].tolist()


# ------------------------------------------------------------------------------------------------------ trie and proof

METHOD = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4, "dropout": 0},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "prefix": {"name": "prefix", "virtual_tokens": 3},
    "bitfit": {"name": "bitfit"},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter", "bottleneck": 8},
}
methods = pytest.mark.parametrize("variant", METHOD)


def tuned(variant: str, dtype=torch.float64):
    """The tiny model with a method attached and its weights moved."""
    model = taught(dtype)
    asked = settings.parse({"data": "rows.jsonl", "method": METHOD[variant]}).method
    model = METHODS[asked.name].attach(model, asked, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.to(dtype).train()


@methods
def test_a_trie_gives_the_loss_and_every_gradient_of_its_rows(variant, branching):
    model = tuned(variant)
    expected, by_rows = gradients(model, [padded_batch([row], 0) for row in branching])
    for batch in (trie_batch(build(branching)), padded_batch(branching, PAD)):
        loss, ours = gradients(model, [batch])
        assert loss == pytest.approx(expected, rel=1e-11)
        assert difference(ours, by_rows) < 1e-10
        for name, gradient in by_rows.items():
            assert float((ours[name] - gradient).abs().max()) < 1e-9 * max(1.0, float(gradient.abs().max())), name


def plant(monkeypatch, parents) -> None:
    """Give the proof batches with other parents: parents(those there are, the node before each)."""
    def planted(real):
        def batch_of(trie, device="cpu"):
            batch = real(trie, device)
            parent = batch["trie"].parent
            return batch | {"trie": replace(batch["trie"], parent=parents(parent, torch.arange(len(parent)) - 1))}

        return batch_of

    for name in ("trie_batch", "learned_batch"):
        monkeypatch.setattr(proving, name, planted(getattr(proving, name)))


@methods
def test_it_is_proven(variant, branching):
    proof = prove(tuned(variant, torch.float32), branching, torch.float32)
    assert proof.passed, proof.reason
    assert proof.leak_max == 0.0


def test_in_float64_the_proof_is_exact(branching):
    proof = prove(tuned("lora"), branching, torch.float64)
    assert proof.passed and proof.leak_max == 0.0
    assert proof.nll_max < 1e-6 and proof.grad_rel_max < 1e-6  # the loss is summed in float32 where weights are


@pytest.mark.parametrize("variant", ["lora", "prompt", "prefix"])
def test_a_filter_that_reads_the_node_to_the_left_is_caught(variant, branching, monkeypatch):
    plant(monkeypatch, lambda parent, before: before)
    proof = prove(tuned(variant, torch.float32), branching, torch.float32)
    assert not proof.passed and proof.leak_max > 1e-4 and proof.nll_max > 1e-3


def test_roots_that_follow_the_tree_before_them_are_caught(branching, monkeypatch):
    plant(monkeypatch, lambda parent, before: torch.where(parent < 0, before, parent))
    assert not prove(tuned("lora", torch.float32), branching, torch.float32).passed


@methods
def test_checkpointing_changes_no_gradient(variant, branching):
    batches = [trie_batch(build(branching)), padded_batch(branching, PAD)]
    model = tuned(variant)
    loss, without = gradients(model, batches)
    checkpoint_activations(model)
    calls = []
    first = next(module for name, module in model.named_modules() if name.endswith("layers.0.input_layernorm"))
    first.register_forward_pre_hook(lambda *a: calls.append(1))
    again, checkpointed = gradients(model, batches)
    assert len(calls) == 4  # twice each pass: it is on
    assert again == loss
    assert difference(checkpointed, without) < 1e-12


@pytest.mark.parametrize("variant", ["lora", "prompt", "prefix"])
def test_tuned_answers_with_a_cache_are_those_without(variant):
    model = tuned(variant).eval()
    short, long = some_ids(1, 3), some_ids(1, 7, seed=2)
    ids = torch.cat([F.pad(short, (4, 0), value=PAD), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (4, 0)), torch.ones_like(long)])
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert together[0, 7:].tolist() == grown(model, short, 6)[0, 3:].tolist()
    assert together[1, 7:].tolist() == grown(model, long, 6)[0, 7:].tolist()


def test_bf16_is_fp32_within_its_rounding(branching):
    exact, rough = tuned("lora", torch.float32), tuned("lora", torch.bfloat16)
    batch = trie_batch(build(branching))
    loss, expected = gradients(exact, [batch])
    for model in (rough, exact):
        with torch.autocast("cpu", torch.bfloat16):
            ours = gradients(model, [batch])
        assert ours[0] == pytest.approx(loss, rel=0.02)
        assert difference(ours[1], expected) < 0.25


def test_transformers_own_loss_shifts_labels_by_one():
    model, ids = tiny().eval(), some_ids(1, 8)
    logits = model(input_ids=ids).logits[0].float()
    expected = F.cross_entropy(logits[:-1], ids[0, 1:])
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_eod_inside_a_row_hides_nothing():
    """Where the original would start anew: rows are apart here, so nothing has to."""
    model = tiny(eos_token_id=5).eval()
    ids = some_ids(1, 8)
    ids[0, 3] = 5
    other = ids.clone()
    other[0, 0] = 50
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits[0, 7], model(input_ids=other).logits[0, 7])


# --------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_under_virtual_places_hangs_its_roots_on_the_last_of_them():
    trie = build([example([5, 6, 7], 1), example([5, 6, 8], 1), example([9, 6], 1)])
    plan = trie_batch(trie)["trie"]
    assert plan.parent.tolist() == [-1, 0, 1, 1, -1, 4]
    assert plan.under(2).parent.tolist() == [-1, 0, 1, 2, 3, 3, 1, 6]
    assert plan.under(2).depth.tolist() == [0, 1, 2, 3, 4, 4, 2, 3]
