"""Devices whose queues another process serves: a scripted back-end (good, hostile, silent) and qemu-storage-daemon."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
from hypothesis import HealthCheck, given, settings, strategies as st

import orchestra as orc
from orchestra.machine.devices.disk import open_store
from orchestra.machine.devices.vhost import device, frontend, lending
from orchestra.machine.devices.vhost.backend import BackEnd
from orchestra.machine.devices.vhost.frontend import FrontEnd, Vring
from orchestra.machine.devices.vhost.messages import HEADER, RamRegion, Request
from orchestra.machine.devices.vhost.qemu import PROGRAM, command_line, explain
from orchestra.model import virtio
from orchestra.native import lib
from orchestra.testing import DeviceRig
from rlimits import so_many_left
from vhost_kit import (
    BUS_MASTER,
    COMMAND,
    MEMORY_SPACE,
    NEEDS_RESET,
    STATUS,
    WRITE,
    DiskDriver,
    ScriptedBackEnd,
    children,
    descriptors,
    number,
    reply,
)

MiB = orc.MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blk.sock"


def rig_of(path: Path, **fields: Any) -> DeviceRig:
    return DeviceRig(orc.VhostUserDisk(str(path), **fields), memory=MiB)


def back_end(rig: DeviceRig) -> BackEnd:
    found = rig.back_end
    assert isinstance(found, BackEnd)
    return found


def threads() -> list[str]:
    """Those that speak to back-ends."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("orchestra ")]


def until(true: Any) -> None:
    """Wait for what a thread is about to do and does not tell."""
    for _ in range(60_000):
        if true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not happen")


# ---- a good back-end


