import subprocess
import sys

import psutil
import pytest

from weitiao.train import memory

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Make control groups: files by their folder, and the lines of /proc/self/cgroup."""
    monkeypatch.setattr(memory, "CONTROLS", tmp_path / "fs")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Free", (), {"available": 64 * GIB}))

    def make(lines, **files):
        (tmp_path / "cgroup").write_text("\n".join(lines) + "\n")
        for name, text in files.items():
            file = tmp_path / "fs" / name.replace("__", "/").replace("_of_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return make


def test_a_container_of_the_second_kind_limits_what_is_free(groups):
    groups(["0::/"], memory_of_max=str(4 * GIB), memory_of_current=str(3 * GIB), memory_of_stat=f"anon 1\ninactive_file {GIB}\n")
    assert memory.free("cpu") == 2 * GIB
    groups(["0::/"], memory_of_stat=f"anon 1\ninactive_file {GIB}\nactive_file {GIB // 2}\n")
    assert memory.free("cpu") == 2 * GIB + GIB // 2


def test_a_group_around_ours_limits_too(groups):
    groups(["0::/job/step"], job__step__memory_of_max="max", job__step__memory_of_current="1", job__step__memory_of_stat="inactive_file 0\n",
           job__memory_of_max=str(8 * GIB), job__memory_of_current=str(GIB), job__memory_of_stat="inactive_file 0\n")
    assert memory.free("cpu") == 7 * GIB


def test_a_container_of_the_first_kind_whose_path_is_the_hosts(groups):
    groups(["5:cpuset:/", "4:memory:/docker/abc"], memory__memory_of_limit_in_bytes=str(2 * GIB), memory__memory_of_usage_in_bytes=str(3 * GIB),
           memory__memory_of_stat=f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n")
    assert memory.free("cpu") == 0  # more is in use than may be


def test_without_limits_all_that_the_machine_has_is_free(groups):
    groups(["0::/"], memory_of_max="max", memory_of_current="1", memory_of_stat="")
    assert memory.free("cpu") == 64 * GIB


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_a_limited_address_space_is_told():
    code = """
import resource, psutil
from weitiao.train import memory
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 29),) * 2)
print(memory.free("cpu"))
"""
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 < found <= 1 << 29
