"""Tables into policies and their parts: which kinds there are, what each takes, and all that is wrong with a table."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from .. import policy as policies
from ..model.errors import SpecError
from ..model.spec import Limit, Meter, Tenant
from ..policy import CPU_MODELS, Condition, CpuModel, Guard, Ladder, Policy, Rung, Step, default_steps
from .toml import Inside, Mistaken, converter, meant, shown

__all__ = ["NONE", "build", "kinds", "make_policy", "rules_converter", "table"]

NONE: Final = "none"
"""TOML has no null: where a parameter may be None, this says so."""

_HINTS: Final[dict[Any, Any]] = {
    Meter | str: Meter,
    Iterable[Step] | None: tuple[Step, ...] | None,
}
"""What a policy's class takes, as a file can say it."""


def kinds() -> Mapping[str, type[Any]]:
    """The policies by the names that files have for them: ``WeightedShare`` is "weighted-share"."""
    found: dict[str, type[Any]] = {}
    for name in policies.__all__:
        one = getattr(policies, name)
        if not (isinstance(one, type) and one is not Policy and callable(getattr(one, "decide", None))):
            continue
        if "policy" not in inspect.signature(one).parameters:  # it makes a policy out of another
            found[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()] = one
    return found


def rules_converter() -> Any:
    """`tomlfile.converter` that knows limits, tenants, guards, ladders' steps and CPU models."""
    made = converter()
    for kind in (Condition, CpuModel, Guard, Step, Tenant):
        made.register_structure_hook(kind, lambda value, kind: build(made, kind, table(value)))
    made.register_structure_hook(Limit, lambda value, _: _limit(made, value))
    made.register_structure_hook_func(lambda to: to == str | CpuModel, lambda value, _: _model(made, value))
    made.register_structure_hook_func(lambda to: to == bool | tuple[str, ...], _flag_or_names)
    several = made.get_structure_hook(tuple[Condition, ...])
    made.register_structure_hook_func(
        lambda to: to == tuple[Condition, ...],
        lambda value, to: several([value] if isinstance(value, dict) else value, to),
    )

    def optional(value: Any, to: Any) -> Any:
        if value == NONE:
            return None
        (kind,) = (one for one in typing.get_args(to) if one is not type(None))
        return made.structure(value, kind)

    made.register_structure_hook_func(_is_optional, optional)
    return made


def build(made: Any, kind: Callable[..., Any], given: Mapping[str, Any], **more: Any) -> Any:
    """Call `kind` with a table's values, each as its parameter has it.

    Parameters:
        made: the converter.
        more: arguments that are no matter of the table.

    Raises:
        ExceptionGroup: all that is wrong, as `Mistaken` and what the converter raises, each with its place.
    """
    known = {name: to for name, to in _hints(kind).items() if name not in more}
    mistakes: list[Exception] = []
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            mistakes.append(Mistaken(_no_such(key, known, kind), key))
            continue
        try:
            arguments[key] = made.structure(value, known[key])
        except Exception as error:
            mistakes.append(Inside(error, key))
    needed = {name for name, one in inspect.signature(kind).parameters.items() if one.default is one.empty}
    mistakes += [Mistaken("is missing", name) for name in known if name in needed and name not in given]
    absent = [name for name in known if name in needed and name not in arguments]
    if all(known[name] is float for name in absent):
        result = _call(kind, arguments | dict.fromkeys(absent, _STAND_INS[0]), more, mistakes, {*absent})
        if not mistakes:
            return result
    raise ExceptionGroup("mistakes", mistakes)


def make_policy(made: Any, kind: str, given: Mapping[str, Any], **more: Any) -> Policy:
    """A policy of a kind. A ladder may have `over` and `highest` in the place of its steps.

    Raises:
        ExceptionGroup, Mistaken: as `build`.
    """
    known = kinds()
    if kind not in known:
        raise Mistaken(
            f"{shown(kind)}: no such policy; there are: {', '.join(sorted(known))}{meant(kind, known)}", "kind"
        )
    policy: Policy
    policy = build(made, _ladder if known[kind] is Ladder else known[kind], given, **more)
    return policy


def table(value: Any) -> Mapping[str, Any]:
    """Check that it is one."""
    if not isinstance(value, dict):
        raise SpecError(f"{shown(value)}: must be a table")
    return value


def _ladder(
    steps: tuple[Step, ...] | None = None,
    *,
    over: float | None = None,
    highest: Rung | None = None,
    meter: Meter = Meter.BUS_LOCKS,
    interval: float = 0.1,
    name: str | None = None,
) -> Ladder:
    """A `Ladder` of steps, or of the default ones for VMs that do more than `over` events a second."""
    if steps is not None:
        for key, value in (("over", over), ("highest", highest)):
            if value is not None:
                raise SpecError(f"{key}={value!r}: give either that or steps")
        return Ladder(steps, meter=meter, interval=interval, name=name)
    made = default_steps(1000.0 if over is None else over, meter=meter, highest=highest or Rung.EVICT)
    return Ladder(made, meter=meter, interval=interval, name=name)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _limit(made: Any, value: Any) -> Limit:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"rate": value}
    if not isinstance(value, dict):
        raise SpecError(f"{shown(value)}: must be events a second, or a table such as {{ rate = 100, burst = 10 }}")
    limit: Limit = build(made, Limit, value)
    return limit


