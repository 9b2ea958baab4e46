"""The settings in examples/: they say what is true, they run as their first lines say, and they come to the tutorials' numbers.

Each is run on a tiny random checkpoint of its own model, in the files that the model's hub has, and on rows of
examples/make_rows.py. What is overridden is the model's name, where the rows are, and sizes.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
import typer
from conftest import tiny_model
from model.methods.test_counts import MODELS
from safetensors.torch import load_file
from test_cli import weitiao  # noqa: F401
from test_example_rows import script  # noqa: F401

from weitiao import config
from weitiao.cli import app
from weitiao.data.dataset import Dataset, load
from weitiao.data.templates import Template, load_template
from weitiao.errors import RowError
from weitiao.model.load import load_tokenizer
from weitiao.model.methods import METHODS, count_parameters
from weitiao.train.evaluation import make_passes
from weitiao.train.folder import RunFolder
from weitiao.train.loop import Schedule
from weitiao.train.loss import learn_on_tries
from weitiao.train.train import default_name

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(str(file.relative_to(ROOT)) for file in EXAMPLES.rglob("*.yaml"))
EMBEDDED = [file for file in FILES if file.endswith("/embedded.yaml")]
OWN = [file for file in FILES if file not in EMBEDDED]

BLOOM = "examples/0_full_bloom/bloom.yaml"
YUAN2 = "examples/1_resume_yuan2/yuan2.yaml"
GPT2 = "examples/3_sentiment_gpt2/gpt2.yaml"
CHATGLM3 = "examples/4_role_play_chatglm3/chatglm3.yaml"
HARD = "examples/2_methods_bloom_llama/bloom/prompt_hard.yaml"
KINDS = ["instructions", "resume", "instructions", "reviews", "role_play"]  # of rows, by tutorial

# model.name -> (its writer in checkpoints.py, its full size in test_counts.py)
OWN_MODELS = {
    "Langboat/bloom-800m-zh": ("bloom", "bloom-800m"),
    "Langboat/bloom-1b4-zh": ("bloom", "bloom-1b4"),
    "modelscope:IEITYuan/Yuan2-2B-Mars-hf": ("yuan2", "yuan2-2b"),
    "modelscope:modelscope/Llama-2-7b-ms": ("llama2", "llama-2-7b"),
    "gpt2": ("gpt2", "gpt2"),
    "THUDM/chatglm3-6b": ("chatglm3", "chatglm3-6b"),
}

every_file = pytest.mark.parametrize("file", FILES)


def comment_lines(file: str) -> list[str]:
    """The lines that a file begins with, without their #."""
    text = (ROOT / file).read_text("utf-8")
    return [line[1:].strip() for line in text[: re.search(r"^[^#]", text, re.M).start()].splitlines()]


def commands(file: str, program: str) -> list[list[str]]:
    """The words behind `weitiao` or `python` of each command that a file begins with."""
    lines = [line.split(" # ")[0] for line in comment_lines(file)]
    return [shlex.split(line)[1:] for line in lines if line.startswith(program + " ")]


def kind_of(file: str) -> str:
    return KINDS[int(file.removeprefix("examples/")[0])]


def rate(run: RunFolder, step: int) -> float:
    return next(line["learning_rate"] for line in run.read_metrics() if line["step"] == step and "loss" in line)


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


# ------------------------------------------------------------------------------------------------------- what they say


def test_each_tutorial_has_one_for_its_own_model_and_one_for_the_embedded():
    folders = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert [name[0] for name in folders] == list("01234")
    for name in folders:
        models = {config.read(str(ROOT / file)).model.name for file in FILES if f"/{name}/" in file}
        assert config.read(str(EXAMPLES / name / "embedded.yaml")).model.name == "smollm2-135m"
        assert len(models) > 1 and models - {"smollm2-135m"} <= set(OWN_MODELS)


