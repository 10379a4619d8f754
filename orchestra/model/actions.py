"""What can be done to a fleet, each with its reason and evidence; and how a VM can end. Plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import attrs

from .errors import SpecError
from .spec import Limit, Meter, as_meter, optional_limit

__all__ = [
    "Action",
    "Applied",
    "CapCpu",
    "Evict",
    "Failed",
    "Halted",
    "Isolate",
    "Kill",
    "Outcome",
    "Pause",
    "Rejoin",
    "Reload",
    "Resume",
    "SetLimit",
    "Shutdown",
    "State",
    "Stop",
    "Stopped",
    "Throttle",
    "Unthrottle",
    "Warn",
]


def _is_text(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        raise SpecError(f"{field.name}={value!r:.200}: must be a string")


def _is_text_or_none(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise SpecError(f"{field.name}={value!r:.200}: must be a string, or None")


def _is_named(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SpecError(f"{field.name}={value!r:.200}: must be a mapping whose keys are strings")


def _text(default: str | None = "", *, optional: bool = False) -> Any:
    return attrs.field(default=default, validator=_is_text_or_none if optional else _is_text)


def _named() -> Any:
    return attrs.field(factory=dict, hash=False, validator=_is_named)


@attrs.frozen(kw_only=True)
class _OnVm:
    """An action about a VM.

    Parameters:
        vm: its name.
        launch: which launch of that name is meant (`Vm.launch`): if another VM has the name by then, nothing is done
            to it. None: whoever has the name. The same for limits on a VM.
    """

    vm: str = attrs.field(validator=_is_text)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    launch: int | None = None


@attrs.frozen(kw_only=True)
class Pause(_OnVm):
    """Hold a VM's vCPUs outside the guest. Allowed while it runs; done at once if it is paused already.

    It has taken effect when no guest code runs: it waits for no device and no task that has an access to answer. The
    row of that state in the journal says what is pending, and `Vm.pause` waits for it.
    """


@attrs.frozen(kw_only=True)
class Resume(_OnVm):
    """Let a paused VM go on. Done at once if it runs already."""


@attrs.frozen(kw_only=True)
class Stop(_OnVm):
    """End a VM, its restarts included, between two instructions. Always allowed."""


@attrs.frozen(kw_only=True)
class Kill(_OnVm):
    """End a VM at once. Always allowed. (As `Stop` for flat guests, which have no orderly shutdown to be asked for.)"""


@attrs.frozen(kw_only=True)
class Warn(_OnVm):
    """Say that a VM hurts others, and do nothing: it is journaled and logged."""


@attrs.frozen(kw_only=True)
class CapCpu(_OnVm):
    """Let each vCPU of a VM run for at most this part of the time. It holds guest code back, whatever the guest does.

    Parameters:
        share: from 0.01 to 1; None: take one's own cap away. Each policy, and the callers of `Fleet.apply` together,
            have one cap at each VM; the tightest counts.
    """

    share: float | None

    def __attrs_post_init__(self) -> None:
        share = self.share
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0.01 <= share <= 1
        ):
            raise SpecError(f"share={share!r}: must be from 0.01 to 1, or None for no cap")


@attrs.frozen(kw_only=True)
class Isolate(_OnVm):
    """Have a VM's vCPUs run on the quarantine CPUs only. Done at once if they do already."""


@attrs.frozen(kw_only=True)
class Rejoin(_OnVm):
    """Let an isolated VM's vCPUs run wherever the others do."""


@attrs.frozen(kw_only=True)
class Evict(_OnVm):
    """Have a VM leave this host: asks the fleet's ``on_evict``, which moves it or says why not."""


@attrs.frozen(kw_only=True)
class Reload:
    """Say that other rules are in force from now on, or were not taken: it is journaled, and does nothing.

    `orchestra.config.reload` applies it when it has changed what there is to change.

    Parameters:
        policies: what became of each policy: "new", "changed", "gone" or "kept".
    """

    policies: Mapping[str, str] = _named()
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    vm: None = attrs.field(default=None, init=False)