def test_back_end_gets_memory_queues_and_eventfds_once_the_driver_is_ready(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        assert driver.sectors == 128
        driver.start()
        scripted.wait_for(Request.SET_STATUS)
        asked = [kind for kind, _, _ in scripted.payloads]
        assert asked[:6] == [3, 1, 15, 16, 17, 24]
        assert asked[6:] == [2, 5, 8, 10, 9, 13, 12, 18, 39]
        by_kind = {kind: (payload, fds) for kind, payload, fds in scripted.payloads}
        assert by_kind[Request.SET_MEM_TABLE] == (struct.pack("<IIQQQQ", 1, 0, 0, MiB, 0, 0), 1)
        assert by_kind[Request.SET_FEATURES] == (struct.pack("<Q", 1 << 32 | 1 << 30 | 1 << 9), 0)
        addresses = driver.descriptors, driver.used, driver.available
        assert struct.unpack("<IIQQQQ", by_kind[Request.SET_VRING_ADDR][0]) == (0, 0, *addresses, 0)
        memory = os.dup(scripted.fds[Request.SET_MEM_TABLE])
        rig.memory.write(0x5000, b"seen by both")
        assert os.pread(memory, 12, 0x5000) == b"seen by both"
        os.close(memory)
        os.eventfd_write(scripted.fds[Request.SET_VRING_CALL], 1)
        assert os.eventfd_read(rig.msis[1].fd) >= 1


def test_features_are_those_that_back_end_and_front_end_both_know(path: Path):
    with ScriptedBackEnd(path) as scripted:
        scripted.features |= 1 << 5 | 1 << 11 | 1 << 34 | 1 << 40  # RO; CONFIG_WCE, RING_PACKED, RING_RESET
        with rig_of(path) as rig:
            assert DiskDriver(rig).negotiate() == 1 << 32 | 1 << 9 | 1 << 5


def test_nothing_is_lent_before_the_guest_runs_and_while_it_is_paused(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        driver = DiskDriver(rig)
        driver.start()
        back_end(rig).wait()
        assert Request.SET_VRING_ENABLE not in scripted.seen
        back_end(rig).let_go("start")
        scripted.wait_for(Request.SET_STATUS)
        quiet = threading.Event()
        back_end(rig).hold("pause")
        back_end(rig).when_still(quiet.set)
        assert quiet.wait(60)
        assert scripted.seen[-2:] == [Request.GET_VRING_BASE, Request.SET_STATUS]
        back_end(rig).let_go("pause")
        scripted.wait_for(Request.SET_VRING_ENABLE, 2)
        assert scripted.seen.count(Request.SET_MEM_TABLE) == 1  # it is the same memory


def test_reset_of_the_driver_ends_when_the_back_end_has_stopped(path: Path):
    stopping, may = threading.Event(), threading.Event()

    def answer(_: ScriptedBackEnd, kind: int, payload: bytes) -> bytes | None:
        if kind == Request.GET_VRING_BASE:
            stopping.set()
            assert may.wait(60)
        return None

    with ScriptedBackEnd(path, answer) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        scripted.wait_for(Request.SET_STATUS)
        driver.reset()  # does not wait
        assert stopping.wait(60)
        assert driver.status
        may.set()
        until(lambda: not driver.status)
        driver.start()
        scripted.wait_for(Request.SET_VRING_ENABLE, 2)


def test_stop_waits_for_requests_that_the_back_end_finishes_after_its_answer(path: Path):
    def answer(scripted: ScriptedBackEnd, kind: int, payload: bytes) -> bytes | None:
        return reply(kind, struct.pack("<II", 0, 2)) if kind == Request.GET_VRING_BASE else None

    with ScriptedBackEnd(path, answer) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        scripted.wait_for(Request.SET_STATUS)
        quiet = threading.Event()
        back_end(rig).hold("pause")
        back_end(rig).when_still(quiet.set)
        scripted.wait_for(Request.SET_STATUS, 2)
        assert not quiet.wait(0.05)
        rig.memory.write(driver.used + 2, struct.pack("<H", 2))  # now the two are done
        assert quiet.wait(60)
        assert rig.device.state().queue[0].next == 2


def test_vector_that_moves_is_told_to_the_back_end(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        scripted.wait_for(Request.SET_STATUS)
        rig.write(26, 0xFFFF, 2)
        scripted.wait_for(Request.SET_VRING_CALL, 2)
        assert scripted.payloads[-1] == (Request.SET_VRING_CALL, struct.pack("<Q", 0x100), 0)


def test_device_goes_on_at_another_back_end_from_its_state(path: Path, tmp_path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        DiskDriver(rig).start()
        scripted.wait_for(Request.SET_STATUS)
        scripted.bases[0] = 0  # nothing was taken
        back_end(rig).hold("pause")
        back_end(rig).wait()
        state = rig.device.state()
    with ScriptedBackEnd(tmp_path / "b", sectors=128) as other:
        spec = orc.VhostUserDisk(str(tmp_path / "b"))
        with DeviceRig(spec, memory=MiB, state=state) as rig:
            rig.configure(COMMAND, MEMORY_SPACE | BUS_MASTER, 2)  # which is the bus's state
            back_end(rig).let_go("start")
            other.wait_for(Request.SET_VRING_ENABLE)
    with ScriptedBackEnd(tmp_path / "c", sectors=127):
        with pytest.raises(orc.SpecError, match="its state is of a disk of 65536 bytes, not 65024"):
            DeviceRig(orc.VhostUserDisk(str(tmp_path / "c")), memory=MiB, state=state)


def test_rings_that_are_not_in_shared_memory_break_the_device_and_reach_no_back_end(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig, base=MiB - 0x1000)
        driver.negotiate()
        rig.write(22, 0, 2)
        for offset, value in ((32, driver.descriptors), (40, 16 * MiB), (48, driver.descriptors)):
            rig.write(offset, value, 8)
        rig.write(28, 1, 2)
        rig.write(20, 15, 1)
        assert driver.status & NEEDS_RESET
        back_end(rig).hold("x")
        back_end(rig).wait()
        assert Request.SET_VRING_ADDR not in scripted.seen


def test_nothing_is_left_of_a_device(path: Path):
    before = descriptors()
    with ScriptedBackEnd(path) as scripted:
        with rig_of(path) as rig:
            back_end(rig).let_go("start")
            DiskDriver(rig).start()
            scripted.wait_for(Request.SET_STATUS)
        assert scripted.closed.wait(60)
    assert descriptors() <= before
    assert not threads()


# ---- bad ones


def test_socket_at_which_nobody_listens_is_an_error_that_names_it(path: Path):
    with pytest.raises(
        orc.FileError, match=r"blk\.sock: no vhost-user back-end listens there .*start it before the VM"
    ):
        rig_of(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 1 << 32}, "VIRTIO_F_VERSION_1 and protocol features are needed"),
        ({"features": 1 << 30}, "VIRTIO_F_VERSION_1 and protocol features are needed"),
        ({"protocol": 1 << 9}, "it lacks the protocol features REPLY_ACK"),
        ({"protocol": 1 << 3}, "it lacks the protocol features CONFIG"),
    ],
)
def test_back_end_that_lacks_something_is_refused_by_name(path: Path, change: dict[str, int], message: str):
    with ScriptedBackEnd(path) as scripted:
        vars(scripted).update(change)
        with pytest.raises(orc.VhostUserError, match=message):
            rig_of(path)


def test_more_queues_than_the_back_end_has_are_refused(path: Path):
    with ScriptedBackEnd(path, queues=2), pytest.raises(orc.VhostUserError, match="queues=3: its back-end has 2"):
        rig_of(path, queues=3)


def test_back_end_that_refuses_a_request_ends_the_vm(path: Path):
    def answer(_: ScriptedBackEnd, kind: int, payload: bytes) -> bytes | None:
        return number(kind, 1) if kind == Request.SET_MEM_TABLE else None

    with ScriptedBackEnd(path, answer), rig_of(path) as rig:
        back_end(rig).let_go("start")
        DiskDriver(rig).start()
        until(lambda: rig.outcomes)
        (outcome,) = rig.outcomes
        assert isinstance(outcome, orc.Failed)
        assert outcome.reason.endswith("blk.sock: it refuses SET_MEM_TABLE (0x1)")


def test_back_end_that_hangs_up_ends_the_vm_and_a_reset_is_not_stuck(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        scripted.wait_for(Request.SET_STATUS)
        scripted.hang_up()
        until(lambda: rig.outcomes)
        # Found by a look at the socket, or by the answer to SET_STATUS that does not come.
        assert "has closed the connection" in rig.outcomes[0].reason  # type: ignore[union-attr]
        driver.reset()
        until(lambda: not driver.status)


def test_back_end_that_says_what_nobody_asked_for_ends_the_vm(path: Path):
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        assert scripted.connection is not None
        scripted.connection.sendall(b"hello")
        until(lambda: rig.outcomes)
        assert "says what nobody has asked for" in rig.outcomes[0].reason  # type: ignore[union-attr]


def pair_with(answers: bytes, *, hang_up: bool) -> tuple[socket.socket, socket.socket]:
    """A front-end's socket, with all answers that it will have."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answers)
    if hang_up:
        theirs.shutdown(socket.SHUT_WR)
    return ours, theirs


GOOD = number(1, 1 << 32 | 1 << 30) + number(15, 1 << 3 | 1 << 9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_any_answers_are_an_error_in_time_or_a_negotiation(answers: bytes, good: bool):
    ours, theirs = pair_with(GOOD + answers if good else answers, hang_up=True)
    with ours, theirs:
        front_end, problem = FrontEnd(ours, "x", answer=0.5), "x: none"
        try:
            front_end.negotiate()
            front_end.config(60)
        except orc.VhostUserError as error:
            problem = str(error)
        assert problem.startswith("x: ")


def test_back_end_that_does_not_answer_is_an_error_after_its_time():
    ours, theirs = pair_with(GOOD[:13], hang_up=False)
    with ours, theirs, pytest.raises(orc.VhostUserError, match="x: GET_FEATURES: it does not answer"):
        FrontEnd(ours, "x", answer=0.05).negotiate()


def test_back_end_that_does_not_read_is_an_error_after_its_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while ours.send(bytes(4096)):
                pass
        with pytest.raises(orc.VhostUserError, match="x: SET_OWNER: it does not answer"):
            FrontEnd(ours, "x", answer=0.05).negotiate()


@pytest.mark.parametrize(
    "ask",
    [
        lambda front_end: front_end.start(
            0, 0, [RamRegion(0, MiB, 0)], dict.fromkeys(range(16), Vring(8, 0, 0, 0, 0, 0, -1)), 0
        ),
        lambda front_end: front_end.stop(range(16)),
    ],
    ids=["lend", "recall"],
)
def test_back_end_that_answers_each_request_at_the_last_moment_has_a_time_for_all_of_them(ask: Any):
    """Whoever ends the VM waits for what is asked just now."""
    here, there = socket.socketpair()
    answered = []

    def answers() -> None:
        with suppress(OSError, struct.error):
            while True:
                kind, _, size = HEADER.unpack(there.recv(HEADER.size))
                payload = there.recv(size)
                threading.Event().wait(0.1)
                there.sendall(reply(kind, payload) if kind == Request.GET_VRING_BASE else number(kind, 0))
                answered.append(kind)

    thread = threading.Thread(target=answers)
    thread.start()
    with there:
        with here, pytest.raises(orc.VhostUserError, match="does not answer"):
            ask(FrontEnd(here, "disk at x", answer=30.0, finish=0.5))
        thread.join()
    assert len(answered) < 10  # of 16 and more


def test_pause_needs_no_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another VM of the process may have taken the last one."""
    connect = device._connect
    monkeypatch.setattr(device, "_connect", lambda name: attrs.evolve(connect(name), drain=True))
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        DiskDriver(rig).start()
        scripted.wait_for(Request.SET_STATUS)
        quiet = threading.Event()
        with so_many_left(0):
            back_end(rig).hold("pause")
            back_end(rig).when_still(quiet.set)
            assert quiet.wait(60)
        assert rig.outcomes == []
        assert Request.GET_VRING_BASE in scripted.seen


def test_back_end_that_fills_our_eventfds_keeps_no_lock_and_goes_with_its_vm(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may clear O_NONBLOCK, which is the file's, and fill the eventfd between our look and our write."""
    with ScriptedBackEnd(path) as scripted, rig_of(path) as rig:
        back_end(rig).let_go("start")
        DiskDriver(rig).start()
        scripted.wait_for(Request.SET_STATUS)
        assert select.select([rig.bells[0].fd], [], [], 60)[0]  # it is kicked as it gets the queue
        os.eventfd_read(rig.bells[0].fd)
        monkeypatch.setattr(lending, "takes", lambda fd: True)  # the look came before
        os.eventfd_write(scripted.fds[Request.SET_VRING_KICK], (1 << 64) - 2)
        os.set_blocking(scripted.fds[Request.SET_VRING_KICK], True)
        rig.write(virtio.NOTIFY, 0, 4)
        until(lambda: back_end(rig)._lending.at == rig.bells[0].fd)
        assert rig.read(STATUS, 1)  # the device's lock is free
        threading.Event().wait(0.05)
        assert threads()
        back_end(rig).stop()
    assert threads() == []


def test_descriptors_that_come_with_an_answer_are_dropped():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = descriptors()
        socket.send_fds(theirs, [number(1, 1 << 32 | 1 << 30)], [0, 0, 0])
        theirs.sendall(number(15, 1 << 3 | 1 << 9))
        FrontEnd(ours, "x").negotiate()
        assert descriptors() <= before


def test_silent_back_end_keeps_its_own_launch_alone_and_for_its_time(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontend.FrontEnd.__init__, "__kwdefaults__", {"answer": 0.2, "finish": 0.2})
    with ScriptedBackEnd(path, lambda *_: b""), pytest.raises(orc.VhostUserError, match="does not answer"):
        rig_of(path)


# ---- the specs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"socket": ""}, "socket='': must be the name of a Unix socket"),
        ({"socket": "x" * 108}, "must have at most 107 bytes"),
        ({"socket": "a", "queues": 0}, "queues=0"),
        ({"socket": "a", "queues": 17}, "queues=17"),
    ],
)
def test_disk_that_can_not_be_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(orc.SpecError, match=message):
        orc.VhostUserDisk(**fields)


def spec_of(**fields: Any) -> orc.VmSpec:
    boot = orc.FlatImage(code=b"\xf4")
    devices = (orc.PciHostBridge(), orc.VhostUserDisk("/nowhere"))
    return orc.VmSpec(name="v", boot=boot, irqchip="full", devices=devices, **fields)


def test_memory_is_shared_where_another_process_serves_a_device():
    assert spec_of(memory=MiB).backing == orc.Memory(MiB, backing="shared")
    assert spec_of(memory=orc.Memory(2 * MiB, huge_pages=True)).backing.backing == "shared"
    assert orc.VmSpec(name="v", boot=orc.FlatImage(code=b"\xf4"), memory=MiB).backing.backing == "anonymous"


def test_memory_that_can_not_be_shared_is_refused_with_the_remedy():
    with pytest.raises(orc.SpecError, match=r"backing='file': another process serves VhostUserDisk.*\"shared\""):
        spec_of(memory=orc.Memory(MiB, backing="file", path="/x"))
    with pytest.raises(orc.SpecError, match="log_dirty=True: another process serves VhostUserDisk"):
        spec_of(log_dirty=True)


# ---- qemu-storage-daemon


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if not shutil.which(PROGRAM) or not shutil.which("qemu-img"):
        pytest.skip(f"{PROGRAM} and qemu-img are not here: install qemu-system-common and qemu-utils")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "8M"], check=True)
    return tmp_path / "a.qcow2"


