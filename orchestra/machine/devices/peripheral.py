"""What a device is: a class with its surroundings injected, and a frozen class beside it with all of its state."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import attrs

from ...backend.memory import Backing
from ...backend.wiring import Bell, InterruptLine, InterruptPulse, MsiVector
from ...model.actions import Outcome
from ...model.devices import DeviceSpec
from ...model.errors import SpecError, StateError
from .console import Console
from .consoleport import ConsolePort
from .pci import PciHost, Slot
from .timers import Timer

__all__ = ["NOWHERE", "Hooks", "Memory", "Peripheral", "implementation"]

SpecT = TypeVar("SpecT", bound=DeviceSpec)
StateT = TypeVar("StateT")


class Memory(Protocol):
    """The guest's memory, checked. Any thread.

    The guest changes it under your hands: read what belongs together in one call, check what you got, and never read it
    again. An address that is no memory, or for a write memory that the guest may not write either, raises
    `GuestMemoryError`, before anything is copied.
    """

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes | bytearray | memoryview) -> None: ...


class Nowhere:
    """An interrupt that nobody wired."""

    fd: Final = -1

    def set(self, level: bool) -> None: ...
    def fire(self) -> None: ...


NOWHERE: Final = Nowhere()


@attrs.frozen(eq=False)
class Hooks:
    """A device's surroundings. It has no other way to touch its machine.

    Attributes:
        memory: the guest's.
        line: its level-triggered line (`Wiring.line`); `NOWHERE` if it has none, or if the VM has no irqchip.
        pulse: the same, if its line is edge-triggered or resampled.
        msis: its message-signalled interrupts, as many as `Wiring.vectors` says.
        timer: makes a timer that calls a function of the device. In `__init__` only.
        console: where output for the VM's owner goes.
        end: ends the VM with that outcome. Any thread.
        wall_clock: seconds since 1970, UTC.
        slot: what it is on the PCI bus; None: it is not there.
        bells: its doorbells there, as many as `PciFunction.bells`.
        bus: the PCI bus, for its host bridge.
        ports: the host's ends of its streams (`Wiring.streams`).
        guest: the guest's memory for a device of the core (``orc_guest_memory *``); None: the VM has no PCI bus.
        backing: what the pages of its RAM are (`GuestMemory.backing`).
        interrupts: the irqchip's lines for a device of the core (``orc_interrupts *``); None: there are none.
    """

    memory: Memory
    timer: Callable[[Callable[[], None]], Timer]
    console: Console
    end: Callable[[Outcome], None]
    line: InterruptLine = NOWHERE
    pulse: InterruptPulse = NOWHERE
    msis: tuple[MsiVector, ...] = ()
    interrupts: Any = None
    wall_clock: Callable[[], float] = time.time
    slot: Slot | None = None
    bells: tuple[Bell, ...] = ()
    bus: PciHost | None = None
    ports: Mapping[str, ConsolePort] = attrs.field(factory=dict)
    guest: Any = None
    backing: Backing = "anonymous"


class Peripheral(ABC, Generic[SpecT, StateT]):
    """A device of a spec. `orchestra/machine/devices/digest.py` is the one to copy.

    Calls of one device never overlap: accesses come on vCPU threads, all others on the fleet's thread. (A device of the
    core has a lock of its own.) None of them may block: what takes long belongs on a thread of the device. The guest is
    hostile: a device must survive every offset, size (1, 2, 4, 8) and value, and any number of rings. An exception of
    the device ends this VM as ``Failed``, which names the device, and no other VM.

    Attributes:
        State: the frozen attrs class that `state` returns. Its fields are values that the codec knows. A state
            from a file may hold anything that the constructor lets pass: the constructor or `restore` must check.
    """

    State: ClassVar[type[Any]]

    def __init__(self, spec: SpecT, hooks: Hooks) -> None:
        """Be as at power-on. Called on a worker thread while the VM is being built: make no interrupt or output yet."""
        self.spec = spec
        self.hooks = hooks

    @classmethod
    def from_state(cls, spec: SpecT, hooks: Hooks, state: object) -> Peripheral[SpecT, StateT]:
        """A device that goes on where `state` was taken: timers run on, a pending interrupt is made.

        Raises:
            StateError: `state` is no state of this class.
            SpecError: no device can be in that state; the message names the field.
        """
        if not isinstance(state, cls.State):
            raise StateError(f"{cls.__name__}: can't go on from {type(state).__name__}: it needs {cls.State.__name__}")
        device = cls(spec, hooks)
        try:
            device.restore(state)
        except BaseException:
            device.stop()  # nobody else has it, and what it opened is its own to close
            raise
        return device

    @abstractmethod
    def read(self, offset: int, size: int) -> int:
        """As `Device.read`; `offset` from the start of its ports or MMIO addresses."""

    @abstractmethod
    def write(self, offset: int, size: int, value: int) -> None:
        """As `Device.write`."""

    def rang(self, doorbell: int, times: int) -> None:
        """The guest rang number `doorbell` of `Wiring.doorbells`, `times` times (1 or more) since the last call.

        After a restore each doorbell rings once more than the guest rang it: look for work, as there may be none.
        """

    def acknowledged(self) -> None:
        """For a resampled line: the guest has ended the interrupt, and the line is low. Fire again if there is more."""

    @abstractmethod
    def reset(self) -> None:
        """Be as at power-on again: registers, timers, the level of the line, where interrupts go."""

    def stop(self) -> None:
        """The guest has ended: write out what is left. Called once; no timer or ring comes after it."""

    @abstractmethod
    def state(self) -> StateT:
        """All that the device keeps, while its VM is quiesced. The call must not change the device."""

    @abstractmethod
    def restore(self, state: StateT) -> None:
        """Become as the device was from which `state` was taken. `from_state` calls this on a new device."""


def implementation(spec: DeviceSpec) -> type[Peripheral[Any, Any]]:
    """The class that a spec names, imported if need be.

    Raises:
        SpecError: there is no class of that name, or it is no `Peripheral`.
    """
    name = type(spec).__name__
    try:
        found = resolve_name(type(spec).implementation)
    except (AttributeError, ImportError, ValueError) as error:
        raise SpecError(
            f"device {name}: implementation={type(spec).implementation!r}: must be 'package.module:Class' ({error})"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Peripheral)):
        raise SpecError(f"device {name}: implementation={type(spec).implementation!r}: must be a class of Peripheral")
    return found