@every_file
def test_the_commands_at_the_head_are_there_and_name_the_file_itself(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = typer.main.get_command(app).commands
    (command, *more), *others = commands(file, "weitiao")
    assert (command, more[0]) == ("train", file)
    for name, *words in [(command, *more), *others]:
        assert {word for word in words if word.startswith("--")} <= {o for p in known[name].params for o in p.opts}
        if name == "train":
            assert words[0] == file
            assert config.read(file, [word for word in words if "=" in word])
        else:
            assert words == [f"runs/{default_name(config.read(file))}"]


@pytest.mark.parametrize("file", EMBEDDED)
def test_the_rows_that_are_made_are_those_that_are_read(file, script, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    ((path, *words),) = commands(file, "python")
    assert path == "examples/make_rows.py" and words[0] == kind_of(file)
    script.main(words)
    data = config.read(str(ROOT / file)).data
    assert {path.name for path in tmp_path.iterdir()} == {source.path for source in (*data.train, *data.eval)}


def test_the_embedded_model_is_asked_as_it_was_taught(script):  # noqa: F811
    resume, role_play = (config.read(str(ROOT / file)).samples.prompts[0] for file in EMBEDDED if file[9] in "14")
    assert resume == script.PROMPT.replace("{sentence}", "张三，汉族，金融学硕士。")
    who, whom = role_play.split("#关于")
    rows = script.make_rows("role_play")[0]
    assert any(row["input"].startswith(f"{who}#关于") for row in rows) and any(row["input"].endswith(f"#关于{whom}") for row in rows)


def test_the_methods_that_tutorial_2_offers_for_the_embedded_model_are_there():
    file = next(file for file in EMBEDDED if "/2_" in file)
    (offer,) = [line for line in comment_lines(file) if " # or " in line]
    names = offer.split(" # or ")[1].split(", ")
    assert len(names) == 6
    for name in names:
        assert config.read(str(ROOT / file), [f"method={name}"]).method.name == name


# ----------------------------------------------------------------------------------------------- how much they train

TRAINABLE = {
    "bitfit": 544_768, "prompt": 20_480, "ptuning": 5_267_456, "ptuning_lstm": 134_324_224, "prefix": 983_040,
    "prefix_projection": 205_641_728, "lora": 1_572_864, "lora_half": 4_194_304, "lora_8bit": 4_194_304, "lora_4bit": 4_194_304,
    "bloom": 750_841_344, "yuan2": 9_043_968, "gpt2": 124_439_808, "chatglm3": 1_949_696,
}


@pytest.mark.parametrize("file", [file for file in OWN if file != HARD])  # a text's length depends on the tokenizer
def test_the_trainable_parameters_are_as_many_as_it_says(file):
    settings, expected = config.read(str(ROOT / file)), TRAINABLE[Path(file).stem]
    assert re.findall(r"([\d,]+) trainable parameters", (ROOT / file).read_text("utf-8")) == [f"{expected:,}"]
    with torch.device("meta"):
        model = MODELS[OWN_MODELS[settings.model.name][1]][0]()
        learn_on_tries(model)
        tuned = METHODS[settings.method.name].attach(model, settings.method, 0)
    assert count_parameters(tuned)[0] == expected


# ------------------------------------------------------------------------------------------------------ that they run


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """name -> a tiny checkpoint of checkpoints.py; where its hub has weights as pickle only, so has it."""
    parent, written = tmp_path_factory.mktemp("hub"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = getattr(checkpoints, name)(parent / f"tiny-{name}")
            if name in ("bloom", "yuan2", "llama2"):
                weights = written[name] / "model.safetensors"
                torch.save(load_file(weights), written[name] / "pytorch_model.bin")
                weights.unlink()
        return written[name]

    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(weitiao, cache, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A folder to run in as in the repository's own."""
    monkeypatch.setenv("WEITIAO_CACHE", str(cache))
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    return tmp_path


def write_rows(script, kind: str, count: int, *files: str) -> None:  # noqa: F811
    """Different rows of a kind in each of the files."""
    rows = script.make_rows(kind, count * len(files))[0]
    for i, file in enumerate(files):
        script.write(rows[i * count : (i + 1) * count], Path(file))


def tried(weitiao, file: str, model: Path, *overrides: str) -> tuple[RunFolder, str]:  # noqa: F811
    """(the run of the last command at the head of a file, what it printed); what is not overridden was in force as it stands."""
    (command, _, *words) = commands(file, "weitiao")[-1]
    code, out, err = weitiao(command, file, *words, "--output", "run", f"model.name={model}", *overrides)
    assert code == 0, err
    run = RunFolder.open(Path("run"))
    assert all(map(math.isfinite, losses(run)))
    assert run.read_json("proof.json")["passed"]
    asked, used = (flat(s.model_dump(mode="json")) for s in (config.read(file), run.settings()))
    left_open = {name for name, value in asked.items() if value in (None, "auto")}
    given = {word.split("=")[0] for word in (*words, *overrides)} | {"model.name", "data.train"}
    assert {name for name in asked if asked[name] != used[name]} <= left_open | given
    return run, out


def flat(values: dict, before: str = "") -> dict[str, object]:
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) and name != "labels" else {before + name: value}
    return found


def answered(run: RunFolder) -> list[str]:
    return [json.loads(line)["prompt"] for line in (run.path / "answers.jsonl").read_text("utf-8").splitlines()]


def steps_saved(run: RunFolder) -> list[int]:
    return [checkpoint.step for checkpoint in run.checkpoints()]


TUTORIAL_2 = [file for file in OWN if "/2_" in file]
NARROW = {"ptuning": ["method.encoder_hidden=8"], "ptuning_lstm": ["method.encoder_hidden=8", "method.encoder_layers=2"]}


@pytest.mark.parametrize("file", TUTORIAL_2)
def test_tutorial_2_runs(file, weitiao, hub, script, place):  # noqa: F811
    settings = config.read(file)
    if settings.model.quantize != "none":
        pytest.importorskip("bitsandbytes", reason="8 and 4 bits need bitsandbytes")
    write_rows(script, "instructions", 8, "alpaca_data_zh.json")
    run, out = tried(weitiao, file, hub(OWN_MODELS[settings.model.name][0]), "training.batch_size=4", "training.steps=2",
                     "samples.max_new_tokens=4", *NARROW.get(Path(file).stem, []))
    assert steps_saved(run) == [2] and len(losses(run)) == 2
    assert answered(run) == ["考试有哪些技巧？"]
    assert (run.path / METHODS[settings.method.name].FOLDER).is_dir()
    if "/llama/" in file:  # 2 layers x (q, v) x rank 8 x (32 in + 32 out), however the frozen weights are packed
        assert "trainable params: 2,048 ||" in out and "computed in float16" in out
        adapter = load_file(run.path / "adapter" / "adapter_model.safetensors")
        assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    if file == HARD:
        words = load_tokenizer(hub("bloom"), settings.model)(settings.method.text).input_ids
        assert f"trainable params: {32 * len(words):,} ||" in out


def test_tutorial_0_runs(weitiao, hub, script, place):  # noqa: F811
    """400 rows, 32 a step: 13 steps, the learning rate going to 0 from the first."""
    write_rows(script, "instructions", 400, "alpaca_data_zh.json")
    run, _ = tried(weitiao, BLOOM, hub("bloom"), "samples.max_new_tokens=4")
    assert len(losses(run)) == 13 and steps_saved(run) == [13]
    assert [rate(run, step) for step in range(1, 14)] == pytest.approx([5e-5 * (14 - step) / 13 for step in range(1, 14)])
    assert f"{rate(run, 10):.3e}" == "1.538e-05"  # the rate that step 10 was made with
    assert answered(run) == ["如何写好一个简历？"]
    assert {weight.dtype for weight in load_file(run.path / "model" / "model.safetensors").values()} == {torch.float32}


def test_tutorial_1_runs(weitiao, hub, script, place):  # noqa: F811
    """24 rows, 12 a step, 3 epochs; as many checkpoints, none of which holds weights of the base."""
    write_rows(script, "resume", 24, "data.json")
    run, _ = tried(weitiao, YUAN2, hub("yuan2"), "data.max_tokens=1024", "samples.max_new_tokens=4")
    assert len(losses(run)) == 6 and steps_saved(run) == [2, 4, 6]
    for checkpoint in run.checkpoints():
        weights = load_file(checkpoint.path / "adapter" / "adapter_model.safetensors")
        assert len(weights) == 2 * 7 * checkpoints.LAYERS and all("lora_" in name for name in weights)
    (prompt,) = answered(run)
    assert prompt == script.PROMPT.replace("{sentence}", "张三，汉族，金融学硕士。")  # as the rows have it, blank lines and commas


def test_tutorial_3_runs(weitiao, hub, script, place):  # noqa: F811
    write_rows(script, "reviews", 16, "train.jsonl", "validation.jsonl")
    run, _ = tried(weitiao, GPT2, hub("gpt2"), "training.steps=2", "evaluation.every=1", "saving.every=1")
    assert steps_saved(run) == [1, 2]
    measured = [line for line in run.read_metrics() if "eval_loss" in line]
    assert [line["step"] for line in measured] == [1, 2] and all(0 <= line["accuracy"] <= 1 for line in measured)
    assert rate(run, 1) == 2e-5 and not (run.path / "answers.jsonl").exists()
    for line in run.read_metrics():
        assert line.get("learned", 8) == 8  # a label a row


def test_tutorial_4_runs(weitiao, hub, script, place):  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    write_rows(script, "role_play", 16, "data.jsonl")
    run, out = tried(weitiao, CHATGLM3, hub("chatglm3"), "data.max_tokens=128", "samples.max_new_tokens=4")
    assert len(losses(run)) == 2 and steps_saved(run) == [2] and rate(run, 2) == pytest.approx(2.5e-5)
    # 3 layers x rank 8 x (48 in + 64 queries + 2 x 2 x 16 keys and values), not what 4 bits are packed into
    assert f"trainable params: {3 * 8 * (48 + 128):,} ||" in out
    assert answered(run) == ["妮露#关于提纳里"]
    assert (run.path / "adapter" / "tokenizer.model").is_file() or (run.path / "adapter" / "chatglm3.model").is_file()


@pytest.fixture(scope="session")
def embedded(tmp_path_factory, tokenizer) -> Path:
    """In the embedded model's place: a Llama with a chat template and room for rows of bytes."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["neg", "pos"])  # a token each, as in the original
    tiny_model(vocabulary=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", EMBEDDED)
def test_the_commands_for_the_embedded_model_run_as_they_stand(file, weitiao, script, embedded, place):  # noqa: F811
    (_, *words) = commands(file, "python")[0]
    script.main([*words, "--rows", "8", "--heldout-rows", "2"])
    settings = config.read(file)
    small = [f"model.name={embedded}", "data.max_tokens=3072", "training.batch_size=4", "training.steps=2"]
    small += ["samples.max_new_tokens=4"] if settings.samples.prompts else []
    done = 0
    for command, *words in commands(file, "weitiao"):
        if "model.quantize=nf4" in words or settings.model.quantize != "none":
            pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
        code, out, err = weitiao(command, *words, *(small if command == "train" else ["--max-new-tokens", "4"]))
        assert code == 0, err
        done += command == "train"
    assert len(list(Path("runs").iterdir())) == done
    for run in map(RunFolder, Path("runs").iterdir()):
        assert len(losses(run)) == 2 and any("eval_loss" in line for line in run.read_metrics())
        assert not settings.samples.prompts or answered(run) == settings.samples.prompts


# ---------------------------------------------------------------------------------------------- what their rows become


def rows_read(file: str, folder: Path, rows: Path, *overrides: str) -> tuple[Dataset, Template, Schedule]:
    """Rows as the settings read them for the model in a folder, and the steps they come to."""
    settings = config.read(str(ROOT / file), overrides, **{"data.train": str(rows)})
    template = load_template(settings.data.template, load_tokenizer(folder, settings.model))
    data = load(settings.data.train, settings.data, template, 8192, 1 << 20, settings.training.seed, task=settings.task)
    training = settings.training
    return data, template, Schedule(len(data), training.batch_size, training.seed, training.epochs, training.steps)


def learned(example) -> list[int]:
    return example.ids[example.weights > 0].tolist()


def test_tutorial_0_prompts_and_answers_to_the_letter(hub, script, tmp_path):  # noqa: F811
    rows = script.make_rows("instructions", 400)[0]
    rows[0] = {"instruction": " 如何写好一个简历？\n", "input": "", "output": "先写姓名。"}
    rows[1] = {"instruction": "改写。", "input": "一\n二 ", "output": " 三\n"}
    rows[2] = {"instruction": "写得长一些。", "input": "", "output": "很长。" * 400}
    rows[3] = {"instruction": "读完它。" * 400, "input": "", "output": "好。"}
    file = tmp_path / "rows.json"
    script.write(rows, file)
    data, template, schedule = rows_read(BLOOM, hub("bloom"), file)
    assert (template.tokenizer.pad_token_id, template.tokenizer.eos_token_id) == (3, 2)
    assert "its answer is cut away" in data.skipped[0].reason and [s.where for s in data.skipped] == [f"{file}, row 4"]
    del rows[3]
    assert (len(data), data.max_tokens, data.cut, schedule.steps) == (399, 256, 1, 13)
    for i, (row, said) in enumerate(zip(data.rows, rows, strict=True)):
        (example,) = row.examples
        asked = "Human: " + "\n".join([said["instruction"], said["input"]]).strip() + "\n\nAssistant: "
        prompt, answer = (template.tokenizer.decode(ids) for ids in (example.ids[example.weights == 0], learned(example)))
        assert prompt == asked and len(example) <= 256
        assert learned(example)[-1] == 2 and 2 not in example.ids[:-1] and not {1, 3} & set(example.ids.tolist())
        if i == 2:
            assert len(example) == 256 and said["output"].startswith(answer.removesuffix("</s>").rstrip("\ufffd"))
        else:
            assert answer == said["output"] + "</s>"
    first = data.rows[0].examples[0]
    assert template.tokenizer.decode(first.ids) == "Human: 如何写好一个简历？\n\nAssistant: 先写姓名。</s>"
    # The question is asked with the ids that were trained.
    asked = template.prompt_ids([{"role": "user", "content": "如何写好一个简历？"}])
    assert asked.tolist() == first.ids[first.weights == 0].tolist()


@pytest.mark.parametrize(("file", "rows", "saved"), [
    (BLOOM, 400, [13]), (BLOOM, 417, [14]), (YUAN2, 200, [17, 34, 51]), (GPT2, 8530, [*range(100, 1001, 100), 1067]),
    (CHATGLM3, 705, [89]), (CHATGLM3, 712, [89]), (CHATGLM3, 713, [90]),
])
def test_the_steps_after_which_the_tutorials_rows_are_saved(file, rows, saved):
    settings = config.read(str(ROOT / file))
    training = settings.training
    schedule = Schedule(rows, training.batch_size, training.seed, training.epochs, training.steps)
    assert [step for step in range(1, schedule.steps + 1) if schedule.due(settings.saving.every, step)] == saved


def test_tutorial_1_keeps_its_rows_whole_and_takes_51_steps(shared, script, tmp_path):  # noqa: F811
    file = tmp_path / "rows.json"
    script.write(script.make_rows("resume", 200)[0], file)
    folder = checkpoints.yuan2(tmp_path / "yuan2", shared / "tokenizers" / "yuan2")
    for rows in (file, shared / "data" / "resume" / "seed_200.json"):
        data, template, schedule = rows_read(YUAN2, folder, rows)
        assert (len(data), data.cut, len(data.skipped)) == (200, 0, 0)
        assert (schedule.steps_per_epoch, schedule.steps) == (17, 51)
        eod, sep = template.tokenizer.convert_tokens_to_ids(["<eod>", "<sep>"])
        for (example,) in (row.examples for row in data.rows):
            assert len(example) <= 384 and learned(example)[-1] == eod and example.ids[example.weights == 0][-1] == sep
            assert template.tokenizer.bos_token_id not in example.ids


@pytest.mark.parametrize("file", [file for file in TUTORIAL_2 if "/llama/" in file])
def test_tutorial_2_ends_llamas_answers_in_one_end_token_and_pads_to_the_right(file, hub, script, tmp_path):  # noqa: F811
    rows = tmp_path / "rows.json"
    script.write(script.make_rows("instructions", 12)[0], rows)
    data, template, _ = rows_read(file, hub("llama2"), rows)
    examples = [row.examples[0] for row in data.rows]
    for example in examples:
        ids = example.ids.tolist()
        assert (ids[0], ids.count(1), ids[-1], ids.count(2)) == (1, 1, 2, 1) and learned(example)[-1] == 2
    (batch,) = make_passes(examples, "padded", 1 << 20, template.pad_id, "cpu")
    masked = batch["attention_mask"] == 0
    assert masked.any() and not (masked[:, :-1] & ~masked[:, 1:]).any() and not batch["weights"][masked].any()


# -- tutorial 3, in the original's vocabulary

ROW_0 = [1016, 284, 787, 257, 22870, 772, 3744, 621, 610, 77, 727, 5513, 5767, 89, 44028, 837, 474, 11025, 12, 565, 3885, 5719, 1801,
         1326, 393, 2876, 574, 384, 13528, 764, 50256, 1930]


@pytest.fixture(scope="session")
def real_gpt2(shared, tmp_path_factory) -> Path:
    """Tiny, but for its 50,257 tokens."""
    return checkpoints.gpt2(tmp_path_factory.mktemp("real") / "gpt2", shared / "tokenizers" / "gpt2")


def test_tutorial_3_in_numbers(shared, real_gpt2):
    data, template, schedule = rows_read(GPT2, real_gpt2, shared / "data" / "rotten_tomatoes" / "train.jsonl")
    assert data.labels.as_dict() == {"neg": [12480], "pos": [1930]}
    assert (len(data), schedule.steps, len(data.skipped)) == (8530, 1067, 0)
    assert data.rows[0].examples[0].ids.tolist() == ROW_0
    assert template.tokenizer.decode(ROW_0).startswith(" going to make a splash even greater than arnold schwarzenegger")
    examples = [row.examples[0] for row in data.rows]
    assert sum(len(example) == 32 for example in examples) == 2797 and max(map(len, examples)) == 32
    for example in examples:
        assert example.ids[-2] == 50256 and learned(example) == [example.ids[-1]] and example.ids[-1] in (12480, 1930)


def test_tutorial_3_refuses_labels_that_begin_alike(weitiao, real_gpt2, script, place):  # noqa: F811
    write_rows(script, "reviews", 8, "train.jsonl", "validation.jsonl")
    (_, *words) = commands(GPT2, "weitiao")[-1]
    code, _, err = weitiao("train", *words, f"model.name={real_gpt2}", "data.labels={0: 不好, 1: 不错}", "training.steps=1")
    assert code == 2 and "'不好' and '不错' both begin with the token" in err and "neg, 1: pos" in err
    assert not Path("runs").exists()
    with pytest.raises(RowError, match="has 2 tokens"):
        rows_read(GPT2, real_gpt2, Path("train.jsonl"), "data.labels={0: terrible, 1: good}")


# -- tutorial 4


def test_tutorial_4_lays_out_its_rows_and_pads_nothing(hub, tmp_path, script):  # noqa: F811
    from sentencepiece import SentencePieceProcessor

    rows = [{"input": "妮露#关于提纳里", "output": "据说他是很厉害的植物学家。"},
            {"instruction": "说一句。", "input": "妮露#关于柯莱", "output": "她偶尔会来看我的演出。"}]
    file = tmp_path / "data.jsonl"
    script.write(rows, file)
    data, template, _ = rows_read(CHATGLM3, hub("chatglm3"), file)
    enc = SentencePieceProcessor(model_file=str(hub("chatglm3") / "tokenizer.model")).encode
    names = ["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"]
    mask, sop, system, user, assistant = template.tokenizer.convert_tokens_to_ids(names)
    examples = [row.examples[0] for row in data.rows]
    for example, row in zip(examples, rows, strict=True):
        asked = "\n".join([row.get("instruction", ""), row["input"]]).strip()
        assert example.ids[example.weights == 0].tolist() == [
            mask, sop, system, *enc("现在模仿原神角色评价他人\n "), user, *enc("\n " + asked), assistant]
        assert learned(example) == [*enc("\n" + row["output"]), 2]
    passes = make_passes(examples, "padded", 4096, template.pad_id, "cpu")
    assert max(batch["input_ids"].shape[1] for batch in passes) == max(map(len, examples)) < 512