def disk_of(image: Path, **fields: Any) -> orc.Disk:
    return orc.Disk(str(image), format="qcow2", **fields)


def check(image: Path) -> None:
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pid_of_daemon() -> int:
    """The one child of this process."""
    (pid,) = children(os.getpid())
    return pid


@pytest.mark.parametrize("direct", [False, True])
def test_what_a_guest_writes_is_in_the_image(image: Path, direct: bool):
    before = descriptors()
    with DeviceRig(disk_of(image, direct=direct), memory=MiB) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        assert driver.sectors == 8 * 2048
        assert driver.write(8, b"written".ljust(4096, b".")) == 0
        assert driver.flush() == 0
        back_end(rig).hold("pause")
        back_end(rig).wait()
        back_end(rig).let_go("pause")
        assert driver.read(8, 4096).startswith(b"written...")
        driver.reset()
        until(lambda: not driver.status)
        driver.start()
        assert driver.read(8, 512).startswith(b"written...")
        pid = pid_of_daemon()
    assert not Path(f"/proc/{pid}").exists()
    assert descriptors() <= before
    check(image)
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, image.with_suffix(".raw")], check=True)
    assert image.with_suffix(".raw").read_bytes()[4096:4110] == b"written......."


def test_pauses_in_the_middle_of_requests_lose_none(image: Path):
    with DeviceRig(disk_of(image), memory=MiB) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        for round_ in range(100):
            data = bytes([round_]) * 4096
            rig.memory.write(driver.data, data)
            driver.offer(WRITE, 8 * round_, len(data))
            back_end(rig).hold("pause")
            back_end(rig).wait()
            used = driver.used_index()
            assert rig.device.state().queue[0].next == used  # what was begun is done
            back_end(rig).let_go("pause")
            assert driver.finished() == 0
        assert driver.used_index() == 100
        assert driver.read(8 * 42, 512) == bytes([42]) * 512


