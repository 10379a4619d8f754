"""Disks of a Linux guest: limits that change while it runs, files and devices that fail, restarts, the command line."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio

import orchestra as orc
from orchestra.model.disk import disks_of
from terminals import seat
from test_linux import BOOTED, PROMPT, answer, booted, ended, spec_with, with_modules  # noqa: F401

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

KiB, MiB = orc.KiB, orc.MiB


def failed(said: str) -> bool:
    """Whether a program says so of a disk, or the kernel does on the console."""
    return "Input/output error" in said or "I/O error" in said


def image(path: Path, size: int = 64 * MiB, *, filled: int = 0) -> Path:
    """A sparse file that begins with so many bytes of data."""
    with path.open("wb") as file:
        file.write(os.urandom(filled))
        file.truncate(size)
    return path


def root(command: list[object]) -> str:
    """Run a command that needs root; skip the test where it can't be."""
    if os.geteuid() != 0 or not shutil.which(str(command[0])):
        pytest.skip(f"needs root and {command[0]}")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    device = root(["losetup", "--find", "--show", file])
    try:
        yield device
    finally:
        root(["losetup", "--detach", device])


@contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    root(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder])
    try:
        yield folder
    finally:
        root(["umount", "--lazy", folder])


async def taken(vm: orc.Vm, line: str) -> float:
    """Seconds that a command in the guest takes."""
    began = trio.current_time()
    await answer(vm, line)
    return trio.current_time() - began


def read_of(disk: str, kib: int) -> str:
    return f"echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/{disk} of=/dev/null bs=64k count={kib // 64} 2>&1"


async def test_limits_change_while_the_guest_reads_and_outlive_a_reset(with_modules, tmp_path):  # noqa: F811
    slow = orc.IoLimit(bytes=orc.TokenBucket(256 * KiB))
    one, two = (image(tmp_path / name) for name in ("one", "two"))
    spec = spec_with(with_modules, orc.Disk(str(one)), orc.Disk(str(two), name="data", io_group="gold"))
    async with orc.open_fleet(backend="kvm", bus_locks="auto", io_groups={"gold": None}) as fleet:
        vm = await booted(fleet, spec)
        disk = vm.disks["vda"]
        assert disk.limit is None
        assert list(vm.disks) == ["vda", "data"]
        disk.set_limit(slow)  # of a disk that was made without one
        assert await taken(vm, read_of("vda", 1024)) > 2.5
        held = disk.statistics()
        assert held.throttled_by["disk"] > 2.5
        assert held.read_bytes >= MiB
        # In the middle of a wait: without the change this would take four minutes.
        await vm.console.write(read_of("vda", 64 * 1024) + "\n")
        await vm.console.wait_for("\n")
        while disk.statistics().waits == held.waits:  # noqa: ASYNC110 (the guest reads meanwhile)
            await trio.sleep(0.05)
        disk.set_limit(None)
        await vm.console.wait_for(PROMPT, timeout=60)
        # By actions: of one disk, of all, and of a group, each with its own place.
        for where in ({"vm": "linux", "disk": "data"}, {"vm": "linux"}, {"group": "gold"}):
            level = "disk" if "disk" in where else next(iter(where))
            applied = await fleet.apply(orc.SetIoLimit(io_limit=slow, **where), policy="p")
            assert applied.outcome == "done"
            assert await taken(vm, read_of("vdb", 1024)) > 2.5
            assert vm.disks["data"].statistics().throttled_by[level] > 2
            await fleet.apply(orc.SetIoLimit(io_limit=None, **where), policy="p")
        disk.set_limit(slow)
        await vm.reset()
        await vm.console.wait_for(PROMPT, timeout=BOOTED)
        assert disk.limit == slow
        assert vm.desired.io_limits_at("vda")[0].io_limit == slow
        assert await taken(vm, read_of("vda", 1024)) > 2
        assert disk.statistics().read_bytes > 64 * MiB  # of both runs
        assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")


