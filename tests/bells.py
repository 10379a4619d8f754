"""Devices for tests, with all that a spec can declare but interrupts: they keep what happened to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import attrs

import orchestra as orc


@attrs.frozen
class Bells(orc.DeviceSpec):
    """Two doorbells: at 0, and at 8 for the value 7."""

    implementation: ClassVar[str] = "bells:BellsDevice"

    base: int = 0xD000_0000

    def wiring(self) -> orc.Wiring:
        bells = (orc.Doorbell(0), orc.Doorbell(8, value=7))
        return orc.Wiring(mmio=range(self.base, self.base + 0x20), doorbells=bells)


@attrs.frozen
class Clock(orc.DeviceSpec):
    """Ends the VM with the code that was written to its port, so many seconds later."""

    implementation: ClassVar[str] = "bells:ClockDevice"

    port: int = 0x600
    after: float = 1.0

    def wiring(self) -> orc.Wiring:
        return orc.Wiring(ports=range(self.port, self.port + 1))


@attrs.frozen
class Kept:
    value: int = 0


class Recorder(orc.Peripheral[Any, Kept]):
    """What both have in common. `during` is called within each ring or expiry, `at_stop` at the end."""

    State = Kept

    def __init__(self, spec: Any, hooks: orc.Hooks) -> None:
        super().__init__(spec, hooks)
        self.value = 0
        self.rings: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.threads: set[int] = set()
        self.stopped = 0
        self.during: Callable[[], object] = lambda: None
        self.at_stop: Callable[[], object] = lambda: None

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))

    def rang(self, doorbell: int, times: int) -> None:
        self.rings.append((doorbell, times))
        self.threads.add(threading.get_ident())
        self.during()

    def reset(self) -> None:
        self.value = 0

    def stop(self) -> None:
        self.stopped += 1
        self.at_stop()

    def state(self) -> Kept:
        return Kept(self.value)

    def restore(self, state: Kept) -> None:
        self.value = state.value


class BellsDevice(Recorder):
    """Its read answers with how many rings of the first bell it had."""


class ClockDevice(Recorder):
    def __init__(self, spec: Clock, hooks: orc.Hooks) -> None:
        super().__init__(spec, hooks)
        self.timer = hooks.timer(self.expired)

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value
        self.timer.arm(round(self.spec.after * 1e9))

    def expired(self) -> None:
        self.threads.add(threading.get_ident())
        self.during()
        self.hooks.end(orc.Shutdown(code=self.value))