WRITES = """
import os, sys
sys.path.insert(0, sys.argv[1])
import orchestra as orc
from orchestra.testing import DeviceRig
from rlimits import so_many_left
from vhost_kit import DiskDriver, children

with DeviceRig(orc.Disk(sys.argv[2], format="qcow2"), memory=orc.MiB) as rig:
    rig.back_end.let_go("start")
    driver = DiskDriver(rig)
    driver.start()
    assert driver.write(0, b"kept".ljust(4096, b"k")) == 0
    assert driver.flush() == 0
    print(children(os.getpid())[0], flush=True)
    number = 0
    while True:  # each in a cluster of its own: tables change all the time
        number += 1
        assert driver.write(1 + 128 * (number % 120), bytes([number % 256]) * 4096) == 0
        if number == 50:
            print("many", flush=True)
"""


def test_image_is_whole_after_a_kill_of_the_fleet_in_the_middle_of_writes(image: Path):
    command = [sys.executable, "-c", WRITES, Path(__file__).parent, image]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fleet:
        assert fleet.stdout is not None
        gone = os.pidfd_open(int(fleet.stdout.readline()))
        assert fleet.stdout.readline() == "many\n"
        fleet.kill()
    assert select.select([gone], [], [], 60)[0], "the daemon outlives its fleet"
    os.close(gone)
    check(image)
    with DeviceRig(disk_of(image), memory=MiB) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        assert driver.read(0, 512) == b"kept".ljust(512, b"k")


