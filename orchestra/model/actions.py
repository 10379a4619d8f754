"""The actions on a fleet, each with its reason and evidence, and the outcomes of a VM. Plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Literal, TypeAlias

import attrs

from .errors import SpecError
from .memory import check_size
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
    "SetMemory",
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
        vm: the VM's name.
        reason: the sentence that says why.
        evidence: the figures that the reason is based on, by name.
        generation: which VM of that name is meant (`Vm.generation`). If another VM has the name by then, the fleet does
            nothing to it. None: the VM that has the name. The same holds for limits on a VM.
    """

    vm: str = attrs.field(validator=_is_text)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    generation: int | None = None


@attrs.frozen(kw_only=True)
class Pause(_OnVm):
    """Hold a VM's vCPUs outside the guest. Allowed while the VM runs; done at once if the VM is paused already.

    The action is done when no guest code runs. It does not wait for a device or a task that has an access to answer:
    the row of the paused state in the journal says what is pending. `Vm.pause` waits for these as well.
    """


@attrs.frozen(kw_only=True)
class Resume(_OnVm):
    """Let a paused VM go on. Done at once if the VM runs already."""


@attrs.frozen(kw_only=True)
class Stop(_OnVm):
    """End a VM between two instructions, and do not restart it. Always allowed."""


@attrs.frozen(kw_only=True)
class Kill(_OnVm):
    """End a VM at once. Always allowed. For flat guests, which know no orderly shutdown, it does the same as `Stop`."""


@attrs.frozen(kw_only=True)
class Warn(_OnVm):
    """Say that a VM hurts others, in the journal and the log, and do nothing to the VM."""


@attrs.frozen(kw_only=True)
class CapCpu(_OnVm):
    """Let each vCPU of a VM run for at most this part of the time. The cap holds for all guest code.

    Each policy has one cap at each VM, and the callers of `Fleet.apply` together have one. The tightest counts.

    Parameters:
        share: a part of the time, from 0.01 to 1. None: take away the cap of the same policy, or of the callers.
    """

    share: float | None

    def __attrs_post_init__(self) -> None:
        share = self.share
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0.01 <= share <= 1
        ):
            raise SpecError(f"share={share!r}: must be from 0.01 to 1, or None for no cap")


@attrs.frozen(kw_only=True)
class SetMemory(_OnVm):
    """Ask a VM's guest to keep to so much of its memory, by its `Balloon`. The action is done once the guest is asked;
    `VmStatistics.memory` says how far the guest is.

    Each policy has one such request at each VM, and the callers of `Fleet.apply` together have one. The smallest
    counts.

    Parameters:
        memory: bytes, a multiple of 4096, from the balloon's floor to the memory of the spec. None: take away the
            request of the same policy, or of the callers.
    """

    memory: int | None

    def __attrs_post_init__(self) -> None:
        if self.memory is not None:
            check_size("memory", self.memory)


@attrs.frozen(kw_only=True)
class Isolate(_OnVm):
    """Let a VM's vCPUs run only on the CPUs that are kept for noisy VMs. Done at once if they do already."""


@attrs.frozen(kw_only=True)
class Rejoin(_OnVm):
    """Let an isolated VM's vCPUs run on the CPUs of the other VMs again."""


@attrs.frozen(kw_only=True)
class Evict(_OnVm):
    """Let a VM leave this host. The fleet calls its ``on_evict``, which moves the VM or says why it can't."""


@attrs.frozen(kw_only=True)
class Reload:
    """Say in the journal that new rules are in force, or that they were refused. It does nothing else.

    `orchestra.config.reload` applies it after it has put the new rules in force.

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

    Each policy has one throttle at each place, and the callers of `Fleet.apply` together have one. A throttle never
    loosens what the spec, `set_limit` or another throttle says: the tightest counts. `Unthrottle` takes away the
    throttle of the same policy, or of the callers.
    """

    limit: Limit
    vm: str | None = _text(None, optional=True)
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    generation: int | None = None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.limit, Limit):
            raise SpecError(f"limit={self.limit!r}: must be a Limit; use Unthrottle to take a limit away")
        _one_target(self.vm, self.tenant, self.generation)


