"""`train --show-model`: the tree as torch prints it, from config.json alone or on the way into a run."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from test_cli import FAST, one_message, weitiao  # noqa: F401
from yuan2 import ROW, write_tokenizer

# A 2B of Yuan2 as its makers publish it.
YUAN2 = {
    "architectures": ["YuanForCausalLM"], "model_type": "yuan", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
    "auto_map": {"AutoConfig": "configuration_yuan.YuanConfig", "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"},
    "intermediate_size": 8192, "hidden_act": "silu", "vocab_size": 135_040, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 77_185, "eos_token_id": 77_185, "pad_token_id": 77_185,
}
# As tutorial 1 prints it, but for its rotary_emb, which here the whole model has but one of.
TREE = """\
YuanForCausalLM(
  (model): YuanModel(
    (embed_tokens): Embedding(135040, 2048, padding_idx=77185)
    (layers): ModuleList(
      (0-23): 24 x YuanDecoderLayer(
        (self_attn): YuanAttention(
          (v_proj): Linear(in_features=2048, out_features=2048, bias=False)
          (o_proj): Linear(in_features=2048, out_features=2048, bias=False)
          (lf_gate): LocalizedFiltering(
            (conv1): Conv2d(2048, 1024, kernel_size=(2, 1), stride=(1, 1), padding=(1, 0))
            (conv2): Conv2d(1024, 2048, kernel_size=(2, 1), stride=(1, 1), padding=(1, 0))
            (output_layernorm): YuanRMSNorm()
          )
          (q_proj): Linear(in_features=2048, out_features=2048, bias=False)
          (k_proj): Linear(in_features=2048, out_features=2048, bias=False)
        )
        (mlp): YuanMLP(
          (up_proj): Linear(in_features=2048, out_features=8192, bias=False)
          (gate_proj): Linear(in_features=2048, out_features=8192, bias=False)
          (down_proj): Linear(in_features=8192, out_features=2048, bias=False)
          (act_fn): SiLU()
        )
        (input_layernorm): YuanRMSNorm()
        (post_attention_layernorm): YuanRMSNorm()
      )
    )
    (norm): YuanRMSNorm()
  )
  (lm_head): Linear(in_features=2048, out_features=135040, bias=False)
)
"""
ADAPTED = textwrap.indent("""\
(v_proj): lora.Linear(
  (base_layer): Linear(in_features=2048, out_features=2048, bias=False)
  (lora_dropout): ModuleDict(
    (default): Dropout(p=0.1, inplace=False)
  )
  (lora_A): ModuleDict(
    (default): Linear(in_features=2048, out_features=8, bias=False)
  )
  (lora_B): ModuleDict(
    (default): Linear(in_features=8, out_features=2048, bias=False)
  )
""", " " * 14)


@pytest.fixture
def yuan2(tmp_path):
    """A folder with a config.json and nothing beside it."""
    folder = tmp_path / "Yuan2-2B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(YUAN2))
    return folder


def test_without_rows_it_is_the_tutorials_tree_before_and_after(weitiao, yuan2):  # noqa: F811
    targets = "method.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
    code, out, err = weitiao("train", "--model", yuan2, "--show-model", "method.rank=8", "method.dropout=0.1", targets)
    assert code == 0, err
    before, heading, after = out.partition("\nWith method=lora:\n\n")
    assert before == TREE and heading
    assert after.startswith("PeftModelForCausalLM(\n  (base_model): LoraModel(\n    (model): YuanForCausalLM(\n") and ADAPTED in after
    assert out.endswith("\ntrainable params: 9,043,968 || all params: 2,097,768,448 || trainable%: 0.4311\n")
    assert [path.name for path in yuan2.parent.iterdir()] == ["Yuan2-2B"]  # no run was begun


@pytest.mark.parametrize("method, trainable", [
    (["method=full"], 2_088_724_480), (["method=prompt", "method.virtual_tokens=10"], 20_480), (["method.init=pissa", "method.rank=8"], 9_043_968)])
def test_each_method_is_attached_without_a_weight(weitiao, yuan2, method, trainable):  # noqa: F811
    code, out, err = weitiao("train", "--model", yuan2, "--show-model", *method)
    assert code == 0 and f"trainable params: {trainable:,} ||" in out, err


def test_the_tokenizer_is_read_where_a_method_asks_it(weitiao, model_folder, yuan2):  # noqa: F811
    code, out, err = weitiao("train", "--model", model_folder, "--show-model", "tokens.add=[<think>]", "method.rank=1")
    assert code == 0 and "trainable params" in out, err
    code, out, err = weitiao("train", "--model", yuan2, "--show-model", "tokens.add=[<think>]")
    assert code == 2 and "has no tokenizer" in err
    one_message(err)


def test_with_rows_the_run_goes_on(weitiao, model_folder, rows_file, tmp_path):  # noqa: F811
    words = ("train", "--model", model_folder, "--data", rows_file, "--output", "run", *FAST, "training.steps=1")
    code, out, err = weitiao(*words, "--show-model")
    assert code == 0, err
    assert "PeftModelForCausalLM(" in out and "(0-1): 2 x LlamaDecoderLayer(" in out and "(lora_A): ModuleDict(" in out
    assert out.index("PeftModelForCausalLM(") < out.index("trainable params: ") < out.index("step 1/1")
    assert (tmp_path / "run/summary.json").is_file()
    assert "PeftModel" not in weitiao(*words, "--output", "second")[1]


def test_what_is_missing_is_told(weitiao, yuan2, tmp_path):  # noqa: F811
    (tmp_path / "data.yaml").write_text(f"model: {yuan2}\ndata: rows.jsonl\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is it?", "completion": "It is it."}\n')
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5/config.json").write_text('{"model_type": "vit"}')
    for words, said in (
        (["data.yaml", "--show-model"], "holds no weights"),  # with rows it is a run, which needs them
        (["--model", yuan2, "--show-model", "method.targets=[nope]"], "matches no layer"),
        (["--model", yuan2], "no rows to learn from"),
        (["--model", "t5", "--show-model"], "describes no causal language model"),
        (["runs/x", "--resume", "--show-model"], "--resume takes a run folder and nothing else"),
    ):
        code, out, err = weitiao("train", *words)
        assert code == 2 and said in err, (words, err)
        one_message(err)


def test_the_run_says_where_others_read_its_rows_otherwise(weitiao, tmp_path):  # noqa: F811
    """From a folder as Yuan2's makers give it to a run folder that answers."""
    from weitiao.model.families.yuan2 import YuanConfig, YuanForCausalLM

    folder = write_tokenizer(tmp_path / "tiny")
    torch.manual_seed(0)
    small = {"vocab_size": 444, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "bos_token_id": 420, "eos_token_id": 420, "pad_token_id": 420}
    YuanForCausalLM(YuanConfig(**small)).save_pretrained(folder)
    rows = [ROW, {"input": "xyz", "output": "Paris"}, {"input": "你好", "output": "Paris"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    code, out, err = weitiao("train", "--model", folder, "--data", "rows.jsonl", "--output", "run", "training.steps=2", "data.max_tokens=300")
    assert code == 0, err
    assert "Of 3 rows looked at, 1 (rows.jsonl:2 the first) have other token ids in transformers' conversion" in out
    assert out.index("Of 3 rows looked at") < out.index("step 1/2")
    code, out, err = weitiao("generate", "run", "--prompt", ROW["input"], "--max-new-tokens", "4")
    assert code == 0, err
    code, out, err = weitiao("merge", "run", "--output", "merged")
    assert code == 0 and "it loads with weitiao. Its weights bear the original's names" in out, err
    # The merged folder is a base as the first was, its tokenizer under weitiao's name for it.
    code, out, err = weitiao("train", "--model", "merged", "--data", "rows.jsonl", "--output", "again", "training.steps=1", "data.max_tokens=300")
    assert code == 0 and (tmp_path / "merged/yuan2.model").is_file(), err
    assert json.loads((tmp_path / "again/data.json").read_text())["fingerprint"] == json.loads((tmp_path / "run/data.json").read_text())["fingerprint"]
