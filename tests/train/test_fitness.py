"""A setting planted against the tiny model and its tokenizer: what is said of it, and how to mend it; and nothing of what fits."""

import copy

import checkpoints
import pytest
import torch
from conftest import CHATML, tiny_config

from weitiao import config
from weitiao.data.templates import load_template
from weitiao.model import load as loading
from weitiao.train.fitness import CHECKS, setting_findings

ONE_EXCHANGE = "{% if messages|length > 2 %}{{ raise_exception('one question') }}{% endif %}" + CHATML
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
FORGETS = CHATML.replace("message['content']", "(message['content'] if loop.last or message['role'] == 'user' else '')")
NO_HEADER = CHATML.rpartition("{% if add_generation_prompt")[0]
OTHER_HEADER = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")
STRIPS = CHATML.replace("message['content']", "message['content'] | trim")
TWO_BOS = "{{ bos_token + bos_token }}" + CHATML


@pytest.fixture
def known(tokenizer):
    """A tokenizer that a test may change: eos <|im_end|> (2), pad <|pad|> (3), 300 ids."""
    return copy.deepcopy(tokenizer)


@pytest.fixture
def find(known, tmp_path):
    """name -> Finding, of settings such as method=lora."""

    def find(*settings, rows=None, template=None, model="llama", dtype=None, **more):
        if template is not None:
            file = tmp_path / "own.jinja"
            file.write_text(template, "utf-8")
            known.chat_template = None  # the file stands for it
            settings = (f"data.template={file}", *settings)
        read = config.read(None, ["data=rows.jsonl", *settings])
        described = tiny_config(model, **more)
        described.dtype = dtype
        found = setting_findings(read, load_template(read.data.template, known), described, rows)
        assert all(finding.kind in {*CHECKS, "not_judged"} and finding.cure and finding.count == 0 for finding in found)
        return {finding.kind: finding for finding in found}

    return find


def only(found, name, what, cure):
    assert set(found) == {name}
    assert what in found[name].what
    assert cure in found[name].cure


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "ptuning", "prefix", "ia3", "adapter", "bitfit"])
def test_nothing_is_said_of_what_fits(method, find):
    fitting = ["method.add_bias=true"] if method == "bitfit" else ["method.virtual_tokens=8"] if method in ("prompt", "ptuning", "prefix") else []
    fitting += ["method.bottleneck=8"] if method == "adapter" else []
    assert find(f"method={method}", *fitting, rows=1000) == {}


def test_a_model_that_wants_numbers_stops_no_training(find):
    """A prefix that begins as tokens runs the model, and GPT-2 asks for a number on the way, which the meta device has none of."""
    found = find("method=prefix", "method.virtual_tokens=8", model="gpt2", rows=1000)
    only(found, "not_judged", "method_refused could not be judged without the weights: RuntimeError", "once the model is loaded")
    assert found["not_judged"].severity == "note"


# ------------------------------------------------------------------------------------------------------------ the tokens


def test_a_stop_token_that_is_split(find, known):
    known.split_special_tokens = True
    found = find()
    assert set(found) == {"stop_splits"}
    assert "reads '<|im_end|>', which ends an answer (id 2), as 10 other tokens: '<', '|', 'i', 'm', '_', 'e'" in found["stop_splits"].what
    assert '"2": {"content": "<|im_end|>", "special": true}' in found["stop_splits"].cure


def test_no_eos(find, known):
    known.eos_token = None
    only(find(), "no_eos", "answers end with the template's '<|im_end|>'", '"eos_token": "<|im_end|>"')


def test_a_stop_token_that_is_not_the_eos(find, known):
    known.eos_token = "<|endoftext|>"
    only(find(), "stop_is_not_eos", "Answers end with '<|im_end|>' (id 2)", "generation_config.json")


def test_pad_is_eos(find, known):
    known.pad_token = "<|im_end|>"
    only(find(), "pad_is_eos", "the one that ends answers, '<|im_end|>'", "Nothing to do")


def test_a_pad_token_outside_the_embedding(find, known):
    known.add_special_tokens({"pad_token": "[PAD]"})
    found = find()
    assert set(found) == {"pad_outside", "ids_outside"}
    assert "'[PAD]' has the id 300, and the embedding has 300 rows" in found["pad_outside"].what


def test_ids_outside_the_embedding(find, known):
    known.add_tokens(["<a>", "<b>"])
    only(find(), "ids_outside", "302 tokens, the embedding has 300 rows: '<a>', '<b>' have none", "tokens.add='[…]'")
    assert find(vocabulary=302) == {}


