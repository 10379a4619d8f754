"""A Linux guest on a qcow2 image over a raw base: what it has synced outlives a kill of the fleet, and a daemon that
dies ends its own VM alone."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio

import linux_kit
import orchestra as orc
from orchestra.machine.devices.vhost.qemu import PROGRAM
from test_linux import answer, booted, ended, had, spec_with
from vhost_kit import children

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

GONE = 60.0
"""Seconds until a daemon has written what it has, after its fleet was killed."""


@pytest.fixture(scope="module")
def with_modules(tmp_path_factory) -> Path:
    """An initrd that has loaded the drivers of all devices."""
    path = tmp_path_factory.mktemp("linux") / "initrd-modules"
    path.write_bytes(had(linux_kit.initrd, linux_kit.LOAD, had(linux_kit.modules, *linux_kit.MODULES)))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image whose backing file is a raw one with a file system."""
    for tool, package in ((PROGRAM, "qemu-system-common"), ("qemu-img", "qemu-utils"), ("mke2fs", "e2fsprogs")):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not here: install {package}")
    base, made = tmp_path / "base.raw", tmp_path / "root.qcow2"
    with base.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", made], check=True)
    return made


def disk_of(image: Path) -> orc.Disk:
    return orc.Disk(str(image), format="qcow2")


WRITES = """
import pathlib, sys
import trio
sys.path.insert(0, sys.argv[1])
import orchestra as orc
from test_linux import answer, booted, spec_with

async def main():
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(pathlib.Path(sys.argv[2]), orc.Disk(sys.argv[3], format="qcow2")))
        await answer(vm, "mkdir /mnt; mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/kept bs=1M count=6")
        exits = vm.statistics().exits.get("mmio", 0)
        print(await answer(vm, "sync; md5sum /mnt/kept"), flush=True)
        print(vm.statistics().exits.get("mmio", 0) - exits, flush=True)
        await vm.console.write("dd if=/dev/zero of=/mnt/lost bs=64k count=10000; echo written\\n")
        await trio.sleep_forever()

trio.run(main)
"""


def check(image: Path) -> None:
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_guest_synced_to_qcow2_outlives_a_kill_of_the_fleet(with_modules: Path, image: Path, tmp_path: Path):
    before = (tmp_path / "base.raw").read_bytes()
    command = [sys.executable, "-c", WRITES, Path(__file__).parent, with_modules, image]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fleet_process:
        assert fleet_process.stdout is not None
        checksum = fleet_process.stdout.readline().split()[0]
        while not (exits := fleet_process.stdout.readline().strip()):
            pass
        (daemon,) = children(fleet_process.pid)
        gone = os.pidfd_open(daemon)
        fleet_process.kill()  # in the middle of writes
    assert select.select([gone], [], [], GONE)[0], "the daemon outlives its fleet"
    os.close(gone)
    assert len(checksum) == 32
    assert exits == "0"  # neither a notification nor an interrupt is one
    check(image)
    assert (tmp_path / "base.raw").read_bytes() == before

    async def read_again() -> None:
        async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
            spec = spec_with(with_modules, disk_of(image))
            vm = await booted(fleet, spec)
            found = await answer(vm, "mkdir /mnt; mount -t ext4 /dev/vda /mnt && md5sum /mnt/kept")
            assert found == f"{checksum}  /mnt/kept\n"
            await vm.pause()
            await vm.resume()
            assert await answer(vm, "echo 3 >/proc/sys/vm/drop_caches; md5sum /mnt/kept") == found
            with pytest.raises(orc.FileError, match=r"root\.qcow2: it is in use by another VM"):
                await fleet.launch(attrs.evolve(spec, name="other"))
            await answer(vm, "umount /mnt")
            assert await answer(vm, "dmesg | grep -E 'virtio.*(fail|error)|I/O err|BUG:|WARNING:|Trace'") == ""
            assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")

    trio.run(read_again)
    assert not children(os.getpid())
    check(image)
    raw = tmp_path / "root.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    checked = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


async def test_daemon_that_dies_ends_its_vm_with_the_reason_and_no_other(with_modules: Path, image: Path):
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_with(with_modules, disk_of(image)))
        other = await fleet.launch(attrs.evolve(spec_with(with_modules), name="other"))
        (daemon,) = children(os.getpid())
        os.kill(daemon, signal.SIGKILL)
        with trio.fail_after(60):
            outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "root.qcow2" in outcome.reason
        assert "signal 9" in outcome.reason
        assert other.statistics().state == orc.State.RUNNING
        await other.stop()
    assert not children(os.getpid())
