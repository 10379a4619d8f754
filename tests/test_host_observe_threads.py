"""CPU time and run-queue delay of threads."""

from __future__ import annotations

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


def test_here_both_are_told_or_the_reason_is():
    times = ThreadTimes()
    own = threading.get_native_id()
    assert times.cpu(own) > 0
    assert (times.run_delay(own) is None) == bool(times.absent)
