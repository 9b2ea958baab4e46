"""What tests/checkpoints.py writes is loaded as the original would be, to the last bit, and learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file
from test_example_rows import script  # noqa: F401

from weitiao import config
from weitiao.model.load import load_model, load_tokenizer, trie_obstacle
from weitiao.screen import Screen
from weitiao.settings.model import ModelSettings
from weitiao.train.train import train

ASKED = ModelSettings(name="x")
WRITERS = {
    "bloom": checkpoints.bloom,
    "bloom-transformer": lambda folder: checkpoints.bloom(folder, prefix="transformer."),
    "bloom-parents": lambda folder: checkpoints.bloom(folder, parents_names=True),
    "llama2": checkpoints.llama2,
    "gpt2": checkpoints.gpt2,
    "yuan2": checkpoints.yuan2,
    "chatglm3": checkpoints.chatglm3,
}
PUBLISHED_IN = {
    "bloom": torch.float16, "llama2": torch.float16, "gpt2": torch.float32, "yuan2": torch.bfloat16, "chatglm3": torch.float16,
}
BUFFERS = (".inv_freq", ".attn.bias")  # in the files, and no weights

# What is trained, on which rows; how the tutorial does it.
LORA = {"name": "lora", "rank": 8, "alpha": 32, "dropout": 0.1}
RUNS = {
    "bloom": ("instructions", {"method": "full"}),
    "llama2": ("instructions", {"method": LORA | {"targets": ["q_proj", "v_proj"]}}),
    "gpt2": ("reviews", {"method": "full", "data": {"labels": {0: "neg", 1: "pos"}}}),
    "yuan2": ("resume", {"method": LORA | {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}}),
    "chatglm3": ("role_play", {"method": LORA | {"targets": ["query_key_value"]}, "data": {"template": "chatglm3_roleplay"}}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> the folder, written when it is first asked for"""
    parent, written = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = WRITERS[name](parent / name)
        return written[name]

    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_weight_is_loaded_to_the_last_bit(folders, name):
    folder = folders(name)
    written = read_weights(folder)
    assert {w.dtype for w in written.values()} == {PUBLISHED_IN[name.partition("-")[0]]}
    model = load_model(folder, ASKED, torch.float32)
    left = {n.removeprefix("transformer."): w for n, w in written.items()}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, left.pop(parameter_name.removeprefix("transformer.")).float()), parameter_name
    assert not left
    assert trie_obstacle(model) is None


@pytest.mark.parametrize(("name", "tied"), [("bloom", True), ("llama2", False), ("gpt2", True), ("yuan2", True), ("chatglm3", False)])
def test_the_head_is_tied_where_the_originals_is(folders, name, tied):
    model = load_model(folders(name), ASKED, torch.float32)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert any(n.endswith(("lm_head.weight", "output_layer.weight")) for n in read_weights(folders(name))) is not tied


@pytest.mark.parametrize("name", ["bloom", "llama2", "gpt2", "yuan2", "chatglm3"])
def test_the_tokenizer_has_a_row_for_each_token_and_gives_texts_back(folders, name):
    tokenizer = load_tokenizer(folders(name), ASKED)
    assert len(tokenizer) <= load_model(folders(name), ASKED, torch.float32).get_input_embeddings().num_embeddings
    for text in ("Human: 如何写好一个简历？\n\nAssistant: ", '{"姓名": ["高勇"], "国籍": ["中国国籍"]}', "不在其中的字：鼹🐿"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_special_tokens_are_where_the_originals_are(folders):
    bloom, llama, gpt2, yuan, glm = (load_tokenizer(folders(name), ASKED) for name in ("bloom", "llama2", "gpt2", "yuan2", "chatglm3"))
    assert [bloom.unk_token_id, bloom.bos_token_id, bloom.eos_token_id, bloom.pad_token_id] == [0, 1, 2, 3]
    assert bloom.padding_side == "left" and 1 not in bloom("你好").input_ids
    assert [llama.unk_token_id, llama.bos_token_id, llama.eos_token_id, llama.pad_token_id] == [0, 1, 2, None]
    assert llama("你好").input_ids[0] == 1 and 2 not in llama("你好").input_ids
    assert gpt2.eos_token_id == gpt2.bos_token_id == len(gpt2) - 1
    assert [len(gpt2(word).input_ids) for word in ("neg", "pos")] == [1, 1] and gpt2("neg").input_ids != gpt2("pos").input_ids
    pieces = yuan.convert_tokens_to_ids(list(checkpoints.YUAN2_PIECES))
    assert pieces == list(range(pieces[0], pieces[0] + len(pieces)))
    assert json.loads((folders("yuan2") / "config.json").read_text())["eod_token"] == pieces[0]
    assert [glm.eos_token_id, glm.pad_token_id] == [2, 0]


def test_sentencepiece_alone_splits_eod_as_it_does_with_the_originals_model(folders, shared):
    from sentencepiece import SentencePieceProcessor

    for file in (folders("yuan2") / "tokenizer.model", shared / "tokenizers" / "yuan2" / "tokenizer.model"):
        pieces = SentencePieceProcessor(model_file=str(file))
        assert len(pieces.encode("<eod>")) > 1 and pieces.id_to_piece(pieces.piece_to_id("<eod>")) == "<eod>"
        assert not pieces.is_control(pieces.piece_to_id("<eod>"))


@pytest.mark.parametrize(("name", "writer", "vocabulary"), [("gpt2", checkpoints.gpt2, 50_257), ("yuan2", checkpoints.yuan2, 134_953)])
def test_a_real_tokenizer_can_take_the_small_ones_place(name, writer, vocabulary, shared, tmp_path):
    folder = writer(tmp_path / name, shared / "tokenizers" / name)
    tokenizer = load_tokenizer(folder, ASKED)
    model = load_model(folder, ASKED, torch.float32)
    assert vocabulary <= len(tokenizer) <= model.config.vocab_size < 1.001 * vocabulary
    if name == "gpt2":
        assert [tokenizer(word).input_ids for word in ("neg", "pos")] == [[12480], [1930]] and tokenizer.eos_token_id == 50_256
    else:
        ids = [77_185, 77_187]
        assert tokenizer.convert_tokens_to_ids(["<eod>", "<sep>"]) == ids == [model.config.eod_token, model.config.sep_token]


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_call_writes_the_same_bytes(folders, name, tmp_path):
    again = WRITERS[name](tmp_path / name)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (folders(name), again))
    if name == "chatglm3":  # this one's trainer notes where it wrote
        assert len(first.pop("tokenizer.model")) < 100_000 and second.pop("tokenizer.model")
    assert first == second
    assert sum(map(len, first.values())) < 2**20


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_from_the_examples_rows(folders, script, name, tmp_path):  # noqa: F811
    kind, asked = RUNS[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in script.make_rows(kind, 12)[0]), "utf-8")
    settings = config.parse(asked | {
        "model": str(folders(name)), "data": {"train": str(rows)} | asked.get("data", {}), "output": str(tmp_path / "run"),
        "training": {"steps": 2, "batch_size": 6, "learning_rate": 1e-3, "layout": "trie", "checkpointing": True},
    })
    run = train(settings, Screen(quiet=True))
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[0] != losses[1]
    assert json.loads((run.path / "proof.json").read_text())["passed"]