def _model(made: Any, value: Any) -> str | CpuModel:
    if isinstance(value, dict):
        return made.structure(value, CpuModel)  # type: ignore[no-any-return]  # it is
    if not isinstance(value, str) or value not in CPU_MODELS:
        near = meant(value, CPU_MODELS) if isinstance(value, str) else ""
        raise SpecError(f"{shown(value)}: must be one of {', '.join(CPU_MODELS)}, or a table with a name{near}")
    return value


def _flag_or_names(value: Any, _: Any) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"{shown(value)}: must be true, false, or names of policies")
    return tuple(names)


def _is_optional(to: Any) -> bool:
    """`X | None`, but for text: there, "none" may be meant."""
    if typing.get_origin(to) not in (typing.Union, types.UnionType):
        return False
    rest = [one for one in typing.get_args(to) if one is not type(None)]
    return len(rest) == 1 and rest[0] is not str and type(None) in typing.get_args(to)


# ---- what a class takes, and what it says is wrong -------------------------------------------------------------------


def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    if isinstance(kind, type) and attrs.has(kind):
        attrs.resolve_types(kind)
        found: dict[str, Any] = {field.name: field.type for field in attrs.fields(kind) if field.init}
    else:
        found = typing.get_type_hints(kind.__init__ if isinstance(kind, type) else kind)  # type: ignore[misc]  # a class
        found.pop("return", None)
    return {name: _HINTS.get(hint, hint) for name, hint in found.items()}


def _no_such(key: str, known: Iterable[str], kind: Any) -> str:
    if kind is Limit and key == "bus_share":
        return "no such key; for a part of the bus' time take a policy of kind = 'bus-time'"
    return f"no such key; there are: {', '.join(known)}{meant(key, known)}"


_BLAMED: Final = re.compile(r"(?:[\w-]+: )?([a-z_]+)((?:\[[^\]]*\])?)=")
_RUNG: Final = re.compile(rf"({'|'.join(Rung)}): ")


_STAND_INS: Final = (1e9, 0.05)
"""Numbers for what must be given and is wrong, so that the rest can be looked at: one of them will do."""


def _call(
    kind: Callable[..., Any],
    arguments: dict[str, Any],
    more: Mapping[str, Any],
    mistakes: list[Exception],
    absent: set[str],
) -> Any:
    """Call it; what it complains about is noted and left out, and it is called again, until it has said it all.

    `absent`: arguments that are stand-ins: what is said about them is no news.
    """
    known = inspect.signature(kind).parameters
    spare = {name: list(_STAND_INS[1:]) for name in absent}
    for _ in range(len(arguments) + 100):
        try:
            return kind(**arguments, **more)
        except (SpecError, ValueError, TypeError, OverflowError) as error:
            at, text = _blame(str(error), arguments)
            name = str(at[0]) if at else ""
            if name not in spare:
                mistakes.append(Mistaken(_suggested(text), *at))
            if not at or name == "steps":  # of several things together: what would be said next, may be due to this
                return None
            if len(at) > 1 and len(arguments[name]) > 1:
                arguments[name] = {key: value for key, value in arguments[name].items() if key != at[1]}
            elif known[name].default is not inspect.Parameter.empty:
                del arguments[name]
            elif isinstance(arguments[name], float):
                left = spare.setdefault(name, list(_STAND_INS))
                if not left:
                    return None
                arguments[name] = left.pop(0)
            else:
                return None
    return None


def _suggested(text: str) -> str:
    found = re.match(r"'([^']*)': must be one of ([\w, -]+)$", text)
    return text + meant(found[1], found[2].split(", ")) if found else text


def _blame(text: str, arguments: Mapping[str, Any]) -> tuple[tuple[str | int, ...], str]:
    """Where an error is, by what it says, and what is left to be said."""
    if "Exceeds the limit" in text:  # int's digits, in the middle of another message
        return (), "a number beyond 64 bits"
    found = _BLAMED.match(text)
    if found is not None:
        name, rest = found[1], text[found.end() :]
        if name in arguments:
            key = _literal(found[2][1:-1]) if found[2] else None
            inside = isinstance(arguments[name], Mapping) and key in arguments[name]
            return ((name, str(key)) if inside else (name,)), rest
        # It was checked under another name: a floor as a rate, a key as a signal.
        value = rest.partition(": ")[0]
        for given, one in arguments.items():
            if isinstance(one, Mapping) and _literal(value) in one:
                return (given, _literal(value)), rest
        named = [
            given for given, one in arguments.items() if not isinstance(one, Mapping | tuple) and repr(one) == value
        ]
        if len(named) == 1:
            return (named[0],), rest
    rung = _RUNG.match(text)
    steps = arguments.get("steps")
    if rung is not None and isinstance(steps, tuple):
        for i, step in enumerate(steps):
            if step.rung == rung[1]:
                return ("steps", i), text
    return (), text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
