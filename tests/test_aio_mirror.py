"""orchestra.aio has every public class, method, parameter and sentence of the trio API; neither drifts."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator

import attrs
import pytest

import orchestra as orc
import orchestra.aio
from orchestra.machine.devices.console import Console
from orchestra.machine.devices.consoleport import ConsolePort
from orchestra.machine.devices.requests import Request, Requests

MIRRORED = {
    orc.Fleet: orc.aio.Fleet,
    orc.Vm: orc.aio.Vm,
    orc.Exits: orc.aio.Exits,
    Requests: orc.aio.Requests,
    Request: orc.aio.Request,
    Console: orc.aio.Console,
    ConsolePort: orc.aio.ConsolePort,
    orc.Watch: orc.aio.Watch,
}
# What a class has for orchestra's own parts and not for users. A name that is new and in neither place fails a test.
INTERNAL = {
    orc.Fleet: "",
    orc.Vm: "generation",
    orc.Exits: "mask channel wake end next_batch next_batch_nowait",
    Requests: "deliver drop end close",
    Request: "answer_bytes give_back put_among",
    Console: "put wake changed close state from_state add_screen remove_screen",
    ConsolePort: "wake changed close",
    orc.Watch: "close",
}
PROTOCOLS = {"__aiter__", "__anext__", "__aenter__", "__aexit__"}


def instance_attributes(cls: type) -> set[str]:
    """What __init__ puts on the object."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))  # type: ignore[misc]
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stores if isinstance(node.value, ast.Name) and node.value.id == "self"}


def public(cls: type) -> set[str]:
    names = {name for name in {*dir(cls), *instance_attributes(cls)} if not name.startswith("_")}
    return names | (PROTOCOLS & set(dir(cls)))


EXPECTED = {cls: public(cls) - set(INTERNAL[cls].split()) for cls in MIRRORED}
MEMBERS = [
    pytest.param(cls, name, id=f"{cls.__name__}.{name}")
    for cls, names in EXPECTED.items()
    for name in sorted(names)
    if name not in PROTOCOLS and hasattr(cls, name) and not inspect.ismemberdescriptor(getattr(cls, name))
]


@pytest.mark.parametrize("cls", MIRRORED)
def test_what_is_called_internal_is_there(cls):
    assert set(INTERNAL[cls].split()) <= public(cls)


@pytest.mark.parametrize("cls", MIRRORED)
def test_asyncio_side_has_what_the_trio_side_has_and_nothing_else(cls):
    assert public(MIRRORED[cls]) == EXPECTED[cls]


@pytest.mark.parametrize(("cls", "name"), MEMBERS)
def test_member_is_of_the_same_kind(cls, name):
    there, here = inspect.getattr_static(cls, name), inspect.getattr_static(MIRRORED[cls], name)
    assert isinstance(here, property) == isinstance(there, property)
    assert inspect.iscoroutinefunction(here) == inspect.iscoroutinefunction(there)


# What an async generator function makes is said in other words by one that is no generator.
SAME = {"AsyncIterator[Exits]": "AbstractAsyncContextManager[Exits]"}
SAME["AsyncIterator[Watch]"] = "AbstractAsyncContextManager[Watch]"
SAME["AsyncIterator[Requests]"] = "AbstractAsyncContextManager[Requests]"


@pytest.mark.parametrize(("cls", "name"), MEMBERS)
def test_member_has_the_same_parameters_types_and_documentation(cls, name):
    there, here = inspect.getattr_static(cls, name), inspect.getattr_static(MIRRORED[cls], name)
    assert here.__doc__ == there.__doc__
    if isinstance(there, property):
        there, here = there.fget, here.fget
    expected, found = inspect.signature(there), inspect.signature(here)
    assert list(found.parameters.values()) == list(expected.parameters.values())
    assert found.return_annotation == SAME.get(expected.return_annotation, expected.return_annotation)


@pytest.mark.parametrize("cls", MIRRORED)
def test_class_documentation_starts_with_the_originals(cls):
    assert inspect.getdoc(MIRRORED[cls]).startswith(inspect.getdoc(cls))


def test_open_fleet_has_the_same_parameters_and_one_more():
    expected, found = (inspect.signature(door).parameters for door in (orc.open_fleet, orc.aio.open_fleet))
    assert list(found.values())[:-1] == list(expected.values())
    assert list(found)[-1] == "thread"


def test_open_fleet_takes_the_fields_of_a_fleet_spec():
    (spec, *fields) = inspect.signature(orc.open_fleet).parameters.values()
    assert fields == list(inspect.signature(orc.FleetSpec).parameters.values())
    assert (spec.kind, spec.default) == (inspect.Parameter.POSITIONAL_ONLY, None)


# ---- what all these return


def classes_in(hint: object) -> Iterator[type]:
    if inspect.isclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def results(cls: type) -> Iterator[type]:
    """orchestra's classes in the types of what it hands out; of plain data, those in its fields too."""
    if cls in MIRRORED:
        members = [inspect.getattr_static(cls, name, None) for name in EXPECTED[cls]]
        functions = [m.fget if isinstance(m, property) else m for m in members if m is not None]
        own = [f for f in functions if inspect.isfunction(f) and f.__module__.startswith("orchestra.")]
        hints = [typing.get_type_hints(function).get("return") for function in own]
    elif attrs.has(cls):
        hints = list(typing.get_type_hints(cls).values())
    else:
        hints = []
    for hint in hints:
        yield from (found for found in classes_in(hint) if found.__module__.startswith("orchestra."))


def test_nothing_that_waits_is_handed_out_unwrapped():
    seen: set[type] = set()
    todo = list(MIRRORED)
    while todo:
        cls = todo.pop()
        if cls not in seen:
            seen.add(cls)
            todo += results(cls)
    assert {orc.VmStatistics, orc.Applied, orc.Failed} <= seen  # it looks where it should
    for cls in seen - set(MIRRORED):
        members = (inspect.getattr_static(cls, name) for name in dir(cls))
        assert not [m for m in members if inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m)], cls


def test_importing_orchestra_imports_no_asyncio():
    code = "import sys, orchestra; print('asyncio' in sys.modules, 'orchestra.aio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
