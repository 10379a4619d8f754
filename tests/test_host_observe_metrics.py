"""The host probe, the cache counters, and what two readings of everything make."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import orchestra as orc
from orchestra.host.observe import HostReading, HostSignals
from orchestra.host.observe.probe import Probe
from orchestra.host.observe.resctrl import CacheCounters, Resctrl, home_group
from orchestra.native import ffi, lib

SILENT = "plays only"


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


# ---- the probe


def taken(probe: Probe, more: int) -> int:
    """Wait until it has taken so many."""
    deadline = time.monotonic() + 30
    while probe.take() < more:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return probe.take()


def test_a_probe_measures_both_and_leaves_no_thread():
    before = threads()
    probe = Probe(period=1_000_000)
    try:
        assert len(threads() - before) == 1
        count = taken(probe, 50)
        lock, memory = probe.medians(0, count)
        assert 0.5 < lock < 10_000
        assert memory > lock / 10
        assert probe.medians(count, count) is None
        assert probe.medians(count - 1, count) is not None
    finally:
        probe.close()
    assert threads() <= before
    assert probe.medians(0, probe.take()) is not None  # what was measured can still be asked for
    probe.close()


def test_a_probe_that_nobody_reads_keeps_going_and_forgets():
    room, buffer = 1024, ffi.new("struct orc_probe_sample[]", 4096)
    handle = lib.orc_probe_start(10_000, 4)
    try:
        # Nobody reads for longer each time, until the ring was full. A take drains what is there at one moment.
        unread, waiting = 0.05, 0
        while waiting < room:
            time.sleep(unread)
            waiting = lib.orc_probe_take(handle, buffer, len(buffer))
            assert waiting <= room
            unread *= 2
            assert unread < 60
        while not lib.orc_probe_take(handle, buffer, len(buffer)):  # and afterwards there are new ones
            time.sleep(0.001)
    finally:
        lib.orc_probe_stop(handle)


def test_no_thread_for_a_probe_is_an_error_that_names_the_limit(monkeypatch):
    class NoThread:
        orc_probe_start = staticmethod(lambda period, each: ffi.NULL)
        orc_probe_stop = lib.orc_probe_stop

    monkeypatch.setattr("orchestra.host.observe.probe.lib", NoThread)
    with pytest.raises(orc.ResourceLimit, match=r"pids\.max"):
        Probe()
    signals = HostSignals(probe=True)
    try:
        assert not signals.probed
        assert r"pids.max" in signals.absent["lock_ns"]
    finally:
        signals.close()


# ---- resctrl, as a tree of files


def tree(folder: Path, *files: str) -> Path:
    (folder / "mon_groups").mkdir()
    (folder / "schemata").write_text("L3:0=ff\n")
    for domain in ("00", "01"):
        data = folder / "mon_groups" / "ours" / "mon_data" / f"mon_L3_{domain}"
        data.mkdir(parents=True)
        for file in files:
            (data / file).write_text("1000\n")
    return folder


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Resctrl:
    """The kernel fills a group as it is made; here it is there already."""
    monkeypatch.setattr(Path, "mkdir", lambda *args, **more: None)
    return Resctrl(folder, "ours")


def test_occupancy_and_traffic_are_summed_over_the_caches(tmp_path, monkeypatch):
    resctrl = opened(tree(tmp_path, "llc_occupancy", "mbm_total_bytes", "mbm_local_bytes"), monkeypatch)
    assert resctrl.here
    assert resctrl.absent == {}
    assert resctrl.read() == CacheCounters(llc_bytes=2000, traffic=2000)
    resctrl.add(1234)
    assert (tmp_path / "mon_groups" / "ours" / "tasks").read_text() == "1234\n"
    (tmp_path / "mon_groups/ours/mon_data/mon_L3_01/llc_occupancy").write_text("Unavailable\n")
    assert resctrl.read() == CacheCounters(llc_bytes=None, traffic=2000)
    resctrl.close()
    assert resctrl.read() == CacheCounters()


def test_those_of_a_second_control_group_are_added(tmp_path, monkeypatch):
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for folder in (tmp_path, noisy):
        tree(folder, "llc_occupancy", "mbm_total_bytes")
    monkeypatch.setattr(Path, "mkdir", lambda *args, **more: None)
    resctrl = Resctrl(tmp_path, "ours", isolated=noisy)
    assert resctrl.read() == CacheCounters(llc_bytes=4000, traffic=4000)
    resctrl.add(1234, isolated=True)
    assert (noisy / "mon_groups/ours/tasks").read_text() == "1234\n"
    assert not (tmp_path / "mon_groups/ours/tasks").exists()


def test_if_isolated_threads_cant_be_counted_nothing_is(tmp_path):
    (tmp_path / "mon_groups").mkdir()
    resctrl = Resctrl(tmp_path, "ours", isolated=tmp_path / "noisy")
    assert "no monitoring group" in resctrl.absent["llc_bytes"]
    assert list((tmp_path / "mon_groups").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "group"),
    [("res:/\nmon:\n", ""), ("res:vms\nmon:one\n", "vms"), ("res:\nmon:\n", ""), ("", ""), (None, "")],
)
def test_the_control_group_of_this_process_is_where_the_kernel_says(tmp_path, text, group):
    if text is not None:
        (tmp_path / "groups").write_text(text)
    assert home_group(Path("/resctrl"), tmp_path / "groups") == Path("/resctrl") / group


def test_a_cpu_that_counts_one_of_them_only_says_so(tmp_path, monkeypatch):
    resctrl = opened(tree(tmp_path, "llc_occupancy"), monkeypatch)
    assert resctrl.read() == CacheCounters(llc_bytes=2000, traffic=None)
    assert resctrl.absent == {"memory_bandwidth": "resctrl: this CPU has no mbm_total_bytes"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "no resctrl"),
        (lambda folder: folder.mkdir(), "mount -t resctrl"),
        (lambda folder: (folder.mkdir(), (folder / "schemata").write_text("")), "does not monitor"),
        (lambda folder: (folder.mkdir(), (folder / "mon_groups").mkdir(), _take(folder)), "can't be|can be made"),
    ],
)
def test_a_host_without_it_is_told_apart_from_one_where_it_is_not_mounted(tmp_path, make, reason):
    make(tmp_path / "resctrl")
    resctrl = Resctrl(tmp_path / "resctrl", "ours")
    assert not resctrl.here
    assert set(resctrl.absent) == {"llc_bytes", "memory_bandwidth"}
    assert all(pytest.importorskip("re").search(reason, why) for why in resctrl.absent.values())
    resctrl.add(1)
    assert resctrl.read() == CacheCounters()
    resctrl.close()


def _take(folder: Path) -> None:
    (folder / "mon_groups" / "ours").mkdir()  # another has that name


# ---- all together


def test_what_is_seen_is_told_and_what_is_not_has_a_reason():
    signals = HostSignals(probe=True)
    try:
        since = signals.read()
        deadline = time.monotonic() + 30
        while (until := signals.read()).samples < since.samples + 5:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        facts = signals.facts(since, until, {"run_delay": "why not"})
    finally:
        signals.close()
    named = ("cpu_pressure", "memory_pressure", "io_pressure", "lock_ns", "memory_ns", "llc_bytes", "memory_bandwidth")
    assert facts.cpus == len(os.sched_getaffinity(0))
    assert facts.lock_ns > 0
    assert facts.memory_ns > 0
    for name in named:
        assert (getattr(facts, name) is None) == (name in facts.absent), name
    assert facts.absent["run_delay"] == "why not"


def test_pressure_is_the_part_of_the_time_between_two_readings(monkeypatch):
    signals = HostSignals()
    try:
        since = HostReading(1_000_000_000, {"cpu_pressure": 500_000, "io_pressure": 7}, 0, CacheCounters(None, 4_000))
        until = HostReading(
            3_000_000_000,
            {"cpu_pressure": 1_000_000, "io_pressure": 7, "memory_pressure": 5},
            0,
            CacheCounters(9, 24_000),
        )
        facts = signals.facts(since, until, {})
    finally:
        signals.close()
    assert facts.cpu_pressure == pytest.approx(0.25)
    assert facts.io_pressure == 0
    assert facts.memory_pressure is None  # there is one reading of it only
    assert (facts.llc_bytes, facts.memory_bandwidth) == (9, pytest.approx(10_000))


def test_without_a_probe_it_says_how_to_get_one():
    signals = HostSignals()
    try:
        facts = signals.facts(signals.read(), signals.read(), {})
        assert (facts.lock_ns, facts.memory_ns) == (None, None)
        assert "probe=True" in facts.absent["lock_ns"]
    finally:
        signals.close()


def test_a_fleet_that_plays_says_nothing_about_this_host():
    before = threads()
    signals = HostSignals(probe=True, silent=SILENT)
    facts = signals.facts(signals.read(), signals.read(), {})
    assert threads() <= before
    assert facts == orc.HostFacts(absent=facts.absent)
    assert set(facts.absent.values()) == {SILENT}
    assert {"cpu_pressure", "lock_ns", "llc_bytes"} <= set(facts.absent)
    assert signals.triggers(["cpu_pressure"]) == []
    signals.close()


def test_a_cgroups_pressure_is_told_instead_of_the_hosts(tmp_path):
    (tmp_path / "cpu.pressure").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=77\n")
    signals = HostSignals(cgroup=tmp_path)
    try:
        assert signals.read().pressure == {"cpu_pressure": 77}
        assert str(tmp_path / "io.pressure") in signals.absent["io_pressure"]
    finally:
        signals.close()
