"""What a run needs: what is settled so that it fits, and when it is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import tiny_config
from weitiao.cli import TORCH_READS
from weitiao.config import parse
from weitiao.errors import SettingError, SourceError
from weitiao.model import products
from weitiao.train import memory, tree
from weitiao.train.devices import device_named
from weitiao.train.needs import FRAMEWORK, PRODUCTS, STEP_OF_BUDGET, NoPlan, Subject, Target, needs, standing
from weitiao.train.plan import CHANGES, WAYS, change_that_fits, changed, made_up, ways
from weitiao.trie import Example

ROOMY = Target("a test", "cpu", 1 << 40, flops={"single": 1e11, "half": 2e11}, bandwidth=1e10)


LARGER = tiny_config("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)  # 4 million weights


def subject(config=None, tokens: int = 48, rows: int = 64, **words) -> Subject:
    return Subject(parse({"data": "none", **words}), config or tiny_config("llama"), made_up(tokens, rows))


def test_terms_are_a_step_and_parts_hold_them():
    planned = needs(subject(method="full"), ROOMY)
    parameters = planned.total
    assert planned.trainable == parameters
    assert planned.terms["weights"] == pytest.approx(4 * parameters, rel=0.01)
    assert planned.terms["optimizer"] == pytest.approx(8 * parameters, rel=0.01)
    assert sum(planned.terms.values()) == planned.parts["steps"] and planned.peak == max(planned.parts.values())
    assert planned.fits and planned.steps == 12 and planned.tokens == 48 * 64
    assert planned.disk["a checkpoint"] == pytest.approx(12 * parameters, rel=0.01)


def test_the_largest_pass_of_the_run_is_planned():
    """One row of 200 tokens among short ones is in the pass that is told."""
    short, long = made_up(16, 31), made_up(200, 1)
    mixed = Subject(parse({"data": "none", "training": {"batch_size": 4}}), tiny_config("llama"), [*short, *long])
    planned = needs(mixed, ROOMY)
    assert 200 < planned.largest <= 200 + 3 * 16
    assert planned.peak > needs(Subject(mixed.settings, mixed.config, short), ROOMY).peak


def test_more_memory_larger_passes_and_less_memory_smaller_ones():
    wanted = subject(tokens=256, rows=64, training={"batch_size": 64, "precision": "bf16", "memory": "fast"})
    roomy = needs(wanted, dataclasses.replace(ROOMY, gives_back=True))
    passing = roomy.peak - needs(subject(tokens=8, rows=8), ROOMY).peak
    tight = needs(wanted, dataclasses.replace(ROOMY, gives_back=True, available=roomy.peak - passing // 2))
    assert roomy.budget == memory.NODES["cpu"]["fast"] > tight.budget > memory.LEAST_NODES
    assert tight.fits and tight.peak <= roomy.peak - passing // 2 and not tight.checkpointing


def test_passes_are_small_on_a_cpu_unless_they_make_too_much_be_computed_once_more():
    def sharing(stem: int, tokens: int = 256) -> list[list[Example]]:
        noise = np.random.default_rng(0)
        shared, weights = noise.integers(3, 90, stem), np.ones(tokens, np.float32)
        weights[0] = 0
        return [[Example(np.concatenate([shared, noise.integers(3, 90, tokens - stem)]).astype(np.int32), weights)] for _ in range(32)]

    def budget(rows, target=ROOMY, **training) -> int:
        return needs(Subject(parse({"data": "none", "training": {"batch_size": 32, **training}}), tiny_config("llama"), rows), target).budget

    usual, two = memory.NODES["cpu"][None], dataclasses.replace(ROOMY, processes=2)
    for stem in (0, 120, 180):  # a stem is computed once
        assert budget(sharing(stem)) == usual
        assert budget(sharing(stem), precision="bf16") == memory.IN_HALVES * usual
    assert budget(sharing(0), two) == usual  # of several processes each pass computes its own
    assert budget(sharing(180), two) == 2 * usual  # 32 x 76 + 180 = 2,612 at once; two passes compute the 180 once more, 7 %; three twice
    assert budget(sharing(0, 6_000)) == 8 * usual  # in two pieces the first is computed again, a quarter more
    assert budget(sharing(0, 6_000), memory="balanced") == memory.NODES["cpu"]["balanced"]
    assert budget(sharing(0), memory="fast") == memory.NODES["cpu"]["fast"]
    assert budget(sharing(0), nodes_per_pass=700) == 700
    assert budget(sharing(0), Target.of_gpu(device_named("a100-40"))) == memory.NODES["cuda"][None]


def test_freed_memory_is_given_back_and_activations_are_recomputed_only_where_it_must_be():
    whole = {"batch_size": 1, "nodes_per_pass": 2048}  # smaller passes fit more
    wanted = subject(tokens=2048, rows=8, training=whole)
    roomy = needs(wanted, ROOMY)
    assert not roomy.gives_back and not roomy.checkpointing and roomy.kept > 0
    at_once = needs(wanted, dataclasses.replace(ROOMY, available=roomy.peak + 1))
    assert at_once.gives_back and at_once.kept == 0 and not at_once.checkpointing
    recomputed = needs(subject(tokens=2048, rows=8, training=whole | {"checkpointing": True}), ROOMY)
    little = dataclasses.replace(ROOMY, available=(recomputed.peak + roomy.peak) // 2)
    least = needs(wanted, little)
    assert least.checkpointing and least.gives_back and least.fits
    asked = needs(subject(tokens=2048, rows=8, training=whole | {"checkpointing": False}), little)
    assert not asked.checkpointing and not asked.fits


def test_a_heap_of_our_own_keeps_little_and_has_nothing_to_give_back():
    wanted = subject(tokens=2048, rows=8, training={"batch_size": 1, "nodes_per_pass": 2048})
    own = dataclasses.replace(ROOMY, own_heap=True)
    roomy = needs(wanted, own)
    assert 0 < roomy.kept < needs(wanted, ROOMY).kept / 15 and not roomy.gives_back
    tight = needs(wanted, dataclasses.replace(own, available=roomy.peak - 1))
    assert tight.checkpointing and not tight.gives_back and tight.fits


def test_where_the_usual_pass_does_not_fit_the_next_smaller_one_is_taken():
    def wanted(**training) -> Subject:
        return subject(tokens=64, rows=64, training={"batch_size": 64, **training})

    usual, target = memory.NODES["cpu"][None], dataclasses.replace(ROOMY, own_heap=True)
    whole = needs(wanted(), target)
    found = needs(wanted(), dataclasses.replace(target, available=whole.peak + whole.kept - 1))
    assert whole.budget == usual and found.budget == (usual - 1) // STEP_OF_BUDGET * STEP_OF_BUDGET and found.fits


def test_any_size_of_pass_is_told_from_two():
    """A pass that was not traced = the same pass traced; one with fewer edges than fill a chunk of logits needs no more than is told."""
    from weitiao.train.needs import _line, edges_of
    from weitiao.train.trace import trace

    wanted = subject(tokens=64, rows=64)
    rows = [path for row in wanted.paths for path in row]
    line = _line(wanted, ROOMY, "trie", False, rows[:32], False)
    few = line.at(wanted.nodes(rows[:8], "trie"), edges_of(rows[:8]))
    assert few.peak >= trace(wanted.case(ROOMY, "trie", False), rows[:8]).peak
    for count in (20, 60):
        told = line.at(wanted.nodes(rows[:count], "trie"), edges_of(rows[:count]))
        traced = trace(wanted.case(ROOMY, "trie", False), rows[:count])
        assert told.peak == pytest.approx(traced.peak, rel=0.02)  # chunks of elementwise work are as large whatever the pass
        assert told.windows["loss"]["logits"] == pytest.approx(traced.windows["loss"]["logits"], rel=0.05)


def test_a_model_that_cannot_be_run_without_numbers_has_no_plan(monkeypatch):
    from weitiao.train import needs as module

    monkeypatch.setattr(module, "trace", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("data-dependent\nmore")))
    with pytest.raises(NoPlan, match="RuntimeError: data-dependent$"):
        needs(subject(), ROOMY)


def test_packed_weights_count_as_many_as_they_stand_for():
    plain, packed = (needs(subject(LARGER, model={"quantize": kind}), ROOMY) for kind in ("none", "nf4"))
    assert (packed.trainable, packed.total) == (plain.trainable, plain.total)
    assert packed.terms["weights"] < plain.terms["weights"] / 4


def test_a_gpu_is_told_in_half_precision_and_by_its_own_memory():
    turing = needs(subject(), Target.of_gpu(device_named("T4")))
    ampere = needs(subject(), Target.of_gpu(device_named("a100-40")))
    assert (turing.compute, ampere.compute) == ("float16", "bfloat16")
    assert turing.available < 15 << 30 < 38 << 30 < ampere.available
    assert turing.seconds > ampere.seconds > 0
    assert needs(subject(), Target.of_gpu(device_named("8GB"))).seconds is None


@pytest.fixture
def by_mkl(monkeypatch):
    """Products in float32, as on most processors."""
    monkeypatch.setattr(products, "is_quicker", lambda: False)


def test_the_code_of_float32_products_by_onednn_is_counted_too(by_mkl, monkeypatch):
    before = needs(subject(), ROOMY).terms["framework"]
    monkeypatch.setattr(products, "is_quicker", lambda: True)
    assert needs(subject(), ROOMY).terms["framework"] == before + PRODUCTS
    assert needs(subject(), Target.of_gpu(device_named("24GB"))).terms["framework"] == FRAMEWORK["cuda"]


def test_the_code_of_products_in_half_precision_is_counted_on_a_cpu(by_mkl):
    """oneDNN keeps it for each shape; as many shapes as `weitiao` lets it keep."""
    half, single = (needs(subject(training={"precision": p}), ROOMY).terms["framework"] for p in ("bf16", "fp32"))
    assert needs(subject(method="full", model={"name": "tiny", "dtype": "bfloat16"}), ROOMY).terms["framework"] == half
    assert half - single == PRODUCTS == int(TORCH_READS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) * 768 << 10
    assert needs(subject(training={"precision": "bf16"}), Target.of_gpu(device_named("24GB"))).terms["framework"] == FRAMEWORK["cuda"]


def test_the_tutorials_figures():
    """0.8B, all weights in float32 with Adam: 4 + 4 + 8 bytes a weight, and activations of 4 rows of 256 tokens; 8B is ten times that."""
    from benchmarks.tutorial_memory import ANY, RECIPE, TOKENS, shapes

    found = {}
    for name, (told, config) in list(shapes().items())[:2]:
        planned = needs(Subject(parse({"data": "none", **RECIPE}), config, made_up(TOKENS, 64)), ANY)
        assert planned.terms["weights"] + planned.terms["gradients"] + planned.terms["optimizer"] == pytest.approx(16 * planned.total, rel=0.01)
        found[told] = sum(planned.terms.values()) / 1e9
    assert 15 < found[18] < 18 and 150 < found[180] < 180


def test_a_change_leaves_the_rest_as_it_was():
    settings = parse({"data": "none", "method": "full", "training": {"learning_rate": 1e-5, "batch_size": 7}})
    lora = changed(settings, {"method": "lora", "model.quantize": "nf4"})
    assert lora.method.name == "lora" and lora.model.quantize == "nf4" and lora.training.batch_size == 7
    assert lora.training.learning_rate is None  # it was found for another method
    assert changed(settings, {"method": "full"}) is None
    assert changed(settings, {"model.quantize": "nf4"}) is None  # full tuning wants plain weights


def test_every_change_and_way_is_made_of_settings():
    settings = parse({"data": "none", "training": {"nodes_per_pass": 64}, "model": {"dtype": "float32"}})
    full = parse({"data": "none", "method": "full"})
    for words in [*(change.words for change in CHANGES), *(words for _, words in WAYS)]:
        assert changed(settings, words) or changed(full, words), words


def test_the_first_change_that_fits_is_told(by_mkl):
    wanted = subject(LARGER, tokens=16, rows=16, method="full")
    target = dataclasses.replace(ROOMY, available=FRAMEWORK["cpu"] + (40 << 20), gives_back=True)
    assert not needs(wanted, target).fits
    change, planned = change_that_fits(wanted, target)
    assert planned.fits
    assert standing(wanted, target) < needs(wanted, target).peak
    assert {"method", "training.optimizer", "training.memory"} & set(change.words)
    assert change_that_fits(wanted, dataclasses.replace(target, available=FRAMEWORK["cpu"])) is None


def test_ways_are_told_best_first_and_those_that_fit_before_the_others(by_mkl):
    wanted = subject(LARGER, tokens=16, rows=16)
    found = ways(wanted, dataclasses.replace(ROOMY, available=FRAMEWORK["cpu"] + (40 << 20), gives_back=True))
    fits = [way.fits for way in found]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    assert [way.name for way in found if way.fits][0] in ("all weights, 8-bit optimizer", "all weights in bf16, thrifty", "LoRA")


@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "gemma3", "qwen2", "gptj", "yuan"])
def test_other_architectures_are_planned_or_say_why_not(architecture):
    planned = needs(subject(tiny_config(architecture)), ROOMY)
    assert planned.peak > FRAMEWORK["cpu"] and np.isfinite(planned.seconds)
    assert planned.layout == ("padded" if architecture == "gptj" else "trie")


def test_planning_leaves_random_numbers_and_attention_as_they_were():
    from weitiao.model import attention

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    needs(subject(), ROOMY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert attention._assumed is None


def few(config, tokenizer=None, **words) -> Subject:
    return Subject(parse({"data": "none"} | words), config, made_up(16, 8), tokenizer)


def test_a_model_that_cannot_be_made_of_fewer_layers_has_no_plan(monkeypatch):
    def refuse(config, settings):
        raise SourceError("The config of x describes no causal language model.")

    monkeypatch.setattr(tree, "of_config", refuse)
    with pytest.raises(NoPlan, match="describes no causal language model"):
        needs(few(tiny_config()), ROOMY)


def test_a_method_that_does_not_suit_the_model_is_refused():
    with pytest.raises(SettingError, match="has no bias"):
        needs(few(tiny_config(), method="bitfit"), ROOMY)


def test_an_operation_without_a_shape_of_its_own_is_told_in_one_line(capfd):
    """Experts of a mixture are multiplied by a kernel that fake tensors know in bf16 alone."""
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )
    try:
        needs(few(config), ROOMY)
    except NoPlan as reason:
        assert "\n" not in str(reason)
    assert "Traceback" not in capfd.readouterr().err


def test_a_prompt_of_words_is_counted_by_the_tokenizer(tokenizer):
    planned = needs(few(tiny_config(), tokenizer, method={"name": "prompt", "text": "Answer in one word."}), ROOMY)
    assert planned.trainable == 32 * len(tokenizer("Answer in one word.", add_special_tokens=False).input_ids)