@attrs.frozen(kw_only=True)
class SetLimit:
    """Set the limit itself of a VM, of one of its vCPUs, of a tenant, or (with none of them) of the host.

    A `limit` of None takes the limit off. `Fleet.set_limit` and `Vm.set_limit` do this, and the journal has this action
    for them.
    """

    limit: Limit | None
    vm: str | None = _text(None, optional=True)
    vcpu: int | None = None
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    generation: int | None = None

    def __attrs_post_init__(self) -> None:
        optional_limit("limit", self.limit)
        _one_target(self.vm, self.tenant, self.generation)


@attrs.frozen(kw_only=True)
class Unthrottle:
    """Take away the throttle at a place. If there is none, or the VM is gone, nothing is done."""

    vm: str | None = _text(None, optional=True)
    tenant: str | None = _text(None, optional=True)
    meter: Meter = attrs.field(default=Meter.BUS_LOCKS, converter=as_meter)
    reason: str = _text()
    evidence: Mapping[str, Any] = _named()
    generation: int | None = None

    def __attrs_post_init__(self) -> None:
        _one_target(self.vm, self.tenant, self.generation)


def _one_target(vm: str | None, tenant: str | None, generation: int | None) -> None:
    if generation is not None and vm is None:
        raise SpecError(f"generation={generation!r}: name its vm as well")
    if vm is not None and tenant is not None:
        raise SpecError(f"vm={vm!r}, tenant={tenant!r}: name one of them, or neither for the host")


Action: TypeAlias = (
    Pause
    | Resume
    | Stop
    | Kill
    | Throttle
    | Unthrottle
    | SetLimit
    | Warn
    | CapCpu
    | SetMemory
    | Isolate
    | Rejoin
    | Evict
    | Reload
)


@attrs.frozen(kw_only=True)
class Applied:
    """What came of an action. The journal keeps it.

    Attributes:
        time: nanoseconds on the fleet's clock.
        action: the action. None: the policy raised `error` and is switched off.
        policy: the name of the policy that asked for the action. None: a caller asked.
        error: why the action was not done. None: it was done.
        outcome: "done", "dry-run" (decided, and nothing done), "refused" (by the guard) or "failed".
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
    """The state of a VM. A throttled VM is in the state RUNNING (see `Vm.throttled`)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    """The VM is between two runs: it waits for a restart's back-off, or for a reset's turn."""
    STOPPED = "stopped"
    FAILED = "failed"


@attrs.frozen
class Halted:
    """Every vCPU executed HLT, and nothing can wake the VM, as it has no irqchip."""


TRIPLE_FAULT: Final = "triple fault"
ACPI_RESET: Final = "ACPI reset"
KEYBOARD_RESET: Final = "keyboard controller reset"
RESETS: Final = (TRIPLE_FAULT, "system event: reset", ACPI_RESET, KEYBOARD_RESET)
"""Reasons of a `Shutdown` that count as a reset: the guest asked for a reset, or hardware would make one."""
POWER_OFF: Final = "ACPI power-off"


@attrs.frozen
class Shutdown:
    """The guest ended itself: by ACPI, an exit port, a system event, or a triple fault. `code` is the exit port's."""

    reason: str = _text("exit port")
    code: int | None = None


@attrs.frozen
class Stopped:
    """You stopped the VM: by `Vm.stop`, by an action, or by the end of its fleet."""

    reason: str = _text()


@attrs.frozen
class Failed:
    """An exit that nothing can handle, or an error of the host or of a device, ended the VM.

    Attributes:
        registers: those of the vCPU that failed, by name, as far as they could be read.
        console: the last lines of the guest's console, if the guest said itself that it failed.
    """

    reason: str
    registers: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    vcpu: int | None = None
    console: str = ""

    def __str__(self) -> str:
        where = "" if self.vcpu is None else f"vCPU {self.vcpu}: "
        registers = " ".join(f"{name}={value:#x}" for name, value in self.registers.items())
        return (
            f"{where}{self.reason}" + (f" ({registers})" if registers else "") + (self.console and f"\n{self.console}")
        )


Outcome: TypeAlias = Halted | Shutdown | Stopped | Failed
