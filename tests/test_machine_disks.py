"""The disks of VMs in a fleet: whose limits they keep to, who changes them, and what is written down of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

import orchestra as orc
from conftest import guest
from orchestra.cli.journal import line
from orchestra.config import parse_rules
from orchestra.journal import read_journal
from orchestra.machine.disks import LEVELS
from orchestra.native import lib

SLOW, SLOWER = orc.IoLimit(operations=100, bytes=orc.MiB), orc.IoLimit(operations=50)
BOTH = orc.IoLimit(operations=50, bytes=orc.MiB)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., orc.VmSpec]:
    """A VM with disks of these fields, that does nothing with them."""

    def make(*disks: dict[str, object], name: str = "a", **fields: object) -> orc.VmSpec:
        made = []
        for number, more in enumerate(disks):
            path = tmp_path / f"{name}{number}"
            path.touch()
            os.truncate(path, orc.MiB)
            made.append(orc.Disk(str(path), **more))  # type: ignore[arg-type]
        return orc.VmSpec(
            name=name,
            irqchip="full",
            boot=orc.FlatImage(code=guest("hello"), load=0x1000, entry=0x1000, mode=16),
            devices=(orc.PciHostBridge(), *made),
            **fields,  # type: ignore[arg-type]
        )

    return make


def test_levels_are_those_of_the_core():
    assert len(LEVELS) == lib.ORC_BLK_LEVELS


def test_two_disks_of_one_name_are_refused_with_the_vm(spec):
    with pytest.raises(orc.SpecError, match=r"devices: disks .*a0' and .*a1' are both named 'x'"):
        spec({"name": "x"}, {"name": "x"})


@pytest.mark.kvm
async def test_limit_of_a_disk_changes_and_outlives_a_reset(spec):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec({"io_limit": SLOW}, {"name": "data"}), paused=True)
        assert list(vm.disks) == ["vda", "data"]
        first, second = vm.disks.values()
        assert (first.limit, second.limit) == (SLOW, None)
        assert second.spec.name == "data"
        second.set_limit(SLOWER)  # of a disk that had none
        first.set_limit(None)
        with pytest.raises(orc.SpecError, match="limit=5: must be an IoLimit"):
            second.set_limit(5)  # type: ignore[arg-type]
        await vm.reset()
        assert (first.limit, second.limit) == (None, SLOWER)
        assert second.statistics() == orc.DiskStatistics()
        assert vm.desired.io_limits == (orc.AskedIoLimit(None, SLOWER, "data"),)
        assert orc.decode(orc.Desired, orc.encode(vm.desired)) == vm.desired
        await vm.stop()
        with pytest.raises(orc.StateError, match="'a' has ended: it has no limit to change"):
            second.set_limit(None)


@pytest.mark.kvm
async def test_each_policy_has_a_limit_of_its_own_and_the_tightest_counts(spec):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec({"io_limit": SLOW}), paused=True)
        disk = vm.disks["vda"]
        act = orc.SetIoLimit(vm="a", disk="vda", io_limit=SLOWER, generation=vm.generation)
        assert (await fleet.apply(act, policy="p")).outcome == "done"
        assert disk.limit == BOTH
        disk.set_limit(None)  # the spec's own: what the policy asks for stays
        assert disk.limit == SLOWER
        assert [one.by for one in vm.desired.io_limits] == ["p"]
        await fleet.apply(attrs.evolve(act, io_limit=None), policy="q")
        assert disk.limit == SLOWER
        await fleet.apply(attrs.evolve(act, io_limit=None), policy="p")
        assert disk.limit is None
        wrong = await fleet.apply(orc.SetIoLimit(vm="a", disk="sda", io_limit=SLOW))
        assert wrong.error == "disk='sda': vm 'a' has no such disk; there are: vda"
        none = await fleet.launch(spec(name="b"), paused=True)
        assert not none.disks
        assert "has no disk to limit" in str((await fleet.apply(orc.SetIoLimit(vm="b", io_limit=SLOW))).error)


class Once:
    """A policy that limits the disks of every VM together."""

    name, interval = "once", 0.01

    def decide(self, facts: orc.Facts) -> list[orc.Action]:
        return [orc.SetIoLimit(vm=vm.name, io_limit=SLOW, reason="too fast") for vm in facts.vms]


@pytest.mark.kvm
async def test_limits_of_a_removed_policy_go_with_it(spec):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec({}), paused=True)
        await fleet.set_policies([Once()])
        await fleet.apply(orc.SetIoLimit(vm="a", io_limit=SLOW), policy="once")
        assert vm.desired.io_limits_at(None)
        await fleet.set_policies([])
        assert not vm.desired.io_limits


@pytest.mark.kvm
async def test_groups_and_tenants_have_limits_that_change(spec):
    tenant = orc.Tenant("acme", io_limit=SLOW)
    async with orc.open_fleet(
        backend="kvm", bus_locks="off", tenants=[tenant], io_groups={"gold": SLOW, "free": None}
    ) as fleet:
        with pytest.raises(orc.SpecError, match=r"vm 'b', disk 'vda': io_group='lead': .*no such group.*free, gold"):
            await fleet.launch(spec({"io_group": "lead"}, name="b"))
        served = orc.VmSpec(
            name="b",
            boot=orc.FlatImage(code=b"\xf4"),
            tenant="acme",
            irqchip="full",
            devices=[orc.PciHostBridge(), orc.VhostUserDisk("blk.sock")],
        )
        with pytest.raises(
            orc.SpecError, match=r"io_limit of tenant 'acme': it does not hold .*VhostUserDisk of vm 'b'"
        ):
            await fleet.launch(served)
        assert "b" not in fleet.vms
        vm = await fleet.launch(spec({"io_group": "gold"}, {"io_group": "free"}, tenant="acme"), paused=True)
        assert vm.disks["vda"].limit is None  # the disk's own
        for where in ({"group": "gold"}, {"group": "free"}, {"tenant": "acme"}):
            assert (await fleet.apply(orc.SetIoLimit(io_limit=SLOWER, **where), policy="p")).outcome == "done"
        assert "no such group of disks" in str((await fleet.apply(orc.SetIoLimit(io_limit=None, group="x"))).error)
        await fleet.change_tenant(attrs.evolve(tenant, io_limit=SLOWER))
        assert fleet.tenants["acme"].io_limit == SLOWER
        assert fleet.actions()[-1].action == orc.SetIoLimit(
            tenant="acme", io_limit=SLOWER, reason="change_tenant('acme')"
        )
        await vm.stop()
        await fleet.remove_tenant("acme")


@pytest.mark.kvm
async def test_journal_has_what_disks_were_limited_to_and_why_says_so(spec, tmp_path):
    path = tmp_path / "journal"
    async with orc.open_fleet(backend="kvm", bus_locks="off", journal=path, io_groups={"gold": SLOW}) as fleet:
        vm = await fleet.launch(spec({"io_limit": SLOW}), paused=True)
        vm.disks["vda"].set_limit(None)
        await fleet.apply(orc.SetIoLimit(vm="a", io_limit=SLOWER, reason="it is night"), policy="p")
    with read_journal(path) as journal:
        rows = [row for row in journal.actions() if row.kind == "SetIoLimit"]
        lines = [line(row).split("  ", 1)[1] for row in rows]
    assert lines == [
        "disks of group gold: SetIoLimit 100 operations/s and 1,048,576 bytes/s: given by open_fleet()",
        "a disk vda: SetIoLimit 100 operations/s and 1,048,576 bytes/s: given by its spec",
        "a disk vda: SetIoLimit none: set_limit()",
        "a: SetIoLimit 50 operations/s by p: it is night",
    ]
    assert [row.given for row in rows] == ["open_fleet", "spec", None, None]


RULES = """
[tenants.acme]
io_limit = { operations = 1000, bytes = { size = 1048576, refill_time = 0.5, one_time_burst = 5e6 } }