def test_image_has_a_backing_file_which_nobody_writes(image: Path, tmp_path: Path):
    base = tmp_path / "base.raw"
    base.write_bytes(b"of the base".ljust(MiB, b"\0"))
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    with DeviceRig(disk_of(top), memory=MiB) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        driver.start()
        assert driver.read(0, 512).startswith(b"of the base")
        assert driver.write(0, b"mine".ljust(512, b"\0")) == 0
        assert driver.read(0, 512).startswith(b"mine")
    assert base.read_bytes().startswith(b"of the base")
    check(top)
    base.rename(tmp_path / "gone")
    with pytest.raises(orc.FileError, match=r"top\.qcow2: .*Could not open backing file"):
        DeviceRig(disk_of(top), memory=MiB)


def test_image_that_is_read_only_is_so_for_the_guest(image: Path):
    with DeviceRig(disk_of(image, readonly=True), memory=MiB) as rig:
        back_end(rig).let_go("start")
        driver = DiskDriver(rig)
        assert driver.negotiate() & 1 << 5
        driver.start()
        assert driver.write(0, bytes(512)) == 1


def test_image_belongs_to_one_vm(image: Path):
    with DeviceRig(disk_of(image), memory=MiB):
        for readonly in (False, True):
            with pytest.raises(orc.FileError, match=r"a\.qcow2: it is in use by another VM or program"):
                DeviceRig(disk_of(image, readonly=readonly), memory=MiB)
        with pytest.raises(orc.FileError, match=r"a\.qcow2: is in use by another VM"):
            DeviceRig(orc.Disk(str(image), format="raw"), memory=MiB)
    with DeviceRig(disk_of(image, readonly=True), memory=MiB), DeviceRig(disk_of(image, readonly=True), memory=MiB):
        pass


