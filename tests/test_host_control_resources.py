"""Isolated threads are moved to the resctrl control group and back, on directories that are laid out like resctrl's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestra as orc
from conftest import Stage
from orchestra.host.control.placement import Quarantine
from orchestra.host.control.resources import ControlGroup

ALLOWED = frozenset(os.sched_getaffinity(0))


@pytest.fixture
def mount(tmp_path) -> Path:
    """resctrl with a control group "noisy"."""
    for folder in (tmp_path, tmp_path / "noisy"):
        (folder / "mon_groups").mkdir(parents=True)
        (folder / "tasks").write_text("")
        (folder / "schemata").write_text("L3:0=ff\n")
        (folder / "mode").write_text("shareable\n")
    (tmp_path / "info").mkdir()
    (tmp_path / "info/last_cmd_status").write_text("ok\n")
    return tmp_path


def tasks(folder: Path) -> str:
    return (folder / "tasks").read_text()


def refuse(mount: Path, why: str) -> None:
    """From now on nothing can be written to the group's tasks."""
    (mount / "noisy/tasks").unlink()
    (mount / "noisy/tasks").mkdir()
    (mount / "info/last_cmd_status").write_text(f"{why}\n")


def test_threads_are_moved_in_and_out(mount):
    group = ControlGroup(mount / "noisy")
    group.admit([11])
    assert (tasks(mount / "noisy"), tasks(mount)) == ("11\n", "")
    group.release([11])
    assert tasks(mount) == "11\n"


def test_they_go_back_to_the_group_that_the_process_is_in(mount):
    home = mount / "vms"
    home.mkdir()
    (home / "tasks").write_text("")
    ControlGroup(mount / "noisy", home).release([11])
    assert (tasks(home), tasks(mount)) == ("11\n", "")


def test_what_the_kernel_refuses_says_why_and_moves_back_what_was_moved(mount):
    def threads() -> Iterator[int]:
        yield 11
        refuse(mount, "Can't move task")
        yield 12

    with pytest.raises(orc.ResourceLimit, match=r"noisy/tasks: .* \(Can't move task\)"):
        ControlGroup(mount / "noisy").admit(threads())
    assert tasks(mount) == "11\n"
    (mount / "info/last_cmd_status").unlink()
    with pytest.raises(orc.ResourceLimit, match=r"directory$"):
        ControlGroup(mount / "noisy").admit([12])


def test_a_thread_that_has_ended_is_left_out(mount, monkeypatch):
    group = ControlGroup(mount / "noisy")

    def gone(fd: int, data: bytes) -> int:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "write", gone)
    group.admit([11])


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (".", "no control group"),  # the root: that is where all threads are
        ("missing", r"`mount -t resctrl resctrl /sys/fs/resctrl`"),
        ("mon_groups", "no control group"),
        ("home", "this process is in it itself"),
        ("locked", "is pseudo-locked"),
    ],
)
def test_a_group_that_cant_be_is_refused(mount, folder, message):
    for name in ("home", "locked"):
        (mount / name).mkdir()
        for file, text in (("tasks", ""), ("schemata", ""), ("mode", "pseudo-locked\n")):
            (mount / name / file).write_text(text)
    with pytest.raises(orc.SpecError, match=message) as raised:
        ControlGroup(mount / folder, mount / "home")
    assert str(raised.value).startswith("quarantine_class=")


def test_a_group_that_may_not_be_written_is_refused(mount, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != mount / "noisy/tasks")
    with pytest.raises(orc.SpecError, match="may not write"):
        ControlGroup(mount / "noisy")


# ---- with the quarantine


needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="this process may run on one CPU only")


@needs_two
def test_isolation_is_cpus_and_group_and_the_counters_are_told(mount):
    told: list[tuple[int, bool]] = []
    own = threading.get_native_id()
    quarantine = Quarantine(frozenset([max(ALLOWED)]), ControlGroup(mount / "noisy"), lambda *moved: told.append(moved))
    try:
        quarantine.confine([own])
        assert os.sched_getaffinity(own) == {max(ALLOWED)}
        assert tasks(mount / "noisy") == f"{own}\n"
        quarantine.free([own])
        assert os.sched_getaffinity(own) == ALLOWED
        assert tasks(mount) == f"{own}\n"
        assert told == [(own, True), (own, False)]
        refuse(mount, "no")
        with pytest.raises(orc.ResourceLimit, match="no"):
            quarantine.confine([own])
        assert os.sched_getaffinity(own) == ALLOWED
        assert len(told) == 2
    finally:
        os.sched_setaffinity(own, ALLOWED)


def test_where_there_is_no_cpu_to_spare_the_group_is_enough(mount):
    own = threading.get_native_id()
    quarantine = Quarantine(frozenset(), ControlGroup(mount / "noisy"))
    quarantine.confine([own])
    quarantine.free([own])
    assert (tasks(mount / "noisy"), tasks(mount)) == (f"{own}\n", f"{own}\n")
    assert os.sched_getaffinity(own) == ALLOWED


@pytest.mark.kvm
async def test_a_guest_is_moved_and_what_cant_be_moved_is_an_outcome(mount, nothing_left):
    stage = Stage("kvm")
    async with stage.open(quarantine_class=str(mount / "noisy")) as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        tid = vm.guest.vcpus[0].tid
        assert (await fleet.apply(orc.Isolate(vm="guest"))).outcome == "done"
        assert tasks(mount / "noisy") == f"{tid}\n"
        assert (await fleet.apply(orc.Rejoin(vm="guest"))).outcome == "done"
        assert tasks(mount) == f"{tid}\n"
        refuse(mount, "Task pid outside namespace")
        failed = await fleet.apply(orc.Isolate(vm="guest"))
        assert failed.outcome == "failed"
        assert "Task pid outside namespace" in failed.error
        assert not vm.isolated


@pytest.mark.emulated
async def test_a_class_that_is_none_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(orc.SpecError, match="quarantine_class="):
        async with orc.open_fleet(backend="emulated", quarantine_class=tmp_path):
            pass
