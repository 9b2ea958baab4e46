"""GPUs by name, as people and drivers write them, and sizes of memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weitiao.errors import SettingError
from weitiao.screen import format_bytes
from weitiao.train.devices import ALIASES, DEVICES, GIB, device_named, parse_bytes


@pytest.mark.parametrize(("text", "name"), [
    ("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("4090D", "RTX 4090 D"), ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"), ("rtx 5090 32gb", "RTX 5090"), ("RTX 4060 8GB", "RTX 4060"),
    ("4060ti", "RTX 4060 Ti 16GB"), ("4060 Ti 8GB", "RTX 4060 Ti 8GB"), ("2080ti", "RTX 2080 Ti"), ("3060", "RTX 3060 12GB"),
    ("h100", "H100 SXM"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("h100-80g", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("a100", "A100 80GB"), ("a100-40", "A100 40GB"), ("A100 40G", "A100 40GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
    ("NVIDIA A100 80GB PCIe", "A100 80GB"), ("A100-PCIE-40GB", "A100 40GB"), ("Tesla V100-SXM2-32GB", "V100 32GB"), ("v100", "V100 16GB"),
    ("Tesla T4", "T4"), ("Tesla P100-PCIE-16GB", "P100"), ("NVIDIA A10G", "A10G"), ("a10", "A10"), ("NVIDIA L4", "L4"), ("l40s", "L40S"),
    ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("NVIDIA H20", "H20"), ("H20-96G", "H20"),
    ("H200 141GB", "H200"), ("b200", "B200"), ("AMD Instinct MI300X", "MI300X"),
])
def test_a_gpu_is_found_as_people_and_drivers_call_it(text, name):
    assert device_named(text) is DEVICES[name]


@pytest.mark.parametrize("name", DEVICES)
def test_every_gpu_of_the_table_is_found_by_its_name_and_with_its_memory(name):
    device = DEVICES[name]
    assert device_named(name) is device
    if name not in ("H100 PCIe", "RTX 4060 Ti 8GB"):  # so much memory has another, too
        assert device_named(f"{name.replace(f' {device.nominal}GB', '')} {device.nominal}GB") is device


@pytest.mark.parametrize("name", DEVICES)
def test_the_numbers_of_a_gpu_agree_with_each_other(name):
    device = DEVICES[name]
    assert 0.9 < device.memory / GIB / device.nominal < 1
    assert 1 <= device.half / device.single < 31
    assert 200 < device.bandwidth < 10_000
    assert device.bf16 or name in ("T4", "P100", "V100 16GB", "V100 32GB", "GTX 1080 Ti", "RTX 2080 Ti")
    assert device.source and "{" not in device.source


def test_geforce_sums_in_float32_at_half_its_rate():
    """Twice its fp32, where the workstation card of the same chip has four times."""
    assert DEVICES["RTX 3090"].half / DEVICES["RTX 3090"].single == pytest.approx(2, rel=0.01)
    assert DEVICES["RTX A6000"].half / DEVICES["RTX A6000"].single == pytest.approx(4, rel=0.01)


def test_aliases_lead_to_gpus_of_the_table():
    assert set(ALIASES.values()) <= DEVICES.keys()
    assert not ALIASES.keys() & DEVICES.keys()


@pytest.mark.parametrize(("text", "nearest"), [
    ("rtx 4091", "RTX 4090"), ("h101", "H100 SXM"), ("4o90", "RTX 4090"), ("RTX A600", "RTX A6000"),
])
def test_an_unknown_gpu_is_refused_with_the_nearest(text, nearest):
    with pytest.raises(SettingError) as refused:
        device_named(text)
    assert refused.value.next_step == f"Did you mean {nearest!r}?"
    assert "RTX 4090" in refused.value.expected and "24GB" in refused.value.expected


@pytest.mark.parametrize(("text", "cure"), [
    ("potato", "Give its memory instead."), ("80", "Did you mean '80GB'?"), ("", "Give its memory instead."),
    ("GB", "Give its memory instead."),
])
def test_what_is_no_gpu_at_all_is_asked_for_its_memory(text, cure):
    with pytest.raises(SettingError) as refused:
        device_named(text)
    assert refused.value.next_step == cure


def test_a_size_alone_is_a_card_of_that_size_without_the_drivers_part():
    device = device_named("24GB")
    assert (device.nominal, device.half, device.single, device.bandwidth) == (24, None, None, None)
    assert device == device_named("24 GiB") == device_named("24g")
    assert str(device) == "a GPU of 24 GB"
    assert device.memory <= DEVICES["RTX 4090"].memory  # never more than a real one has
    assert device_named("8GB").memory <= DEVICES["RTX 4060"].memory


@pytest.mark.parametrize(("text", "size"), [
    ("8GB", 8 * 2**30), ("8 GiB", 8 * 2**30), ("8g", 8 * 2**30), ("1.5GB", 3 * 2**29), ("512MB", 2**29), ("2T", 2**41),
    (" 24GB ", 24 * 2**30),
])
def test_a_size_counts_in_powers_of_two(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "cure"), [
    ("8", "Did you mean '8GB'?"), ("0GB", "Write it with its unit."), ("", "Write it with its unit."), ("-8GB", "Write it with its unit."),
    ("8 apples", "Write it with its unit."),
])
def test_what_is_no_size_is_refused(text, cure):
    with pytest.raises(SettingError, match="is no size of memory") as refused:
        parse_bytes(text)
    assert refused.value.next_step == cure


@pytest.mark.parametrize(("count", "text"), [
    (0, "0.0 GiB"), (8 * 2**30, "8.0 GiB"), (12.34 * 2**30, "12.3 GiB"), (2**30 // 2, "0.5 GiB"), (45 * 2**20, "45 MiB"),
    (3 * 2**19, "1.5 MiB"), (2000 * 2**30, "2,000.0 GiB"),
])
def test_bytes_are_told_in_gib(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("text", ["8.0 GiB", "45 MiB"])
def test_what_is_told_is_read_back(text):
    assert format_bytes(parse_bytes(text)) == text


def test_devices_need_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, weitiao.train.devices; assert 'torch' not in sys.modules"], check=True)