[[policies]]
kind = "ladder"
steps = [
    { rung = "warn", when = { signal = "exits", over = 1000 } },
    { rung = "throttle_io", when = { signal = "exits", over = 1000 }, dwell = 5, io_limit = { operations = 100 } },
]
"""


def test_rules_have_limits_of_disks():
    rules = parse_rules(RULES)
    bucket = orc.TokenBucket(orc.MiB, 0.5, 5e6)
    assert rules.tenants["acme"].io_limit == orc.IoLimit(operations=1000, bytes=bucket)
    (ladder,) = rules.policies
    assert ladder.steps[1].io_limit == orc.IoLimit(operations=100)  # type: ignore[attr-defined]
    wrong = RULES.replace("io_limit = { operations = 100 }", "cpu = 0.5")
    with pytest.raises(orc.SpecError, match=r"steps\[1\].io_limit: None: a throttle of disks needs an IoLimit"):
        parse_rules(wrong)
    with pytest.raises(orc.SpecError, match=r"operations: 'many': must be so much a second, or a table"):
        parse_rules(RULES.replace("operations = 1000", "operations = 'many'"))


FLOOD = bytes.fromhex(
    "66baf80c b804080080 ef"  # out 0xcf8: the command register of device 1
    "66bafc0c b806000000 ef"  # out 0xcfc: it decodes memory, and is a bus master
    "c7050030 00c000000000 ebf4"  # again and again: a write to the notify register of its queue
)
"""In 32-bit mode. The BAR is where orchestra places it."""


def io_thread_of(vm: orc.Vm) -> int:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            if (task / "comm").read_text().strip() == f"{vm.name}/io":
                found.append(int(task.name))
    return max(found)  # one of a VM before may be on its way out still


def cpu_of(thread: int) -> float:
    """Seconds of CPU that it has used."""
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.kvm
@pytest.mark.parametrize("limited", [False, True], ids=["no limit", "exit_limit"])
async def test_guest_that_floods_a_notify_register_keeps_its_io_thread_no_cpu(spec, limited):
    given = spec({}, exit_limit=orc.Limit(rate=100, burst=10) if limited else None)
    given = attrs.evolve(given, boot=orc.FlatImage(code=FLOOD, load=0x1000, entry=0x1000, mode=32))
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(given)
        thread = io_thread_of(vm)
        while cpu_of(thread) == 0:  # noqa: ASYNC110 (it is the guest's doing)
            await trio.sleep(0.01)
        guest_began, began, used = vm.statistics().exits, trio.current_time(), cpu_of(thread)
        await trio.sleep(1)
        share = (cpu_of(thread) - used) / (trio.current_time() - began)
        assert 0 < share < 0.15
        # The kernel takes the notifications: neither the core nor Python sees an exit of them.
        assert vm.statistics().exits.get("mmio", 0) == guest_began.get("mmio", 0)
        await vm.pause()
        assert vm.quiesced
        await vm.resume()
        await vm.stop()


@pytest.mark.kvm
async def test_io_thread_is_isolated_with_its_vm(spec):
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("there is one CPU only: none to spare")
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(spec({}), paused=True)
        thread = io_thread_of(vm)
        vm.isolate()
        assert os.sched_getaffinity(thread) == {max(everywhere)}
        vm.isolate(False)
        assert os.sched_getaffinity(thread) == everywhere
        vm.cap_cpu(0.5)
        await vm.reset()  # the next run's thread is capped from the start
        vm.cap_cpu(None)
        await vm.stop()
