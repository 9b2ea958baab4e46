"""How virtual tokens begin, how they stand before padded rows, and what is refused."""

import pytest
import torch
from conftest import example, tiny_model

from weitiao import config
from weitiao.data.batch import padded_batch, trie_batch
from weitiao.errors import SettingError
from weitiao.model import attention
from weitiao.model.generate import batches_of, padding_shows, room
from weitiao.model.methods import METHODS, count_parameters
from weitiao.model.methods.virtual import COMMON, demonstrations, spread, start_ids
from weitiao.model.methods.wiring import keys_and_values, with_places
from weitiao.settings.methods import PrefixSettings, PromptSettings, PtuningSettings
from weitiao.train.loss import learn_on_tries
from weitiao.trie import build

KINDS = [PromptSettings(virtual_tokens=4), PtuningSettings(virtual_tokens=4), PrefixSettings(virtual_tokens=4),
         PrefixSettings(virtual_tokens=4, projection=True)]
kinds = pytest.mark.parametrize("settings", KINDS, ids=["prompt", "ptuning", "prefix", "projection"])


def attached(settings, name="llama", tokenizer=None, seed=0, **more):
    model = tiny_model(name, **more)
    learn_on_tries(model)
    return METHODS[settings.name].attach(model, settings, seed, tokenizer)


@kinds
def test_drawn_from_the_vocabulary_they_begin_as_its_tokens_would_stand_there(settings):
    """A prompt is its tokens' embeddings and a prefix their keys and values: the text behind is answered alike."""
    model = attached(settings).eval()
    ids = start_ids(settings, 4, None, model, 0)
    row = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        virtual = model(input_ids=row).logits[0]
        model.virtual.on = False
        real = model(input_ids=torch.cat([ids[None], row], dim=1)).logits[0, 4:]
    assert float((virtual - real).abs().max()) < 1e-6


def test_a_text_is_the_start_whole_and_next_to_the_row(tokenizer):
    text = "What is the capital of France?"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    model = attached(PromptSettings(text=text), tokenizer=tokenizer)
    assert model.virtual_places == len(ids)
    assert torch.equal(model.virtual(), model.get_input_embeddings().weight[ids])
    roomy = attached(PromptSettings(text=text, virtual_tokens=len(ids) + 3), tokenizer=tokenizer)
    assert torch.equal(roomy.virtual()[3:], model.virtual())


def test_a_text_with_more_tokens_than_places_is_refused(tokenizer):
    with pytest.raises(SettingError, match="method.virtual_tokens is 2"):
        attached(PromptSettings(text="What is the capital?", virtual_tokens=2), tokenizer=tokenizer)


def test_text_and_init_go_together():
    with pytest.raises(SettingError, match="init=text needs the text"):
        config.parse({"data": "r.jsonl", "method": {"name": "prompt", "init": "text"}})
    with pytest.raises(SettingError, match="method.text is empty"):
        config.parse({"data": "r.jsonl", "method": {"name": "prompt", "text": "  "}})
    with pytest.raises(SettingError, match="goes with method.init=text"):
        config.parse({"data": "r.jsonl", "method": {"name": "prompt", "init": "random", "text": "a"}})
    made = config.parse({"data": "r.jsonl", "method": {"name": "prefix", "text": "a"}})
    assert made.method.init == "text"


def test_special_tokens_are_not_drawn(tokenizer):
    model = tiny_model()
    drawn = start_ids(PromptSettings(), 500, tokenizer, model, 0).tolist()
    assert not set(drawn) & set(tokenizer.all_special_ids)
    assert max(drawn) < min(COMMON, 300) and len(set(drawn)) > 100


def test_noise_has_the_spread_of_what_it_replaces():
    model = attached(PromptSettings(init="random", virtual_tokens=200))
    deviation = float(model.get_input_embeddings().weight.std())
    assert float(model.virtual().detach().std()) == pytest.approx(deviation, rel=0.5)
    assert spread(torch.full((4,), 0.0)) == 1.0
    assert spread(torch.tensor([-0.9, 0.9])) == 1.0 and spread(torch.tensor([-0.2, 0.2])) == 0.25


def test_rows_padded_left_or_right_get_their_virtual_tokens_before_the_first_token():
    left, right = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    assert with_places(left, 2).tolist() == [[0, 0, 1, 1, 1, 1, 1]]
    assert with_places(right, 2).tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    assert with_places(None, 2) is None


