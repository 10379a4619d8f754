"""The priority of a fleet's thread: who has it, who has not, and when it ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import struct
import threading

import pytest
import trio

import orchestra as orc
import orchestra.aio
from orchestra.host.control.priority import LoopPriority, end_priority
from orchestra.machine.workers import Workers
from orchestra.native import lib

pytestmark = pytest.mark.skipif(not lib.orc_slice(0), reason="this kernel has no slices to ask for (Linux 6.12)")
SHORT = 100_000
RAISED = -3
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_SCHED_SETATTR, SYS_SCHED_GETATTR = 314, 315  # x86-64
ATTR = struct.Struct("IIQiIQQQII")


def attributes(thread: int = 0) -> list[int]:
    """As the kernel has them: size, policy, flags, nice, priority, runtime, ..."""
    data = ctypes.create_string_buffer(ATTR.size)
    assert LIBC.syscall(SYS_SCHED_GETATTR, thread, data, ATTR.size, 0) == 0
    return list(ATTR.unpack(data.raw))


def ask(runtime: int) -> None:
    """Ask for a slice for this thread, as a user would."""
    wanted = attributes()
    wanted[2], wanted[5] = 0, runtime
    assert LIBC.syscall(SYS_SCHED_SETATTR, 0, ctypes.create_string_buffer(ATTR.pack(*wanted)), 0) == 0


def on_a_thread(function):
    """Call it on a new thread, whose slice is nobody else's, and return or raise what it does."""
    found: list[object] = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


DEFAULT = on_a_thread(lambda: lib.orc_slice(0))
SYS_CAPGET, SYS_CAPSET, CAPABILITY_VERSION_3 = 125, 126, 0x20080522


def drop_sys_nice() -> None:
    """This thread lacks CAP_SYS_NICE from here on: capabilities are a thread's own (capabilities(7))."""
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    assert LIBC.syscall(SYS_CAPGET, header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    words[0] &= ~(1 << lib.CAP_SYS_NICE)
    assert LIBC.syscall(SYS_CAPSET, header, struct.pack("6I", *words)) == 0


def may_raise() -> bool:
    """Whether this process may lower a thread's nice value."""

    def run() -> bool:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), RAISED)
        except PermissionError:
            return False
        return True

    return on_a_thread(run)


NICE = RAISED if may_raise() else 0
privileged = pytest.mark.skipif(not NICE, reason="takes CAP_SYS_NICE, or RLIMIT_NICE of 23")


def nice(thread: int = 0) -> int:
    return attributes(thread)[3]


def spinning(name: str = "vm", **more: object) -> orc.VmSpec:
    return orc.VmSpec(name=name, memory=orc.MiB, boot=orc.FlatImage(code=b"\xeb\xfe"), **more)  # type: ignore[arg-type]


def threads() -> set[int]:
    return {int(thread) for thread in os.listdir("/proc/self/task")}


THREADED = [
    pytest.param("kvm", marks=pytest.mark.kvm),
    pytest.param("emulated", marks=pytest.mark.emulated),
]


@pytest.mark.parametrize("backend", THREADED)
async def test_a_fleet_has_a_short_slice_and_its_other_threads_have_the_default(backend):
    before, known = attributes(), threads()
    async with orc.open_fleet(backend=backend, bus_locks="off") as fleet:
        assert lib.orc_slice(0) == SHORT
        assert nice() == NICE
        assert attributes()[1] == before[1]  # the policy is as it was
        vm = await fleet.launch(spinning())
        vm.cap_cpu(0.5)  # makes the capper
        assert len(threads() - known) >= 2
        with trio.fail_after(20):
            # A thread sets its own slice, soon after it has begun.
            while {lib.orc_slice(thread) for thread in threads() - known} - {DEFAULT, 0}:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert {nice(thread) for thread in threads() - known} == {0}
    assert attributes() == before


@pytest.mark.kvm
async def test_the_last_of_several_fleets_on_a_thread_ends_the_priority():
    first, second = orc.open_fleet(bus_locks="off"), orc.open_fleet(bus_locks="off")
    seen = []
    opened = [trio.Event(), trio.Event()]
    close = [trio.Event(), trio.Event()]
    closed = [trio.Event(), trio.Event()]

    async def keep(number: int, fleet) -> None:
        async with fleet:
            opened[number].set()
            await close[number].wait()
        closed[number].set()

    async with trio.open_nursery() as nursery:
        for number, fleet in enumerate((first, second)):
            nursery.start_soon(keep, number, fleet)
            await opened[number].wait()
        close[0].set()  # the one that came first, so that it is no matter of nesting
        await closed[0].wait()
        seen.append((lib.orc_slice(0), nice()))
        close[1].set()
    seen.append((lib.orc_slice(0), nice()))
    assert seen == [(SHORT, NICE), (DEFAULT, 0)]


