"""The spec of a fleet: plain frozen data that a file can hold and a daemon can send, checked when it is made.

It names the types of live parts (a backend, a recorder, a callback), so it belongs to the fleet, and not to `model`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import attrs

from ..backend import NAMES, Backend, no_such
from ..backend.files import Opener
from ..machine.hostbudget import HostBudget
from ..model.actions import Evict
from ..model.codec import LIVE, encode
from ..model.errors import SpecError
from ..model.iolimit import IoLimit, optional_io_limit
from ..model.journalspec import JournalSpec
from ..model.spec import Limit, Meter, Tenant, check_flag, optional_limit
from ..policy import Guard, Policy, PolicySpec
from ..policy.state import check_policies
from .recorder import Recorder

__all__ = ["DEFAULT_TENANT", "FleetSpec", "OnEvict", "make_policies"]

DEFAULT_TENANT: Final = "default"
"""The tenant of VMs that name no tenant."""

OnEvict: TypeAlias = Callable[[Any, Evict], Awaitable[object]]
"""Moves a VM to another host, or raises why it can't. The VM is a `Vm` of the side (trio or asyncio) that opened the
fleet."""

LONGEST: Final = 86_400.0
"""The longest interval of a journal in seconds: a day. A longer interval would not show when something happened."""


def _tenants(given: Mapping[str, Limit | Tenant | None] | Iterable[Tenant]) -> Mapping[str, Tenant]:
    """Tenants by name, from any form in which they may be given, with the default tenant."""
    if not isinstance(given, Iterable):
        raise SpecError(f"tenants={given!r}: must be a mapping by name, or Tenant objects")
    made: dict[str, Tenant] = {}
    items: Iterator[tuple[Any, Any]]
    items = iter(given.items()) if isinstance(given, Mapping) else ((getattr(t, "name", None), t) for t in given)
    for name, value in items:
        if isinstance(value, Tenant):
            if value.name != name:
                raise SpecError(f"tenants[{name!r}]: its name is {value.name!r}: they must be the same")
            made[name] = value
        elif value is None or isinstance(value, Limit):
            made[name] = Tenant(name, limit=value)
        elif not isinstance(given, Mapping):
            raise SpecError(f"tenants: {value!r}: must be a Tenant, or tenants a mapping of names to limits")
        else:
            raise SpecError(f"tenants[{name!r}]={value!r}: must be a Tenant, a Limit, or None for no limit")
    made.setdefault(DEFAULT_TENANT, Tenant(DEFAULT_TENANT))
    return made


def _policies(given: Iterable[Policy | PolicySpec]) -> tuple[Policy | PolicySpec, ...]:
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise SpecError(f"policies={given!r}: must be policies, or PolicySpec objects, in a list")
    policies = tuple(given)
    for one in policies:
        if isinstance(one, str | type) and not isinstance(one, Policy):  # a kind, as in a file; a class
            raise SpecError(
                f"policies: {one!r} must be a policy, such as WeightedShare(), or PolicySpec('weighted-share')"
            )
    return policies


def make_policies(given: Iterable[Policy | PolicySpec]) -> list[Policy]:
    """Make the policies: each `PolicySpec` becomes a new policy that has seen nothing yet.

    Raises:
        SpecError: an entry is no policy, or two policies have one name.
    """
    return check_policies(one.make() if isinstance(one, PolicySpec) else one for one in _policies(given))


def _journal(given: Recorder | JournalSpec | str | Path | None) -> Recorder | JournalSpec | None:
    return JournalSpec(os.fspath(given)) if isinstance(given, str | Path) else given


def _path(given: str | Path | None) -> str | None:
    return os.fspath(given) if isinstance(given, Path) else given


def _cpus(given: Iterable[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    cpus = tuple(given) if isinstance(given, Iterable) else given
    if not isinstance(cpus, tuple) or not cpus or not all(isinstance(n, int) and not isinstance(n, bool) for n in cpus):
        raise SpecError(f"quarantine={cpus!r}: must be numbers of CPUs, one at least")
    return tuple(sorted(set(cpus)))


def _settings(guard: Guard | None) -> Any:
    """Two guards are equal if their settings are, whatever they have seen."""
    return None if guard is None else encode(guard)


@attrs.frozen(kw_only=True)
class FleetSpec:
    """A fleet, for `open_fleet`.

    All fields are plain data, except live objects that a program may give to a fleet in its own process: a Backend
    object, a policy, a recorder, a callback. The codec refuses live objects, and says what to give in their place.

    Parameters:
        backend: "auto", "kvm", "emulated", "scripted", or a Backend object. "auto" is KVM where /dev/kvm opens, else
            emulated. Where these arguments need bus locks to be seen (a limit on them, a policy for them,
            bus_locks="require") and KVM reports none, it is emulated as well. `Fleet.backend.why` says which and why.
        limit: the host's: bus locks per second of all VMs together; None: only counted. With a `host_budget`, the
            fleet's.
        exit_limit: the same for exits of any kind.
        answer_limit: the same for accesses that Python answers. (Each VM has a limit of its own by default.)
        host_budget: the host's, shared with fleets of other processes, above all of this fleet's own limits. It stays
            open when the fleet ends. Only where guests run on threads: scripts have a clock of their own.
        tenants: by name, each a `Tenant`, a `Limit`, or None; or `Tenant` objects. VMs that name none belong to
            "default", which may be given here as well.
        policies: asked at each of their ticks; see `orchestra.policy`. A `PolicySpec` is one as data.
        bus_locks: "require" (fail where they can't be seen), "auto" (see them if they can be), "off".
        strict: a policy that raises ends the fleet instead of being switched off.
        guard: what no policy may do. Default: `Guard` with its defaults.
        journal: a file, a `JournalSpec`, or an `orchestra.journal.Journal`: it keeps actions, states, and what the VMs
            and the host did in each interval.
        journal_interval: seconds.
        probe: time locked operations and memory on this host all the while, for 0.2 to 0.4 % of a CPU. Default: if a
            policy needs it.
        cgroup: a version-2 cgroup: its pressure counts as the host's.
        cap_by: what keeps CPU caps. "run-loop": orchestra, on any host. "cgroup": the kernel, by cpu.max of cgroups
            that come and go below the one this process lives in (`cgroup`, if given, must be that one). A thread that
            the kernel holds may hold the interpreter's lock: docs/engine.md has what to expect of each.
        on_evict: an async function that is called with a VM and an `Evict` to move it to another host, or to raise why
            not.
        open_file: opens the files that VMs name: disks, kernels, memory. Default: by their paths. In a process that may
            open none, `OpenedFiles` has the descriptors.
        quarantine: CPUs for isolated VMs. Default: the last that this process may run on.
        quarantine_class: a resctrl control group for isolated VMs, such as "/sys/fs/resctrl/noisy"; you make it, and
            limit its part of the caches and of the memory bandwidth by its schemata. No CPU that has resctrl has run
            this yet.

    Raises:
        NoSuchBackend: no backend has that name.
        SpecError: the message names the field, the value and the remedy.
    """

    backend: str | Backend = attrs.field(default="auto", metadata={LIVE: "name a backend, such as 'kvm'"})
    limit: Limit | None = None
    exit_limit: Limit | None = None
    answer_limit: Limit | None = None
    host_budget: HostBudget | None = attrs.field(
        default=None, metadata={LIVE: "leave it out, and give it where the fleet is opened"}
    )
    tenants: Mapping[str, Tenant] = attrs.field(default=(), converter=_tenants, hash=False)
    io_groups: Mapping[str, IoLimit | None] = attrs.field(factory=dict, hash=False)
    policies: tuple[Policy | PolicySpec, ...] = attrs.field(
        default=(), converter=_policies, metadata={LIVE: "give a PolicySpec, such as PolicySpec('weighted-share')"}
    )
    bus_locks: Literal["require", "auto", "off"] = "auto"
    strict: bool = False
    guard: Guard | None = attrs.field(default=None, eq=_settings, hash=False)
    journal: Recorder | JournalSpec | None = attrs.field(
        default=None, converter=_journal, metadata={LIVE: "give a JournalSpec, or the file's name"}
    )
    journal_interval: float = 1.0
    probe: bool | None = None
    cgroup: str | None = attrs.field(default=None, converter=_path)
    cap_by: Literal["run-loop", "cgroup"] = "run-loop"
    on_evict: OnEvict | None = attrs.field(
        default=None, metadata={LIVE: "leave it out, and give it where the fleet is opened"}
    )
    open_file: Opener | None = attrs.field(
        default=None, metadata={LIVE: "leave it out, and give it where the fleet is opened"}
    )
    quarantine: tuple[int, ...] | None = attrs.field(default=None, converter=_cpus)
    quarantine_class: str | None = attrs.field(default=None, converter=_path)

    def __attrs_post_init__(self) -> None:
        for field, words in (("bus_locks", ("require", "auto", "off")), ("cap_by", ("run-loop", "cgroup"))):
            if getattr(self, field) not in words:
                *most, last = (f'"{word}"' for word in words)
                raise SpecError(f"{field}={getattr(self, field)!r}: must be {', '.join(most)} or {last}")
        for meter in Meter:
            optional_limit(meter.field, getattr(self, meter.field))
        if not isinstance(self.io_groups, Mapping) or not all(isinstance(name, str) for name in self.io_groups):
            raise SpecError(f"io_groups={self.io_groups!r:.200}: must be a mapping of names to limits")
        for name, limit in self.io_groups.items():
            optional_io_limit(f"io_groups[{name!r}]", limit)
        if self.host_budget is not None and not isinstance(self.host_budget, HostBudget):
            raise SpecError(f"host_budget={self.host_budget!r}: must be a HostBudget (`create` or `attach`), or None")
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise SpecError(f"guard={self.guard!r}: must be a Guard, or None for one with its defaults")
        if self.journal is not None and not isinstance(self.journal, JournalSpec | Recorder):
            raise SpecError(
                f"journal={self.journal!r}: must be an orchestra.journal.Journal, a JournalSpec, a file, or None for "
                "none"
            )
        seconds = self.journal_interval
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
        if not (number and 0.001 <= seconds <= LONGEST):
            raise SpecError(f"journal_interval={seconds!r}: must be seconds, from 0.001 to {LONGEST:g}")
        check_flag("strict", self.strict)
        if self.probe is not None:
            check_flag("probe", self.probe)
        for field in ("cgroup", "quarantine_class"):
            if not isinstance(getattr(self, field), str | None):
                raise SpecError(f"{field}={getattr(self, field)!r}: must be a folder, or None")
        if self.on_evict is not None and not callable(self.on_evict):
            raise SpecError(f"on_evict={self.on_evict!r}: must be an async function, or None")
        if self.open_file is not None and not callable(self.open_file):
            raise SpecError(f"open_file={self.open_file!r}: must be a function, such as OpenedFiles({{...}}), or None")
        if not isinstance(self.backend, str) and not callable(getattr(self.backend, "create", None)):
            raise SpecError(f"backend={self.backend!r}: must be a name, such as 'kvm', or a Backend object")
        if isinstance(self.backend, str) and self.backend not in NAMES:
            raise no_such(self.backend)
        asked = self._limits_bus_locks(self.make_policies())
        if self.bus_locks == "off" and asked:
            raise SpecError(f"{asked} limits bus locks, but bus_locks='off': leave one of them out")

    def make_policies(self) -> list[Policy]:
        """As the function `make_policies`, for this spec."""
        return make_policies(self.policies)

    def needs_bus_locks(self, policies: Iterable[Policy]) -> str:
        """The field that needs bus locks to be seen, for a message; empty: no field does."""
        asked = self._limits_bus_locks(policies)
        return asked or ("bus_locks='require'" if self.bus_locks == "require" else "")

    def _limits_bus_locks(self, policies: Iterable[Policy]) -> str:
        limits = {"limit": self.limit, **{f"tenants[{name!r}]": one.limit for name, one in self.tenants.items()}}
        if self.host_budget is not None:
            limits["host_budget"] = self.host_budget.limit
        asking = [what for what, given in limits.items() if given is not None]
        asking += [f"policy {one.name!r}" for one in policies if getattr(one, "meter", None) is Meter.BUS_LOCKS]
        return next(iter(asking), "")
