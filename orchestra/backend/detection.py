"""What `backend="auto"` means, everywhere: the best backend that can do what is asked for, and one line that says why.

KVM comes first, the emulator second. A backend is passed over if it does not open on this host, sees no bus locks
where somebody needs them, or can't run the VM that is asked for. The fleet, ``orchestra demo``, ``run`` and ``doctor``
all ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal, TypeAlias

import attrs

from ..model.errors import BackendUnavailable, BusLockUnsupported
from ..model.spec import VmSpec
from . import Backend

__all__ = ["Asked", "Found", "Pick", "look", "open_best", "pick"]

Name: TypeAlias = Literal["kvm", "emulated"]

NO_BUS_LOCKS: Final = "this host's KVM reports no bus locks"
DETECTION: Final = (
    "use an Intel CPU with bus-lock detection and Linux 5.12, or an AMD one with Bus Lock Threshold and Linux 6.16"
)


@attrs.frozen
class Asked:
    """What a backend must be able to do.

    Attributes:
        bus_locks: what needs bus locks to be seen, such as "limit" or "bus_locks='require'"; empty: nothing.
        spec: a VM that the backend must be able to run; None: no VM is known yet.
    """

    bus_locks: str = ""
    spec: VmSpec | None = None

    @classmethod
    def by(cls, spec: VmSpec) -> Asked:
        """What one VM asks for."""
        limits = {"limit": spec.limit, "vcpu_limit": spec.vcpu_limit}
        first = next((name for name, limit in limits.items() if limit is not None), "")
        return cls(first, spec)

    def __str__(self) -> str:
        if self.spec is not None:
            return f"run vm {self.spec.name!r}"
        return f"do what {self.bus_locks} asks for"


@attrs.frozen
class Found:
    """A backend as it was found on this host.

    Attributes:
        name: the backend.
        problem: why it does not open, or can't run the VM that is asked for; empty: there is no problem.
        remedy: what to do about the problem.
        opens: whether the backend could be opened.
        bus_locks: whether it sees bus locks.
    """

    name: Name
    problem: str = ""
    remedy: str = ""
    opens: bool = True
    bus_locks: bool = True

    @classmethod
    def closed(cls, name: Name, message: str) -> Found:
        """A backend that does not open. `message`: of its `BackendUnavailable`: the problem, a colon, the remedy."""
        message = message.removeprefix(f"backend={name!r}: ")
        # Only KVM's remedies have colons of their own, and only unicorn's problems.
        problem, _, remedy = message.partition(": ") if name == "kvm" else message.rpartition(": ")
        return cls(name, problem, remedy, opens=False, bus_locks=False)


@attrs.frozen
class Pick:
    """The name of a backend, and one line that says why. None: no backend fits; `why` has each reason and remedy."""

    name: Name | None
    why: str


def pick(found: Iterable[Found], asked: Asked = Asked()) -> Pick:
    """The first backend that can do what is asked for. The backends after it are not looked at."""
    passed: list[Found] = []
    for one in found:
        if not one.problem and asked.bus_locks and not one.bus_locks:
            one = attrs.evolve(one, problem=NO_BUS_LOCKS, remedy=DETECTION)
        if not one.problem:
            return Pick(one.name, f"{one.name}: {_because(one, passed, asked)}")
        passed.append(one)
    reasons = "; ".join(f"{one.name}: {one.problem}" + f" ({one.remedy})" * bool(one.remedy) for one in passed)
    return Pick(None, f"no backend here can {asked if asked != Asked() else 'run guests'}: {reasons}")


def _because(one: Found, passed: Sequence[Found], asked: Asked) -> str:
    if not passed:
        opens = "/dev/kvm opens"
        return f"{opens}, and this host's KVM reports bus locks" if one.bus_locks else f"{opens}; {NO_BUS_LOCKS}"
    first = passed[0]
    if not first.opens:
        return first.problem
    if first.problem == NO_BUS_LOCKS:
        return f"/dev/kvm opens, but {NO_BUS_LOCKS}, and {asked.bus_locks} needs them"
    return f"/dev/kvm opens, but not for this VM: {first.problem}"


def open_best(asked: Asked = Asked()) -> Backend:
    """The backend that `pick` says, opened; its `why` is the reason. The caller closes it.

    Raises:
        BusLockUnsupported: backends open, but none of these sees the bus locks that are asked for.
        BackendUnavailable: no backend fits, for other reasons. The message has each backend's reason and remedy.
        ResourceLimit: no file descriptor is left.
    """
    opened: list[Backend] = []
    seen: list[Found] = []

    def looked() -> Iterator[Found]:
        for one in _each(opened, asked.spec):
            seen.append(one)
            yield one

    picked = None
    try:
        picked = pick(looked(), asked)
    finally:
        for backend in opened:
            if picked is None or backend.name != picked.name:
                backend.close()
    if picked.name is None:
        blind = asked.bus_locks and any(one.opens and not one.bus_locks for one in seen)
        raise (BusLockUnsupported if blind else BackendUnavailable)(picked.why)
    backend = opened[-1]
    backend.why = picked.why  # type: ignore[misc]  # both of ours are plain attributes
    return backend


def look() -> list[Found]:
    """Every backend that "auto" knows, as found on this host; nothing stays open.

    Raises:
        ResourceLimit: no file descriptor is left.
    """
    opened: list[Backend] = []
    try:
        return list(_each(opened, None))
    finally:
        for backend in opened:
            backend.close()


def _each(opened: list[Backend], spec: VmSpec | None) -> Iterator[Found]:
    """Open one backend after another, as far as the caller iterates. Backends that open are added to `opened`."""
    from .emulated.machine import EmulatedBackend
    from .kvm.machine import KvmBackend

    ways: tuple[tuple[Name, Callable[[], KvmBackend | EmulatedBackend]], ...] = (
        ("kvm", KvmBackend.open),
        ("emulated", EmulatedBackend),
    )
    for name, open_ in ways:
        try:
            backend = open_()
        except BackendUnavailable as error:
            yield Found.closed(name, str(error))
            continue
        opened.append(backend)
        problem, remedy = (None if spec is None else backend.refusal(spec)) or ("", "")
        if name == "emulated":
            remedy = ""  # it names KVM, which has been passed over by now
        yield Found(name, problem, remedy, bus_locks=backend.bus_lock_detection() is not None)
