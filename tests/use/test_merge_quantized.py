"""A run on packed weights, from its first step to plain weights that any program loads."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from weitiao import config
from weitiao.cli import main
from weitiao.errors import RunError
from weitiao.model import quantize
from weitiao.screen import Screen
from weitiao.train.train import train
from weitiao.use.merge import as_trained, loss_of, proof_rows
from weitiao.use.trained import open_trained

pytest.importorskip("bitsandbytes")
FAST = ["training.epochs=6", "training.batch_size=6", "training.learning_rate=1e-2", "method.rank=4", "data.eval_share=0.25"]


@pytest.fixture(scope="module", params=["nf4", "int8"])
def run(request, tmp_path_factory, model_folder, rows_file):
    path = tmp_path_factory.mktemp(request.param) / "run"
    settings = config.read(None, [*FAST, f"model.quantize={request.param}"], **{
        "model.name": str(model_folder), "data.train": str(rows_file), "output": str(path)})
    return train(settings).path


def weitiao(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def test_it_trained_resumes_measures_and_answers(run, monkeypatch, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert json.loads((run / "proof.json").read_text())["passed"]
    assert "bitsandbytes" in json.loads((run / "environment.json").read_text())
    assert config.read(str(run / "config.yaml")).training.precision in ("fp32", "bf16", "fp16")
    assert weitiao(monkeypatch, capsys, "evaluate", run, "--base", "--rows", 2, "--max-new-tokens", 4)[0] == 0
    scores = json.loads((run / "scores.json").read_text())
    last = next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line)
    assert scores["tuned"]["loss"] == pytest.approx(last, rel=1e-3) and scores["base"]["loss"] > scores["tuned"]["loss"]
    assert weitiao(monkeypatch, capsys, "generate", run, "--prompt", "What is 3 and 3?", "--max-new-tokens", 4)[0] == 0


def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(run, monkeypatch, capsys, tmp_path):
    import shutil

    whole = (run / "metrics.jsonl").read_bytes()
    part = tmp_path / "part"
    shutil.copytree(run, part)
    newest = max((part / "checkpoints").iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(newest)
    shutil.rmtree(part / "adapter")
    (part / "summary.json").unlink()
    code, out, err = weitiao(monkeypatch, capsys, "train", part, "--resume")
    assert code == 0, err
    assert "Going on with" in out and (part / "metrics.jsonl").read_bytes() == whole


def test_the_merged_model_is_plain_and_computes_what_was_trained(run, monkeypatch, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    code, out, err = weitiao(monkeypatch, capsys, "merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    int8 = "int8" in out
    assert f"merged into the {'original' if int8 else 'dequantized'} base" in out and "Loss on these rows: " in out
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32} and not quantize.is_quantized(merged)
    trained = open_trained(str(run), Screen(quiet=True))
    rows = proof_rows(trained)
    losses = [loss_of(model, rows, trained.template.pad_id, trained.autocast) for model in (trained.model, merged)]
    with trained.method.untuned(trained.model):
        untuned = loss_of(trained.model, rows, trained.template.pad_id, trained.autocast)
    assert untuned - losses[0] > 0.2
    assert losses[1] == pytest.approx(losses[0], abs=2e-3 if int8 else 1e-5)


def test_the_other_base_on_request(run, monkeypatch, capsys, tmp_path):
    int8 = config.read(str(run / "config.yaml")).model.quantize == "int8"
    other = "dequantized" if int8 else "original"
    code, out, err = weitiao(monkeypatch, capsys, "merge", run, "--output", tmp_path / "merged", "--base", other)
    assert code == 0, err
    assert f"merged into the {other} base" in out
    code, _, err = weitiao(monkeypatch, capsys, "merge", run, "--output", tmp_path / "x", "--base", "packed")
    assert code == 2 and "Expected original or dequantized" in err


def test_the_quantised_model_is_what_a_four_bit_merge_is_held_against(run, monkeypatch, capsys, tmp_path):
    """Weights taken out wrongly, 5 % too large, are not written."""
    packed = as_trained(str(run), "dequantized", Screen(quiet=True))
    if packed.logits is None:  # 8 bits round what comes in: no plain model equals them
        return
    right = quantize.plain_weight
    monkeypatch.setattr(quantize, "plain_weight", lambda layer: right(layer) * 1.05)
    code, _, err = weitiao(monkeypatch, capsys, "merge", run, "--output", tmp_path / "merged")
    assert code == 2 and "is not the one that was trained" in err
    assert not (tmp_path / "merged").exists()


def test_a_base_that_was_not_quantised_has_nothing_to_take_out(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    settings = config.read(None, ["training.steps=1"], **{
        "model.name": str(model_folder), "data.train": str(rows_file), "output": str(tmp_path / "run")})
    train(settings)
    code, _, err = weitiao(monkeypatch, capsys, "merge", tmp_path / "run", "--base", "dequantized")
    assert code == 2 and "was not quantised" in err
    assert weitiao(monkeypatch, capsys, "merge", tmp_path / "run", "--base", "original")[0] == 0


def test_a_method_without_a_merge_says_so_before_anything_is_loaded(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    from weitiao.use import merge

    settings = config.read(None, ["training.steps=1", "method=prompt"], **{
        "model.name": str(model_folder), "data.train": str(rows_file), "output": str(tmp_path / "run")})
    train(settings)
    monkeypatch.setattr(merge, "open_trained", lambda *a: pytest.fail("loaded"))
    with pytest.raises(RunError, match="nothing to merge"):
        merge.merge(str(tmp_path / "run"), None, "float32")


REFUSED = {
    "full": (["method=full", "model.quantize=nf4"], "method=lora"),
    "epsilon": (["method=full", "model.dtype=float16"], "training.adam_epsilon=1e-4"),
    "device": (["model.device_map=autp"], "Expected auto, balanced"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_written(what, model_folder, rows_file, tmp_path, monkeypatch, capsys):
    words, cure = REFUSED[what]
    code, _, err = weitiao(monkeypatch, capsys, "train", "--model", model_folder, "--data", rows_file, "--output", tmp_path / "x", *words)
    assert code == 2 and cure in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_float16_weights_train_from_the_command_line_with_that_epsilon(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    code, out, err = weitiao(
        monkeypatch, capsys, "train", "--model", model_folder, "--data", rows_file, "--output", tmp_path / "x", "method=full",
        "model.dtype=float16", "training.adam_epsilon=1e-4", "training.learning_rate=1e-3", "training.steps=6")
    assert code == 0, err
    assert "weights in float16, computed in float16" in " ".join(out.split())
    assert config.read(str(tmp_path / "x" / "config.yaml")).training.precision == "fp16"
    assert weitiao(monkeypatch, capsys, "merge", tmp_path / "x")[0] == 0