async def test_a_fleet_in_virtual_time_leaves_the_thread_alone(autojump_clock):
    async with orc.open_fleet(backend="scripted", bus_locks="off"):
        assert (lib.orc_slice(0), nice()) == (DEFAULT, 0)


@pytest.mark.kvm
@pytest.mark.parametrize("thread", [False, True])
def test_from_asyncio_the_thread_of_trio_has_the_slice(thread):
    async def main() -> tuple[int, set[int]]:
        async with orchestra.aio.open_fleet(bus_locks="off", thread=thread):
            return lib.orc_slice(0), {lib.orc_slice(one) for one in threads()}

    here, all_threads = asyncio.run(main())
    assert here == (DEFAULT if thread else SHORT)
    assert SHORT in all_threads
    assert lib.orc_slice(0) == DEFAULT


def test_a_slice_that_somebody_chose_is_left_alone():
    def run() -> tuple[int, int]:
        ask(5_000_000)
        priority = LoopPriority()
        priority.acquire()
        within = lib.orc_slice(0)
        priority.release()
        return within, lib.orc_slice(0)

    assert on_a_thread(run) == (5_000_000, 5_000_000)


def test_a_thread_with_another_policy_is_left_alone():
    def run() -> tuple[list[int], list[int]]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        before = attributes()
        priority = LoopPriority()
        priority.acquire()
        within = attributes()
        priority.release()
        return before, within

    before, within = on_a_thread(run)
    assert within == before


def test_a_nice_value_that_somebody_chose_is_left_alone():
    def run() -> tuple[list[int], list[int]]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        priority = LoopPriority()
        priority.acquire()
        within = attributes()
        priority.release()
        return within, attributes()

    within, after = on_a_thread(run)
    assert (within[3], within[5]) == (7, SHORT)
    assert (after[3], after[5]) == (7, DEFAULT)


@privileged
def test_of_a_slice_that_somebody_chose_and_a_nice_value_of_ours_only_ours_ends():
    def run() -> tuple[list[int], list[int]]:
        ask(SHORT)
        priority = LoopPriority()
        priority.acquire()
        within = attributes()
        priority.release()
        return within, attributes()

    within, after = on_a_thread(run)
    assert (within[3], within[5]) == (RAISED, SHORT)
    assert (after[3], after[5]) == (0, SHORT)


@privileged
def test_what_starts_from_a_thread_with_the_priority_has_none_of_it():
    def run() -> tuple[list[int], list[int], list[int]]:
        before = attributes()
        priority = LoopPriority()
        priority.acquire()
        child = on_a_thread(attributes)
        priority.release()
        return before, child, attributes()

    before, child, after = on_a_thread(run)
    assert before == child == after


@privileged
def test_a_thread_that_is_allowed_it_by_a_limit_alone_loses_all_but_a_flag():
    def run() -> tuple[int, int, int, int]:
        drop_sys_nice()
        priority = LoopPriority()
        priority.acquire()
        refused = nice()
        priority.release()
        resource.setrlimit(resource.RLIMIT_NICE, (20 - RAISED, hard))
        priority.acquire()
        allowed = nice()
        priority.release()
        return refused, allowed, nice(), lib.orc_slice(0)

    soft, hard = resource.getrlimit(resource.RLIMIT_NICE)
    if soft >= 20 - RAISED:
        pytest.skip("RLIMIT_NICE allows it already")
    if 0 <= hard < 20 - RAISED:
        try:
            resource.setrlimit(resource.RLIMIT_NICE, (soft, 20 - RAISED))
        except ValueError:
            pytest.skip("takes CAP_SYS_RESOURCE, to raise the hard limit")
        hard = 20 - RAISED
    try:
        assert on_a_thread(run) == (0, RAISED, 0, DEFAULT)
    finally:
        resource.setrlimit(resource.RLIMIT_NICE, (soft, hard))


def test_a_thread_without_the_privilege_inherits_the_slice_until_it_ends_it():
    def child() -> tuple[int, int]:
        inherited = lib.orc_slice(0)
        end_priority()
        return inherited, lib.orc_slice(0)

    def run() -> tuple[int, int]:
        drop_sys_nice()
        LoopPriority().acquire()
        return on_a_thread(child)

    assert on_a_thread(run) == (SHORT, DEFAULT)


async def test_work_on_a_worker_thread_has_the_default():
    priority = LoopPriority()
    priority.acquire()
    try:
        workers = Workers(threaded=True)
        assert await workers.run(lambda: lib.orc_slice(0), workers.setup) == DEFAULT
    finally:
        priority.release()
