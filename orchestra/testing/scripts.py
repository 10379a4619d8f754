"""What the ready guests do, as scripts; and the backend that finds a spec's script by its image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Final, TypeAlias

from ..backend import Detection
from ..backend.scripted import ScriptedBackend, ScriptedExit, bus_lock, hlt, io_write, triple_fault
from ..model.errors import OrchestraError, SpecError
from ..model.spec import FlatImage, VmSpec
from . import guests

__all__ = ["backend", "script"]

Script: TypeAlias = Iterable[ScriptedExit]
Own: TypeAlias = Mapping[str, Script] | Callable[[VmSpec, int], Script | None]

LOCK: Final = bytes.fromhex("f0ff477e")  # lock inc dword [rdi+0x7e]
NO_EMULATION: Final = 1  # KVM_INTERNAL_ERROR_EMULATION
YEARS: Final = 365.25 * 86400.0


def script(image: FlatImage, detection: Detection | None = "fault-like") -> Script:
    """What each vCPU of a ready guest does; to be played from its start each time.

    Parameters:
        image: a ready guest's ``boot``.
        detection: as `ScriptedBackend` takes it; says where a lock's RIP is.

    Raises:
        SpecError: the image is not a ready guest's, so what it does is not known.
    """
    found = guests.read(image)
    if found is None:
        raise SpecError(f"boot={image!r}: not a ready guest of orchestra.testing, so what it does is not known")
    after = found.period
    match found.name:
        case "quiet" | "io_heavy":
            return repeat(io_write(found.port, b"\0", after))
        case "split_locking":
            rip = guests.CODE + found.code.index(LOCK) + (len(LOCK) if detection == "trap-like" else 0)
            return repeat(bus_lock(after, rip))
        case "spinning":
            return _spin()
        case "halting":
            return [hlt(after)]
        case "triple_fault":
            return [triple_fault(after)]
        case "wild_jump":
            return [ScriptedExit("internal_error", after, args=(NO_EMULATION,))]
    raise SpecError(f"boot: a ready guest {found.name!r}, which this version of orchestra.testing does not have")


def _spin() -> Iterator[ScriptedExit]:
    yield ScriptedExit("intr", 100 * YEARS)
    raise OrchestraError(
        "a spinning guest has spun for 100 years of virtual time: nothing else is left to happen, so whatever is "
        "waited for does not come"
    )


def backend(scripts: Own | None = None, *, detection: Detection | None = "fault-like") -> ScriptedBackend:
    """A scripted backend that knows the ready guests; for ``open_fleet(backend=...)``.

    Parameters:
        scripts: what other guests do: by VM name, or a function of the spec and the vCPU's number that may return None.
            They come before the ready guests. Like these, one given as a list is played from its start each time.
        detection: how the pretended host reports bus locks; None: it does not.

    Launching what is neither a ready guest nor has a script raises `SpecError`.
    """

    def find(spec: VmSpec, vcpu: int) -> Script:
        own = scripts(spec, vcpu) if callable(scripts) else (scripts or {}).get(spec.name)
        if own is not None:
            return own
        if guests.read(spec.boot) is None:
            raise SpecError(
                f"vm {spec.name!r}: this backend executes no code, and has no script for it: boot a ready guest of "
                "orchestra.testing, or pass backend(scripts={...})"
            )
        return script(spec.boot, detection)

    return ScriptedBackend(find, detection=detection)
