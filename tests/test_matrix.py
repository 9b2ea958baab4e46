"""Every method on every architecture: train, trie, checkpointing, bf16, generate, reload, PEFT, resume, merge. Numbers in each cell."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import tiny_model
from train.test_loop import losses, make_rows, training

from weitiao import config
from weitiao.data.batch import learned_batch, padded_batch
from weitiao.errors import RunError
from weitiao.model.load import trie_obstacle
from weitiao.model.methods import METHODS
from weitiao.train.folder import RunFolder
from weitiao.train.loss import learn_on_tries, summed_loss
from weitiao.model.load import checkpoint_activations
from weitiao.trie import build

ARCHITECTURES = ["llama", "bloom", "gpt2", "qwen2", "gemma3", "yuan"]
VIRTUAL = {"virtual_tokens": 3}
VARIANTS = {
    "full": {"name": "full"},
    "full-last": {"name": "full", "last_layers": 1},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", **VIRTUAL},
    "prompt-text": {"name": "prompt", "text": "What is the capital?"},
    "ptuning-mlp": {"name": "ptuning", **VIRTUAL},
    "ptuning-lstm": {"name": "ptuning", "encoder": "lstm", **VIRTUAL},
    "prefix": {"name": "prefix", **VIRTUAL},
    "prefix-text": {"name": "prefix", "text": "What is the capital?"},
    "prefix-projection": {"name": "prefix", "projection": True, **VIRTUAL},
    "lora": {"name": "lora", "rank": 4},
    "rslora": {"name": "lora", "rank": 4, "rslora": True},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "lora-plus": {"name": "lora", "rank": 4, "plus_ratio": 4},
    "ia3": {"name": "ia3"},
    "adapter-houlsby": {"name": "adapter", "style": "houlsby", "bottleneck": 8},
    "adapter-pfeiffer": {"name": "adapter", "style": "pfeiffer", "bottleneck": 8},
}
WITHOUT_BIAS = ("llama", "gemma3")
# On models as tiny and random as these.
RATES = {"prompt": 1.0, "ptuning": 0.1, "prefix": 0.5, "ia3": 0.2}
# What PEFT reads; what can be merged. The rest is loaded by weitiao; the rest is refused.
PEFT = ("prompt", "ptuning", "prefix", "lora", "rslora", "dora", "pissa", "ia3")
MERGED = ("full", "bitfit", "lora", "rslora", "dora", "pissa", "ia3")

cells = pytest.mark.parametrize("architecture", ARCHITECTURES)
methods = pytest.mark.parametrize("variant", VARIANTS)


def settings_of(variant: str, architecture: str) -> dict:
    given = dict(VARIANTS[variant])
    if variant == "bitfit" and architecture in WITHOUT_BIAS:
        given["add_bias"] = True
        if architecture == "gemma3":  # whose plain code has room for biases in attention alone
            given["targets"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return given


def tuned(variant: str, architecture: str, tokenizer, dtype=torch.float32, moved: float = 0.05, base=None):
    """(a tiny model with the method attached and its weights moved, the method)"""
    settings = config.parse({"data": "rows.jsonl", "method": settings_of(variant, architecture)}).method
    model = (base or tiny_model(architecture, seed=1)).to(dtype)
    learn_on_tries(model)
    method = METHODS[settings.name]
    model = method.attach(model, settings, 0, tokenizer)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.train(), method


def gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all gradients together."""
    assert a.keys() == b.keys() and a
    return float(torch.stack([(a[k] - b[k]).norm() for k in b]).norm() / torch.stack([g.norm() for g in b.values()]).norm())


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(scope="module")
def ids():
    return torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0))


def layout_of(architecture: str) -> str:
    return "padded" if trie_obstacle(tiny_model(architecture)) else "trie"


def train(variant, architecture, tokenizer, **more):
    return training(tokenizer, make_rows(12), layout=layout_of(architecture), method=settings_of(variant, architecture),
                    model=tiny_model(architecture, seed=1), **{"batch_size": 12, "learning_rate": 2e-2, "warmup": 0, **more})


@methods
@cells
def test_training_lowers_the_loss_and_leaves_frozen_weights_as_they_were(variant, architecture, tokenizer):
    run = train(variant, architecture, tokenizer, epochs=6, learning_rate=RATES.get(VARIANTS[variant]["name"], 2e-2))
    before = {name: p.detach().clone() for name, p in run.plain_model.named_parameters()}
    assert run.fit()
    assert losses(run)[-1] < losses(run)[0] - 2e-4
    for name, parameter in run.plain_model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in run.plain_model.named_parameters() if p.requires_grad)


@methods
@cells
def test_one_batch_gives_the_gradients_of_its_rows(variant, architecture, tokenizer, branching):
    model, _ = tuned(variant, architecture, tokenizer)
    model = model.double()
    by_rows = gradients(model, [padded_batch([row], 0) for row in branching])
    batch = padded_batch(branching, 0) if trie_obstacle(model) else learned_batch(build(branching))
    together = gradients(model, [batch])
    assert together[0] == pytest.approx(by_rows[0], rel=1e-9)
    assert difference(together[1], by_rows[1]) < 2e-6  # norms compute in float32


