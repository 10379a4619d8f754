"""A fleet and its VMs as asyncio programs see them: each method calls the method of the same name on the trio side.

tests/test_aio_mirror.py compares names, parameters, types and documentation with the originals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Literal

from ..backend import Backend, Detection
from ..fleet import fleet as house
from ..fleet.statistics import FleetStatistics
from ..machine import vm as machine
from ..machine.desired import Desired
from ..machine.devices.bus import Device
from ..machine.vm import VmStatistics
from ..model.actions import Action, Applied, Outcome, State
from ..model.exits import Exit
from ..model.spec import Limit, Meter, Tenant, VmSpec
from ..policy import Guard, Policy, PolicySpec
from ..profile import Profile, Symbols
from .block import Block
from .bridge import Bridge
from .streams import Console, ConsolePort, Exits, Requests, Watch
from .wrapper import Wrapper, mirrors, wrapped

__all__ = ["Fleet", "Vm"]


@mirrors(house.Fleet)
class Fleet(Wrapper[house.Fleet]):
    """In asyncio: opened by `orchestra.aio.open_fleet`, and used by any task of that loop."""

    __slots__ = ()

    @property
    def vms(self) -> Mapping[str, Vm]:
        return _Vms(self._bridge, self._inner)

    async def launch(
        self,
        spec: VmSpec,
        *,
        paused: bool = False,
        devices: Iterable[tuple[range | None, range | None, Device]] = (),
    ) -> Vm:
        launch = partial(self._inner.launch, spec, paused=paused, devices=devices)
        vm = await self._bridge.call(launch, undo=_undo_launch)
        return wrapped(Vm, self._bridge, vm)

    def vm(self, name: str) -> Vm:
        return wrapped(Vm, self._bridge, self._bridge.sync(self._inner.vm, name))

    def exits(
        self,
        *kinds: type[Exit],
        vm: Vm | str | None = None,
        capacity: int = 65536,
        drop: Literal["oldest", "newest"] = "oldest",
    ) -> AbstractAsyncContextManager[Exits]:
        of = vm._inner if isinstance(vm, Vm) else vm
        subscribe = partial(self._inner.exits, *kinds, vm=of, capacity=capacity, drop=drop)
        return Block(self._bridge, subscribe, partial(Exits, self._bridge))

    def watch(self, interval: float = 1.0) -> AbstractAsyncContextManager[Watch]:
        return Block(self._bridge, partial(self._inner.watch, interval), partial(Watch, self._bridge))

    async def apply(self, action: Action, *, policy: str | None = None) -> Applied:
        return await self._bridge.call(partial(self._inner.apply, action, policy=policy))

    def actions(self) -> tuple[Applied, ...]:
        return self._bridge.sync(self._inner.actions)

    async def set_limit(
        self,
        limit: Limit | None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        tenant: str | None = None,
        vm: str | None = None,
        vcpu: int | None = None,
    ) -> None:
        await self._bridge.call(partial(self._inner.set_limit, limit, meter=meter, tenant=tenant, vm=vm, vcpu=vcpu))

    def set_limit_nowait(
        self,
        limit: Limit | None,
        *,
        meter: Meter | str = Meter.BUS_LOCKS,
        tenant: str | None = None,
        vm: str | None = None,
        vcpu: int | None = None,
    ) -> None:
        self._bridge.sync(self._inner.set_limit_nowait, limit, meter=meter, tenant=tenant, vm=vm, vcpu=vcpu)

    def check_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, tenant: str | None = None
    ) -> None:
        self._bridge.sync(self._inner.check_limit, limit, meter=meter, tenant=tenant)

    async def add_tenant(self, tenant: Tenant) -> None:
        await self._bridge.call(partial(self._inner.add_tenant, tenant))

    async def change_tenant(self, tenant: Tenant) -> None:
        await self._bridge.call(partial(self._inner.change_tenant, tenant))

    async def remove_tenant(self, name: str) -> None:
        await self._bridge.call(partial(self._inner.remove_tenant, name))

    async def set_policies(self, policies: Sequence[Policy | PolicySpec], guard: Guard | None = None) -> None:
        await self._bridge.call(partial(self._inner.set_policies, policies, guard))

    @property
    def backend(self) -> Backend:
        return self._inner.backend

    @property
    def bus_locks(self) -> bool:
        return self._inner.bus_locks

    @property
    def bus_lock_detection(self) -> Detection | None:
        return self._inner.bus_lock_detection

    @property
    def limit(self) -> Limit | None:
        return self._bridge.sync(lambda: self._inner.limit)

    @property
    def exit_limit(self) -> Limit | None:
        return self._bridge.sync(lambda: self._inner.exit_limit)

    @property
    def answer_limit(self) -> Limit | None:
        return self._bridge.sync(lambda: self._inner.answer_limit)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._bridge.sync(lambda: self._inner.tenants)

    def now(self) -> int:
        return self._bridge.sync(self._inner.now)

    def statistics(self) -> FleetStatistics:
        return self._bridge.sync(self._inner.statistics)

    async def stop(self, reason: str = "the fleet was stopped") -> Mapping[str, Outcome]:
        return await self._bridge.call(self._inner.stop, reason)


async def _undo_launch(vm: machine.Vm) -> None:
    await vm.stop("its launch was cancelled")


class _Vms(Mapping[str, "Vm"]):
    """`Fleet.vms`: a live view of the fleet's VMs."""

    __slots__ = ("_bridge", "_fleet")

    def __init__(self, bridge: Bridge, fleet: house.Fleet) -> None:
        self._bridge = bridge
        self._fleet = fleet

    def __getitem__(self, name: str) -> Vm:
        return wrapped(Vm, self._bridge, self._bridge.sync(self._fleet.vms.__getitem__, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._bridge.sync(tuple, self._fleet.vms))

    def __len__(self) -> int:
        return len(self._fleet.vms)

    def __repr__(self) -> str:
        return repr(dict(self))


@mirrors(machine.Vm)
class VmAttributes(Wrapper[machine.Vm]):
    """In asyncio: what a VM is, without its methods."""

    __slots__ = ()

    @property
    def spec(self) -> VmSpec:
        return self._inner.spec

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def tenant(self) -> str:
        return self._inner.tenant

    @property
    def restarts(self) -> int:
        return self._inner.restarts

    @property
    def desired(self) -> Desired:
        return self._bridge.sync(lambda: self._inner.desired)

    @property
    def quiesced(self) -> bool:
        return self._bridge.sync(lambda: self._inner.quiesced)

    @property
    def console(self) -> Console:
        return wrapped(Console, self._bridge, self._inner.console)

    @property
    def ports(self) -> Mapping[str, ConsolePort]:
        return {name: wrapped(ConsolePort, self._bridge, port) for name, port in self._inner.ports.items()}

    @property
    def outcome(self) -> Outcome | None:
        return self._bridge.sync(lambda: self._inner.outcome)

    @property
    def state(self) -> State:
        return self._bridge.sync(lambda: self._inner.state)

    @property
    def throttled(self) -> bool:
        return self._bridge.sync(lambda: self._inner.throttled)


@mirrors(machine.Vm)
class Vm(VmAttributes):
    """In asyncio: used by any task of the loop."""

    __slots__ = ()

    async def wait(self) -> Outcome:
        return await self._bridge.call(self._inner.wait)

    async def pause(self, *, quiesce: bool = True) -> None:
        await self._bridge.call(partial(self._inner.pause, quiesce=quiesce))

    async def resume(self) -> None:
        await self._bridge.call(self._inner.resume)

    async def reset(self, reason: str = "reset()") -> None:
        await self._bridge.call(self._inner.reset, reason)

    async def stop(self, reason: str = "stop()") -> Outcome:
        return await self._bridge.call(self._inner.stop, reason)

    async def power_button(self) -> None:
        await self._bridge.call(self._inner.power_button)

    async def shutdown(self, *, timeout: float = 10.0) -> Outcome:  # noqa: ASYNC109 (what comes then is no error)
        return await self._bridge.call(partial(self._inner.shutdown, timeout=timeout))

    async def set_limit(
        self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS, vcpu: int | None = None
    ) -> None:
        await self._bridge.call(partial(self._inner.set_limit, limit, meter=meter, vcpu=vcpu))

    async def set_memory(self, memory: int | None) -> None:
        await self._bridge.call(self._inner.set_memory, memory)

    def cap_cpu(self, share: float | None) -> None:
        self._bridge.sync(self._inner.cap_cpu, share)

    def isolate(self, isolated: bool = True) -> None:
        self._bridge.sync(self._inner.isolate, isolated)

    async def log_dirty(self, on: bool = True) -> None:
        await self._bridge.call(self._inner.log_dirty, on)

    def report_work(self, units: float) -> None:
        self._bridge.sync(self._inner.report_work, units)

    def attach(self, device: Device, *, ports: range | None = None, mmio: range | None = None) -> None:
        self._bridge.sync(self._inner.attach, device, ports=ports, mmio=mmio)

    def requests(
        self, *, ports: range | None = None, mmio: range | None = None
    ) -> AbstractAsyncContextManager[Requests]:
        claim = partial(self._inner.requests, ports=ports, mmio=mmio)
        return Block(self._bridge, claim, partial(Requests, self._bridge))

    def read_memory(self, address: int, size: int) -> bytes:
        return self._bridge.sync(self._inner.read_memory, address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        self._bridge.sync(self._inner.write_memory, address, data)

    def registers(self, vcpu: int = 0) -> Any:
        return self._bridge.sync(self._inner.registers, vcpu)

    async def inspect(self, vcpu: int = 0) -> Any:
        return await self._bridge.call(self._inner.inspect, vcpu)

    def set_sampling(self, every: int) -> None:
        self._bridge.sync(self._inner.set_sampling, every)

    def profile(self, symbols: Iterable[Symbols] = ()) -> Profile:
        return self._bridge.sync(self._inner.profile, symbols)

    def statistics(self) -> VmStatistics:
        return self._bridge.sync(self._inner.statistics)

    async def kernel_statistics(self) -> Mapping[str, float]:
        return await self._bridge.call(self._inner.kernel_statistics)