@kinds
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_padding_on_either_side_changes_nothing(settings, name):
    model = attached(settings, name).eval()
    row = torch.tensor([[7, 8, 9, 10]])
    pad = torch.full((1, 3), 3)
    ones, zeros = torch.ones_like(row), torch.zeros_like(pad)
    with torch.no_grad():
        alone = model(input_ids=row, attention_mask=ones).logits[0]
        right = model(input_ids=torch.cat([row, pad], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[0, :4]
        mask = torch.cat([zeros, ones], 1)
        left = model(input_ids=torch.cat([pad, row], 1), attention_mask=mask,
                     position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[0, 3:]
    assert float((alone - right).abs().max()) < 1e-6
    assert float((alone - left).abs().max()) < 1e-6


@kinds
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_beams_go_with_the_cache(settings, name):
    """Beam search reorders the cache; a beam of one's own log-probability is what the model gives without a cache."""
    model = attached(settings, name).eval()
    row = torch.tensor([[7, 8, 9, 10]])
    out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=5, num_beams=3, do_sample=False,
                         eos_token_id=None, pad_token_id=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    with torch.no_grad():
        logprobs = model(input_ids=out.sequences).logits[0].log_softmax(-1)
    own = sum(float(logprobs[t - 1, out.sequences[0, t]]) for t in range(4, 9))
    assert float(out.sequences_scores[0]) == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("window", [None, 3, 7, 50])
def test_a_prefix_is_seen_by_every_node_whichever_way_attention_is_computed(branching, window):
    trie = build(branching)
    plan = trie_batch(trie)["trie"]
    g = torch.Generator().manual_seed(0)
    query, = (torch.randn(1, 4, len(trie), 8, generator=g, dtype=torch.float64),)
    key, value = (torch.randn(1, 2, 5 + len(trie), 8, generator=g, dtype=torch.float64) for _ in range(2))
    judge = attention.dense(query, key, value, plan, 0.3, window)
    assert float((attention.by_paths(query, key, value, plan, 0.3, window) - judge).abs().max()) < 1e-12
    if window is None:
        assert float((attention.ByKeys.apply(query, key, value, plan.segments, 0.3) - judge).abs().max()) < 1e-12


def test_a_plan_under_virtual_tokens_by_hand():
    plan = trie_batch(build([example([5, 6, 7], 1), example([5, 8], 1)]))["trie"].under(2)
    assert plan.depth.tolist() == [0, 1, 2, 3, 4, 3]
    assert plan.subtree_end.tolist() == [6, 6, 6, 5, 5, 6]
    assert [tuple(s) for s in plan.segments] == [(0, 2, 6), (2, 3, 6), (3, 5, 5), (5, 6, 6)]
    assert plan.longest == 5


@kinds
def test_virtual_tokens_are_computed_once_a_pass(settings, branching):
    """Nodes in the layers: a prompt's are V more than the trie's whatever the rows, a prefix's none."""
    model = attached(settings)
    seen = []
    model.base_model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    trie = build(branching)
    model(**trie_batch(trie))
    model(**{k: v for k, v in padded_batch(branching, 0).items() if k not in ("targets", "weights")})
    more = 4 if settings.name != "prefix" else 0
    assert [shape[:2] for shape in seen] == [(1, len(trie) + more), (len(branching), max(map(len, branching)) + more)]


@kinds
def test_room_is_what_virtual_tokens_leave(settings):
    assert room(attached(settings)) == 256 - 4
    assert METHODS[settings.name].virtual_tokens(settings, None) == 4


def test_under_a_window_only_prompts_of_one_length_follow_a_prefix():
    assert padding_shows(attached(PrefixSettings(), "gemma3"))
    assert not padding_shows(attached(PrefixSettings(), "llama")) and not padding_shows(attached(PromptSettings(), "gemma3"))
    assert batches_of([5, 3, 5, 3, 3], 2, alike=True) == [[1, 3], [4], [0, 2]]
    assert batches_of([5, 3, 5, 3, 3], 2, alike=False) == [[1, 3], [4, 0], [2]]


def test_only_the_encoder_or_the_table_is_trained():
    model = attached(PtuningSettings(virtual_tokens=4, encoder_hidden=8))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(n.startswith("virtual.encoder.") for n in names)
    assert count_parameters(model)[0] == 4 * 32 + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 32 + 32)


def test_the_same_seed_gives_the_same_start():
    settings = PtuningSettings(virtual_tokens=4)
    a, b, c = (attached(settings, seed=s).virtual.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["start"], c["start"])


def test_an_encoder_is_in_the_state_to_resume_from_and_not_in_the_adapter(tmp_path):
    from safetensors.torch import load_file

    settings = PtuningSettings(virtual_tokens=4)
    method, model = METHODS["ptuning"], attached(settings)
    method.save(model, tmp_path, "base")
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    state = method.encoder_state(model)
    assert any("mlp_head" in name for name in state)
    method.load(model, tmp_path)
    assert method.encoder_state(model) == {}  # what is only used needs none
    method.load_encoder_state(model, state)
    assert method.encoder_state(model).keys() == state.keys()
    assert "scale" in METHODS["prompt"].encoder_state(attached(PromptSettings(virtual_tokens=4)))  # the unit of its optimizer's state


def test_a_prefix_is_laid_out_as_peft_lays_it_out():
    model = attached(PrefixSettings(virtual_tokens=4))
    pairs = keys_and_values(model)
    assert len(pairs) == 2 and pairs[0][0].shape == (1, 2, 4, 8)
    flat = model.virtual().view(4, 4, 2, 8)  # [V, layers * 2, heads, d]
    assert torch.equal(pairs[1][1][0], flat[:, 3].transpose(0, 1))


def test_they_begin_as_rows_with_their_answers_those_with_another_answer_first():
    rows = [example([5, 6, 9], 2), example([5, 7, 9], 2), example([5, 8, 10], 2), example([5, 6, 7, 8, 5, 6, 7, 8], 6)]
    for seed in range(8):
        start = demonstrations(rows, 7, seed)
        assert len(start) == 7
        whole = {tuple(start[-3:]), tuple(start[-6:-3])}
        assert {row[-1] for row in whole} == {9, 10} and whole <= {(5, 6, 9), (5, 7, 9), (5, 8, 10)}
    assert demonstrations(rows[:1], 7, 0) == [5, 6, 9]
    assert demonstrations(rows[3:], 5, 0) == [8, 5, 6, 7, 8]  # the end of a row that is too long
    assert demonstrations([], 5, 0) == []
    model = tiny_model()
    assert start_ids(PromptSettings(), 5, None, model, 0, rows[:1]).tolist()[-3:] == [5, 6, 9]
    assert len(start_ids(PromptSettings(), 5, None, model, 0, rows[:1])) == 5


def opt():
    import transformers as T

    return T.OPTForCausalLM(T.OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                        max_position_embeddings=64, word_embed_proj_dim=32))


def deepseek():
    import transformers as T

    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=64))