@methods
@cells
def test_checkpointing_changes_no_gradient(variant, architecture, tokenizer, branching):
    model, _ = tuned(variant, architecture, tokenizer)
    batches = [padded_batch(branching, 0)] + ([] if trie_obstacle(model) else [learned_batch(build(branching))])
    for batch in batches:
        model, _ = tuned(variant, architecture, tokenizer)
        without = gradients(model, [batch])
        checkpoint_activations(model)
        recomputed = counted_layers(model)
        with_it = gradients(model, [batch])
        assert recomputed() > 0
        assert with_it[0] == without[0]
        assert difference(with_it[1], without[1]) < 1e-6


def counted_layers(model):
    """How many layers' forwards ran twice: proof that checkpointing is on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    calls = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            child = next(module.children())
            child.register_forward_pre_hook(lambda m, args: calls.append(m))
    return lambda: sum(calls.count(m) == 2 for m in set(calls))


@methods
@cells
def test_bf16_is_fp32_within_its_rounding(variant, architecture, tokenizer, branching):
    exact, _ = tuned(variant, architecture, tokenizer)
    batch = padded_batch(branching, 0) if trie_obstacle(exact) else learned_batch(build(branching))
    frozen_base = variant not in ("full", "full-last")
    half, _ = tuned(variant, architecture, tokenizer, torch.bfloat16 if frozen_base else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(half, [batch])
    right = gradients(exact, [batch])
    assert rough[0] == pytest.approx(right[0], rel=0.02)
    assert all(bool(torch.isfinite(g).all()) for g in rough[1].values())
    if variant != "pissa":  # of a rounded weight, whose singular vectors are others
        assert difference(rough[1], right[1]) < 0.25
    for name, parameter in half.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32, name


@methods
@cells
def test_answers_with_a_cache_are_those_without(variant, architecture, tokenizer, ids):
    model, _ = tuned(variant, architecture, tokenizer)
    model.eval()
    short = ids[:1, 4:]
    padded = torch.cat([torch.full((1, 4), 3), short], dim=1)
    both = torch.cat([padded, ids[1:]])
    mask = (torch.arange(9)[None] >= torch.tensor([[4], [0]])).long()
    asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=3)
    alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **asked)
    batch = model.generate(input_ids=both, attention_mask=mask, **asked)
    grown = short
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([grown, model(input_ids=grown).logits[:, -1:].argmax(-1)], dim=1)
    assert alone[0].tolist() == grown[0].tolist()
    if not (architecture == "gemma3" and variant.startswith("prefix")):  # there only prompts of one length go together
        assert batch[0, 9:].tolist() == grown[0, 5:].tolist()


@methods
@cells
def test_saved_and_reloaded_it_is_the_same_to_the_bit(variant, architecture, tokenizer, ids, tmp_path):
    model, method = tuned(variant, architecture, tokenizer)
    before = logits(model, ids)
    method.save(model, tmp_path / "saved", "base")
    fresh, _ = tuned(variant, architecture, tokenizer, moved=0.0)
    assert not torch.equal(logits(fresh, ids), before)
    method.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh, ids), before)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith(PEFT)])
@cells
def test_peft_reads_what_is_saved(variant, architecture, tokenizer, ids, tmp_path):
    from peft import PeftModel

    base = tiny_model(architecture, seed=1, **({"sliding_window": 64} if architecture == "gemma3" else {}))
    base.save_pretrained(tmp_path / "base")
    model, method = tuned(variant, architecture, tokenizer, base=base)
    ours = logits(model, ids)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    plain = type(tiny_model(architecture)).from_pretrained(tmp_path / "base")
    theirs = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"), ids)[:, -ids.shape[1] :]
    # PiSSA's file is a LoRA on the base as it was: the same sum in another order.
    assert float((ours - theirs).abs().max()) <= (2e-6 if variant == "pissa" else 0.0)


@methods
@cells
def test_untuned_is_the_base(variant, architecture, tokenizer, ids):
    model, method = tuned(variant, architecture, tokenizer)
    base = logits(tiny_model(architecture, seed=1), ids)
    before = logits(model, ids)
    if method.TRAINS_ALL:
        with pytest.raises(RunError), method.untuned(model):
            pass
        return
    with method.untuned(model):
        assert float((logits(model, ids) - base).abs().max()) <= (2e-6 if variant == "pissa" else 0.0)
    assert torch.equal(logits(model, ids), before)


@methods
@cells
def test_resumed_it_is_the_uninterrupted_run(variant, architecture, tokenizer, tmp_path):
    start = functools.partial(train, variant, architecture, tokenizer, batch_size=6, epochs=2)
    whole = start()
    assert whole.fit()
    first = start(run=RunFolder(tmp_path))
    first.fit(last=2)
    first.save()
    second = start()
    second.restore(RunFolder(tmp_path).checkpoints()[-1])
    assert second.step == 2 and second.fit()
    assert losses(second) == losses(whole)[2:]
    for (name, a), (_, b) in zip(second.plain_model.named_parameters(), whole.plain_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@methods
@cells
def test_merged_it_is_a_plain_model_or_it_is_refused(variant, architecture, tokenizer, ids, tmp_path):
    model, method = tuned(variant, architecture, tokenizer)
    before = logits(model, ids)
    if not variant.startswith(MERGED):
        with pytest.raises(RunError, match="weitiao chat"):
            method.refuse_merge()
        return
    method.refuse_merge()
    merged = method.merge(model)
    merged.save_pretrained(tmp_path)
    plain = type(tiny_model(architecture)).from_pretrained(tmp_path)
    assert float((logits(plain, ids) - before).abs().max()) < 1e-5
