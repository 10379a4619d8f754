"""Bus locks of Linux guests, of their programs, of their kernel and of their own guests: counted, held and named."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import trio

import linux_kit
import orchestra as orc
from conftest import bus_lock_problem
from orchestra.cli.guilty import guilty
from test_linux import answer, booted, ended, had, spec_of

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.linux,
    pytest.mark.skipif(bus_lock_problem() is not None, reason=str(bus_lock_problem())),
]

OFF = orc.Shutdown(reason="ACPI power-off")
LINKED_AT = 0xFFFFFFFF81000000
"""Where a kernel's `_text` is without KASLR (CONFIG_PHYSICAL_START, in the kernel's map of itself)."""


def program(name: str) -> bytes:
    return had(linux_kit.program, linux_kit.GUESTS / f"{name}.c")


def initrd_of(folder: Path, modules: tuple[str, ...], **more: bytes) -> Path:
    """An initrd that loads these modules of Debian's kernel, and then those of `more` that are modules."""
    programs = {f"bin/{name}": program(name) for name in ("splitlocks", "works")}
    path = folder / "initrd"
    path.write_bytes(had(linux_kit.initrd, linux_kit.LOAD, {**had(linux_kit.modules, *modules), **programs, **more}))
    return path


@pytest.fixture(scope="module")
def with_locks(tmp_path_factory) -> Path:
    """An initrd for disks, with all that makes split locks."""
    module = had(linux_kit.kernel_module, linux_kit.KERNEL_LOCKS)
    return initrd_of(tmp_path_factory.mktemp("locks"), (*linux_kit.VIRTIO, "virtio_blk"), **{"99-kernlocks.ko": module})


@pytest.fixture(scope="module")
def with_kvm(tmp_path_factory) -> Path:
    """An initrd of a guest that has guests itself."""
    return initrd_of(tmp_path_factory.mktemp("nested"), linux_kit.KVM, **{"bin/nested": program("nested")})


def debian(initrd: Path, *devices: orc.DeviceSpec, cmdline: str = "quiet", vcpus: int = 1) -> orc.VmSpec:
    spec = spec_of(had(linux_kit.debian_kernel), initrd, vcpus=vcpus, cmdline=cmdline)
    return attrs.evolve(spec, devices=(*spec.devices, *devices))


# ---- how many


async def test_locks_of_a_program_are_counted_as_the_host_reports_them(tmp_path):
    """Intel exactly, as Linux makes none of its own; AMD with less where a lock runs again, and a page's first touch
    more. The kernel needs no unpacking: on the Intel host of a box all takes long."""
    (kernel := tmp_path / "vmlinux").write_bytes(had(linux_kit.vmlinux, had(linux_kit.debian_kernel)))
    (initrd := tmp_path / "initrd").write_bytes(had(linux_kit.initrd, "", {"bin/splitlocks": program("splitlocks")}))
    spec = attrs.evolve(spec_of(kernel, initrd, cmdline="quiet nokaslr"), memory=96 * orc.MiB)
    async with orc.open_fleet(backend="kvm", bus_locks="require") as fleet:
        vm = await booted(fleet, spec)
        before = vm.statistics().bus_locks
        assert await answer(vm, "splitlocks 1000") == "1000 split locks\n"
        counted = vm.statistics().bus_locks - before
        exact = vm.statistics().bus_lock_detection == "trap-like"
        assert 999 <= counted <= 1001 if exact else 980 <= counted <= 1001
        await vm.stop()


# ---- which instruction


