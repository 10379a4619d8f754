"""The names that scripts, examples and checks rely on: they are there, with these parameters, and nothing is hidden."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import attrs
import pytest

import orchestra as orc
from orchestra.backend.scripted import bus_lock, io_read, io_write
from orchestra.model import actions, errors, exits

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(orc.__path__, "orchestra.")
    if not found.name.startswith(("orchestra.cli", "orchestra.native._", "orchestra.native.tests"))
)


def test_all_of_the_front_door_is_exactly_what_it_imports():
    tree = ast.parse(Path(orc.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert sorted(imported) == sorted(orc.__all__)
    assert all(hasattr(orc, name) for name in orc.__all__)
    assert len(orc.__all__) == len(set(orc.__all__))


@pytest.mark.parametrize("module", [actions, errors, exits], ids=lambda module: module.__name__)
def test_whole_vocabulary_is_at_the_front_door(module):
    assert set(module.__all__) <= set(orc.__all__)
    assert all(getattr(orc, name) is getattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_lists_is_there(name):
    module = importlib.import_module(name)
    assert [entry for entry in getattr(module, "__all__", ()) if not hasattr(module, entry)] == []


@pytest.mark.parametrize("name", ["exits", "errors", "actions"])
def test_vocabulary_lists_every_class_that_it_has(name):
    module = importlib.import_module(f"orchestra.model.{name}")
    public = {
        n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__ and n[0] != "_"
    }
    assert public <= set(module.__all__)


@pytest.mark.parametrize("name", orc.__all__)
def test_every_public_class_and_function_is_documented(name):
    thing = getattr(orc, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)


# ---- parameters


def parameters(function: Callable[..., object]) -> dict[str, object]:
    """Its parameters with their defaults (`...`: none), without self."""
    return {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def keyword_only(function: Callable[..., object]) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in found if parameter.kind is parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (orc.open_fleet, {"backend": "auto", "limit": None, "tenants": (), "policies": (), "bus_locks": "auto"}),
        (orc.Fleet.launch, {"spec": ..., "paused": False}),
        (orc.Fleet.exits, {"kinds": ..., "vm": None}),
        (orc.Fleet.apply, {"action": ...}),
        (orc.Fleet.statistics, {}),
        (orc.Vm.requests, {"ports": None, "mmio": None}),
        (orc.Vm.pause, {}),
        (orc.Vm.resume, {}),
        (orc.Vm.set_limit, {"limit": ...}),
        (orc.Vm.wait, {}),
        (orc.Vm.stop, {}),
        (orc.Vm.statistics, {}),
        (orc.Vm.read_memory, {"address": ..., "size": ...}),
        (orc.Vm.write_memory, {"address": ..., "data": ...}),
        (orc.Vm.registers, {"vcpu": 0}),
        (orc.Request.answer, {"data": None}),
        (orc.Limit, {"rate": ..., "burst": None, "max_delay": 10.0}),
        (orc.FlatImage, {"code": ..., "load": 0x1000, "entry": None, "mode": 16}),
        (orc.Tenant, {"name": ..., "weight": 1.0, "limit": None}),
        (orc.Throttle, {"vm": None, "limit": ..., "reason": ""}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_parameters_are_those_that_scripts_use(function, expected):
    assert expected.items() <= parameters(function).items()


def test_spec_is_made_by_keywords():
    wanted = {"name", "tenant", "memory", "vcpus", "limit", "exit_limit", "boot"}
    assert wanted <= keyword_only(orc.VmSpec)
    required = {name for name, default in parameters(orc.VmSpec).items() if default is ...}
    assert required == {"name", "boot"}


def test_fleet_is_opened_by_keywords():
    assert keyword_only(orc.open_fleet) == set(parameters(orc.open_fleet))
    assert issubclass(type(orc.open_fleet(backend="scripted")), AbstractAsyncContextManager)


@pytest.mark.parametrize("name", ["pause", "resume", "set_limit", "wait", "stop"])
def test_what_may_wait_is_async_and_what_may_not_is_not(name):
    assert inspect.iscoroutinefunction(getattr(orc.Vm, name))


@pytest.mark.parametrize("name", ["statistics", "read_memory", "write_memory", "registers"])
def test_what_can_not_block_is_not_async(name):
    assert not inspect.iscoroutinefunction(getattr(orc.Vm, name))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (orc.FleetStatistics, {"bus_locks", "throttled_seconds", "released", "vms", "vcpus", "missed"}),
        (orc.VmStatistics, {"state", "bus_locks", "throttled_seconds", "released", "exits", "vcpus"}),
        (orc.VcpuStatistics, {"state", "bus_locks", "throttled_seconds", "released", "exits"}),
        (orc.BusLock, {"vm", "vcpu", "time", "rip"}),
        (orc.Failed, {"reason", "registers"}),
    ],
)
def test_fields_are_those_that_scripts_read(kind, fields):
    assert fields <= {field.name for field in attrs.fields(kind)}


@pytest.mark.parametrize("kind", [orc.FleetStatistics, orc.TenantStatistics, orc.VmStatistics, orc.VcpuStatistics])
def test_statistics_are_frozen(kind):
    made = kind(*range(len(attrs.fields(kind))))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(made, attrs.fields(kind)[0].name, 1)


def test_request_has_what_a_script_needs_to_answer_it():
    assert {"vcpu", "address", "size", "write", "data"} <= set(orc.Request.__slots__)


# ---- the same, as a script would write it


async def test_a_fleet_script_as_the_design_shows_it(autojump_clock):
    script = {"web-1": [io_write(0xE9, b"h"), io_read(0x500), *[bus_lock(after=0.001, rip=0x1234)] * 10]}
    async with orc.open_fleet(
        backend=orc.ScriptedBackend(script),
        limit=orc.Limit(rate=1000, burst=100, max_delay=1.0),
        tenants={"acme": orc.Limit(rate=500)},
        policies=[],
        bus_locks="require",
    ) as fleet:
        vm = await fleet.launch(
            orc.VmSpec(
                name="web-1",
                tenant="acme",
                memory=64 * orc.MiB,
                vcpus=1,
                limit=orc.Limit(rate=200, burst=20),
                exit_limit=None,
                boot=orc.FlatImage(code=b"\xf4", load=0x1000, entry=0x1000, mode=16),
                devices=[orc.DebugConsole()],
            ),
            paused=True,
        )
        assert fleet.vms == {"web-1": vm}
        async with vm.requests(ports=range(0x500, 0x510)) as requests:
            async with fleet.exits(orc.BusLock, vm=vm) as locks:
                await vm.resume()
                request = await anext(requests)
                assert (request.address, request.size, request.write) == (0x500, 1, False)
                await fleet.apply(orc.Throttle(vm="web-1", limit=orc.Limit(rate=10), reason="noisy"))
                await vm.set_limit(orc.Limit(rate=50))
                request.answer(b"\x2a")
                seen = [(lock.vm, lock.vcpu, lock.rip) async for lock in locks]
        assert seen == [("web-1", 0, 0x1234)] * 10
        assert await vm.wait() == orc.Halted()
        assert (vm.statistics().bus_locks, fleet.statistics().bus_locks) == (10, 10)
        assert vm.statistics().exits["io"] == 2
        vm.write_memory(0x2000, b"abc")
        assert vm.read_memory(0x2000, 3) == b"abc"
        assert vm.registers().rip == 0x1000
        assert await vm.stop() == orc.Halted()
    assert fleet.statistics().throttled_seconds > 0
