"""A data set of a hub or of save_to_disk gives its own rows, and whatever a hub answers is one message."""

import sys
import types

import pytest
from sources import A, fields, in_an_empty_folder, lines, refusal, write  # noqa: F401

from weitiao.data.rows import label_names, read_rows
from weitiao.data.rows.row import Row
from weitiao.errors import SourceError


def saved(datasets, **columns):
    label = datasets.ClassLabel(names=["neg", "pos"])
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({"text": datasets.Value("string"), "label": label})
    )


def test_a_saved_data_set_gives_its_own_values_and_the_names_of_its_labels():
    datasets = pytest.importorskip("datasets")
    saved(datasets, text=["bad", "good"], label=[0, 1]).with_format("numpy").save_to_disk("reviews")
    rows = list(read_rows("reviews"))
    assert rows == [Row({"text": "bad", "label": 0}, "reviews", 1), Row({"text": "good", "label": 1}, "reviews", 2)]
    assert type(rows[0].fields["label"]) is int
    assert label_names("reviews") == {0: "neg", 1: "pos"}


def test_a_saved_dict_gives_the_split_asked_for():
    datasets = pytest.importorskip("datasets")
    one, two = saved(datasets, text=["a"], label=[0]), saved(datasets, text=["b"], label=[1])
    datasets.DatasetDict(train=one, validation=two).save_to_disk("reviews")
    assert fields("reviews", split="validation") == [{"text": "b", "label": 1}]
    assert refusal(SourceError, "reviews", split="validatoin") == (
        "reviews has no split 'validatoin'.\nThere: train, validation.\nDid you mean 'validation'?"
    )


def test_a_saved_folder_that_is_torn_is_refused():
    pytest.importorskip("datasets")
    write("reviews/state.json", "{}")
    assert refusal(SourceError, "reviews").startswith("reviews cannot be read: ")


def test_files_have_no_label_names():
    write("rows.jsonl", lines(A))
    assert label_names("rows.jsonl") is None


# -- Hubs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, with whatever `hub.load` is set to; `hub.asked` keeps the questions."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    stub = types.SimpleNamespace(asked=[], reach=lambda: None, offline=None)
    stub.load = lambda: saved(datasets, text=["bad", "good"], label=[0, 1])

    def load_dataset(*args, **options):
        stub.asked.append((args, options))
        stub.offline = datasets.config.HF_HUB_OFFLINE
        return stub.load()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: stub.reach())
    return stub


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "path, set_id",
    [("owner/name", "owner/name"), ("hub:owner/name", "owner/name"), ("hub:rotten_tomatoes", "rotten_tomatoes")],
)
def test_a_hub_set_is_loaded_by_its_id(hub, path, set_id):
    rows = list(read_rows(path, split="test", name="en"))
    assert hub.asked == [((set_id, "en"), {"split": "test"})]
    assert rows[1] == Row({"text": "good", "label": 1}, path, 2) and rows[1].where == f"{path}, row 2"
    assert label_names(path) == {0: "neg", 1: "pos"}


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "data/rows.jsonl", "./owner/name", "a/b/c", "~/rows", "C:\\rows", "C:/rows", "rows", "rows/"]
)
def test_what_looks_like_a_path_never_goes_to_a_hub(hub, path):
    assert "no such file" in refusal(SourceError, path)
    assert not hub.asked


def test_an_id_whose_first_part_is_a_folder_here_is_a_path(hub):
    write("data/rows.jsonl", lines(A))
    message = refusal(SourceError, "data/row")
    assert message.startswith("data/row: no such file or folder.\nThe folder holds: rows.jsonl.\n")
    assert message.endswith("write hub:data/row") and not hub.asked


def test_a_bare_name_is_told_how_to_be_written(hub):
    assert refusal(SourceError, "rotten_tomatoes").endswith("write hub:rotten_tomatoes") and not hub.asked


def test_without_a_network_one_message_comes_at_once_and_says_how_to_go_on(hub):
    hub.reach = failing(OSError("Name or service not known"))
    hub.load = failing(ConnectionError("OfflineModeIsEnabled"))
    with pytest.raises(SourceError) as caught:
        read_rows("owner/name")  # before the first row is asked for
    message = str(caught.value)
    assert message.startswith(
        "owner/name cannot be loaded: ConnectionError: the hub cannot be reached (Name or service not known)\n"
    )
    assert "No file or folder here has this name" in message
    assert "hf download --repo-type dataset owner/name" in message
    assert "HF_ENDPOINT" in message and "modelscope:owner/name" in message
    assert hub.offline and len(hub.asked) == 1  # no half a minute of retries


def test_without_a_network_what_was_fetched_before_is_read_and_nothing_stays_switched(hub):
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    hub.reach = failing(OSError("no route"))
    assert len(fields("owner/name")) == 2
    assert datasets.config.HF_HUB_OFFLINE == before


def test_an_unknown_split_of_a_hub_set_is_told(hub):
    hub.load = failing(ValueError('Unknown split "tset". Should be one of [\'train\', \'test\'].'))
    message = refusal(SourceError, "hub:owner/name", split="tset")
    assert "Should be one of ['train', 'test']" in message and "Name one of those in the message." in message


def test_a_hub_set_that_is_not_there_or_private_is_told(hub):
    from datasets.exceptions import DatasetNotFoundError

    hub.load = failing(DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."))
    message = refusal(SourceError, "owner/name")
    assert "doesn't exist on the Hub" in message and "hf auth login" in message


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_modelscope_set_is_loaded_by_its_id(monkeypatch, wrapped):
    rows, asked = [{"text": "a"}, {"text": "b"}], []

    def load(set_id, **options):
        asked.append((set_id, options))
        return types.SimpleNamespace(ds_instance=rows) if wrapped else rows

    package, module = types.ModuleType("modelscope"), types.ModuleType("modelscope.msdatasets")
    package.msdatasets, module.MsDataset = module, types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    assert list(read_rows("modelscope:owner/name", split="test", name="zh")) == [
        Row({"text": "a"}, "modelscope:owner/name", 1),
        Row({"text": "b"}, "modelscope:owner/name", 2),
    ]
    assert asked == [("owner/name", {"subset_name": "zh", "split": "test"})]
    assert label_names("modelscope:owner/name") is None


@pytest.mark.parametrize(
    "path, module, extras",
    [("owner/name", "datasets", "datasets"), ("modelscope:owner/name", "modelscope", "modelscope,datasets")],
)
def test_a_missing_client_is_told_with_its_command(monkeypatch, path, module, extras):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "modelscope.msdatasets", raising=False)
    message = refusal(SourceError, path)
    assert f"needs the package {module}" in message and f'pip install "weitiao[{extras}]"' in message
