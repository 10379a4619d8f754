"""Policies as a scenario names them, made anew for each host: the classes that run live, and QEMU's for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import attrs

from .. import policy as live
from ..config.forms import NONE, dialect
from ..model.codec import KIND, At, CodecError, Reading, Wrong, decode
from ..model.decoding import BAD
from ..model.errors import SpecError
from ..model.mistakes import meant
from ..policy import Policy, policy_kinds
from .cpus import HostCpu, LimitSpec

__all__ = ["Factory", "PolicySpec", "QemuWindow", "check_policy", "kinds", "maker"]

Factory: TypeAlias = Callable[[HostCpu], Policy]
"""Makes a policy for one host. Hosts differ in their CPU, and a policy keeps what it remembers in itself."""

_LIMIT: Final = {field.name for field in attrs.fields(LimitSpec)}


@attrs.frozen
class PolicySpec:
    """A policy of a scenario: as `orchestra.PolicySpec` has it, but not read before a host's CPU is known.

    Its arguments are as the file says them; a table with `rate` or `bus_share` is a limit.
    """

    kind: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    def to_data(self) -> Mapping[str, Any]:
        """For the codec."""
        return {KIND: self.kind, **self.arguments}

    @classmethod
    def from_data(cls, data: object, reading: Reading, at: At) -> Any:
        """For the codec. `check_policy` reports its mistakes for each CPU model."""
        given = reading.table({KIND: data} if isinstance(data, str) else data, at)
        if given is BAD:
            return BAD
        if not isinstance(given.get(KIND), str):
            return reading.no((*at, KIND), "is missing: which policy")
        return cls(given[KIND], {key: one for key, one in given.items() if key != KIND})


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
    """Those of `orchestra.policy_kinds`, and "qemu-window"."""
    return {"qemu-window": QemuWindow, **policy_kinds()}


def maker(spec: PolicySpec) -> Callable[[HostCpu], Policy | QemuWindow]:
    """What makes instances of it, for a host with a given CPU each; as a file of rules would, beside `bus_share`.

    Raises:
        CodecError: all that is wrong, each with its place.
    """
    copies: dict[HostCpu, Policy | QemuWindow] = {}

    def make(cpu: HostCpu) -> Policy | QemuWindow:
        if cpu not in copies:
            copies[cpu] = _make(spec, cpu)
        return copy.deepcopy(copies[cpu])  # it has seen nothing yet; reading it anew takes ten times as long

    return make


def _make(spec: PolicySpec, cpu: HostCpu) -> Policy | QemuWindow:
    says = {key: _on(value, cpu, (key,)) for key, value in spec.arguments.items()}
    if spec.kind not in kinds():
        known = kinds()
        text = f"{spec.kind!r}: no such policy; there are: {', '.join(sorted(known))}{meant(spec.kind, known)}"
        raise _wrong(text, KIND)
    if spec.kind == "qemu-window":
        window: QemuWindow = decode(QemuWindow, says, dialect())
        return window
    made: live.PolicySpec = decode(live.PolicySpec, {KIND: spec.kind, **says}, dialect())
    return made.make()


def _wrong(text: str, *at: str | int) -> CodecError:
    return CodecError([Wrong(at, text)])


def _on(value: Any, cpu: HostCpu, at: tuple[str | int, ...]) -> Any:
    """A value of TOML on a host with that CPU: parts of the bus become rates."""
    if isinstance(value, Mapping):
        if "bus_share" in value:
            return _rate(value, cpu, at)
        return {key: _on(one, cpu, (*at, key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_on(one, cpu, (*at, i)) for i, one in enumerate(value)]
    return value


def _rate(value: Mapping[str, Any], cpu: HostCpu, at: tuple[str | int, ...]) -> Any:
    if extra := sorted(set(value) - _LIMIT):
        raise _wrong(f"no such key; a limit has {', '.join(sorted(_LIMIT))}", *at, extra[0])
    said = {key: None if number == NONE else number for key, number in value.items()}
    for key, number in said.items():
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise _wrong(f"{number!r}: must be a number", *at, key)
    try:
        limit = LimitSpec(**said).on(cpu)
    except SpecError as error:
        raise _wrong(str(error), *at) from None
    if at[-1] == "over":  # a threshold is no limit
        return limit.rate
    burst = {} if limit.burst is None else {"burst": limit.burst}
    return {"rate": limit.rate, "max_delay": NONE if limit.max_delay is None else limit.max_delay, **burst}


def check_policy(spec: PolicySpec, cpus: Sequence[HostCpu]) -> str:
    """Make one for each CPU model, so that nothing is wrong later; its name."""
    make = maker(spec)
    names = [make(cpu).name for cpu in cpus]
    return names[0]
