"""At the end of a run, what was learned answers the prompts that the run was given."""

from __future__ import annotations

import json
import sys

import pytest

from weitiao import config
from weitiao.cli import main
from weitiao.errors import SettingError

PROMPTS = ["What is 3 and 3?", "如何写好一个简历？"]


@pytest.fixture
def weitiao(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weitiao", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def train(weitiao, model_folder, rows_file):
    """Train to `output`, and read back what it answered."""
    def run(output, *words, prompts=PROMPTS):
        code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", output, "method.rank=4",
                                 "training.batch_size=12", "training.learning_rate=1e-2", f"samples.prompts={json.dumps(prompts)}", *words)
        assert code == 0, err
        with open(f"{output}/answers.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file], out

    return run


def test_the_published_weights_answer_greedily_as_generate_would_and_it_is_told_where_they_were_cut(train, weitiao):
    answers, out = train("r", "training.epochs=2", "samples.max_new_tokens=12", "data.system=Be brief.")
    assert [line["prompt"] for line in answers] == PROMPTS
    for number, line in enumerate(answers, 1):
        code, said, told = weitiao("generate", "r", "--prompt", line["prompt"], "--max-new-tokens", 12)
        assert code == 0 and said.rstrip("\n") == line["answer"]
        assert told == ("Answer 1 was cut at 12 tokens; --max-new-tokens allows more.\n" if line.get("cut") else "")
    assert any(line.get("cut") for line in answers)
    assert out.count("… (cut at 12 tokens)") == sum("cut" in line for line in answers)
    assert out.index("run folder") < out.index("如何写好一个简历？")  # summed up before
    assert "如何写好一个简历？" in open("r/answers.jsonl", encoding="utf-8").read()  # as it is, not escaped


def test_the_best_step_answers_where_it_is_not_the_last(train, weitiao, tmp_path):
    """No answer is right after any step, so that the first step stays the best by exact match."""
    answers, _ = train("r", "training.steps=4", "data.eval_share=0.25", "evaluation.every=1", "evaluation.metric=exact_match", "saving.every=1",
                       "samples.max_new_tokens=8")
    assert json.loads((tmp_path / "r/summary.json").read_text())["published_step"] == 1
    best, last = (weitiao("generate", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 8)[1].rstrip("\n") for folder in ("r", "r/checkpoints/4"))
    assert answers[0]["answer"] == best != last


def test_a_drawn_answer_is_drawn_by_the_seed(train):
    drawn = ["training.steps=1", "samples.temperature=1.5", "samples.top_p=0.95", "samples.max_new_tokens=20"]
    first, again, other = (train(name, *drawn, f"training.seed={seed}")[0] for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other


@pytest.mark.parametrize("method", ["full", "ptuning", "prefix"])
def test_with_other_methods_checkpointing_and_bf16(train, weitiao, model_folder, method):
    answers, _ = train("r", f"method={method}", "training.steps=2", "training.checkpointing=true", "training.precision=bf16",
                       "samples.max_new_tokens=6", *(["method.virtual_tokens=4"] if method != "full" else []), prompts=PROMPTS[:1])
    assert weitiao("generate", "r", "--prompt", PROMPTS[0], "--max-new-tokens", 6)[1].rstrip("\n") == answers[0]["answer"]


def test_one_text_is_a_list_of_one_and_no_prompts_are_no_answers(train, weitiao, model_folder, rows_file, tmp_path):
    assert config.read(None, ["samples.prompts=你好"], **{"data.train": "x"}).samples.prompts == ["你好"]
    assert weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", "training.steps=1")[0] == 0
    assert not (tmp_path / "r/answers.jsonl").exists()


def test_ctrl_c_while_it_answers_leaves_a_finished_run(weitiao, model_folder, rows_file, monkeypatch, tmp_path):
    from weitiao.train import samples

    def broken_off(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "answers_to", broken_off)
    code, out, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r", "training.steps=1", "samples.prompts=Hi")
    assert code == 130 and "The run is finished; ask it: weitiao generate r" in err
    assert (tmp_path / "r/summary.json").is_file() and (tmp_path / "r/adapter").is_dir()
    assert not (tmp_path / "r/answers.jsonl").exists()
    code, out, _ = weitiao("train", "r", "--resume")
    assert code == 0 and "is finished" in out


def test_a_prompt_without_room_for_an_answer_is_refused_before_training(weitiao, model_folder, rows_file, tmp_path):
    code, _, err = weitiao("train", "--model", model_folder, "--data", rows_file, "--output", "r",
                           f"samples.prompts={json.dumps(['Hi', 'many words ' * 200])}")
    assert code == 2 and "samples.prompts: prompt 2 has" in err and "The model takes 256, the answer counted." in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, message", [
    (["samples.temperature=1"], "samples.temperature goes with samples.prompts, and would do nothing here."),
    (["samples.max_new_tokens=9"], "samples.max_new_tokens goes with samples.prompts, and would do nothing here."),
    (["samples.prompts=Hi", "samples.top_p=0.5"], "samples.top_p goes with a temperature above 0, and would do nothing here."),
    (["samples.prompts=['  ']"], "samples.prompts holds an empty text."),
])
def test_settings_that_would_do_nothing_are_refused(words, message):
    with pytest.raises(SettingError) as caught:
        config.read(None, words, **{"data.train": "x"})
    assert message in str(caught.value)


def test_chat_tells_an_answer_that_was_cut(train, weitiao, monkeypatch):
    import io

    train("r", "training.steps=1", "samples.max_new_tokens=1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 and 3?\n"))
    code, out, _ = weitiao("chat", "r", "--max-new-tokens", 5)
    assert code == 0 and out.rstrip().endswith("… (cut at 5 tokens)")
