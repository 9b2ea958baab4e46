"""GPUs by name: how much they hold and how fast they are, for a plan that is made where no GPU is.

    "rtx4090", "h100", "a100-40", "NVIDIA GeForce RTX 4090"  ──  DEVICES  ──  Device
    "24GB", "24 GiB"                                         ──  a Device of which the memory alone is known

Speeds are the makers' own, dense (no sparsity), with sums in float32, at the boost clock: what no run reaches. GeForce cards halve
their half-precision rate when they sum in float32, which training does; the larger number on the box is for sums in float16.
"""

from __future__ import annotations

import difflib
import functools
import re
import textwrap
from dataclasses import dataclass

from weitiao.errors import SettingError

GIB = 2**30
# Of a card's nominal memory, what is left once the driver has taken its part: the least in the table, but for cards that spend
# some on error correction.
LEFT_BY_DRIVER = 0.95


@dataclass(frozen=True)
class Device:
    """One kind of GPU; a speed is None where only the memory is known.

    name: as people say it; an empty one: a size.
    nominal: GiB on the box. memory: bytes that PyTorch can have, its `total_memory`; the CUDA context comes out of these still.
    half, single: TFLOP/s of matrix products in bf16 or fp16, and in fp32 with TF32 off.
    bandwidth: GB/s between the chip and its memory.
    bf16: whether the hardware multiplies bf16; without it, half precision is fp16.
    source: the data sheet that the speeds are from.
    """

    name: str
    nominal: float
    memory: int
    half: float | None = None
    single: float | None = None
    bandwidth: float | None = None
    bf16: bool = True
    source: str = ""

    def __str__(self) -> str:
        return self.name or f"a GPU of {self.nominal:g} GB"


TURING = "NVIDIA Turing GPU architecture, appendix"
AMPERE = "NVIDIA Ampere GA102 GPU architecture, appendix"
ADA = "NVIDIA Ada GPU architecture, appendix"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture, appendix"
# By the appendices' own ratio where an appendix leaves the card out.
CORES = "maker's specification: cores x boost clock x 2; products in half precision at twice that"
SHEET = "{} data sheet"

# name; GiB nominal, GiB that PyTorch reports (of driver versions the least seen); TFLOP/s half, single; GB/s; bf16; source.
_TABLE = (
    ("T4", 16, 14.56, 65.0, 8.1, 320, False, SHEET),
    ("P100", 16, 15.89, 9.3, 9.3, 732, False, SHEET),  # no tensor cores: fp16 summed in float32 is no faster
    ("V100 16GB", 16, 15.77, 125.0, 15.7, 900, False, SHEET),
    ("V100 32GB", 32, 31.73, 125.0, 15.7, 900, False, SHEET),
    ("GTX 1080 Ti", 11, 10.90, 11.3, 11.3, 484, False, CORES),  # no tensor cores
    ("RTX 2080 Ti", 11, 10.57, 53.8, 13.4, 616, False, TURING),
    ("RTX 3060 12GB", 12, 11.62, 25.5, 12.7, 360, True, CORES),
    ("RTX 3060 Ti", 8, 7.63, 32.4, 16.2, 448, True, CORES),
    ("RTX 3070", 8, 7.63, 40.6, 20.3, 448, True, AMPERE),
    ("RTX 3080 10GB", 10, 9.64, 59.5, 29.8, 760, True, AMPERE),
    ("RTX 3080 Ti", 12, 11.62, 68.2, 34.1, 912, True, CORES),
    ("RTX 3090", 24, 23.55, 71.0, 35.6, 936, True, AMPERE),
    ("RTX 3090 Ti", 24, 23.55, 80.0, 40.0, 1008, True, CORES),
    ("RTX 4060", 8, 7.62, 30.2, 15.1, 272, True, CORES),
    ("RTX 4060 Ti 8GB", 8, 7.62, 44.1, 22.1, 288, True, CORES),
    ("RTX 4060 Ti 16GB", 16, 15.57, 44.1, 22.1, 288, True, CORES),
    ("RTX 4070", 12, 11.60, 58.3, 29.1, 504, True, CORES),
    ("RTX 4070 SUPER", 12, 11.60, 70.9, 35.5, 504, True, CORES),
    ("RTX 4070 Ti SUPER", 16, 15.57, 88.2, 44.1, 672, True, CORES),
    ("RTX 4080", 16, 15.57, 97.5, 48.7, 717, True, ADA),
    ("RTX 4080 SUPER", 16, 15.57, 104.4, 52.2, 736, True, CORES),
    ("RTX 4090", 24, 23.50, 165.2, 82.6, 1008, True, ADA),
    ("RTX 4090 D", 24, 23.50, 147.1, 73.5, 1008, True, CORES),
    ("RTX 5060 Ti 16GB", 16, 15.47, 47.4, 23.7, 448, True, CORES),
    ("RTX 5070", 12, 11.49, 61.7, 30.9, 672, True, BLACKWELL),
    ("RTX 5070 Ti", 16, 15.47, 87.9, 43.9, 896, True, BLACKWELL),
    ("RTX 5080", 16, 15.47, 112.6, 56.3, 960, True, BLACKWELL),
    ("RTX 5090", 32, 31.36, 209.5, 104.8, 1792, True, BLACKWELL),
    ("RTX PRO 6000 Blackwell", 96, 94.97, 503.8, 126.0, 1792, True, "NVIDIA RTX Blackwell PRO GPU architecture, appendix"),
    ("RTX A4000", 16, 15.60, 76.7, 19.2, 448, True, SHEET),
    ("RTX A5000", 24, 23.54, 111.1, 27.8, 768, True, SHEET),
    ("RTX A6000", 48, 47.41, 154.8, 38.7, 768, True, SHEET),
    ("RTX 6000 Ada", 48, 47.38, 364.2, 91.1, 960, True, SHEET),
    ("A10", 24, 22.05, 125.0, 31.2, 600, True, SHEET),
    ("A10G", 24, 22.05, 70.0, 31.5, 600, True, SHEET),
    ("A30", 24, 23.50, 165.0, 10.3, 933, True, SHEET),
    ("A40", 48, 44.34, 149.7, 37.4, 696, True, SHEET),
    ("L4", 24, 22.03, 121.0, 30.3, 300, True, SHEET),
    ("L40S", 48, 44.34, 362.0, 91.6, 864, True, SHEET),
    ("A100 40GB", 40, 39.38, 312.0, 19.5, 1555, True, SHEET),
    ("A100 80GB", 80, 79.14, 312.0, 19.5, 1935, True, SHEET),  # the PCIe card's bandwidth; SXM: 2039
    ("A800 80GB", 80, 79.14, 312.0, 19.5, 1935, True, SHEET),
    ("H100 SXM", 80, 79.10, 989.0, 67.0, 3350, True, SHEET),
    ("H100 PCIe", 80, 79.10, 756.0, 51.0, 2000, True, SHEET),
    ("H800", 80, 79.10, 989.0, 67.0, 3350, True, SHEET),
    ("H20", 96, 95.00, 148.0, 44.0, 4000, True, SHEET),
    ("H200", 141, 139.72, 989.0, 67.0, 4800, True, SHEET),
    ("B200", 180, 178.35, 2250.0, 75.0, 7700, True, SHEET),
    ("MI300X", 192, 191.50, 1307.4, 163.4, 5300, True, "AMD Instinct {} data sheet"),
)
DEVICES: dict[str, Device] = {
    name: Device(name, nominal, int(usable * GIB), half, single, bandwidth, bf16, source.format(name))
    for name, nominal, usable, half, single, bandwidth, bf16, source in _TABLE
}
# What is meant where a name fits several: the one that is met most.
ALIASES = {
    "V100": "V100 16GB", "A100": "A100 80GB", "A800": "A800 80GB", "H100": "H100 SXM",
    "RTX 3060": "RTX 3060 12GB", "RTX 3080": "RTX 3080 10GB", "RTX 4060 Ti": "RTX 4060 Ti 16GB", "RTX 5060 Ti": "RTX 5060 Ti 16GB",
}