@attrs.frozen(kw_only=True)
class Throttle:
    """Hold a VM, a tenant, or (with neither) the host to `limit`. Takes effect at once, also in the middle of a wait.

    Each policy, and the callers of `Fleet.apply` together, have one throttle at each place. It never loosens what the
    spec, `set_limit` or another said: the tightest counts. `Unthrottle` takes away one's own.
    """

    limit: Limit
    vm: str | None = _text(None, optional=True)
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    launch: int | None = None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.limit, Limit):
            raise SpecError(f"limit={self.limit!r}: must be a Limit; use Unthrottle to take a limit away")
        _one_target(self.vm, self.tenant, self.launch)


@attrs.frozen(kw_only=True)
class SetLimit:
    """Set the limit itself, of a VM, one of its vCPUs, a tenant, or (with none of them) the host. None: no limit.

    What `Fleet.set_limit` and `Vm.set_limit` do and are journaled as.
    """

    limit: Limit | None
    vm: str | None = _text(None, optional=True)
    vcpu: int | None = None
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    launch: int | None = None

    def __attrs_post_init__(self) -> None:
        optional_limit("limit", self.limit)
        _one_target(self.vm, self.tenant, self.launch)


@attrs.frozen(kw_only=True)
class Unthrottle:
    """Take away what `Throttle` set at the same place. Where there is none, or the VM is gone, nothing is done."""

    vm: str | None = _text(None, optional=True)
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    launch: int | None = None

    def __attrs_post_init__(self) -> None:
        _one_target(self.vm, self.tenant, self.launch)


def _one_target(vm: str | None, tenant: str | None, launch: int | None) -> None:
    if launch is not None and vm is None:
        raise SpecError(f"launch={launch!r}: name its vm as well")
    if vm is not None and tenant is not None:
        raise SpecError(f"vm={vm!r}, tenant={tenant!r}: name one of them, or neither for the host")


Action: TypeAlias = (
    Pause | Resume | Stop | Kill | Throttle | Unthrottle | SetLimit | Warn | CapCpu | Isolate | Rejoin | Evict | Reload
)


@attrs.frozen(kw_only=True)
class Applied:
    """An action that was applied, or that failed: what the journal keeps.

    `time` is in nanoseconds on the fleet's clock, `policy` the name of the policy that asked for it (None: a caller),
    `error` why it was not done (None: it was). Without an action: the policy raised `error` and is switched off.
    `outcome`: "done", "dry-run" (decided, and nothing done), "refused" (by the guard) or "failed".
    """

    time: int
    action: Action | None
    policy: str | None = _text(None, optional=True)
    error: str | None = _text(None, optional=True)
    outcome: Literal["done", "dry-run", "refused", "failed"] = attrs.field()

    @outcome.default
    def _from_error(self) -> str:
        return "done" if self.error is None else "failed"


class State(StrEnum):
    """Where a VM is. Being throttled is a condition of running (`Vm.throttled`), not a state of its own."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    """Between two runs: it waits for a restart's back-off, or for a reset's turn."""
    STOPPED = "stopped"
    FAILED = "failed"


@attrs.frozen
class Halted:
    """Every vCPU executed HLT and nothing can wake it (no irqchip)."""


@attrs.frozen
class Shutdown:
    """The guest ended itself: through an exit port, a system event, or a triple fault."""

    reason: str = _text("exit port")
    code: int | None = None


@attrs.frozen
class Stopped:
    """You stopped it: `Vm.stop`, an action, or the end of its fleet."""

    reason: str = _text()


@attrs.frozen
class Failed:
    """An exit nobody can handle, or an error of the host or of a device, ended it.

    `registers` holds those of the vCPU that failed, by name, as far as they could be read.
    """

    reason: str
    registers: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    vcpu: int | None = None

    def __str__(self) -> str:
        where = "" if self.vcpu is None else f"vCPU {self.vcpu}: "
        registers = " ".join(f"{name}={value:#x}" for name, value in self.registers.items())
        return f"{where}{self.reason}" + (f" ({registers})" if registers else "")


Outcome: TypeAlias = Halted | Shutdown | Stopped | Failed
