"""Answers of a batch that rows join and leave, behind stems that are kept once, are those of each prompt alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from weitiao.model import decode, generate, tails
from weitiao.model.decode import arrange
from weitiao.model.generate import Sampling, answers_to, no_decoding
from weitiao.model.methods import METHODS
from weitiao.settings.methods import AdapterSettings, Ia3Settings, LoraSettings, PrefixSettings, PromptSettings, PtuningSettings
from weitiao.train.loss import learn_on_tries

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "glm", "gpt2", "cohere", "granite", "bloom", "yuan"]
METHOD_SETTINGS = [
    LoraSettings(dropout=0.0), LoraSettings(dora=True, dropout=0.0), AdapterSettings(dropout=0.0), Ia3Settings(),
    PromptSettings(init="random", virtual_tokens=5), PtuningSettings(init="random", virtual_tokens=5),
    PrefixSettings(init="random", virtual_tokens=5), PrefixSettings(init="random", virtual_tokens=5, projection=True),
]
METHOD_NAMES = ["lora", "dora", "adapter", "ia3", "prompt", "ptuning", "prefix", "projection"]
STOPS = [2, *range(100, 112)]


def lively(name: str, **more):
    """A tiny model whose answers are not one token again and again."""
    model = tiny_model(name, **more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    learn_on_tries(model)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Two stems one below the other, twins, a prompt that begins others, one that shares nothing, one of a single token."""
    draw = np.random.default_rng(0)
    shared, more = draw.integers(120, 290, 20), draw.integers(120, 290, 6)
    made = [np.concatenate([shared, draw.integers(120, 290, n)]) for n in (1, 4, 4, 9, 30)]
    made += [np.concatenate([shared, more, draw.integers(120, 290, n)]) for n in (1, 2, 3)]
    made += [made[1], shared, shared[:7], draw.integers(120, 290, 3), np.concatenate([shared, more]), shared[:1]]
    return [ids.astype(np.int32) for ids in made]