def device_named(text: str) -> Device:
    """The GPU that a person or a driver calls `text`: case, blanks, dashes, the maker's name and RTX may be left out.

    A size alone ("24GB") is a card sold with so much memory: the driver's part is taken off, as it is off a card that is named.

    Raises:
        SettingError: no GPU of the table is called that, and it is no size.
    """
    known = _by_plain_name()
    if found := known.get(_plain(text)) or known.get(_plain(text, FORMS)):
        return found
    if SIZE.fullmatch(text.strip()):
        size = parse_bytes(text)
        return Device("", size / GIB, int(LEFT_BY_DRIVER * size))
    known = textwrap.fill(", ".join(name.replace(" ", "\xa0") for name in DEVICES), 90, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    raise SettingError(f"{text!r} is no GPU that is known.", "Expected its memory, such as 24GB, or one of\n" + known.replace("\xa0", " "),
                       _nearest(text) or "Give its memory instead.")


def parse_bytes(text: str) -> int:
    """8GB -> 8 * 2**30. Memory is sold in powers of two that are called GB, so GB, GiB and G are one unit here; so with M and T.

    Raises:
        SettingError: it is no size, or none that is more than 0.
    """
    found = SIZE.fullmatch(text.strip())
    size = int(float(found["number"]) * UNITS[found["unit"].upper()]) if found else 0
    if size <= 0:
        raise SettingError(f"{text!r} is no size of memory.", "Expected a number above 0 and its unit, such as 8GB, 24GiB or 512MB.",
                           _with_unit(text) or "Write it with its unit.")
    return size


SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[MGT])(i?B)?", re.IGNORECASE)
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


def _with_unit(text: str) -> str:
    number = text.strip()
    return f"Did you mean '{number}GB'?" if number.isdigit() and 0 < int(number) < 1000 else ""


# Words that tell no card from another (the G of 40G, but not that of A10G), and those that tell only some.
NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|amd|instinct|generation|[rg]tx|hbm\d?e?|(?<=\d)\s*gi?b(?![a-z])|(?<=[ -]\d\d)g(?![a-z])|[^a-z0-9]"
)
FORMS = re.compile(r"sxm\d?|pcie|workstation|server|edition")


def _plain(name: str, also: re.Pattern[str] | None = None) -> str:
    """NVIDIA GeForce RTX 4090 -> 4090, A100-SXM4-80GB -> a100sxm480 or, without its form, a10080."""
    name = name.lower()
    return NOISE.sub("", also.sub("", name) if also else name)


@functools.cache
def _by_plain_name() -> dict[str, Device]:
    """Each card by its name, and by its name with its memory; an alias before either."""
    named = {_plain(name): device for name, device in DEVICES.items()}
    with_size = {f"{_plain(name, FORMS)}{device.nominal:g}": device for name, device in reversed(DEVICES.items())}
    aliases = {_plain(alias): DEVICES[name] for alias, name in ALIASES.items()}
    return with_size | named | aliases


def _nearest(text: str) -> str:
    if hint := _with_unit(text):
        return hint
    known = _by_plain_name()
    close = difflib.get_close_matches(_plain(text, FORMS), known, n=1, cutoff=0.6)
    return f"Did you mean {known[close[0]].name!r}?" if close else ""
