"""CPU time and run-queue delay of threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from orchestra.host.observe import ThreadTimes


def test_a_thread_that_ran_is_told_from_one_that_sleeps():
    stop, go, done, ready = threading.Event(), threading.Event(), threading.Event(), []

    def sleep() -> None:
        ready.append(threading.get_native_id())
        stop.wait()

    def work() -> None:
        ready.append(threading.get_native_id())
        go.wait()
        end = time.thread_time_ns() + 20_000_000
        while time.thread_time_ns() < end:
            pass
        done.set()
        stop.wait()

    threads = []
    for target in (sleep, work):
        threads.append(threading.Thread(target=target))
        threads[-1].start()
        while len(ready) < len(threads):
            time.sleep(0)
    times = ThreadTimes()
    try:
        while True:  # until it sleeps for good
            before = [times.cpu(tid) for tid in ready]
            time.sleep(0.01)
            if before == [times.cpu(tid) for tid in ready]:
                break
        go.set()
        assert done.wait(30)
        asleep, worked = (times.cpu(tid) - was for tid, was in zip(ready, before, strict=True))
        assert asleep == 0
        assert worked >= 20_000_000
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    while Path(f"/proc/self/task/{ready[0]}").exists():  # Python is done with it before the kernel is
        time.sleep(0)
    assert times.cpu(ready[0]) is None  # it is gone
    assert times.run_delay(ready[0]) is None


def test_a_kernel_without_schedstat_is_named_and_not_taken_for_one_without_delay(tmp_path):
    own = threading.get_native_id()
    folder: Path = tmp_path / str(own)
    folder.mkdir()
    (folder / "schedstat").write_text("0 0 0\n")
    times = ThreadTimes(tmp_path)
    assert "CONFIG_SCHED_INFO" in times.absent["run_delay"]
    assert times.run_delay(own) is None
    assert times.cpu(own) > 0
    (folder / "schedstat").write_text("500 70 3\n")
    assert ThreadTimes(tmp_path).run_delay(own) == 70
    assert "can't be read" in ThreadTimes(tmp_path / "nowhere").absent["run_delay"]


def test_files_are_kept_open_for_so_many_threads_and_no_longer_than_they_are_needed(tmp_path, monkeypatch):
    def open_files() -> int:
        return sum(str(tmp_path) in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    monkeypatch.setattr("orchestra.host.observe.threads.KEPT", 3)
    for tid in [threading.get_native_id(), *range(1, 6)]:
        (tmp_path / str(tid)).mkdir()
        (tmp_path / str(tid) / "schedstat").write_text(f"500 {70 + tid} 3\n")
    times = ThreadTimes(tmp_path)
    assert open_files() == 0
    for _ in range(2):
        assert [times.run_delay(tid) for tid in range(1, 6)] == [71, 72, 73, 74, 75]
        assert open_files() == 3
    times.forget(5)
    times.forget(5)
    assert open_files() == 2
    times.close()
    assert open_files() == 0


def test_a_thread_that_has_the_number_of_one_that_is_gone_is_told_for_itself():
    times, numbers = ThreadTimes(), []
    thread = threading.Thread(
        target=lambda: numbers.append((threading.get_native_id(), times.run_delay(threading.get_native_id())))
    )
    thread.start()
    thread.join()
    ((tid, _),) = numbers
    while Path(f"/proc/self/task/{tid}").exists():
        time.sleep(0)
    assert times.run_delay(tid) is None  # the file that was kept says nothing of whoever comes
    times.close()


def test_here_both_are_told_or_the_reason_is():
    times = ThreadTimes()
    own = threading.get_native_id()
    assert times.cpu(own) > 0
    assert (times.run_delay(own) is None) == bool(times.absent)
