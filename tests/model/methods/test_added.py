"""tokens.add: new special tokens whose rows alone are trained beside the method, saved small, merged."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from weitiao import config
from weitiao.errors import SettingError
from weitiao.model.methods import method_of
from weitiao.train.loss import learn_on_tries

NEW = ["<think>", "</think>"]
METHODS = ["lora", "bitfit", "ia3", "adapter", "prompt", "prefix", "full"]


def attached(tokenizer, method="lora", name="gpt2", tied=None, moved=0.0):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    settings = config.parse({"data": "r.jsonl", "method": method, "tokens": {"add": NEW}})
    made = method_of(settings, tokenizer)
    model = tiny_model(name, seed=1, **({} if tied is None else {"tie_word_embeddings": tied}))
    learn_on_tries(model)
    model = made.attach(model, settings.method, 0, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and method != "full":
                parameter += moved
    return model.eval(), made, tokenizer.convert_tokens_to_ids(NEW)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, ids[0], 9, ids[1], 7]])).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_of_the_tables_are_trained(tokenizer, method, tied):
    model, _, ids = attached(tokenizer, method, "llama" if method != "bitfit" else "qwen2", tied)
    assert ids == [300, 301]
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    if method == "full":
        assert not rows and all(p.requires_grad for p in model.parameters())
        return
    assert [tuple(p.shape) for p in rows] == [(2, 32)] * (1 if tied else 2)
    assert all(p.requires_grad and p.dtype is torch.float32 for p in rows)
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and p.shape[0] >= 300]
    assert tables and not any(p.requires_grad for p in tables)
    logits(model, ids)
    with torch.enable_grad():
        model.train()(input_ids=torch.tensor([[5, ids[0], 9]])).logits[0, -1, ids[1]].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rows)


def test_a_new_row_begins_as_the_mean_of_the_old(tokenizer):
    model, _, ids = attached(tokenizer, "full")
    table = model.get_input_embeddings().weight
    assert torch.allclose(table[300], table[:300].mean(0), atol=1e-6) and table.shape[0] == 302


def test_rows_to_spare_are_used_and_begin_as_the_mean_too(tokenizer):
    from weitiao.model.methods.added import make_room

    model = tiny_model(vocabulary=320)
    make_room(model, [300, 301])
    table = model.get_input_embeddings().weight
    assert table.shape[0] == 320 and torch.allclose(table[301], table[:300].mean(0), atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS[:-1], {"name": "lora", "init": "pissa"}], ids=str)
def test_untuned_the_rows_are_what_they_began_as(tokenizer, method):
    start, _, ids = attached(tokenizer, method)
    model, made, _ = attached(tokenizer, method, moved=0.05)
    moved = logits(model, ids)
    with made.untuned(model):
        base = logits(model, ids)
    with made.untuned(start):
        assert float((base - logits(start, ids)).abs().max()) < 2e-6
    assert torch.equal(logits(model, ids), moved) and not torch.allclose(moved, base, atol=1e-3)


def test_a_new_token_is_one_token_and_can_be_read_in_an_answer(tokenizer):
    import copy

    from weitiao.model.methods.added import extend

    tokenizer = copy.deepcopy(tokenizer)
    ids = extend(tokenizer, NEW)
    text = "<think>It</think> is 2."
    encoded = tokenizer(text, add_special_tokens=False).input_ids
    assert [i for i in encoded if i in ids] == ids
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text


@pytest.mark.parametrize("names, found", [([""], "empty"), ([" "], "empty"), (["<a>", "<a>"], "twice")])
def test_no_token_and_a_token_twice_are_refused(tokenizer, names, found):
    import copy

    from weitiao.model.methods.added import extend

    with pytest.raises(SettingError, match=found):
        extend(copy.deepcopy(tokenizer), names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_reloaded_and_merged(tokenizer, method, tied, tmp_path):
    model, made, ids = attached(tokenizer, method, tied=tied, moved=0.05)
    before = logits(model, ids)
    made.save(model, tmp_path / "saved", "base")
    fresh, again, _ = attached(tokenizer, method, tied=tied)
    again.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh, ids), before)
    if method in ("lora", "bitfit", "ia3"):
        merged = made.merge(model)
        merged.save_pretrained(tmp_path / "merged")
        plain = type(tiny_model("gpt2")).from_pretrained(tmp_path / "merged").eval()
        assert float((logits(plain, ids) - before).abs().max()) < 1e-5
        assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied


def test_lora_keeps_them_in_its_peft_file_and_others_in_a_small_one(tokenizer, tmp_path):
    for method, file in (("lora", "adapter_model.safetensors"), ("bitfit", "tokens.safetensors")):
        model, made, _ = attached(tokenizer, method)
        made.save(model, tmp_path / method, "base")
        saved = load_file(tmp_path / method / file)
        rows = [v for k, v in saved.items() if "trainable_tokens" in k or "token_adapter" in k]
        assert [tuple(r.shape) for r in rows] == [(2, 32)]
        assert not any(v.shape[0] >= 300 for v in saved.values())


def test_peft_reads_loras_on_a_base_with_room(tokenizer, tmp_path):
    from peft import PeftModel

    model, made, ids = attached(tokenizer, "lora", moved=0.05)
    made.save(model, tmp_path, "base")
    base = tiny_model("gpt2", seed=1)
    base.resize_token_embeddings(302, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval(), ids), logits(model, ids))


def test_a_token_that_is_there_is_refused(tokenizer):
    import copy

    settings = config.parse({"data": "r.jsonl", "tokens": {"add": ["<|im_end|>"]}})
    with pytest.raises(SettingError, match="has '<|im_end|>' already"):
        method_of(settings, copy.deepcopy(tokenizer))


@pytest.mark.parametrize("trained, frozen", [({"last_layers": 1}, "embed_tokens.weight and lm_head.weight"),
                                             ({"train": ["*embed_tokens*"]}, "tokens.add: lm_head.weight")])
def test_a_frozen_table_is_told(tokenizer, trained, frozen):
    import copy

    settings = config.parse({"data": "r.jsonl", "method": {"name": "full", **trained}, "tokens": {"add": NEW}})
    made = method_of(settings, copy.deepcopy(tokenizer))
    model = tiny_model()
    with pytest.raises(SettingError, match=frozen):
        made.attach(model, settings.method, 0)
