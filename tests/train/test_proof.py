"""The proof passes where trie = rows, and can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import example, tiny_model

from weitiao.data.batch import padded_batch
from weitiao.model.methods import METHODS
from weitiao.model.stems import Stem
from weitiao.settings.methods import LoraSettings
from weitiao.train import loss
from weitiao.train.evaluation import trie_batches
from weitiao.train.loss import learn_on_tries
from weitiao.train.proof import leak, prove
from weitiao.trie import build


def taught(name="llama", **more):
    model = tiny_model(name, **more)
    learn_on_tries(model)
    return model


def reads_the_node_before_it(model) -> None:
    """Plant the defect of traps: a convolution over the layout, where it should follow `parent`."""
    layer = model.model.layers[0].mlp
    original = layer.forward

    def forward(hidden):
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return original(hidden + 0.05 * before)

    layer.forward = forward


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "glm", "mistral", "yuan"])
def test_a_right_model_is_proven(name, branching):
    proof = prove(taught(name), branching, torch.float32)
    assert proof.passed, proof.reason
    assert proof.leak_max == 0.0
    assert proof.nll_max < 1e-4 and proof.grad_rel_max < 1e-4
    assert proof.nodes < proof.row_tokens


def test_a_planted_leak_is_caught(branching):
    model = taught()
    reads_the_node_before_it(model)
    proof = prove(model, branching, torch.float32)
    assert not proof.passed
    assert proof.leak_max > 1e-4
    assert proof.reason.startswith("tokens of other rows move hidden states by 0.00")


def test_a_leak_is_caught_where_there_is_one_row_alone(branching):
    model = taught()
    layer = model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda hidden: original(hidden + 0.05 * torch.nn.functional.pad(hidden, (0, 0, 0, 1))[:, 1:])
    proof = prove(model, branching[:1], torch.float32)
    assert not proof.passed and proof.leak_max > 1e-4


def test_positions_that_ignore_depth_are_caught(branching):
    model = taught("gpt2")
    original = model.transformer.forward
    model.transformer.forward = lambda *a, position_ids=None, **k: original(*a, **k)
    proof = prove(model, branching, torch.float32)
    assert not proof.passed
    assert proof.nll_max > 1e-3


def test_a_wrong_gradient_alone_is_caught(branching):
    model = taught()
    weight = model.model.layers[0].mlp.up_proj.weight
    calls = []

    def spoil(grad):
        calls.append(1)
        return grad * 1.01 if len(calls) == 1 else grad  # the trie's gradient only; it comes first

    weight.register_hook(spoil)
    proof = prove(model, branching, torch.float32)
    assert not proof.passed and proof.reason.startswith("gradients differ from plain rows' by")


def test_adapters_are_moved_for_the_proof_and_put_back(branching):
    model = METHODS["lora"].attach(taught(), LoraSettings(rank=4), seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    model.eval()
    proof = prove(model, branching, torch.float32)
    assert proof.passed
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_in_the_proof_and_on_again_after_it(branching):
    model = METHODS["lora"].attach(taught("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), LoraSettings(dropout=0.5), seed=0)
    proof = prove(model, branching, torch.float32)
    assert proof.passed, proof.reason
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3, 0.5}


def test_bf16_is_held_to_what_bf16_can_do(branching):
    proof = prove(taught(), branching, torch.bfloat16)
    assert proof.passed, proof.reason
    assert proof.dtype == "bfloat16" and proof.leak_max == 0.0
    assert proof.grad_rel_max > 1e-4  # it is bf16 that was measured


def test_a_loss_is_as_exact_as_its_logits_are_spaced():
    from weitiao.train.proof import TOLERANCES, _limits

    model = taught()
    assert _limits(model, torch.float32, 46.0, 0.0) == TOLERANCES[torch.float32]
    assert _limits(model, torch.bfloat16, 5.0, 1.0) == TOLERANCES[torch.bfloat16]
    assert _limits(model, torch.bfloat16, 46.0, 1.0)[1] == pytest.approx(8 * 32 / 128)
    assert _limits(model, torch.float16, 46.0, 1.0)[1] == pytest.approx(8 * 32 / 1024)
    assert _limits(model, torch.bfloat16, 46.0, 0.01)[2] == pytest.approx(6 * 0.01 + 0.35 / 16)


def test_an_id_that_is_never_told_does_not_widen_the_limits(branching):
    model = taught()
    model.lm_head.register_forward_hook(lambda layer, given, logits: logits.index_fill(-1, torch.tensor([0]), float("-inf")))
    proof = prove(model, [e for e in branching if 0 not in e.ids], torch.float32)
    assert proof.passed and proof.limits[1] == 3e-4, proof


def lost_gradients(model, monkeypatch):
    monkeypatch.setattr(Stem, "add", lambda self, name, gradient: None)


def halved_gradients(model, monkeypatch):
    true = Stem.add
    monkeypatch.setattr(Stem, "add", lambda self, name, gradient: true(self, name, 0.5 * gradient))


@pytest.mark.parametrize(("name", "fault"), [
    ("llama", lost_gradients), ("llama", halved_gradients), ("gpt2", lost_gradients), ("qwen3", lost_gradients)], ids=str)
def test_in_bf16_too_a_fault_that_moves_nobody_else_is_caught(name, fault, branching, monkeypatch):
    model = taught(name)
    assert prove(model, branching, torch.bfloat16).passed
    fault(model, monkeypatch)
    proof = prove(model, branching, torch.bfloat16)
    assert proof.leak_max == 0 and not proof.passed, proof


def test_large_logits_in_bf16_pass_and_a_layer_that_reads_a_neighbour_does_not(branching, monkeypatch):
    model = taught()
    model.lm_head.weight.data *= 40 / model(torch.arange(4, 60)[None]).logits.abs().max()
    good = prove(model, branching, torch.bfloat16)
    assert good.passed and good.grad_rel <= good.grad_rel_max, good
    forward = model.model.forward

    def leaking(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.1 * out.last_hidden_state.roll(1, dims=1)
        return out

    monkeypatch.setattr(model.model, "forward", leaking)
    assert not prove(model, branching, torch.bfloat16).passed


def test_differences_of_gradients_by_hand():
    from weitiao.train.proof import _differences

    theirs = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([1e-9])}
    ours = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.5, 1.0]), "c": torch.tensor([2e-9])}
    worst, together = _differences(ours, theirs.items())
    assert worst == pytest.approx(0.5) and together == pytest.approx((1.25 / 26) ** 0.5)
    assert not _differences({"a": torch.tensor([float("nan")])}, [("a", torch.ones(1))])[0] <= 1
    assert _differences({}, []) == (0.0, 0.0)


def test_an_attention_that_a_trie_cannot_have_is_named(branching):
    model = taught()
    original = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *a, **k: original(*a, softcap=3.0, **k)
    proof = prove(model, branching, torch.float32)
    assert not proof.passed and "softcap" in proof.reason


def test_doubled_weights_are_caught(branching, monkeypatch):
    from weitiao.train import proof as module

    def doubled(*given):
        for batch in trie_batches(*given):
            yield batch | {"trie": replace(batch["trie"], weights=2 * batch["trie"].weights)}

    monkeypatch.setattr(module, "trie_batches", doubled)
    proof = prove(taught(), branching, torch.float32)
    assert not proof.passed and proof.grad_rel_max > 0.5


@pytest.mark.parametrize("stems", [True, False])
def test_what_comes_back_to_a_stem_and_is_lost_is_caught(stems, branching, monkeypatch):
    """Where passes go on behind stems, and nowhere else."""
    monkeypatch.setattr(Stem, "add", lambda self, name, gradient: None)
    proof = prove(taught(), branching, torch.float32, stems=stems)
    assert proof.passed is not stems
    assert proof.reason.startswith("gradients differ") is stems


def test_an_attention_that_sees_a_branch_further_back_is_caught_by_the_leak_alone(branching, monkeypatch):
    from weitiao.model import attention

    def leaky(query, key, value, plan, scale, window=None, dropout=0.0):
        nodes = torch.arange(query.shape[2])
        mask = (nodes[None] <= nodes[:, None]) & (nodes[:, None] < plan.subtree_end[None])
        leaves = [s for s in plan.segments if s.below == s.end]
        mask[leaves[-1].start : leaves[-1].end, leaves[-3].start] = True
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    monkeypatch.setattr(attention, "_has_flash_kernel", lambda q, v: False)
    monkeypatch.setattr(attention, "by_paths", leaky)
    model = taught()
    few = build(sorted(branching, key=len)[:4])
    assert leak(model, few) > 1e-4


def test_a_window_that_only_long_rows_feel_is_tested_on_one(branching, monkeypatch):
    from weitiao.model import attention

    real = attention.by_paths
    monkeypatch.setattr(attention, "by_paths", lambda q, k, v, plan, scale, window=None, dropout=0.0:
                        real(q, k, v, plan, scale, window + 1 if window else window, dropout))
    rng = np.random.default_rng(3)
    long = [example(rng.integers(4, 60, 60), 50, 20 + i) for i in range(3)]
    assert max(len(row) for row in branching) < 40
    proof = prove(taught("mistral", sliding_window=40), [*branching, *branching, *long], torch.float32)
    assert not proof.passed


def test_weights_in_bf16_are_held_to_what_bf16_can_do(branching):
    model = tiny_model().to(torch.bfloat16)
    learn_on_tries(model)
    assert prove(model, branching, torch.float32).passed


def test_a_proof_is_made_on_few_tokens_even_where_rows_are_long():
    from weitiao.train.proof import LONGEST, ROWS, TOKENS, picked

    rng = np.random.default_rng(0)
    rows = [example(rng.integers(4, 60, n), 1, n) for n in (10, 20, 900, 1000, 1500, 1900, 3000, 8000, 8100, 8200)]
    chosen = picked(rows)
    assert [len(e) for e in chosen] == [10, 20, 900, 1000, 2048]
    assert sum(map(len, chosen)) <= TOKENS
    short = [example(rng.integers(4, 60, 12), 1, i) for i in range(20)] + [example(rng.integers(4, 60, 500), 1, 99)]
    assert [len(e) for e in picked(short)] == [12] * (ROWS - 1) + [500]
    assert len(picked(rows[-2:])) == 2 and LONGEST < TOKENS


def test_no_part_of_a_proof_is_larger_than_a_pass_unless_a_window_shows_only_there():
    from weitiao.train.proof import LONGEST, SHORT, TOKENS, picked, size_for

    plain, sliding = tiny_model().config, tiny_model("mistral", sliding_window=700).config
    assert size_for(plain, 448) == (896, 448) and size_for(plain, 16_384) == (TOKENS, LONGEST)
    assert size_for(plain, 100).longest == SHORT and size_for(plain, 4096, frugal=True).longest == SHORT
    assert size_for(sliding, 448).longest == size_for(sliding, 896).longest == LONGEST and size_for(sliding, 1400) == (2800, 1400)
    rng = np.random.default_rng(0)
    chosen = picked([example(rng.integers(4, 60, n), 1, n) for n in (300, 400, 900, 5000)], size_for(plain, 448))
    assert [len(e) for e in chosen] == [300, 448]
    shared = rng.integers(4, 60, 900)
    rows = [example(np.concatenate([shared, rng.integers(4, 60, n)]), 900, n) for n in (100, 110, 120, 130)]
    assert build(picked(rows, size_for(plain, 448))).computed <= 448 and all(e.weights.any() for e in picked(rows, size_for(plain, 448)))


def test_a_sketch_of_gradients_keeps_lengths_and_differences(branching):
    """Folded as they come, over several passes: within a few per cent of the gradients', and no gradient left behind."""
    from weitiao.train.proof import _gradients, sketched

    model = tiny_model(hidden_size=64, vocabulary=2048)
    learn_on_tries(model)
    rows = [padded_batch([e], pad_id=0) for e in branching]
    other = [padded_batch([e], pad_id=0) for e in branching[:4]]
    plain = [{n: g.clone() for n, g in _gradients(model, some, 10.0, 1.0)} for some in (rows, other)]
    sketches = [dict(sketched(model, some, 10.0, 1.0)) for some in (rows, other)]
    assert plain[0].keys() == sketches[0].keys() and all(p.grad is None for p in model.parameters())
    for name in plain[0]:
        for values in ([plain[0][name], sketches[0][name]], [plain[0][name] - plain[1][name], sketches[0][name] - sketches[1][name]]):
            assert float(values[1].norm()) == pytest.approx(float(values[0].norm()), rel=0.1), name


def test_a_frugal_proof_passes_and_fails_like_the_other(branching, monkeypatch):
    model = tiny_model()
    learn_on_tries(model)
    whole, frugal = (prove(model, branching, torch.float32, frugal=asked) for asked in (False, True))
    assert whole.passed and frugal.passed
    true = loss.summed_loss
    monkeypatch.setattr(loss, "summed_loss", lambda m, b: true(m, b) * (1.01 if "trie" in b else 1.0))
    broken = prove(model, branching, torch.float32, frugal=True)
    assert not broken.passed and broken.grad_rel_max == pytest.approx(0.01, rel=0.2)


def test_rows_are_shortened_to_their_beginnings_of_which_something_is_learned():
    from weitiao.train.proof import shortened

    short, early, late = example(range(10), 4), example(range(40), 5), example(range(40), 30)
    a, b, c = (shortened(row, 16) for row in (short, early, late))
    assert [e.ids.tolist() for e in (a, b, c)] == [list(range(10)), list(range(16)), list(range(16))]
    assert [e.weights.tolist() for e in (a, b, c)] == [[0] * 4 + [1] * 6, [0] * 5 + [1] * 11, [0] * 14 + [1] * 2]
