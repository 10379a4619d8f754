"""Ready guests: one name and one set of parameters for a spec that runs anywhere.

Each is a real 64-bit image (nasm source with its bytes beside it, ``nasm -f bin -o NAME.bin NAME.asm``), and its
parameters stand behind the image, where the guest finds them. By the same bytes `script` knows what it would do, so
a VM behaves the same on every backend, also if a program of yours made the `VmSpec` around the image.

Times and rates are of the guest's own making: what it does when nothing holds it up. One that was held up by a limit or
a pause does not make up for it. On a real CPU it watches the time-stamp counter, so it keeps its CPU busy all the time,
and does what that CPU can: some 100,000 exits a second. It learns the counter's frequency from KVM's clock, or from
CPUID leaf 0x40000010; where the backend gives neither, 2.5 GHz are assumed, and rates are off by as much as that is.

Each vCPU does the same, at the rate given, and has 256 bytes at `SLOTS` of the guest's memory, the first 8 of which
count what it did. A script can't write to memory: there they stay 0.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from ...model.errors import SpecError
from ...model.spec import BootSpec, FlatImage, VmSpec

__all__ = [
    "CODE",
    "Behaviour",
    "crashing",
    "halting",
    "io_heavy",
    "quiet",
    "read",
    "spinning",
    "split_locking",
]

CODE: Final = 0x1000
"""Where the image is."""
SLOTS: Final = 0x2000
SLOT: Final = 256
"""Bytes for each vCPU."""
TSC_KHZ: Final = 2_500_000
LONGEST: Final = 1e9
_FOOLISH: Final = "a guest that runs for a billion seconds and longer is `spinning`"

# Behind the image: period (ns), frequency (kHz) and port, for the guest. Then the kind of guest, for `read`.
_PARAMETERS: Final = struct.Struct("<QIH2x32s")
_SIGNATURE: Final = "orchestra.testing."


@attrs.frozen
class Behaviour:
    """What a ready guest does.

    Attributes:
        name: of the source file.
        period: seconds before it does so, and from one time to the next.
        port: of the guests that write to one.
        code: the image without parameters.
    """

    name: str
    period: float
    port: int
    code: bytes


def read(image: BootSpec) -> Behaviour | None:
    """What the image does; None: it is not one of these."""
    if not isinstance(image, FlatImage) or len(image.code) <= _PARAMETERS.size:
        return None
    period, _, port, signature = _PARAMETERS.unpack(image.code[-_PARAMETERS.size :])
    name = signature.rstrip(b"\0")
    if not name.startswith(_SIGNATURE.encode()):
        return None
    return Behaviour(
        name[len(_SIGNATURE) :].decode("ascii", "replace"), period / 1e9, port, image.code[: -_PARAMETERS.size]
    )


def quiet(name: str = "quiet", *, rate: float = 1.0, port: int = 0x80, **spec: Any) -> VmSpec:
    """A good neighbour: writes a byte to a port now and then, and never locks the bus.

    Parameters:
        name: the VM's.
        rate: writes per second.
        port: where to; 0x80 has no device behind it, and the writes are only counted.
        spec: the other parameters of `VmSpec`, such as ``tenant`` and ``limit``; also for the guests below.

    Raises:
        SpecError: it can't be; also from the guests below.
    """
    return _spec("quiet", name, spec, period=_period(rate), port=port)


def io_heavy(name: str = "io-heavy", *, rate: float = 10_000.0, port: int = 0x80, **spec: Any) -> VmSpec:
    """Writes a byte to a port `rate` times a second."""
    return _spec("io_heavy", name, spec, period=_period(rate), port=port)


def split_locking(name: str = "noisy", *, rate: float = 1000.0, **spec: Any) -> VmSpec:
    """A noisy neighbour: `rate` split locks a second, and nothing else."""
    return _spec("split_locking", name, spec, period=_period(rate))


def spinning(name: str = "spinning", **spec: Any) -> VmSpec:
    """Keeps its CPU busy and never exits.

    In virtual time the VM fails after 100 years, as a task that still waits for it then would wait for ever.
    """
    return _spec("spinning", name, spec)


def halting(name: str = "halting", *, after: float = 0.0, **spec: Any) -> VmSpec:
    """Ends well, `after` so many seconds: outcome `Halted`."""
    return _spec("halting", name, spec, period=_seconds(after))


def crashing(
    name: str = "crashing",
    *,
    how: Literal["triple-fault", "wild-jump"] = "wild-jump",
    after: float = 0.0,
    **spec: Any,
) -> VmSpec:
    """Crashes, `after` so many seconds.

    Parameters:
        how: "wild-jump": it goes on where no memory is, which the hypervisor can't (outcome `Failed`, the one after
            which ``restart="on-failure"`` restarts); "triple-fault": as a kernel that crashes and has no handler left,
            or reboots that way (outcome `Shutdown`).
    """
    if how not in ("triple-fault", "wild-jump"):
        raise SpecError(f'how={how!r}: must be "triple-fault" or "wild-jump"')
    return _spec(how.replace("-", "_"), name, spec, period=_seconds(after))


def _spec(guest: str, name: str, more: dict[str, Any], *, period: float = 0.0, port: int = 0) -> VmSpec:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 0xFFFF:
        raise SpecError(f"port={port!r}: must be from 0 to 65535")
    signature = (_SIGNATURE + guest).encode()
    code = (Path(__file__).parent / f"{guest}.bin").read_bytes()
    parameters = _PARAMETERS.pack(round(period * 1e9), TSC_KHZ, port, signature)
    image = FlatImage(code=code + parameters, load=CODE, mode=64)
    made = VmSpec(name=name, boot=image, **more)
    needed, stacks = SLOTS + SLOT * made.vcpus, image.stacks(made.layout)
    if needed > stacks.start:
        size = made.layout.size
        raise SpecError(
            f"memory={size}: a ready guest with {made.vcpus} vCPUs needs at least {size + needed - stacks.start} "
            "bytes, in whole pages of 4096"
        )
    return made


def _period(rate: float) -> float:
    if not 1 / LONGEST < _number("rate", rate) <= 1e9:
        raise SpecError(f"rate={rate!r}: must be more than 0 and at most 1e9 a second; {_FOOLISH}")
    return 1 / rate


def _seconds(after: float) -> float:
    if not 0 <= _number("after", after) < LONGEST:
        raise SpecError(f"after={after!r}: must be seconds, at least 0; {_FOOLISH}")
    return after


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{field}={value!r}: must be a number")
    return value