@pytest.mark.parametrize("kaslr", [False, True], ids=["nokaslr", "KASLR"])
async def test_guilty_names_instructions_of_a_program_and_of_the_kernel_by_symbol(with_locks, tmp_path, capsys, kaslr):
    """The kernel's own symbols are from the guest's /proc/kallsyms: Debian's System.map has none."""
    (image := tmp_path / "disk.img").write_bytes(bytes(32 * orc.MiB))
    (elf := tmp_path / "splitlocks").write_bytes(program("splitlocks"))
    spec = debian(with_locks, orc.Disk(str(image)), cmdline=f"quiet noreplace-smp{'' if kaslr else ' nokaslr'}")
    journal = tmp_path / "journal.db"
    async with orc.open_fleet(backend="kvm", bus_locks="require", journal=journal) as fleet:
        vm = await booted(fleet, attrs.evolve(spec, sample_every=1))
        before = vm.statistics().bus_locks
        assert await answer(vm, "splitlocks 1000") == "1000 split locks\n"
        assert await answer(vm, "echo 1000 >/proc/kernlocks") == ""
        assert 0.98 * 2500 <= vm.statistics().bus_locks - before <= 2500
        assert await answer(vm, "cat /proc/kallsyms >/dev/vda && sync") == ""
        assert await ended(vm, "poweroff -f") == OFF

    symbols = image.read_bytes().rstrip(b"\0")
    (tmp_path / "kallsyms").write_bytes(symbols)
    text = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.split()[2] == b"_text")
    assert (text != LINKED_AT) is kaslr

    def shown(system_map: Path, slide: int = 0) -> dict[str, dict[str, object]]:
        assert guilty("linux", journal, symbols=[elf] * (not slide) + [system_map], slide=slide, as_json=True) == 0
        found = json.loads(capsys.readouterr().out)["instructions"]
        return {one["symbol"] or hex(one["address"]): one for one in found if one["weight"] > 100}

    found = shown(tmp_path / "kallsyms")
    assert sorted(found) == ["_raw_spin_lock", "kernlocks_own", "split_lock"]
    for name, cpl, weight, code in (
        ("split_lock", 3, 1000, "lock inc dword"),
        ("_raw_spin_lock", 0, 1000, "lock cmpxchg"),
        ("kernlocks_own", 0, 500, "lock inc dword"),
    ):
        one = found[name]
        assert (one["cpl"], one["mode"], one["exact"], one["nested"]) == (cpl, 64, True, False)
        assert 0.97 * weight <= one["weight"] <= 1.01 * weight
        assert one["text"].startswith(code) if one["text"] else not one["code"]

    # A System.map as it was linked, and how far the kernel has moved.
    slid = b"\n".join(
        b"%x %s" % (int(line.split()[0], 16) - (text - LINKED_AT), line.split(maxsplit=1)[1])
        for line in symbols.splitlines()
        if int(line.split()[0], 16) >= LINKED_AT
    )
    (tmp_path / "System.map").write_bytes(slid)
    if kaslr:
        assert "_raw_spin_lock" not in shown(tmp_path / "System.map")
        assert shown(tmp_path / "System.map", slide=text - LINKED_AT)["_raw_spin_lock"]["cpl"] == 0


# ---- a guest's guest


async def test_locks_of_a_nested_guest_are_counted_held_and_told_apart(with_kvm, tmp_path):
    journal = tmp_path / "journal.db"
    async with orc.open_fleet(backend="kvm", bus_locks="require", journal=journal) as fleet:
        vm = await booted(fleet, attrs.evolve(debian(with_kvm), sample_every=1))
        assert "SVM: kvm: Nested Paging enabled" in await answer(vm, "dmesg | grep SVM")  # as CPUID tells it
        before = vm.statistics().bus_locks
        async with fleet.exits(orc.BusLock, vm=vm) as exits:
            assert await answer(vm, "splitlocks 200") == "200 split locks\n"
            assert await answer(vm, "nested 1000") == "exit 5, 1000 split locks in a nested guest\n"  # KVM_EXIT_HLT
            with trio.fail_after(60):
                whose = []
                while len(whose) < vm.statistics().bus_locks - before:
                    whose.append((await exits.receive()).guest_mode)
        assert 0.98 * 1000 <= whose.count(True) <= 1.02 * 1000  # a page's first touch is reported once more
        assert 0.98 * 200 <= whose.count(False) <= 200
        await vm.set_limit(orc.Limit(rate=200, burst=1))
        began = trio.current_time()
        assert await answer(vm, "nested 600") == "exit 5, 600 split locks in a nested guest\n"
        assert trio.current_time() - began >= 0.98 * 600 / 200
        await vm.set_limit(None)
        nested = [one for one in vm.profile().instructions if one.nested]
        assert len(nested) == 1
        assert (nested[0].address, nested[0].mode, nested[0].cpl) == (0x1006, 16, 0)
        assert 0.98 * 1600 <= nested[0].weight <= 1.02 * 1600
        assert nested[0].code == bytes.fromhex("f0ff063f20")
        assert await ended(vm, "poweroff -f") == OFF


# ---- a limit, and who else is there


@pytest.mark.smp
async def test_limit_holds_the_rate_and_nothing_else_of_the_guest(with_locks):
    """The vCPU that locks waits, and the other one of the guest goes on."""
    async with orc.open_fleet(backend="kvm", bus_locks="require") as fleet:
        vm = await booted(fleet, debian(with_locks, vcpus=2))
        await vm.set_limit(orc.Limit(rate=100, burst=1))
        await vm.console.write("splitlocks 800 0 1 & works 4 0; wait; echo done\n")
        await vm.console.wait_for("rounds in", timeout=60)
        # the worker was done in its time, while the locks need twice as long
        began, locks = trio.current_time(), vm.statistics().bus_locks
        await vm.console.wait_for("800 split locks", timeout=60)
        seconds, counted = trio.current_time() - began, vm.statistics().bus_locks - locks
        assert counted > 100
        assert counted / 100 * 0.99 - 0.05 <= seconds
        held = [vcpu.throttled_seconds for vcpu in vm.statistics().vcpus]
        assert held[1] > 5
        assert held[0] == 0
        await vm.set_limit(None)
        assert await ended(vm, "poweroff -f") == OFF