def test_base_belongs_to_qemu_or_to_a_raw_disk(image: Path, tmp_path: Path):
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(MiB))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    store = open_store(orc.Disk(str(tmp_path / "own"), base=str(base)))
    with pytest.raises(orc.FileError, match=r"top\.qcow2: it, or a backing file of it, is in use by another VM"):
        DeviceRig(disk_of(top), memory=MiB)
    lib.orc_store_free(store)
    with DeviceRig(disk_of(top), memory=MiB), pytest.raises(orc.FileError, match=r"base\.raw: is in use by another VM"):
        open_store(orc.Disk(str(base)))


def test_daemon_that_is_killed_ends_the_vm_with_how(image: Path):
    with DeviceRig(disk_of(image), memory=MiB) as rig:
        back_end(rig).let_go("start")
        DiskDriver(rig).start()
        os.kill(pid_of_daemon(), signal.SIGKILL)
        until(lambda: rig.outcomes)
        reason = rig.outcomes[0].reason  # type: ignore[union-attr]
        assert reason.endswith("; signal 9")
        assert reason.count("disk ") == 1
    with DeviceRig(disk_of(image), memory=MiB):  # nobody has its lock any more
        pass


def test_file_that_is_no_image_is_refused_before_anything_starts(image: Path, tmp_path: Path):
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(MiB))
    for path, message in (
        (raw, r"raw\.img: is no qcow2 image: make one with"),
        (tmp_path, "is a directory"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(orc.FileError, match=message):
            DeviceRig(disk_of(path), memory=MiB)
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + bytes(MiB))
    with pytest.raises(
        orc.FileError, match=r"broken\.qcow2: qemu-storage-daemon can't use it: Unsupported qcow2 version 0"
    ):
        DeviceRig(disk_of(broken), memory=MiB)


def test_daemon_that_is_not_installed_is_named_with_its_package(image: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(orc.BackendUnavailable, match=f"needs {PROGRAM}, which is not here: .*qemu-system-common"):
        DeviceRig(disk_of(image), memory=MiB)


def test_name_of_a_file_is_never_a_protocol(image: Path):
    odd = image.with_name('nbd:localhost:1, {"a": 1}.qcow2')
    image.rename(odd)
    with DeviceRig(disk_of(odd), memory=MiB):
        pass


def test_command_says_all_that_the_spec_says():
    words = command_line("q", disk_of(Path("/a"), readonly=True, direct=True), 7, block_device=True, aio="io_uring")
    assert words[0] == "q"
    assert '"driver": "host_device"' in words[2]
    assert all('"read-only": true' in word and '"direct": true' in word for word in (words[2], words[4]))
    assert '"discard": "unmap"' in words[2]
    assert '"writable": false' in words[6]
    assert '{"type": "fd", "str": "7"}' in words[6]


def test_words_that_mean_nothing_known_are_left_as_they_are():
    assert explain(disk_of(Path("/a")), "Segmentation fault") is None


# ---- in a fleet


def vm_of(path: Path, name: str = "v") -> orc.VmSpec:
    devices = (orc.PciHostBridge(), orc.VhostUserDisk(str(path)))
    boot = orc.FlatImage(code=b"\xeb\xfe")  # for ever
    return orc.VmSpec(name=name, boot=boot, memory=MiB, irqchip="full", devices=devices)


@pytest.mark.kvm
async def test_silent_back_end_holds_its_own_launch_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontend.FrontEnd.__init__, "__kwdefaults__", {"answer": 3.0, "finish": 3.0})
    order: list[str] = []
    with ScriptedBackEnd(path, lambda *_: b"") as scripted:
        async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet, trio.open_nursery() as nursery:

            async def launch(name: str) -> None:
                with pytest.raises(orc.VhostUserError, match="does not answer"):
                    await fleet.launch(vm_of(path, name))
                order.append(name)

            nursery.start_soon(launch, "silent")
            await trio.to_thread.run_sync(scripted.wait_for, Request.GET_FEATURES)
            for number in range(6):  # more than there are threads for set-ups
                halts = orc.VmSpec(name=f"h-{number}", boot=orc.FlatImage(code=b"\xf4"))
                assert isinstance(await (await fleet.launch(halts)).wait(), orc.Halted)
            order.append("others")
    assert order == ["others", "silent"]


@pytest.mark.kvm
async def test_limit_that_does_not_hold_a_disk_of_another_process_is_refused(path: Path, tmp_path: Path):
    raw, limit = tmp_path / "raw", orc.IoLimit(operations=100)
    raw.write_bytes(bytes(MiB))
    spec = vm_of(path)
    spec = attrs.evolve(spec, tenant="t", devices=(*spec.devices, orc.Disk(str(raw))))
    with ScriptedBackEnd(path):
        async with orc.open_fleet(backend="kvm", bus_locks="auto", tenants={"t": None}) as fleet:
            vm = await fleet.launch(spec)
            with pytest.raises(orc.SpecError, match=r"io_limit of tenant 't': it does not hold .* of vm 'v'"):
                await fleet.change_tenant(orc.Tenant("t", io_limit=limit))
            assert fleet.tenants["t"].io_limit is None
            for where, whose in (({"tenant": "t"}, "tenant 't'"), ({"vm": "v"}, "vm 'v'")):
                done = await fleet.apply(orc.SetIoLimit(io_limit=limit, **where))
                assert f"io_limit of {whose}: it does not hold" in str(done.error)
            vm.disks["vdb"].set_limit(limit)  # the raw one alone
            assert vm.disks["vdb"].limit == limit


@pytest.mark.kvm
async def test_vm_has_a_back_end_pauses_restarts_and_leaves_nothing(path: Path):
    before = descriptors()
    with ScriptedBackEnd(path) as scripted:
        async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
            vm = await fleet.launch(vm_of(path))
            await vm.pause()
            while not vm.quiesced:
                await trio.lowlevel.checkpoint()
            with pytest.raises(orc.StateError, match="another process serves a device of it"):
                await vm.log_dirty()
            await vm.resume()
            await vm.reset()
            assert scripted.seen.count(Request.SET_OWNER) == 2
            scripted.hang_up()
            outcome = await vm.wait()
            assert isinstance(outcome, orc.Failed)
            assert "its back-end has closed the connection" in outcome.reason
    assert descriptors() <= before


@pytest.mark.kvm
async def test_launch_that_is_cancelled_or_fails_leaves_no_process(image: Path, path: Path):
    before = descriptors()
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        spec = attrs.evolve(vm_of(path), devices=(orc.PciHostBridge(), disk_of(image)))
        with trio.move_on_after(0) as scope:
            await fleet.launch(spec)
        assert scope.cancelled_caught
        both = attrs.evolve(spec, devices=(*spec.devices, orc.VhostUserDisk(str(path))))
        with pytest.raises(orc.FileError, match="no vhost-user back-end listens there"):
            await fleet.launch(both)
        with pytest.raises(orc.OrchestraError, match="missing"):
            await fleet.launch(attrs.evolve(spec, devices=(*spec.devices, orc.Disk("/missing"))))
        assert not children(os.getpid())
        vm = await fleet.launch(spec)
        (first,) = children(os.getpid())
        await vm.reset()  # the next run's daemon gets the image from the one before
        (second,) = children(os.getpid())
        assert first != second
    assert not children(os.getpid())
    assert descriptors() <= before
    assert not threads()
