"""Policies as data: which kinds there are, what each takes, and a `PolicySpec` that a file can hold.

This is the one registry of kinds: files of rules, a `FleetSpec` and the simulator's scenarios name policies by it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from ..model.codec import KIND, At, Reading
from ..model.decoding import BAD
from ..model.errors import SpecError
from ..model.mistakes import meant, shown
from ..model.spec import Meter
from .adaptive import Adaptive
from .bustime import BusTime
from .compose import only
from .credits import BurstCredits
from .facts import Policy
from .ladder import Ladder
from .share import WeightedShare
from .static import StaticLimits
from .steps import Rung, Step, default_steps

__all__ = ["Chosen", "PolicySpec", "policy_kinds"]

_KINDS: Final[tuple[type[Any], ...]] = (Adaptive, BurstCredits, BusTime, Ladder, StaticLimits, WeightedShare)
"""The classes that data can name. `Only` is not among them: it wraps another policy, and data have the key "only"."""

ONLY: Final = "only"
NAME: Final = "name"


def policy_kinds() -> Mapping[str, type[Any]]:
    """The policy classes by their names in data: ``WeightedShare`` is "weighted-share"."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower(): kind for kind in _KINDS}


def _ladder(
    steps: Iterable[Step] | None = None,
    *,
    over: float | None = None,
    highest: Rung | None = None,
    meter: Meter = Meter.BUS_LOCKS,
    interval: float = 0.1,
    name: str | None = None,
) -> Ladder:
    """A `Ladder` of the given steps, or of the default steps for VMs that do more than `over` events a second."""
    if steps is not None:
        for key, value in (("over", over), ("highest", highest)):
            if value is not None:
                raise SpecError(f"{key}={value!r}: give either that or steps")
        return Ladder(steps, meter=meter, interval=interval, name=name)
    made = default_steps(1000.0 if over is None else over, meter=meter, highest=highest or Rung.EVICT)
    return Ladder(made, meter=meter, interval=interval, name=name)


def _maker(kind: type[Any]) -> Callable[..., Policy]:
    return _ladder if kind is Ladder else kind


@attrs.frozen
class Chosen:
    """Which VMs a policy is for: patterns of names and of tenants, as `only` takes them. None: all fit.

    Raises:
        SpecError: neither is given, or a pattern is empty.
    """

    vms: tuple[str, ...] | None = None
    tenants: tuple[str, ...] | None = None

    def __attrs_post_init__(self) -> None:
        if self.vms is None and self.tenants is None:
            raise SpecError("say which: vms = 'web-*', tenants = ['acme']")
        for field in ("vms", "tenants"):
            names = getattr(self, field)
            if names is not None and not _are_patterns(names):
                raise SpecError(f"{field}={names!r}: must be a pattern such as 'web-*', or several, in a tuple")


def _are_patterns(names: object) -> bool:
    return isinstance(names, tuple) and bool(names) and all(isinstance(name, str) and name for name in names)


def _frozen(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(arguments, Mapping):
        raise SpecError(
            f"arguments={shown(arguments)}: must be a mapping of the policy's parameters, such as {{'over': 300.0}}"
        )
    return dict(arguments)


@attrs.frozen
class PolicySpec:
    """A policy as data. Each `make` gives a new policy, which has seen nothing yet.

    The JSON form is one object, as in a file of rules:
    ``{"kind": "ladder", "over": 500.0, "only": {"vms": ["web-*"]}}``.

    Parameters:
        kind: "weighted-share", "ladder", ...: the class's name in small letters; see `policy_kinds`.
        arguments: the arguments of the class, by the names of its parameters. A ladder may have `over` (events a
            second) and `highest` in the place of its steps.
        only: the VMs that the policy is for. None: all VMs.

    Raises:
        SpecError: there is no such kind, or its class does not accept the arguments.
    """

    kind: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict, converter=_frozen, hash=False)
    only: Chosen | None = None

    def __attrs_post_init__(self) -> None:
        known = policy_kinds()
        if not isinstance(self.kind, str) or self.kind not in known:
            raise SpecError(
                f"kind={shown(self.kind)}: no such policy; there are: {', '.join(known)}{meant(self.kind, known)}"
            )
        if self.only is not None and not isinstance(self.only, Chosen):
            raise SpecError(
                f"only={shown(self.only)}: must be a Chosen, such as Chosen(vms=('web-*',)), or None for all VMs"
            )
        taken = inspect.signature(_maker(known[self.kind])).parameters
        for key in self.arguments:
            if key not in taken:
                raise SpecError(
                    f"policy {self.kind!r}: {key}: no such parameter; there are: {', '.join(taken)}{meant(key, taken)}"
                )
        try:
            self.make()
        except TypeError as error:  # one is missing, or of a type that its class does not check
            raise SpecError(f"policy {self.kind!r}: {error}") from None

    @property
    def name(self) -> str:
        """The policy's name in the journal."""
        return self.make().name

    def make(self) -> Policy:
        """Make a policy, which has seen nothing yet.

        Raises:
            SpecError: the class does not accept the arguments.
        """
        make = _maker(policy_kinds()[self.kind])
        if self.only is None:
            return make(**self.arguments)
        inner = {key: value for key, value in self.arguments.items() if key != NAME}  # the name is that of the whole
        return only(make(**inner), self.only.vms, self.only.tenants, self.arguments.get(NAME))

    def to_data(self) -> Mapping[str, Any]:
        """For the codec."""
        return {KIND: self.kind, **self.arguments, **({} if self.only is None else {ONLY: self.only})}

    @classmethod
    def from_data(cls, data: object, reading: Reading, at: At) -> Any:
        """For the codec."""
        kind, rest = reading.choice(data, at, policy_kinds(), "policy")
        before = len(reading.wrong)
        chosen = reading.value(Chosen, rest[ONLY], (*at, ONLY)) if ONLY in rest else None
        if kind is BAD:
            return BAD
        given = {key: value for key, value in rest.items() if key != ONLY}
        arguments = reading.arguments(_maker(policy_kinds()[kind]), given, at)
        if len(reading.wrong) > before:
            return BAD
        return cls(kind, arguments, chosen)
