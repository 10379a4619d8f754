"""Pressure: totals are read, what is missing is named, and stalls are awaited."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from orchestra.host.observe.pressure import RESOURCES, Pressure, Trigger, open_triggers, path_of

PSI = Path("/proc/pressure/cpu")
SOME = "some avg10=1.53 avg60=0.87 avg300=0.73 total=1234567\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"

needs_psi = pytest.mark.skipif(not os.access(PSI, os.W_OK), reason=f"{PSI} is not there, or may not be written")


def test_the_total_is_that_of_some(tmp_path):
    path = tmp_path / "cpu"
    path.write_text(SOME)
    pressure = Pressure({"cpu_pressure": path})
    try:
        assert pressure.read() == {"cpu_pressure": 1234567}
        assert pressure.absent == {}
        path.write_text(SOME.replace("1234567", "2000000"))
        assert pressure.read() == {"cpu_pressure": 2000000}
    finally:
        pressure.close()


def test_what_is_missing_is_absent_with_the_reason_and_never_zero(tmp_path):
    garbled = tmp_path / "io"
    garbled.write_text("nonsense\n")
    pressure = Pressure({"cpu_pressure": tmp_path / "nowhere", "io_pressure": garbled})
    try:
        assert pressure.read() == {}
        assert "CONFIG_PSI" in pressure.absent["cpu_pressure"]
        assert str(garbled) in pressure.absent["io_pressure"]
    finally:
        pressure.close()


def test_one_that_goes_away_is_absent_from_then_on(tmp_path):
    path = tmp_path / "cpu"
    path.write_text(SOME)
    pressure = Pressure({"cpu_pressure": path})
    try:
        path.write_text("")
        assert pressure.read() == {}
        assert set(pressure.absent) == {"cpu_pressure"}
    finally:
        pressure.close()


def test_closing_leaves_no_descriptor(tmp_path):
    path = tmp_path / "cpu"
    path.write_text(SOME)
    before = os.listdir("/proc/self/fd")
    pressure = Pressure({"cpu_pressure": path})
    pressure.close()
    pressure.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_cgroups_files_have_the_kernels_names():
    assert path_of("memory_pressure") == Path("/proc/pressure/memory")
    assert path_of("io_pressure", Path("/sys/fs/cgroup/acme")) == Path("/sys/fs/cgroup/acme/io.pressure")


@needs_psi
def test_this_hosts_totals_only_grow():
    pressure = Pressure({signal: path_of(signal) for signal in RESOURCES})
    try:
        first, second = pressure.read(), pressure.read()
        assert set(first) | set(pressure.absent) == set(RESOURCES)
        assert all(second[signal] >= total for signal, total in first.items())
    finally:
        pressure.close()


@pytest.fixture
def crowd() -> Iterator[None]:
    """More who want a CPU than there are."""
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for process in busy:
        process.kill()
        process.wait()


@needs_psi
async def test_a_trigger_fires_when_tasks_wait_for_a_cpu(crowd):
    trigger = Trigger("cpu_pressure", PSI, stall=0.05)
    try:
        for _ in range(2):
            with trio.fail_after(20):  # a window is two seconds where we are not privileged
                await trigger.wait()
    finally:
        trigger.close()


def test_triggers_that_cant_be_had_say_why(tmp_path):
    triggers, problem = open_triggers({"cpu_pressure": tmp_path / "nowhere"})
    assert triggers == []
    assert "CONFIG_PSI" in problem


async def test_a_trigger_whose_cgroup_is_gone_says_so(tmp_path, monkeypatch):
    """The kernel tells it by EPOLLERR; a pipe without a reader does so too."""
    fifo = tmp_path / "cpu.pressure"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    real = os.open

    def open_for_writing(path: object, flags: int, *rest: object) -> int:
        return real(path, os.O_WRONLY | os.O_NONBLOCK if path == fifo else flags, *rest)

    monkeypatch.setattr(os, "open", open_for_writing)
    trigger = Trigger("cpu_pressure", fifo)
    try:
        assert os.read(reader, 100) == b"some 150000 1000000\0"
        os.close(reader)
        with trio.fail_after(10), pytest.raises(OSError, match="is gone"):
            await trigger.wait()
    finally:
        trigger.close()
