"""Policies as a scenario names them, made anew for each host: the classes that run live, and QEMU's for comparison."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import attrs

from .. import policy as policies
from ..errors import SpecError
from ..policy import Policy
from ..policy.ladder import Ladder
from ..policy.steps import Condition, Rung, Step, default_steps
from ..spec import Limit
from ..tomlfile import Mistaken
from .cpus import HostCpu, LimitSpec

__all__ = ["Factory", "PolicySpec", "QemuWindow", "check_policy", "kinds", "maker"]

Factory: TypeAlias = Callable[[HostCpu], Policy]
"""Makes a policy for one host. Hosts differ in their CPU, and a policy keeps what it remembers in itself."""

_LIMIT: Final = {"rate", "bus_share", "burst", "max_delay"}


@attrs.frozen
class PolicySpec:
    """A policy by its kind (see `kinds`) and what its class takes. A table with `rate` or `bus_share` is a limit."""

    kind: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict, hash=False)


@attrs.frozen(kw_only=True)
class QemuWindow:
    """QEMU's ``bus-lock-ratelimit``: one for each VM, no policy at all. Source: QEMU, include/qemu/ratelimit.h.

    Parameters:
        rate: locks in a slice. Once they are used up, each vCPU sleeps to the slice's end, which every lock beyond
            puts off by 1/rate of a slice; a slice begins with the first lock after the last one.
        slice: seconds.
    """

    rate: float
    slice: float = 1.0
    name: str = "qemu-window"

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.rate <= 1e9:
            raise SpecError(f"rate={self.rate!r}: must be from 1 to 1e9 locks in a slice")
        if not 1e-3 <= self.slice <= 3600:
            raise SpecError(f"slice={self.slice!r}: must be from 0.001 to 3600 seconds")


def kinds() -> Mapping[str, type[Any]]:
    """What `orchestra.policy` offers, by name (``WeightedShare`` is "weighted-share"), and "qemu-window"."""
    found: dict[str, type[Any]] = {"qemu-window": QemuWindow}
    for name in policies.__all__:
        one = getattr(policies, name)
        if not (isinstance(one, type) and one is not Policy and callable(getattr(one, "decide", None))):
            continue
        if "policy" not in inspect.signature(one).parameters:  # it makes a policy out of another
            found[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()] = one
    return found


def _value(value: Any, cpu: HostCpu, at: tuple[str | int, ...]) -> Any:
    """A value of TOML as a policy's argument."""
    if isinstance(value, Mapping):
        if {"rate", "bus_share"} & set(value):
            if extra := sorted(set(value) - _LIMIT):
                raise Mistaken(f"no such key; a limit has {', '.join(sorted(_LIMIT))}", *at, extra[0])
            for key, number in value.items():
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise Mistaken(f"{number!r}: must be a number", *at, key)
            try:
                return LimitSpec(**value).on(cpu)
            except SpecError as error:
                raise Mistaken(str(error), *at) from None
        return {key: _value(one, cpu, (*at, key)) for key, one in value.items()}
    if isinstance(value, list):
        return [_value(one, cpu, (*at, i)) for i, one in enumerate(value)]
    return value


def _ladder(arguments: dict[str, Any]) -> dict[str, Any]:
    """A ladder's steps: tables, or the default ones for a threshold (`over`, `highest`)."""
    if "steps" not in arguments:
        over = arguments.pop("over", 1000.0)
        over = over.rate if isinstance(over, Limit) else over
        return {**arguments, "steps": default_steps(over, highest=arguments.pop("highest", Rung.EVICT))}
    if extra := {"over", "highest"} & set(arguments):
        raise Mistaken("give either that or steps", min(extra))
    steps = []
    for i, step in enumerate(arguments["steps"]):
        try:
            when = step.pop("when", [])
            steps.append(Step(when=[Condition(**one) for one in (when if isinstance(when, list) else [when])], **step))
        except (TypeError, ValueError, AttributeError) as error:
            raise Mistaken(str(error), "steps", i) from None
    return {**arguments, "steps": steps}


def maker(spec: PolicySpec) -> Callable[[HostCpu], Policy | QemuWindow]:
    """What makes instances of it, for a host with a given CPU each.

    Raises:
        SpecError: there is no such kind, or its class does not take that. What is wrong with a value is told when an
            instance is made.
    """
    known = kinds()
    if spec.kind not in known:
        raise Mistaken(f"{spec.kind!r}: no such policy; there are: {', '.join(sorted(known))}", "kind")
    kind = known[spec.kind]
    takes = inspect.signature(kind).parameters
    more = ("over", "highest") if kind is Ladder else ()
    for key in spec.arguments:
        if key not in takes and key not in more:
            raise Mistaken(f"no such key; {spec.kind} has {', '.join([*takes, *more])}", key)
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in spec.arguments:
            raise Mistaken(f"is missing; {spec.kind} needs it", name)

    def make(cpu: HostCpu) -> Policy | QemuWindow:
        arguments = {key: _value(value, cpu, (key,)) for key, value in spec.arguments.items()}
        try:
            made: Policy | QemuWindow = kind(**(_ladder(arguments) if kind is Ladder else arguments))
        except Mistaken:
            raise
        except (TypeError, ValueError, AttributeError) as error:  # SpecError is a ValueError
            said = str(error)
            field = next((key for key in arguments if said.startswith((f"{key}=", f"{key}[", f"{key}:"))), None)
            raise Mistaken(said.removeprefix(f"{field}="), *([field] if field else [])) from None
        return made

    return make


def check_policy(spec: PolicySpec, cpus: Sequence[HostCpu]) -> str:
    """Make one for each CPU model, so that nothing is wrong later; its name."""
    make = maker(spec)
    names = [make(cpu).name for cpu in cpus]
    return names[0]