def alone(model, prompt: np.ndarray, limit: int) -> list[int]:
    """By transformers, without padding."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
                             eos_token_id=STOPS, pad_token_id=3)
    return out[0, len(prompt) :].tolist()


def likeliest(logits: torch.Tensor, prompts, said) -> list[int]:
    return logits.argmax(-1).tolist()


def decoded(model, prompts, limits, at_once: int = 64, **more) -> list[list[int]]:
    with torch.inference_mode():
        found = dict(decode.decode(model, prompts, limits, STOPS, likeliest, at_once, generate.virtual_now(model), **more))
    assert all(len(ids) <= limit for ids, limit in zip((found[i] for i in range(len(prompts))), limits, strict=True))
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("at_once", "worth", "nodes"), [(1, 1, 2048), (3, 1, 16), (64, 1, 2048), (64, 512, 40)])
def test_answers_are_those_of_each_prompt_alone(name, at_once, worth, nodes, prompts, monkeypatch):
    monkeypatch.setattr(decode, "NODES", nodes)
    monkeypatch.setattr(decode, "WORTH", worth)
    model = lively(name)
    limits = [5 + i for i in range(len(prompts))]
    expected = [alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert len({token for ids in expected for token in ids}) > 1
    assert decoded(model, prompts, limits, at_once) == expected


WIDE = {"bloom": {"hidden_size": 64}, "gpt2": {"n_embd": 64}}  # heads of 16


@pytest.mark.parametrize(("name", "at_once"), [("llama", 3), ("mistral", 64), ("gemma3", 5), ("bloom", 4), ("gpt2", 64)])  # the second and third look back a few places only
def test_tails_by_our_own_kernel_give_the_same_answers(name, at_once, prompts, monkeypatch):
    if reason := tails.trouble():
        pytest.skip(reason)
    monkeypatch.setattr(decode, "WORTH", 1)
    model = lively(name, **WIDE.get(name, {"head_dim": 32}))
    limits = [5 + i for i in range(len(prompts))]
    expected = [alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    called = []
    attend = tails.attend
    monkeypatch.setattr(tails, "attend", lambda *given: called.append(given) or attend(*given))
    assert decoded(model, prompts, limits, at_once) == expected
    assert called or name == "bloom"  # whose keys are wider than its values: they hold the distances


@pytest.mark.parametrize("settings", [PromptSettings(init="random", virtual_tokens=5), PrefixSettings(init="random", virtual_tokens=5)], ids=["prompt", "prefix"])
def test_tails_by_our_own_kernel_stand_behind_virtual_tokens(settings, prompts, monkeypatch):
    if reason := tails.trouble():
        pytest.skip(reason)
    monkeypatch.setattr(decode, "WORTH", 1)
    model = METHODS[settings.name].attach(lively("llama", head_dim=32), settings, 0).eval()
    called = []
    attend = tails.attend
    monkeypatch.setattr(tails, "attend", lambda *given: called.append(given) or attend(*given))
    logits_told(model, prompts, 6)
    assert called


def test_tails_in_bfloat16_take_half_the_room_and_say_the_same(prompts, monkeypatch):
    if reason := tails.trouble():
        pytest.skip(reason)
    model = lively("llama", head_dim=32).bfloat16()
    made = []
    larger = decode.Batch._larger
    monkeypatch.setattr(decode.Batch, "_larger", lambda *given: made.append(larger(*given)) or made[-1])
    ours = decoded(model, prompts, [3] * len(prompts))
    assert {tail.dtype for tail in made} == {torch.bfloat16}
    monkeypatch.setattr(tails, "takes", lambda *given: False)
    made.clear()
    theirs = decoded(model, prompts, [3] * len(prompts))
    assert {tail.dtype for tail in made} == {torch.float32}
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(prompts) - 3  # ties of bfloat16 fall either way


def logits_told(model, prompts, limit: int) -> list[torch.Tensor]:
    """What each token was chosen by: [tokens, vocabulary] of each prompt, held against one forward over prompt and answer."""
    told: dict[int, list[torch.Tensor]] = {}

    def choose(logits, rows, said):
        for row, line in zip(rows, logits, strict=True):
            told.setdefault(row, []).append(line)
        return likeliest(logits, rows, said)

    with torch.inference_mode():
        found = dict(decode.decode(model, prompts, [limit] * len(prompts), STOPS, choose, 4, generate.virtual_now(model)))
        for i, prompt in enumerate(prompts):
            ids = torch.from_numpy(np.concatenate([prompt, found[i]]).astype(np.int64))[None]
            judge = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            assert float((torch.stack(told[i]) - judge).abs().max()) < 2e-4
    return [torch.stack(told[i]) for i in range(len(prompts))]


@pytest.mark.parametrize("settings", METHOD_SETTINGS, ids=METHOD_NAMES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "yuan"])
def test_logits_under_a_method_are_those_of_each_row_alone(settings, name, prompts, monkeypatch):
    monkeypatch.setattr(decode, "WORTH", 1)
    method = METHODS[settings.name]
    model = method.attach(lively(name), settings, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    tuned = logits_told(model, prompts, 6)
    with method.untuned(model):
        untuned = logits_told(model, prompts, 6)
    assert any(float((a[0] - b[0]).abs().max()) > 1e-2 for a, b in zip(tuned, untuned, strict=True))


def test_without_the_flash_kernel_answers_are_the_same(prompts, monkeypatch):
    from weitiao.model import attention

    model = lively("llama")
    limits = [12] * len(prompts)
    expected = decoded(model, prompts, limits)
    monkeypatch.setattr(attention, "_has_flash_kernel", lambda q, v: False)
    monkeypatch.setattr(decode, "WORTH", 1)
    assert decoded(model, prompts, limits, 5) == expected


def test_the_order_and_the_stems_of_five_prompts():
    """A B C d, A B C e f, A B g, A B, h: a stem A for four of them (A B but the last token of the shortest), B C for two."""
    A, B, C, d, e, f, g, h = range(8)
    prompts = [np.array(ids, np.int32) for ids in ([A, B, C, d], [A, B, C, e, f], [A, B, g], [A, B], [h])]
    order, stems = arrange(prompts, virtual=10, worth=1)
    assert order == [1, 0, 2, 3, 4]  # below a branch, the longest first
    assert [[(s.start, s.end, list(s.rows)) for s in stem.chain()] for stem in stems] == [
        [(0, 10, [0, 1, 2, 3, 4]), (10, 11, [0, 1, 2, 3]), (11, 13, [0, 1])],
        [(0, 10, [0, 1, 2, 3, 4]), (10, 11, [0, 1, 2, 3]), (11, 13, [0, 1])],
        [(0, 10, [0, 1, 2, 3, 4]), (10, 11, [0, 1, 2, 3])],
        [(0, 10, [0, 1, 2, 3, 4]), (10, 11, [0, 1, 2, 3])],
        [(0, 10, [0, 1, 2, 3, 4])],
    ]
    assert arrange(prompts, worth=100) == ([1, 0, 2, 3, 4], [None] * 5)


def watched(model, monkeypatch) -> list[tuple[int, int]]:
    """(nodes that go through the model, places that the tails have room for) of every call."""
    calls: list[tuple[int, int]] = []
    forward = model.forward

    def watching(*args, **inputs):
        out = forward(*args, **inputs)
        memory = inputs["trie"].memory
        keys = getattr(memory, "batch", memory).tails[0][0]
        calls.append((inputs["input_ids"].shape[1], keys.shape[0] * keys.shape[2]))
        return out

    monkeypatch.setattr(model, "forward", watching)
    return calls


def test_a_shared_prefix_is_computed_once_however_many_passes_there_are(monkeypatch):
    monkeypatch.setattr(decode, "NODES", 150)
    draw = np.random.default_rng(0)
    shared = draw.integers(120, 290, 100)
    prompts = [np.concatenate([shared, draw.integers(120, 290, 10)]).astype(np.int32) for _ in range(30)]
    model = lively("llama")
    calls = watched(model, monkeypatch)
    decoded(model, prompts, [1] * 30)
    assert sum(nodes for nodes, _ in calls) == pytest.approx(100 + 30 * 10, abs=10)  # first tokens are shared here and there
    assert len(calls) > 2


def test_a_row_that_stops_makes_room_for_another(prompts, monkeypatch):
    model = lively("llama")
    calls = watched(model, monkeypatch)
    limits = [40, *[2] * (len(prompts) - 1)]
    answers = decoded(model, prompts, limits, 4)
    steps = [nodes for nodes, _ in calls]
    assert len(answers[0]) > 30
    assert len(steps) < len(answers[0]) + len(prompts)  # the long one held none of the others up
    assert steps[-15:] == [1] * 15  # and went on alone


def test_tails_stay_within_the_places_they_are_given(prompts, monkeypatch):
    model = lively("llama")
    calls = watched(model, monkeypatch)
    limits = [8] * len(prompts)
    bounded = decoded(model, prompts, limits, places=200)
    assert max(places for _, places in calls) <= 200
    assert bounded == decoded(model, prompts, limits)
    assert max(places for _, places in calls) > 400


# ------------------------------------------------------------------------------------------------- prompts -> answers


@pytest.fixture
def template(tokenizer):
    return SimpleNamespace(tokenizer=tokenizer, stop_ids=STOPS, pad_id=3)


def texts(model, template, prompts, sampling=Sampling(12), *more, **named) -> list[str]:
    return [answer.text for answer in answers_to(model, template, prompts, sampling, *more, **named)]


def test_both_ways_give_the_same_answers_and_the_bar_counts_rows(template, prompts):
    model = lively("llama")
    assert no_decoding(model) is None and no_decoding(model, "padded") == "its rows are padded"
    seen = []

    def progress(ends, what):
        seen.append(len(ends))
        for end in ends:
            seen.append(end[0])
            yield end

    ours = answers_to(model, template, prompts, Sampling(12), 4, progress)
    assert seen[0] == len(prompts) and sorted(seen[1:]) == list(range(len(prompts)))
    assert ours == answers_to(model, template, prompts, Sampling(12), 4, layout="padded")
    assert any(answer.cut for answer in ours) and not all(answer.cut for answer in ours)


def test_a_prompt_that_leaves_no_room_is_answered_by_nothing(template, prompts):
    model = lively("llama", max_position_embeddings=32)
    for layout in ("trie", "padded"):
        answers = answers_to(model, template, prompts, Sampling(40), 1, layout=layout)
        assert [a.tokens for a, p in zip(answers, prompts) if len(p) >= 32] == [0]
        assert all(a.tokens <= 32 - len(p) for a, p in zip(answers, prompts) if len(p) < 32)


def test_draws_follow_the_seed_and_not_the_batch(template, prompts):
    model = lively("llama")
    drawn = []
    for at_once in (1, 4, 64):
        torch.manual_seed(7)
        drawn.append(texts(model, template, prompts, Sampling(12, temperature=1.5, top_p=0.9), at_once))
    assert drawn[0] == drawn[1] == drawn[2]
    torch.manual_seed(8)
    assert texts(model, template, prompts, Sampling(12, temperature=1.5, top_p=0.9)) != drawn[0]
    assert drawn[0][1] != drawn[0][8]  # the same prompt twice


def test_draws_keep_to_the_likeliest(template):
    """A share of 1e-6 holds the likeliest token alone; at a high temperature everything is drawn."""
    model = lively("llama")
    prompts = [np.array([130, 131, n], np.int32) for n in range(120, 160)]
    assert texts(model, template, prompts, Sampling(6, temperature=2.0, top_p=1e-6)) == texts(model, template, prompts, Sampling(6))


def test_a_penalty_of_the_models_own_is_kept(template, prompts):
    model = lively("llama")
    plain = texts(model, template, prompts)
    model.generation_config.repetition_penalty = 3.0
    penalised = texts(model, template, prompts)
    assert penalised == texts(model, template, prompts, Sampling(12), 1, layout="padded") != plain  # one row: no pads to be penalised


@pytest.mark.parametrize("why", ["gptj", "generation_config", "untaught", "softcap"])
def test_what_it_cannot_do_is_left_to_transformers(why, template, prompts, monkeypatch):
    if why == "untaught":
        model = tiny_model().eval()
    else:
        model = lively("gptj" if why == "gptj" else "llama")
    if why == "generation_config":
        model.generation_config.no_repeat_ngram_size = 2
        assert "no_repeat_ngram_size" in no_decoding(model)
    if why == "softcap":  # told by the attention itself, when it is asked
        def refuse(*args, **kwargs):
            raise generate.TrieUnsupported("its attention uses softcap")

        monkeypatch.setattr(decode.Pass, "attend", refuse)
    assert (no_decoding(model) is None) == (why == "softcap")
    expected = [template.tokenizer.decode(ids[:-1] if ids[-1] in STOPS else ids, skip_special_tokens=True).rstrip("\ufffd")
                for ids in (alone(model, prompt, 12) for prompt in prompts)]
    assert texts(model, template, prompts, Sampling(12), 1) == expected


def test_the_same_prompt_is_answered_once(template, monkeypatch):
    model = lively("llama")
    calls = watched(model, monkeypatch)
    answers = texts(model, template, [np.array([130, 131, 132], np.int32)] * 5)
    assert len(set(answers)) == 1 and max(nodes for nodes, _ in calls) == 3
