"""Imports go down only, and the command line answers without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weitiao

SOURCE = Path(weitiao.__file__).parent
# A floor sees its own and those below it.
FLOORS = {
    "errors": 0, "settings": 1, "config": 2,
    "trie": 3, "metrics": 3, "screen": 3, "help": 3, "example": 3, "__init__": 3,
    "data": 4, "model": 5, "train": 6, "use": 7, "cli": 8, "__main__": 9,
}


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS[parts[1] if len(parts) > 1 else "__init__"]


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "weitiao":
            if node.module == "weitiao":
                yield from (f"weitiao.{a.name}" if (SOURCE / f"{a.name}.py").exists() or (SOURCE / a.name).is_dir() else "weitiao"
                            for a in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "weitiao")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(file):
    relative = file.relative_to(SOURCE)
    here = FLOORS[relative.parts[0].removesuffix(".py")]
    for module in imports(file):
        assert floor(module) <= here, f"{relative} imports {module} from above"


def test_every_file_has_a_floor():
    for file in FILES:
        assert file.relative_to(SOURCE).parts[0].removesuffix(".py") in FLOORS


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["chat", "--help"], ["--version"]])
def test_help_loads_no_heavy_library(words):
    script = (
        "import sys; sys.argv = ['weitiao', *sys.argv[1:]]\n"
        "from weitiao.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("words, told", [
    (["train", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["check", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["plan", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["train", "--data", "broken.jsonl"], "broken.jsonl:2"),
    (["train", "--data", "empty.jsonl"], "holds no rows"), (["train", "--data", "strange.jsonl"], "has the columns a, b"),
    (["train", "--data", "good.jsonl", "--model", "smolm2-135m"], "Did you mean 'smollm2-135m'"), (["plan", "--model", "./none"], "nothing at"),
    (["train", "--data", "good.jsonl", "data.eval=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["train", "--data", "good.jsonl", "--output", "taken"], "The folder taken exists already"),
    (["train", "nowhere", "--resume"], "There is no run folder nowhere"), (["chat", "nowhere"], "There is no run folder nowhere"),
    (["merge", "taken"], "taken is no run folder"),
])
def test_what_is_plain_at_a_glance_is_told_before_a_heavy_library_is_loaded(words, told, tmp_path):
    good = '{"prompt": "What is it?", "completion": "It is it."}\n'
    for name, text in {"good": good, "broken": good + "{\n", "empty": "", "strange": '{"a": 1, "b": 2}\n'}.items():
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", "utf-8")
    script = (
        "import sys; sys.argv = ['weitiao', *sys.argv[1:]]\n"
        "from weitiao.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and told in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["broken.jsonl", "empty.jsonl", "good.jsonl", "notes.txt", "strange.jsonl", "taken"]


def test_reading_rows_loads_no_torch():
    script = "import sys, weitiao.data.dataset; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
