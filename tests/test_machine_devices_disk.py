"""Disks: what their spec refuses, which files they take, and who may have a file at the same time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

import orchestra as orc
from conftest import guest
from orchestra.machine.devices.disk import FLOCK, DiskDevice, open_store
from orchestra.model.disk import disks_of
from orchestra.model.iolimit import tightest_io
from orchestra.native import lib
from orchestra.testing import DeviceRig

MiB = orc.MiB


@contextmanager
def store(disk: orc.Disk) -> Iterator[Any]:
    made = open_store(disk)
    try:
        yield made
    finally:
        lib.orc_store_free(made)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "root.img"
    path.touch()
    os.truncate(path, MiB)
    return str(path)


# ---- the spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path='': must be the name of a file"),
        ({"path": "a\0b"}, "path=.*must be the name of a file"),
        ({"path": 7}, "path=7: must be the name"),
        ({"path": "a", "readonly": 1}, "readonly=1: must be True or False"),
        ({"path": "a", "direct": None}, "direct=None: must be"),
        ({"path": "a", "base": ""}, "base='': must be the name of a file"),
        ({"path": "a", "base": "a"}, "base='a': must be another file"),
        ({"path": "a", "base": "b", "direct": True}, "direct=True: a disk with a base"),
        ({"path": "a", "io_limit": 5}, "io_limit=5: must be an IoLimit"),
        ({"path": "a", "format": "vmdk"}, 'format=\'vmdk\': must be "raw" or "qcow2"'),
        ({"path": "a", "format": "qcow2", "base": "b"}, "base: a qcow2 image names its backing file itself"),
        ({"path": "a", "format": "qcow2", "io_limit": orc.IoLimit(bytes=MiB)}, 'io_limit: format="qcow2" has none'),
        ({"path": "a", "format": "qcow2", "io_group": "g"}, 'io_group: format="qcow2" has none'),
        ({"path": "a", "io_group": ""}, "io_group='': must be 1 to 64 letters"),
        ({"path": "a", "name": "a/b"}, "name='a/b': must be 1 to 64 letters"),
    ],
)
def test_a_spec_that_can_not_be_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(orc.SpecError, match=message):
        orc.Disk(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of them"),
        ({"operations": 0}, "operations=0: must be"),
        ({"operations": -1.0}, "operations=-1.0: must be"),
        ({"bytes": 511}, "bytes: size=511: must be from 512"),
        ({"bytes": 1e12}, "size=.*must be"),
        ({"operations": "many"}, "operations='many': must be more than 0 a second, a TokenBucket"),
        ({"operations": 0.5}, "operations: size=0.5: must be from 1"),
        ({"operations": orc.TokenBucket(1e9, 0.5)}, "operations: refill_time=0.5: gives more than"),
        ({"operations": orc.TokenBucket(1, one_time_burst=1e10)}, "operations: one_time_burst=1.*: must be at most"),
    ],
)
def test_a_limit_that_can_not_be_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(orc.SpecError, match=message):
        orc.IoLimit(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size=0: must be more than 0"),
        ({"size": float("nan")}, "size=nan: must be finite"),
        ({"size": 1, "refill_time": 0}, "refill_time=0: must be from 0.001 to 86400 seconds"),
        ({"size": 1, "refill_time": 1e6}, "refill_time=.*must be from"),
        ({"size": 1, "one_time_burst": -1}, "one_time_burst=-1: must be from 0"),
        ({"size": True}, "size=True: must be a number"),
    ],
)
def test_a_bucket_that_can_not_be_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(orc.SpecError, match=message):
        orc.TokenBucket(**fields)


def test_a_number_is_a_bucket_of_so_many_a_second():
    assert orc.IoLimit(operations=100, bytes=MiB) == orc.IoLimit(orc.TokenBucket(100, 1.0), orc.TokenBucket(MiB))
    assert orc.TokenBucket(50, refill_time=0.5).rate == 100
    assert str(orc.IoLimit(operations=100, bytes=MiB)) == "100 operations/s and 1,048,576 bytes/s"


def test_of_several_limits_the_lowest_rate_with_the_smallest_size_counts():
    wide = orc.IoLimit(operations=orc.TokenBucket(1000, 1.0, one_time_burst=7))
    slow = orc.IoLimit(operations=orc.TokenBucket(5000, 10.0), bytes=MiB)
    assert tightest_io([wide, slow]) == orc.IoLimit(orc.TokenBucket(1000, 2.0), orc.TokenBucket(MiB))
    assert tightest_io([wide]) is wide
    assert tightest_io([]) is None


def test_disks_have_the_names_that_linux_gives_them_or_their_own():
    many = [orc.Disk(f"{n}") for n in range(28)]
    names = list(disks_of([orc.Rng(), *many]))
    assert (names[0], names[1], names[25:]) == ("vda", "vdb", ["vdz", "vdaa", "vdab"])
    assert list(disks_of([orc.Disk("a", name="root"), orc.Disk("b")])) == ["root", "vdb"]
    with pytest.raises(orc.SpecError, match=r"disks 'a' and 'b' are both named 'vdb': give each another name"):
        disks_of([orc.Disk("a", name="vdb"), orc.Disk("b")])


def test_a_disk_is_on_the_pci_bus_with_a_vector_for_its_queue():
    function = orc.Disk("root.img").wiring().pci
    assert function is not None
    assert (function.device, function.class_code, function.vectors, len(function.bells)) == (0x1042, 0x010000, 2, 1)


# ---- files


def test_a_file_that_can_not_be_a_disk_is_refused_by_name(tmp_path: Path, image: str):
    odd, empty, pipe = tmp_path / "odd", tmp_path / "empty", tmp_path / "pipe"
    odd.write_bytes(bytes(513))
    empty.touch()
    os.mkfifo(pipe)
    for disk, message in [
        (orc.Disk(str(tmp_path / "none")), "none: does not exist: make it first"),
        (orc.Disk(str(tmp_path)), "is a directory"),
        (orc.Disk(str(tmp_path), readonly=True), "is a directory"),
        (orc.Disk(str(odd)), "odd: has 513 bytes: .*multiple of 512"),
        (orc.Disk(str(empty)), "empty: is empty: give it the size"),
        (orc.Disk(str(pipe)), "pipe: is no file or block device"),
        (orc.Disk(str(tmp_path / "new"), base=str(tmp_path / "none")), "none: does not exist"),
        (orc.Disk(str(tmp_path / "new"), base=image, readonly=True), "new: does not exist"),
        (orc.Disk(str(odd), base=image), "odd: is not what a disk with a base has written"),
    ]:
        with pytest.raises(orc.FileError, match=message):
            open_store(disk)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_a_disk_to_be_read(image: str):
    os.chmod(image, 0o400)
    with pytest.raises(orc.FileError, match=r"can't be written .* or use readonly=True"):
        open_store(orc.Disk(image))
    with store(orc.Disk(image, readonly=True)):
        pass


def test_the_lock_is_as_the_kernel_has_it():
    assert struct.calcsize(FLOCK) == 32  # sizeof(struct flock) on x86-64


def test_who_writes_a_file_has_it_alone_and_who_reads_shares_it(image: str):
    with store(orc.Disk(image)):
        for readonly in (False, True):
            with pytest.raises(orc.FileError, match=r"root.img: is in use by another VM.*: stop that VM first"):
                open_store(orc.Disk(image, readonly=readonly))
    with store(orc.Disk(image, readonly=True)), store(orc.Disk(image, readonly=True)):
        with pytest.raises(orc.FileError, match=r"in use by another VM: .*give each VM its own copy"):
            open_store(orc.Disk(image))
    with store(orc.Disk(image)):  # nothing of it is left
        pass


def test_disks_share_a_base_and_have_each_their_own_file(tmp_path: Path, image: str):
    one, two = (orc.Disk(str(tmp_path / name), base=image) for name in ("one", "two"))
    with store(one), store(two):
        with pytest.raises(orc.FileError, match="one: is in use"):
            open_store(one)
        with pytest.raises(orc.FileError, match=r"root\.img: is in use"):
            open_store(orc.Disk(image))
    with store(one):  # as it was left
        pass
    os.truncate(image, 2 * MiB)
    with pytest.raises(orc.FileError, match=r"one: was written over a base of another size than .*root.img"):
        open_store(one)


def test_a_disk_past_the_page_cache_works_or_says_why_not(image: str):
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError:  # this file system has none
        with pytest.raises(orc.FileError, match="O_DIRECT: leave direct=True out"):
            open_store(orc.Disk(image, direct=True))
        return
    with store(orc.Disk(image, direct=True)):
        pass


# ---- the device


def test_a_disk_shows_its_capacity_and_gives_its_file_back_when_it_stops(image: str):
    disk = orc.Disk(image, io_limit=orc.IoLimit(operations=10))
    rig: Any = DeviceRig(disk)
    try:
        device = rig.device
        assert isinstance(device, DiskDevice)
        assert int.from_bytes(device.state().config[:8], "little") == MiB // 512
        assert device.counters().reads == 0
    finally:
        rig.device.stop()
    with store(disk):
        pass


def test_a_disk_goes_on_from_its_state_and_not_from_that_of_one_of_another_size(image: str):
    rig: Any = DeviceRig(orc.Disk(image))
    state = rig.device.state()
    rig.device.restore(state)
    assert rig.device.state() == state
    rig.device.stop()
    os.truncate(image, 2 * MiB)
    rig = DeviceRig(orc.Disk(image))
    try:
        with pytest.raises(orc.SpecError, match=r"a disk of 1048576 bytes, and .*root\.img has 2097152"):
            rig.device.restore(state)
    finally:
        rig.device.stop()


@pytest.mark.parametrize(
    ("offset", "message"), [(20, "with blocks of 4096 bytes, and .* has 512"), (36, "of another kind")]
)
def test_a_disk_does_not_go_on_as_one_that_its_guest_has_not_seen(image: str, offset: int, message: str):
    with DeviceRig(orc.Disk(image)) as rig:
        state = rig.device.state()
        config = state.config[:offset] + (4096).to_bytes(4, "little") + state.config[offset + 4 :]
        with pytest.raises(orc.SpecError, match=message):
            rig.device.restore(attrs.evolve(state, config=config))


@pytest.mark.kvm
async def test_a_vm_holds_its_disk_while_it_runs_and_no_longer(image: str):
    spec = orc.VmSpec(
        name="a",
        irqchip="full",
        boot=orc.FlatImage(code=guest("hello"), load=0x1000, entry=0x1000, mode=16),
        devices=(orc.PciHostBridge(), orc.Disk(image)),
    )
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec, paused=True)
        with pytest.raises(orc.FileError, match="in use by another VM"):
            open_store(orc.Disk(image))
        await vm.stop()
        with store(orc.Disk(image)):
            pass


def test_a_disk_goes_through_the_codec():
    disk = orc.Disk("b", readonly=True, base="a", io_limit=orc.IoLimit(operations=7))
    spec = orc.VmSpec(
        name="a",
        irqchip="full",
        boot=orc.FlatImage(code=b"\xf4", load=0x1000, entry=0x1000, mode=16),
        devices=(orc.PciHostBridge(), disk),
    )
    assert orc.decode(orc.VmSpec, orc.encode(spec)) == spec


@pytest.mark.parametrize("name", ["path", "base"])
def test_raw_disk_that_begins_as_a_qcow2_image_is_refused_unless_its_format_is_said(
    image: str, name: str, tmp_path: Path
):
    with open(image, "r+b") as file:
        file.write(b"QFI\xfb")
    paths = {"path": image} if name == "path" else {"path": str(tmp_path / "new"), "base": image}
    with pytest.raises(orc.FileError, match=r'root\.img: begins as a qcow2 image: say format="qcow2" .*format="raw"'):
        with store(orc.Disk(**paths)):
            pass
    with store(orc.Disk(**paths, format="raw")):
        pass
