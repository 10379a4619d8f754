"""Isolated threads run on the quarantine CPUs and nowhere else, and come back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

import orchestra as orc
from orchestra.host.control.placement import Quarantine, quarantine_cpus

ALLOWED = frozenset(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(len(ALLOWED) < 2, reason="this process may run on one CPU only")


@pytest.fixture
def thread() -> Iterator[int]:
    """A thread that waits."""
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        done.wait()

    waiting = threading.Thread(target=wait)
    waiting.start()
    begun.wait()
    assert waiting.native_id is not None
    yield waiting.native_id
    done.set()
    waiting.join()


@needs_two
def test_a_confined_thread_runs_on_the_quarantine_cpus_and_is_freed_again(thread):
    quarantine = Quarantine(quarantine_cpus([min(ALLOWED)]))
    quarantine.confine([thread])
    assert os.sched_getaffinity(thread) == {min(ALLOWED)}
    assert os.sched_getaffinity(0) == ALLOWED
    quarantine.confine([thread])  # twice is as once
    quarantine.free([thread])
    assert os.sched_getaffinity(thread) == ALLOWED


@needs_two
def test_by_default_the_last_cpu_is_for_quarantine():
    assert quarantine_cpus(None) == {max(ALLOWED)}


def test_with_one_cpu_there_is_none_to_spare_and_it_says_so(monkeypatch, thread):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert quarantine_cpus(None) == frozenset()
    with pytest.raises(orc.ResourceLimit, match="none to spare"):
        Quarantine(frozenset()).confine([thread])


@needs_two
@pytest.mark.parametrize(
    ("cpus", "message"),
    [([], "numbers of CPUs"), (["0"], "numbers"), ([True], "numbers"), ([4095], "may run on"), (ALLOWED, "no CPU")],
)
def test_cpus_that_cant_be_are_refused(cpus, message):
    with pytest.raises(orc.SpecError, match=message):
        quarantine_cpus(cpus)


@needs_two
def test_a_host_that_refuses_moves_back_what_was_moved(monkeypatch, thread):
    real, calls = os.sched_setaffinity, []

    def refuse(pid: int, cpus: frozenset[int]) -> None:
        calls.append((pid, cpus))
        if pid == 1:
            raise PermissionError(1, "Operation not permitted")
        real(pid, cpus)

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pytest.raises(orc.ResourceLimit, match=r"cpuset"):
        Quarantine(frozenset([min(ALLOWED)])).confine([thread, 1])
    assert os.sched_getaffinity(thread) == ALLOWED


@needs_two
def test_a_thread_that_has_ended_is_no_error():
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    assert ended.native_id is not None
    Quarantine(frozenset([min(ALLOWED)])).confine([ended.native_id])
