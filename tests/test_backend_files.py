"""Files that somebody else has opened: what a VM names is had by the descriptors alone."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import trio

import orchestra as orc
from host_driver import DATA, HostDriver, machine
from orchestra.backend.files import open_path
from orchestra.backend.memory import GuestMemory
from orchestra.machine.boot.files import BootFile
from orchestra.machine.devices.disk import open_store
from orchestra.native import lib
from orchestra.testing import wait_until


@pytest.fixture
def given(tmp_path: Path):
    """Files by names that no path has, and their descriptors."""
    made: dict[str, int] = {}

    def give(name: str, content: bytes, flags: int = os.O_RDONLY) -> int:
        path = tmp_path / "for a moment"
        path.write_bytes(content)
        made[name] = os.open(path, flags)
        path.unlink()
        return made[name]

    yield give, made
    for fd in made.values():
        os.close(fd)


def test_by_default_a_file_is_opened_by_its_path_for_its_owner_alone(tmp_path):
    fd = open_path(str(tmp_path / "new"), os.O_RDWR | os.O_CREAT)
    try:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(fd)


def test_a_descriptor_is_given_as_often_as_it_is_asked_for_and_stays_the_givers(given):
    give, made = given
    give("a", b"abc")
    files = orc.OpenedFiles(made)
    for _ in range(2):
        fd = files("a", os.O_RDONLY | os.O_NONBLOCK)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.pread(fd, 3, 0) == b"abc"
        os.close(fd)
    assert os.pread(made["a"], 3, 0) == b"abc"


def test_what_was_not_opened_and_what_was_not_opened_for_writing_is_not_had(given, tmp_path):
    give, made = given
    give("a", b"abc")
    files = orc.OpenedFiles(made)
    with pytest.raises(OSError, match="it was not opened for this process") as caught:
        files(__file__, os.O_RDONLY)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(PermissionError):
        files("a", os.O_RDWR)
    with pytest.raises(orc.FileError, match=r"a: can't be written \(Permission denied\): .* or use readonly=True"):
        open_store(orc.Disk("a"), files)
    with pytest.raises(orc.FileError, match="b: can't be opened as a disk: it was not opened for this process"):
        open_store(orc.Disk("b"), files)
    with pytest.raises(orc.FileError, match="k: kernel: can't be opened: it was not opened for this process"):
        BootFile("kernel", "k", files)


def test_a_disk_over_a_base_and_its_locks_are_the_descriptors(given):
    give, made = given
    give("base", bytes(8192))
    give("new", b"", os.O_RDWR)
    files = orc.OpenedFiles(made)
    disk = orc.Disk("new", base="base")
    lib.orc_store_free(open_store(disk, files))  # makes it
    lib.orc_store_free(open_store(disk, files))  # and goes on


def test_memory_and_kernel_are_read_by_descriptors(given):
    give, made = given
    give("ram", b"from the file".ljust(orc.MiB, b"\0"))
    give("kernel", b"a kernel")
    spec = orc.VmSpec(
        name="a",
        memory=orc.Memory(orc.MiB, backing="file", path="ram"),
        boot=orc.FlatImage(code=b"\xf4"),
    )
    memory = GuestMemory(spec, open_file=orc.OpenedFiles(made))
    try:
        assert memory.read(0, 13) == b"from the file"
        with BootFile("kernel", "kernel", memory.open_file) as kernel:
            kernel.read_to(memory, 0x2000, 0, 8)
        assert memory.read(0x2000, 8) == b"a kernel"
    finally:
        memory.close()


@pytest.mark.kvm
async def test_a_fleet_that_may_open_nothing_runs_its_vms_again_and_again(given, nothing_left):
    give, made = given
    give("disk", b"sector 0".ljust(8192, b"."), os.O_RDWR)
    with trio.fail_after(60):
        async with orc.open_fleet(backend="kvm", bus_locks="off", open_file=orc.OpenedFiles(made)) as fleet:
            vm = await fleet.launch(machine(orc.Disk("disk")))
            for _ in range(2):
                driver = HostDriver(vm)
                driver.start()
                driver.read_sector(0, DATA + 0x1000)
                await wait_until(lambda driver=driver: driver.used == 1)
                assert vm.read_memory(DATA + 0x1000, 8) == b"sector 0"
                before = vm._control.guest
                await vm.reset()
                await wait_until(lambda before=before: vm._control.guest is not before and vm.state == "running")
            with pytest.raises(orc.FileError, match="it was not opened for this process"):
                await fleet.launch(machine(orc.Disk("other"), name="other"))