async def test_files_and_devices_that_fail_give_the_guest_errors_and_the_vm_goes_on(with_modules, tmp_path):  # noqa: F811
    fixed, cut = image(tmp_path / "fixed", filled=4096), image(tmp_path / "cut", filled=4096)
    backing, broken = image(tmp_path / "backing"), image(tmp_path / "broken", filled=MiB)
    short = image(tmp_path / "short")
    root(["mke2fs", "-q", "-t", "ext4", short])
    os.truncate(short, 32 * MiB)
    with (
        small_file_system(tmp_path / "full", 4 * MiB) as folder,
        loop_device(backing) as whole,
        loop_device(broken) as failing,
    ):
        filler = folder / "filler"
        filler.write_bytes(bytes(3 * MiB))
        disks = [
            orc.Disk(str(fixed), readonly=True, name="fixed"),
            orc.Disk(str(image(folder / "sparse")), name="full"),
            orc.Disk(str(cut), name="cut"),
            orc.Disk(whole, name="loop"),
            orc.Disk(failing, name="failing"),
            orc.Disk(str(short), name="short"),
        ]
        names = dict(zip(disks_of(disks), ("vda", "vdb", "vdc", "vdd", "vde", "vdf"), strict=True))
        async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
            vm = await booted(fleet, spec_with(with_modules, *disks))

            def write(disk: str, mib: int, more: str = "") -> str:
                return f"dd if=/dev/urandom of=/dev/{names[disk]} bs=1M count={mib} conv=fsync {more} 2>&1"

            # Read-only: the guest's kernel knows.
            assert "not permitted" in await answer(vm, write("fixed", 1))
            assert fixed.read_bytes()[:4096] != bytes(4096)
            # No room at the host: an error, as virtio has no other word for it; with room again it works.
            assert failed(await answer(vm, write("full", 8)))
            assert vm.disks["full"].statistics().no_space > 0
            filler.unlink()
            assert not failed(await answer(vm, write("full", 2)))
            # Cut off under its guest: what is beyond the end fails, and the rest does not.
            os.truncate(cut, 8 * MiB)
            assert failed(await answer(vm, f"dd if=/dev/{names['cut']} of=/dev/null bs=64k skip=512 count=1 2>&1"))
            assert not failed(await answer(vm, f"dd if=/dev/{names['cut']} of=/dev/null bs=64k count=16 2>&1"))
            assert vm.disks["cut"].statistics().errors > 0
            # A block device works as a file does, and its errors are errors.
            assert not failed(await answer(vm, write("loop", 4)))
            digest = (await answer(vm, f"dd if=/dev/{names['loop']} bs=64k count=4 2>/dev/null | md5sum")).split()[0]
            with open(whole, "rb") as device:  # noqa: ASYNC230 (nothing else is to be done meanwhile)
                assert hashlib.md5(device.read(256 * KiB)).hexdigest() == digest
            os.truncate(broken, 0)
            assert failed(await answer(vm, f"dd if=/dev/{names['failing']} of=/dev/null bs=64k skip=4 count=1 2>&1"))
            # Shorter than its file system: the guest's kernel says so.
            assert "failed" in await answer(vm, f"mkdir /mnt; mount -t ext4 /dev/{names['short']} /mnt 2>&1")
            assert "bad geometry" in await answer(vm, "dmesg | grep -i ext4")
            assert vm.state == "running"
            assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")


async def test_io_thread_is_where_its_vms_vcpus_are_and_within_their_cap(with_modules, tmp_path):  # noqa: F811
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU only: none to spare for isolation")

    def io_thread() -> int:
        tasks = Path("/proc/self/task").iterdir()
        return next(int(task.name) for task in tasks if (task / "comm").read_text().strip() == "linux/io")

    def cpu_of(thread: int) -> float:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    spec = spec_with(with_modules, orc.Disk(str(image(tmp_path / "disk", filled=MiB))))
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec)
        thread, everywhere = io_thread(), os.sched_getaffinity(0)
        vm.isolate()
        assert os.sched_getaffinity(thread) == {max(everywhere)}
        vm.isolate(False)
        assert os.sched_getaffinity(thread) == everywhere
        # Reads past the guest's page cache, for as long as it is told: the I/O thread has all to do that it can.
        loop = "while :; do dd if=/dev/vda of=/dev/null bs=4k count=256 iflag=direct 2>/dev/null; done"
        await vm.console.write(f"{loop} & sleep 1\n")
        await vm.console.wait_for(PROMPT, timeout=60)
        vm.cap_cpu(0.05)
        await trio.sleep(1)
        used, began = cpu_of(thread), trio.current_time()
        await trio.sleep(5)
        share = (cpu_of(thread) - used) / (trio.current_time() - began)
        assert share < 0.08
        vm.cap_cpu(None)
        await vm.stop()


def test_run_takes_disks_by_name_read_only_over_a_base_and_with_limits(with_modules, tmp_path):  # noqa: F811
    kernel = spec_with(with_modules).boot.kernel
    base = image(tmp_path / "base", filled=MiB)
    before = base.read_bytes()
    image(tmp_path / "fixed", filled=MiB)
    command = [sys.executable, "-m", "orchestra", "run", "--kernel", str(kernel), "--initrd", str(with_modules)]
    disks = ["--disk", f"new,base={base}", "--disk", "fixed,ro,iops=1000,bw=256K"]
    with seat([*command, "--cmdline", "quiet", "--memory", "256M", *disks], cwd=tmp_path) as person:
        person.see(b"/ # ", within=BOOTED)
        person.type(b"dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync 2>&1; echo done $((1 + 1))\r")
        assert not failed(person.see(b"done 2", within=60).decode())
        person.type(b"dd if=/dev/zero of=/dev/vdb count=1 2>&1; echo done $((1 + 2))\r")
        assert b"not permitted" in person.see(b"done 3", within=60)
        person.type(b"poweroff -f\r")
        assert person.ended(within=BOOTED) == 0
    assert base.read_bytes() == before
    assert (tmp_path / "new").stat().st_size > 0


async def test_vm_that_fails_restarts_with_its_disk_and_what_was_on_it(with_modules, tmp_path):  # noqa: F811
    disk = image(tmp_path / "disk")
    spec = attrs.evolve(
        spec_with(with_modules, orc.Disk(str(disk), io_limit=orc.IoLimit(operations=5000))), restart="on-failure"
    )
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec)
        read = "dd if=/dev/vda bs=64k count=16 2>/dev/null | md5sum"
        write = "dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null"
        await answer(vm, write)
        before = (await answer(vm, read)).split()[0]
        await vm.console.write("echo c >/proc/sysrq-trigger\n")  # the kernel panics
        await vm.console.wait_for(PROMPT, timeout=BOOTED)
        assert vm.restarts == 1
        assert (await answer(vm, read)).split()[0] == before
        assert vm.disks["vda"].limit == orc.IoLimit(operations=5000)
        assert vm.disks["vda"].statistics().writes > 0  # of the first run
        with pytest.raises(orc.FileError, match="in use by another VM"):
            await fleet.launch(attrs.evolve(spec, name="other"))
        assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")
