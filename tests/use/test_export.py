"""What was learned, read by PEFT and transformers alone; and one message where it cannot be."""

from __future__ import annotations

import json
import shutil
import sys

import chatglm3
import numpy as np
import pytest
import torch

from weitiao import config
from weitiao.cli import main
from weitiao.errors import RunError
from weitiao.screen import Screen
from weitiao.train.train import train
from weitiao.use import export as exporting
from weitiao.use.merge import logits_of, proof_rows
from weitiao.use.trained import open_trained

FAST = ["training.steps=2", "training.batch_size=4", "training.learning_rate=2e-2", "training.precision=fp32"]
METHODS = {
    "lora": ["method.rank=4", "method.targets=[query_key_value]"],
    "all-linear-dora": ["method.rank=4", "method.dora=true"],
    "lora-tokens": ["method.rank=4", "tokens.add=[<think>]"],
    "ia3": ["method=ia3"],
    "ia3-inputs": ["method=ia3", "method.targets=[dense]", "method.feedforward=[query_key_value]"],
    "prompt": ["method=prompt", "method.virtual_tokens=5"],
    "prefix": ["method=prefix", "method.virtual_tokens=5"],
    "nf4": ["method.rank=4", "model.quantize=nf4"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chatglm3.write_tokenizer(chatglm3.write_checkpoint(tmp_path_factory.mktemp("models") / "chatglm3"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"input": f"妮露#关于{i}", "output": f"据说他是很厉害的{i}。"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return file


@pytest.fixture(scope="module")
def run_of(model, rows, tmp_path_factory):
    made = {}

    def run(name, base=model, template="chatglm3_roleplay"):
        if "nf4" in name:
            pytest.importorskip("bitsandbytes")
        if (name, base) not in made:
            settings = config.read(None, [*FAST, *METHODS.get(name, [f"method={name}"]), f"data.template={template}"], **{
                "model.name": str(base), "data.train": str(rows), "output": str(tmp_path_factory.mktemp("runs") / name)})
            made[name, base] = train(settings, Screen(quiet=True)).path
        return made[name, base]

    return run


def weitiao(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def trained_logits(run) -> tuple[list, list[torch.Tensor]]:
    trained = open_trained(str(run), Screen(quiet=True), "original")
    rows = proof_rows(trained)
    return rows, logits_of(trained.model, rows)


def largest_difference(model, rows, expected) -> float:
    with torch.no_grad():
        got = [model(input_ids=torch.from_numpy(r.examples[-1].ids.astype(np.int64))[None]).logits[0, -len(e):] for r, e in zip(rows, expected)]
    return max(float((a - b).abs().max()) for a, b in zip(got, expected))


@pytest.mark.parametrize("name", METHODS)
def test_peft_reads_it_on_transformers_own_glm(run_of, name, monkeypatch, capsys, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import GlmForCausalLM

    run = run_of(name)
    code, out, err = weitiao(monkeypatch, capsys, "export", run, "--output", tmp_path / "adapter", "--base", tmp_path / "glm")
    assert code == 0, err
    assert "Proven on" in out and "tokenizer is read by weitiao alone" in out and ("nf4" in out) == (name == "nf4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "glm"]
    glm = GlmForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32)
    rows, expected = trained_logits(run)
    with torch.no_grad():
        untuned = largest_difference(glm.eval(), rows, expected)
    tuned = PeftModel.from_pretrained(glm, tmp_path / "adapter").eval()
    assert untuned > 1e-2 and largest_difference(tuned, rows, expected) < 1e-4
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(tmp_path / "glm")
    by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, low_cpu_mem_usage=False).eval()
    assert largest_difference(by_name, rows, expected) < 1e-4


def test_the_base_is_the_checkpoint_in_its_own_type_file_by_file(run_of, model, monkeypatch, capsys, tmp_path):
    from safetensors.torch import load_file

    weights = {name: w.half() for name, w in chatglm3.random_weights().items()}
    half = chatglm3.write_tokenizer(chatglm3.write_checkpoint(tmp_path / "half", weights))
    code, _, err = weitiao(monkeypatch, capsys, "export", run_of("lora", half), "--output", tmp_path / "a", "--base", tmp_path / "glm")
    assert code == 0, err
    files = sorted((tmp_path / "glm").glob("*.safetensors"))
    assert len(files) == 2
    stored = {name: w for file in files for name, w in load_file(file).items()}
    assert {w.dtype for w in stored.values()} == {torch.float16} and not any("inv_freq" in name for name in stored)
    fused = torch.cat([stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(fused, weights["transformer.encoder.layers.1.self_attention.query_key_value.weight"])
    facts = json.loads((tmp_path / "glm" / "config.json").read_text())
    assert facts["model_type"] == "glm" and facts["dtype"] == "float16" and "auto_map" not in facts
    index = json.loads((tmp_path / "glm" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored) and index["metadata"]["total_size"] == sum(w.nbytes for w in stored.values())


def test_one_base_serves_several_adapters_and_no_other(run_of, model, monkeypatch, capsys, tmp_path):
    glm = tmp_path / "glm"
    assert weitiao(monkeypatch, capsys, "export", run_of("lora"), "--output", tmp_path / "a", "--base", glm)[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in glm.iterdir()}
    assert weitiao(monkeypatch, capsys, "export", run_of("ia3"), "--output", tmp_path / "b", "--base", glm)[0] == 0
    assert {p.name: p.stat().st_mtime_ns for p in glm.iterdir()} == before
    other = chatglm3.write_tokenizer(chatglm3.write_checkpoint(tmp_path / "other", chatglm3.random_weights(seed=1)))
    code, _, err = weitiao(monkeypatch, capsys, "export", run_of("lora", other), "--output", tmp_path / "c", "--base", glm)
    assert code == 2 and "is not what was trained" in err and "another model" in err
    assert not (tmp_path / "c").exists() and {p.name: p.stat().st_mtime_ns for p in glm.iterdir()} == before
    code, _, err = weitiao(monkeypatch, capsys, "export", run_of("lora"), "--output", tmp_path / "d", "--base", model)
    assert code == 2 and "no Glm model" in err


def test_without_a_base_the_adapter_is_in_the_run_and_says_what_it_needs(run_of, model, monkeypatch, capsys):
    run = run_of("lora")
    shutil.rmtree(run / "export", ignore_errors=True)
    code, out, err = weitiao(monkeypatch, capsys, "export", run)
    assert code == 0, err
    assert "Glm form" in out and "--base DIR writes" in out
    facts = json.loads((run / "export" / "adapter_config.json").read_text())
    assert facts["target_modules"] == ["k_proj", "q_proj", "v_proj"] and facts["base_model_name_or_path"] == str(model)
    code, _, err = weitiao(monkeypatch, capsys, "export", run)
    assert code == 2 and "exists already" in err


def test_what_is_not_proven_is_not_kept(run_of, monkeypatch, capsys, tmp_path):
    from weitiao.model.families import chatglm3 as family

    right = family.glm_state
    monkeypatch.setattr(family, "glm_state", lambda state, c: {n: 1.2 * w if "lora_B" in n else w for n, w in right(state, c).items()})
    code, _, err = weitiao(monkeypatch, capsys, "export", run_of("lora"), "--output", tmp_path / "new" / "a", "--base", tmp_path / "new" / "glm")
    assert code == 2 and "is not what was trained" in err
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_leaves_nothing(run_of, monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_base", full)
    code, _, err = weitiao(monkeypatch, capsys, "export", run_of("lora"), "--output", tmp_path / "a", "--base", tmp_path / "glm")
    assert code == 2 and "No space left" in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [
    ("full", "weitiao merge"), ("bitfit", "weitiao merge"), ("adapter", "loaded beside the base"),
    ("prompt-tokens", "tokens.add beside method=prompt"),
])
def test_what_is_no_adapter_of_pefts_is_told_before_anything_is_loaded(run_of, name, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(METHODS, "prompt-tokens", ["method=prompt", "method.virtual_tokens=5", "tokens.add=[<think>]"])
    run = run_of(name)
    monkeypatch.setattr(exporting, "open_trained", lambda *a: pytest.fail("loaded"))
    code, _, err = weitiao(monkeypatch, capsys, "export", run, "--output", tmp_path / "a")
    assert code == 2 and words in err and list(tmp_path.iterdir()) == []


# -- other models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "lora-tokens", "prompt", "prefix", "ia3"])
def test_any_other_models_adapter_is_pefts_already(run_of, model_folder, name, monkeypatch, capsys, tmp_path):
    from transformers import AutoTokenizer

    monkeypatch.setitem(METHODS, "lora", ["method.rank=4"])
    run = run_of(name, model_folder, "auto")
    code, out, err = weitiao(monkeypatch, capsys, "export", run)
    assert code == 0 and f"{run}/adapter is in PEFT's form already" in out and str(model_folder) in out, err
    assert not (run / "export").exists()
    code, out, err = weitiao(monkeypatch, capsys, "export", run, "--output", tmp_path / "copy")
    assert code == 0 and "Proven on" in out, err
    for file in (run / "adapter").iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == (run / "template.jinja").read_text()
    code, _, err = weitiao(monkeypatch, capsys, "export", run, "--output", tmp_path / "x", "--base", tmp_path / "glm")
    assert code == 2 and "needs no conversion" in err


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        exporting.export(str(tmp_path), None, None)
