"""Each method from the command line to the end: train, go on, evaluate beside the base, answer, merge or be told why not."""

from __future__ import annotations

import json

import pytest
from test_cli import FAST, weitiao  # noqa: F401

RATE = ["training.learning_rate=0.05", "training.epochs=2", "training.batch_size=6"]
THINK = "<think>"
METHODS = {
    "prompt": ["method=prompt", "method.virtual_tokens=5"],
    "ptuning": ["method=ptuning", "method.virtual_tokens=5"],
    "prefix": ["method=prefix", "method.projection=true", "method.virtual_tokens=5"],
    "bitfit": ["method=bitfit", "method.add_bias=true"],
    "ia3": ["method=ia3"],
    "adapter": ["method=adapter", "method.style=houlsby", "method.bottleneck=8"],
    "full": ["method=full", "method.last_layers=1"],
    "lora-tokens": ["method.rank=4", "tokens.add=[<think>]"],
    "bitfit-tokens": ["method=bitfit", "method.add_bias=true", "tokens.add=[<think>]"],
    "prompt-nf4": ["method=prompt", "method.virtual_tokens=5", "model.quantize=nf4"],
}
MERGED = ("bitfit", "ia3", "full", "lora-tokens", "bitfit-tokens")


def losses(run) -> list[float]:
    return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def evaluated_losses(run) -> list[float]:
    return [line["eval_loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "eval_loss" in line]


@pytest.mark.parametrize("name", METHODS)
def test_from_the_first_step_to_the_merged_model(weitiao, name, model_folder, rows_file, tmp_path):  # noqa: F811
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    rows = tmp_path / "rows.jsonl"
    think = THINK if "tokens" in name else ""
    rows.write_text(rows_file.read_text().replace("It is", f"{think}It is"))
    base = "--base" if name != "full" else None
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows, "--output", "run", *RATE, *METHODS[name], "data.eval_share=0.25")
    assert code == 0, err
    assert "Proven on" in out and ("Merge it" in out) == name.startswith(MERGED)
    run = tmp_path / "run"
    assert losses(run)[-1] < losses(run)[0]
    first_checkpoint = min((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    code, out, err = weitiao("evaluate", first_checkpoint)
    assert code == 0 and json.loads((run / "scores.json").read_text())["tuned"]["loss"] == pytest.approx(max(evaluated_losses(run)), rel=1e-5), err
    code, out, err = weitiao("evaluate", run, *([base] if base else []))
    assert code == 0, err
    scores = json.loads((run / "scores.json").read_text())
    assert scores["tuned"]["loss"] == pytest.approx(min(evaluated_losses(run)), rel=1e-5)
    if base:
        assert scores["base"]["loss"] > scores["tuned"]["loss"]
    code, first, err = weitiao("generate", run, "--prompt", "What is 3 and 3?", "--max-new-tokens", "8")
    assert code == 0, err
    assert weitiao("generate", run, "--prompt", "What is 3 and 3?", "--max-new-tokens", "8")[1] == first
    code, out, err = weitiao("merge", run)
    if name.startswith(MERGED):
        assert code == 0 and "Proven on" in out, err
        assert (f'"{THINK}"' in (run / "merged" / "tokenizer.json").read_text()) == bool(think)
    else:
        assert code == 2 and "weitiao chat" in err and not (run / "merged").exists()
    code, out, err = weitiao("prove", run)
    assert code == 0 and "differ by at most 0" in out, err


def test_a_model_without_biases_is_told_its_cure_before_anything_is_written(weitiao, model_folder, rows_file, tmp_path):  # noqa: F811
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "run", "method=bitfit")
    assert code == 2 and "method.add_bias=true" in err and not (tmp_path / "run").exists()


def test_a_token_that_is_there_and_one_that_is_new(weitiao, model_folder, rows_file, tmp_path):  # noqa: F811
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, *FAST, "tokens.add=[<|im_end|>]")
    assert code == 2 and "already" in err
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, *FAST, "tokens.add=[<think>]", "--output", "new")
    assert code == 0 and "<think>" in (tmp_path / "new" / "adapter" / "tokenizer.json").read_text(), err


def test_a_text_longer_than_its_places_is_told(weitiao, model_folder, rows_file, tmp_path):  # noqa: F811
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "method=prompt", "method.text=What is the capital of France?",
                           "method.virtual_tokens=3")
    assert code == 2 and "tokens, method.virtual_tokens is 3" in err and not (tmp_path / "runs").exists()


def test_virtual_tokens_leave_the_model_fewer_places(weitiao, model_folder, tmp_path):  # noqa: F811
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "a " * 60, "completion": "b " * 60}) + "\n")
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows, "method=prompt", "method.virtual_tokens=250", "--output", "run")
    assert code == 2 and "250 virtual tokens leave 6 of the model's 256 places" in err
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows, "method=prompt", "method.virtual_tokens=200", "--output", "run",
                             "training.epochs=1")
    assert code == 2 and "1 row" in err, (out, err)
