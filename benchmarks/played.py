"""Exits that a C thread makes at a set rate (producer.c) in the place of paused vCPUs, and who receives them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import attrs

import orchestra as orc
import orchestra.aio
from orchestra.native import ffi, lib
from orchestra.native.core import REASON_NUMBERS

from . import floor

__all__ = ["SETTLE", "Production", "Tally", "compiled", "production"]

SETTLE = 2.0
"""Seconds for the last exits to arrive."""
NATIVE = Path(orc.__file__).parent / "native"


@attrs.define
class Tally:
    """What the consumer saw."""

    received: int = 0
    cpu: float = 0.0


class Production(ctypes.Structure):
    """struct production of producer.c."""

    _fields_ = [
        ("account", ctypes.c_void_p),
        ("now", ctypes.c_void_p),
        ("vcpus", ctypes.c_void_p),
        ("vcpu_count", ctypes.c_int64),
        ("rate", ctypes.c_double),
        ("total", ctypes.c_int64),
        ("reason", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("latest", ctypes.c_int64),
        ("took", ctypes.c_int64),
    ]


def compiled(build: Path) -> Any:
    """The C function ``produce``; ctypes lets go of the interpreter lock while it runs."""
    library = floor.compile_c("producer.c", build / "producer.so", "-shared", "-fPIC", f"-I{NATIVE}")
    produce = ctypes.CDLL(str(library)).produce
    produce.restype = None
    return produce


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def production(vm: orc.Vm | orc.aio.Vm, kind: type[orc.Exit], rate: int, total: int) -> Production:
    """`total` exits of that kind, at `rate` a second, by the vCPUs of a VM in turn.

    The VM is paused, and stays so: its vCPUs have all that a fleet gives them, and nobody else accounts for them.
    """
    guest = getattr(vm, "_inner", vm)._control.guest
    handles = ffi.new("orc_vcpu *[]", [vcpu.core.handle for vcpu in guest.vcpus])
    work = Production(
        account=_address(ffi.addressof(lib, "orc_vcpu_account")),
        now=_address(ffi.addressof(lib, "orc_now")),
        vcpus=_address(handles),
        vcpu_count=len(handles),
        rate=rate,
        total=total,
        reason=REASON_NUMBERS["x86_bus_lock" if kind is orc.BusLock else kind.__name__.lower()],
        flags=lib.KVM_RUN_X86_BUS_LOCK if kind is orc.BusLock else 0,
    )
    work.handles = handles  # which lives as long
    return work