@pytest.mark.parametrize("extended", [False, True])
def test_added_tokens_make_the_embedding_grow(extended, find, known):
    if extended:
        known.add_tokens(["<think>"])
    only(find("tokens.add=<think>"), "rows_grow", "from 300 rows to 301", "as many")
    assert find("tokens.add=<think>", vocabulary=304) == {}


# ---------------------------------------------------------------------------------------------------------- the template


def test_two_bos(find, known):
    known.bos_token = "<|endoftext|>"
    only(find(template=TWO_BOS), "two_bos", "begin with two '<|endoftext|>'", "{{ bos_token }}")


def test_a_template_without_the_bos_that_its_tokenizer_puts(find, known):
    from tokenizers.processors import TemplateProcessing

    known.bos_token = "<|endoftext|>"
    known._tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    only(find(), "no_bos", "puts '<|endoftext|>' before a text", "{{ bos_token }}")
    assert find("data.template=chatml") == {}, "weitiao puts it before a template that is not the tokenizer's own"


def test_a_template_that_forgets(find):
    only(find(template=FORGETS), "forgets_prefix", "once more is said", "nothing is wrong")


def test_a_template_of_one_exchange(find):
    only(find(template=ONE_EXCHANGE), "one_exchange", "one question and one answer", "data.template=chatml")


def test_a_prompt_other_than_in_a_conversation(find):
    only(find(template=OTHER_HEADER), "other_prompt", r"ends in '…", "add_generation_prompt")


def test_a_header_that_becomes_part_of_the_answer(find):
    only(find(template=NO_HEADER), "header_in_answer", r"writes '<|im_start|>assistant\n' before an answer", "{% if add_generation_prompt %}")


def test_a_template_other_than_the_models_own(find):
    only(find("data.template=alpaca"), "other_template", "data.template=alpaca writes '### Instruction:", "Leave data.template out")
    assert find("data.template=chatml") == {}, "the same marks"


def test_a_named_template_that_lacks_only_a_system_text(find, known):
    known.chat_template = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
    assert find("data.template=chatml") == {}


def test_a_base_model(find, known):
    known.chat_template = None
    only(find(), "no_template", "smollm2-135m brings no chat template", "data.template")


def test_a_template_that_strips(find):
    only(find(template=STRIPS), "strips", "from the ends of what is asked and answers", "trim")


def test_a_system_text_that_is_refused(find):
    only(find("data.system=Be brief.", template=NO_SYSTEM), "drops_system", "refuses a system text", "beginning of each prompt")
    assert find("data.system=Be brief.", template=CHATML) == {}


# ------------------------------------------------------------------------------------------------------------ the method


def test_bitfit_without_biases(find):
    only(find("method=bitfit"), "method_refused", "LlamaForCausalLM has no bias", "method.add_bias=true")
    assert find("method=bitfit", model="gpt2") == {}


def test_targets_that_match_nothing(find):
    only(find("method.targets=[q_pro]"), "targets_match_nothing", "Did you mean 'q_proj'?", "q_proj, k_proj, v_proj, o_proj, gate_proj")


def test_targets_that_match_in_part(find):
    only(find("method.targets=[q_proj, c_attn]"), "targets_match_in_part", "names c_attn", "q_proj, k_proj")
    assert find("method.targets=[q_proj, lm_head]", "method.rank=8") == {}


def test_targets_of_another_method(find):
    found = find("method=ia3", "method.targets=[query]")
    only(found, "method_refused", "method.targets names 'query', and no linear layer of the model is called so", "Mend that setting")


def test_a_rank_above_what_a_layer_can_have(find):
    # 32 wide, but keys and values are 16: two of seven linears in each of two layers.
    only(find("method.rank=20", "method.alpha=20"), "rank_too_large", "more than 4 of 14 adapted layers", "method.rank=16 or less")


@pytest.mark.parametrize(("settings", "scale"), [
    (["method.rank=8", "method.alpha=128"], "128 / 8 = 16"), (["method.rank=8", "method.alpha=0.4"], "0.4 / 8 = 0.05"),
    (["method.rank=16", "method.alpha=64", "method.rslora=true"], "64 / sqrt(16) = 16"),
])
def test_an_odd_scale(settings, scale, find):
    only(find(*settings), "odd_scale", scale, "makes it 2")


def test_a_wide_bottleneck(find):
    only(find("method=adapter"), "wide_bottleneck", "method.bottleneck=64 is wider than the model's stream of 32", "narrow")


def test_virtual_tokens_that_leave_no_room(find):
    found = find("method=prompt", "method.virtual_tokens=250")
    only(found, "no_room", "leave 6 of the model's 256 places", "Lower method.virtual_tokens")
    only(find("method=prompt", "method.virtual_tokens=200"), "little_room", "leave 56 of the model's 256", "Lower method.virtual_tokens")


