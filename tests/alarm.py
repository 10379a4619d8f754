"""A device as somebody else would write it, of which orchestra knows nothing: an alarm clock with an interrupt line."""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs

import orchestra as orc

MILLISECOND = 1_000_000


@attrs.frozen
class Alarm(orc.DeviceSpec):
    """Two ports of 4 bytes: writing the first sets the alarm in so many milliseconds, and reading it gives what is
    left; reading the second acknowledges an alarm, and says how many there were."""

    implementation: ClassVar[str] = "alarm:AlarmDevice"

    port: int = 0x600
    irq: int = 5
    trigger: Literal["level", "edge", "resample"] = "level"

    def wiring(self) -> orc.Wiring:
        return orc.Wiring(ports=range(self.port, self.port + 8), line=orc.Line(self.irq, self.trigger))


@attrs.frozen
class AlarmState:
    left: int | None = None
    rung: int = 0
    level: bool = False


class AlarmDevice(orc.Peripheral[Alarm, AlarmState]):
    State = AlarmState

    def __init__(self, spec: Alarm, hooks: orc.Hooks) -> None:
        super().__init__(spec, hooks)
        self._timer = hooks.timer(self._expired)
        self._rung, self._level = 0, False

    def _expired(self) -> None:
        self._rung += 1
        self._hold(True)

    def _hold(self, level: bool) -> None:
        self._level = level
        self.hooks.line.set(level)  # one of the two is wired, as the spec says
        if level:
            self.hooks.pulse.fire()

    def acknowledged(self) -> None:
        if self._level:  # the guest ended the interrupt, and did not look what it was for
            self.hooks.pulse.fire()

    def read(self, offset: int, size: int) -> int:
        if offset == 0 and size == 4:
            return (self._timer.remaining() or 0) // MILLISECOND
        if offset == 4 and size == 4:
            self._hold(False)
            return self._rung
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self._timer.arm(value * MILLISECOND)

    def reset(self) -> None:
        self._timer.disarm()
        self._rung = 0
        self._hold(False)

    def state(self) -> AlarmState:
        return AlarmState(self._timer.remaining(), self._rung, self._level)

    def restore(self, state: AlarmState) -> None:
        self._rung = state.rung
        if state.left is not None:
            self._timer.arm(state.left)
        self._hold(state.level)