def lfm2():
    import transformers as T

    return T.Lfm2ForCausalLM(T.Lfm2Config(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
                                          max_position_embeddings=64))


@pytest.mark.parametrize("make, name, found", [
    (opt, "prompt", "goes past the place"), (opt, "prefix", "keys and values|goes past the place"),
    (deepseek, "prefix", "latent attention"), (lfm2, "prefix", "conv"),
])
def test_models_that_have_no_place_for_them_are_refused_by_name(make, name, found):
    settings = {"prompt": PromptSettings(), "prefix": PrefixSettings()}[name]
    with pytest.raises(SettingError, match=f"{make().__class__.__name__}(.|\n)*({found})"):
        METHODS[name].attach(make(), settings, 0)


def test_a_padded_pass_counts_the_virtual_tokens_of_each_row():
    from weitiao.data.packing import padded_passes

    rows = [example(range(4, 14), 5, i) for i in range(20)]
    assert [len(p) for p in padded_passes(rows, 100)] == [10, 10]
    assert [len(p) for p in padded_passes(rows, 100, virtual_tokens=10)] == [5, 5, 5, 5]


def test_weight_decay_leaves_alone_what_does_not_stand_for_zero():
    from weitiao.settings.training import TrainingSettings
    from weitiao.train.optimizer import make_optimizer

    for settings, decayed in ((PromptSettings(), 0), (PtuningSettings(encoder_hidden=8), 4)):
        model, method = attached(settings), METHODS[settings.name]
        groups = make_optimizer(model, TrainingSettings(weight_decay=0.1), 1e-3, decays=method.decays).param_groups
        assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == decayed  # an embedding and three matrices


@pytest.mark.parametrize("method, found", [
    ({"name": "ptuning", "encoder_layers": 3}, "encoder=lstm"), ({"name": "ptuning", "encoder_dropout": 0.1}, "encoder=lstm"),
    ({"name": "prefix", "projection_hidden": 8}, "projection=true"), ({"name": "bitfit", "targets": ["q_proj"]}, "add_bias=true"),
])
def test_settings_that_would_do_nothing_are_refused(method, found):
    with pytest.raises(SettingError, match=f"goes with {found}"):
        config.parse({"data": "r.jsonl", "method": method})
