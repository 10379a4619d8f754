"""Which backend shows bus locks best on this host, and why: what the demonstration runs on, and the doctor tells.

Programs get `choose("auto")`, which never swaps the host's KVM for an emulator.
"""

from __future__ import annotations

from typing import Literal

import attrs

from ..errors import BackendUnavailable
from . import Backend

__all__ = ["Pick", "Seen", "open_best", "pick"]


@attrs.frozen
class Seen:
    """What was found on this host.

    Attributes:
        kvm: why KVM does not open, with what to do about it; None: it does.
        bus_locks: KVM reports bus locks.
        unicorn: the same as `kvm`, of the emulator.
    """

    kvm: str | None
    bus_locks: bool
    unicorn: str | None


@attrs.frozen
class Pick:
    """A backend, or none, in one line with its reason; `remedy` is the one command that would make it better."""

    name: Literal["kvm", "emulated"] | None
    why: str
    remedy: str = ""


def pick(seen: Seen) -> Pick:
    """KVM where it reports bus locks, else the emulator, which sees them all, else KVM without them."""
    no_kvm = None if seen.kvm is None else seen.kvm.partition(": ")[0]
    if no_kvm is None and seen.bus_locks:
        return Pick("kvm", "kvm: /dev/kvm opens, and this host's KVM reports bus locks")
    because = no_kvm or "/dev/kvm opens, but this host's KVM reports no bus locks"
    if seen.unicorn is None:
        return Pick("emulated", f"emulated: {because}")
    problem, _, remedy = seen.unicorn.removeprefix("backend='emulated': ").rpartition(": ")
    remedy = remedy.strip("`")
    if no_kvm is None:
        return Pick("kvm", f"kvm: /dev/kvm opens; it reports no bus locks here, but {problem}", remedy)
    return Pick(None, f"no guest can run here: {because}; and {problem}", remedy)


def open_best() -> tuple[Backend, Pick]:
    """The backend that `pick` says, opened. Whoever asked closes it.

    Raises:
        BackendUnavailable: there is none; the message ends with the command that helps.
        ResourceLimit: no file descriptor is left.
    """
    from .emulated.machine import EmulatedBackend
    from .kvm.machine import KvmBackend

    kvm: KvmBackend | None = None
    emulated: EmulatedBackend | None = None
    no_kvm = no_unicorn = None
    try:
        kvm = KvmBackend.open()
    except BackendUnavailable as error:
        no_kvm = str(error)
    bus_locks = kvm is not None and kvm.bus_lock_detection() is not None
    if not bus_locks:
        try:
            emulated = EmulatedBackend()
        except BackendUnavailable as error:
            no_unicorn = str(error)
    picked = pick(Seen(no_kvm, bus_locks, no_unicorn))
    backend = emulated or kvm
    if kvm is not None and backend is not kvm:
        kvm.close()
    if backend is None:
        raise BackendUnavailable(f"{picked.why}: `{picked.remedy}`")
    backend.why = picked.why
    return backend, picked