def test_a_text_longer_than_its_virtual_tokens(find):
    found = find("method=prompt", "method.virtual_tokens=2", "method.text=What is the capital of France?")
    only(found, "method_refused", "method.virtual_tokens is 2", "Leave method.virtual_tokens out")


def test_more_layers_than_there_are(find):
    only(find("method=full", "method.last_layers=3"), "method_refused", "the model has 2", "leave it out")


def test_rows_longer_than_the_model_takes(find):
    only(find("data.max_tokens=1000"), "rows_cut", "data.max_tokens=1,000, and the model takes 256", "256 or less")


# --------------------------------------------------------------------------------------------------------- the precision


def test_float16_throughout(find):
    only(find("method=full", "model.dtype=float16", "training.adam_epsilon=1e-4"), "pure_half", "without loss scaling", "Leave model.dtype out")


def test_bfloat16_weights_that_are_trained(find):
    found = find("method=full", "model.dtype=bfloat16", "training.rounding=nearest", dtype=torch.bfloat16)
    only(found, "trained_in_bf16", "bfloat16, as the checkpoint holds them: a step below 1/512", "Leave training.rounding out")
    assert find("method=full", "model.dtype=bfloat16", dtype=torch.bfloat16) == {}, "small steps count by default"
    assert find("method=lora", "model.dtype=bfloat16", dtype=torch.bfloat16) == {}, "frozen weights may be"


def test_a_half_checkpoint_is_held_in_float32(find):
    only(find("method=full", dtype=torch.float16), "held_in_float32", "holds float16", "method=lora")


def test_a_bfloat16_checkpoint_in_fp16(find):
    only(find("training.precision=fp16", dtype=torch.bfloat16), "narrower_range", "training.precision=fp16 ends at 65,504", "bf16")


def test_a_tiny_model_quantised(find):
    only(find("model.quantize=nf4"), "quantised_tiny", "model.quantize=nf4 on 0 million weights", "model.quantize=none")


# -------------------------------------------------------------------------------------------------------------- the pace


@pytest.mark.parametrize(("settings", "name", "what"), [
    (["method=full", "training.learning_rate=1e-3"], "rate_too_high", "50 times what method=full"),
    (["training.learning_rate=9e-6"], "rate_too_low", "56 times less than what method=lora"),
    (["method=bitfit", "method.add_bias=true", "training.learning_rate=2e-5"], "rate_too_low", "150 times less"),
])
def test_a_rate_far_off(settings, name, what, find):
    only(find(*settings), name, what, "Leave training.learning_rate out")
    assert find(*settings, "training.optimizer=sgd") == {}, "whose rate means something else"


@pytest.mark.parametrize("warmup", ["48", "100", "0.6"])
def test_a_warmup_as_long_as_the_run(warmup, find):
    found = find(f"training.warmup={warmup}", rows=200)  # 13 steps an epoch, 3 epochs
    only(found, "all_warmup", "of 39 steps", "Leave training.warmup out")
    assert find(f"training.warmup={warmup}") == {} or float(warmup) < 1, "how many steps there are is not known"


def test_a_batch_of_all_rows(find):
    only(find("training.batch_size=64", rows=40), "batch_of_all", "more than the 40 rows there are: an epoch is one step, and the run has 3", "Lower")
    only(find("training.batch_size=64", rows=1), "batch_of_all", "more than the 1 row there is: an epoch", "Lower")


def test_few_steps(find):
    only(find(rows=40, *["training.epochs=2"]), "few_steps", "40 rows in batches of 16, 2 epochs: the run has 6 steps", "raise training.epochs")


def test_measuring_behind_the_end(find):
    found = find("saving.every=500", "evaluation.every=400", "data.eval_share=0.1", rows=200)
    only(found, "never_due", "saving.every=500 and evaluation.every=400 is more than the 39 steps", "epoch")


# --------------------------------------------------------------------------------------------------- tokenizers as they are


@pytest.mark.parametrize(("name", "kinds"), [
    ("gpt2", ["no_template"]), ("yuan2", ["pad_is_eos", "forgets_prefix"]),
])
def test_real_tokenizers(name, kinds, shared, tmp_path):
    folder = getattr(checkpoints, name)(tmp_path / name, shared / "tokenizers" / name)
    read = config.read(None, ["data=rows.jsonl", f"model={folder}"])
    template = load_template("auto", loading.load_tokenizer(folder, read.model))
    assert [finding.kind for finding in setting_findings(read, template, loading.load_config(folder, read.model))] == kinds
