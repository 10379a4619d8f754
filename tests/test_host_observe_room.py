"""How much memory there is for this process, by what the host and its cgroups say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from orchestra.host.files import Files
from orchestra.host.observe.room import Bound, MemoryRoom, memory_room

MEMINFO = "MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:  600 kB\nSwapTotal:  200 kB\n"
HOST = MemoryRoom(
    Bound(1200 << 10, "MemTotal and SwapTotal of /proc/meminfo"), Bound(600 << 10, "MemAvailable of /proc/meminfo")
)


@pytest.fixture
def host(tmp_path: Path):
    """A host of these files."""

    def make(files: dict[str, str | int]) -> MemoryRoom:
        for name, content in {"proc/meminfo": MEMINFO, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(content))
        return memory_room(Files(tmp_path))

    return make


V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": "29 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/a\n0::/\n",
    "proc/self/mountinfo": "30 1 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}


def test_without_cgroups_it_is_the_hosts(host):
    assert host({}) == HOST


def test_the_tightest_cgroup_above_counts_and_its_files_are_free(host):
    top, own = "sys/fs/cgroup/a", "sys/fs/cgroup/a/b"
    found = host({**V2, f"{own}/memory.max": "max", f"{top}/memory.max": 500 << 10, f"{top}/memory.current": 450 << 10})
    assert found == MemoryRoom(
        Bound(700 << 10, "memory.max of /sys/fs/cgroup/a"), Bound(50 << 10, "memory.max of /sys/fs/cgroup/a")
    )
    found = host({f"{top}/memory.stat": f"anon 1\ninactive_file {20 << 10}\nactive_file {10 << 10}\nfile 7\n"})
    assert found.free == Bound(80 << 10, "memory.max of /sys/fs/cgroup/a")
    found = host({f"{top}/memory.swap.max": 0, f"{own}/memory.max": 100 << 10, f"{own}/memory.current": 200 << 10})
    assert found.most == Bound(300 << 10, "memory.max of /sys/fs/cgroup/a/b")
    assert found.free == Bound(0, "memory.max of /sys/fs/cgroup/a/b")


def test_cgroups_of_version_1_count_too(host):
    folder = "sys/fs/cgroup/memory/a"
    assert host({**V1, f"{folder}/memory.limit_in_bytes": 9223372036854771712}) == HOST
    found = host({f"{folder}/memory.limit_in_bytes": 500 << 10, f"{folder}/memory.usage_in_bytes": 400 << 10})
    assert found.free == Bound(100 << 10, "memory.limit_in_bytes of /sys/fs/cgroup/memory/a")


def test_a_host_that_says_nothing_bounds_nothing(tmp_path):
    assert memory_room(Files(tmp_path)) == MemoryRoom(None, None)


def test_this_host_says_something():
    room = memory_room()
    assert room.most.size >= room.free.size > 0


@given(st.text(alphabet="MemTotalAvib:\n 0123456789kB", max_size=200))
def test_whatever_the_files_hold_is_read(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("host")
    (root / "proc/self").mkdir(parents=True)
    for name in ("meminfo", "self/cgroup", "self/mountinfo"):
        (root / "proc" / name).write_text(text)
    memory_room(Files(root))
