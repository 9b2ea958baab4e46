"""What tests of a model's source share: places of their own, what stands for a model, and a refusal's message."""

from pathlib import Path

import pytest

from weitiao.errors import SourceError
from weitiao.model.source import resolve
from weitiao.model.source.cache import cache_folder


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Every test has its own cache and its own working folder."""
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write_model(folder: Path) -> Path:
    """What stands for a model where nobody loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def refused(name: str, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        resolve(name, **options)
    return caught.value


def models() -> list[str]:
    """What the cache holds, locks aside."""
    folder = cache_folder() / "models"
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".lock") if folder.is_dir() else []
