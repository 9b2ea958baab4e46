"""Known models: the numbers of the tables make a model of the published size, and an id finds them however it is written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from weitiao.model.known import IDS, SHAPES, known, known_config, known_names


def one_of_each_shape() -> dict[str, str]:
    """Shape -> the first id of it."""
    return {shape: next(i for i in known_names() if known(i).parameters == SHAPES[shape].parameters) for shape in SHAPES}


def on_meta(name: str):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(known_config(name))


# Seen in print by many (model cards, notebooks, papers): the tables' own numbers cannot drift together with their shapes.
PRINTED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616, "mistralai/Mistral-7B-v0.1": 7_241_732_096, "Langboat/bloom-800m-zh": 750_841_344,
    "Langboat/bloom-1b4-zh": 1_303_111_680, "THUDM/chatglm3-6b": 6_243_584_000, "IEITYuan/Yuan2-2B-Mars-hf": 2_088_724_480,
    "gpt2": 124_439_808, "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("names", [list(one_of_each_shape().values())[i::4] for i in range(4)], ids="1234")
def test_a_model_of_each_shape_has_as_many_parameters_as_are_published(names):
    counted = {name: sum(p.numel() for p in on_meta(name).parameters()) for name in names}
    assert counted == {name: known(name).parameters for name in names}


@pytest.mark.parametrize(("name", "parameters"), PRINTED.items(), ids=list(PRINTED))
def test_counts_are_those_that_are_in_print(name, parameters):
    assert known(name).parameters == parameters


def test_every_id_is_of_a_known_shape_and_every_shape_has_an_id():
    assert {shape for _, shape, _ in IDS} == SHAPES.keys()
    assert len({shape.parameters for shape in SHAPES.values()}) == len(SHAPES)  # or one_of_each_shape leaves some out
    assert len(known_names()) == len(set(map(str.lower, known_names()))) > 200
    bare = {name.lower().rpartition("/")[2]: known(name) for name in known_names()}
    for name in known_names():  # without its owner an id still means one model
        twin = bare[name.lower().rpartition("/")[2]]
        assert (twin.model_type, twin.facts, twin.dtype) == (known(name).model_type, known(name).facts, known(name).dtype)


@pytest.mark.parametrize("name", [
    "Qwen/Qwen2.5-7B-Instruct", "qwen/qwen2.5-7b-instruct", "Qwen2.5-7B-Instruct", "hf:Qwen/Qwen2.5-7B-Instruct", "hub:qwen2.5-7b-instruct",
    "modelscope:Qwen/Qwen2.5-7B-Instruct", "unsloth/Qwen2.5-7B-Instruct", " Qwen/Qwen2.5-7B-Instruct ",
])
def test_an_id_is_found_however_it_is_written(name):
    assert known(name).id == "Qwen/Qwen2.5-7B-Instruct"
    assert known_config(name).hidden_size == 3584


@pytest.mark.parametrize("name", [
    "Qwen/Qwen2.5-7B-Instruct-GGUF", "someone/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-8B", "", "/", "./gpt2", "gpt2:main", "smollm2",
    "pypi:gpt2==1", "THUDM/glm-4-9b-chat",
])
def test_what_is_not_in_the_tables_is_not_guessed(name):
    assert known(name) is None
    assert known_config(name) is None


@pytest.mark.parametrize(("pattern", "names"), [
    ("meta-llama/Llama-2-7b[-chat]-hf", ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"]),
    ("a/b[-x|-y] c", ["a/b", "a/b-x", "a/b-y", "c"]),
])
def test_an_optional_ending_is_spelled_out(pattern, names):
    from weitiao.model.known import _spelled_out

    assert list(_spelled_out(pattern)) == names


# id, longest row, tied, theta, kind of rope, window of some layer: what a few published config.json say.
FACTS = [
    ("Qwen/Qwen2.5-7B", 131_072, False, 1e6, "default", None),
    ("Qwen/Qwen2.5-7B-Instruct", 32_768, False, 1e6, "default", None),
    ("Qwen/Qwen2.5-Math-7B", 4_096, False, 1e4, "default", None),
    ("Qwen/Qwen3-0.6B", 40_960, True, 1e6, "default", None),
    ("Qwen/Qwen3-4B-Instruct-2507", 262_144, True, 5e6, "default", None),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 131_072, False, 1e4, "default", None),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 131_072, False, 5e5, "llama3", None),
    ("meta-llama/Llama-2-7b-hf", 4_096, False, 1e4, "default", None),
    ("meta-llama/Meta-Llama-3-8B", 8_192, False, 5e5, "default", None),
    ("meta-llama/Llama-3.2-1B", 131_072, True, 5e5, "llama3", None),
    ("mistralai/Mistral-7B-v0.1", 32_768, False, 1e4, "default", 4_096),
    ("mistralai/Mistral-7B-v0.3", 32_768, False, 1e6, "default", None),
    ("google/gemma-2-2b", 8_192, True, 1e4, "default", 4_096),
    ("microsoft/Phi-3-mini-4k-instruct", 4_096, False, 1e4, "default", 2_047),
    ("microsoft/phi-4", 16_384, False, 250_000.0, "default", None),
    ("deepseek-ai/deepseek-coder-6.7b-base", 16_384, False, 1e5, "linear", None),
    ("HuggingFaceTB/SmolLM2-1.7B", 8_192, True, 130_000.0, "default", None),
    ("THUDM/chatglm3-6b", 8_192, False, 1e4, "default", None),
]


@pytest.mark.parametrize(("name", "limit", "tied", "theta", "kind", "window"), FACTS, ids=[line[0] for line in FACTS])
def test_a_config_says_what_the_published_one_says(name, limit, tied, theta, kind, window):
    from weitiao.model.load import model_limit

    config = known_config(name)
    assert model_limit(config) == limit
    assert config.tie_word_embeddings is tied
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]) == (theta, kind)
    assert getattr(config, "sliding_window", None) == window
    assert config.name_or_path == name


def test_the_shapes_of_llama_2_are_the_defaults_of_its_class():
    from transformers import LlamaConfig

    ours, theirs = known_config("llama-2-7b-hf").to_dict(), LlamaConfig().to_dict()
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "head_dim", "hidden_act", "attention_bias", "mlp_bias"):
        assert ours[field] == theirs[field], field


def test_gemma_3_turns_its_windows_and_its_whole_rows_by_two_thetas():
    config = known_config("google/gemma-3-1b-it")
    assert {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()} == {"sliding_attention": 1e4, "full_attention": 1e6}
    assert config.layer_types.count("full_attention") == 4


@pytest.mark.parametrize(("name", "dtype"), [
    ("google/gemma-2-2b", torch.float32), ("google/gemma-2-2b-it", torch.bfloat16), ("meta-llama/Llama-2-7b-hf", torch.float16),
    ("gpt2", torch.float32),
])
def test_the_type_is_the_one_the_weights_are_published_in(name, dtype):
    assert known_config(name).dtype == dtype
    assert next(on_meta(name).parameters()).dtype == dtype


def test_a_config_is_changed_without_changing_the_next():
    first = known_config("meta-llama/Llama-3.1-8B")
    first.rope_parameters["factor"] = 99.0
    first.num_hidden_layers = 1
    second = known_config("meta-llama/Llama-3.1-8B")
    assert (second.rope_parameters["factor"], second.num_hidden_layers) == (8.0, 32)


def test_names_are_known_without_transformers():
    script = (
        "import sys\nfrom weitiao.model.known import known_names, known\n"
        "assert known('gpt2').parameters and known_names()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
