"""The core makes small VMs: what happens if that is cancelled, or the host has no thread or descriptor for it."""

from __future__ import annotations

import errno
import os

import pytest
import trio

import orchestra as orc
from conftest import Stage
from orchestra.native import lib

pytestmark = pytest.mark.kvm

KVM = Stage("kvm")


class Core:
    """The core, with one function replaced."""

    def __init__(self, **functions: object) -> None:
        vars(self).update(functions)

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


async def test_a_launch_that_is_cancelled_while_the_core_makes_its_vm_leaves_nothing(nothing_left, monkeypatch):
    begun, scope = trio.Event(), trio.CancelScope()

    def begin(*args: object) -> int:
        begun.set()
        return int(lib.orc_builder_begin(*args))

    async with KVM.open() as fleet:
        with monkeypatch.context() as patch:
            patch.setattr("orchestra.machine.builder.lib", Core(orc_builder_begin=begin))

            async def launch() -> None:
                with scope:
                    await fleet.launch(KVM.spec("spin"))

            async with trio.open_nursery() as launches:
                launches.start_soon(launch)
                await begun.wait()
                scope.cancel()
        assert scope.cancelled_caught
        assert dict(fleet.vms) == {}
        assert await (await fleet.launch(KVM.spec("halt"))).wait() == orc.Halted()


async def test_without_a_thread_for_it_the_vm_is_made_all_the_same(nothing_left, monkeypatch):
    monkeypatch.setattr("orchestra.machine.builder.lib", Core(orc_builder_begin=lambda *args: -errno.EAGAIN))
    async with KVM.open() as fleet:
        assert await (await fleet.launch(KVM.spec("halt"))).wait() == orc.Halted()


async def test_no_descriptor_to_be_told_by_is_an_error_that_names_the_limit(nothing_left, monkeypatch):
    def eventfd(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with KVM.open() as fleet:
        with monkeypatch.context() as patch:
            patch.setattr(os, "eventfd", eventfd)
            with pytest.raises(orc.ResourceLimit, match="ulimit -n"):
                await fleet.launch(KVM.spec("halt"))
        assert dict(fleet.vms) == {}
        assert await (await fleet.launch(KVM.spec("halt"))).wait() == orc.Halted()


async def test_many_launches_at_once_all_succeed(nothing_left):
    async with KVM.open() as fleet:
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(fleet.launch, KVM.spec("halt", f"vm-{number}"))
        assert [await vm.wait() for vm in fleet.vms.values()] == [orc.Halted()] * 40


async def test_a_vm_that_the_kernel_refuses_half_way_says_at_which_call_and_leaves_nothing(nothing_left, monkeypatch):
    async with KVM.open() as fleet:
        with monkeypatch.context() as patch:
            patch.setattr("orchestra.backend.kvm.machine.TSS_ADDRESS", 0xFFFF_F000)
            with pytest.raises(orc.KvmError, match="KVM_SET_TSS_ADDR"):
                await fleet.launch(KVM.spec("halt"))
        assert dict(fleet.vms) == {}
        assert await (await fleet.launch(KVM.spec("halt"))).wait() == orc.Halted()
