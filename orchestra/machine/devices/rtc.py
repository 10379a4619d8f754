"""A real-time clock, the MC146818 of a PC: the time in UTC, and 114 bytes of memory that a run keeps.

Port 0x70 chooses a register, port 0x71 has it. The time is BCD with 24 hours, as firmware leaves it, until the guest
says otherwise in register B. There is no alarm and no periodic interrupt; a guest has better timers.
Source: Motorola MC146818A data sheet; the century in register 0x32 as in every PC.
"""

from __future__ import annotations

import calendar
import time
from typing import Final

import attrs

from ...model.checks import fail, number, whole
from ...model.chipset import Rtc
from .peripheral import Hooks, Peripheral

__all__ = ["RtcDevice", "RtcState"]

SIZE: Final = 128
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
A_32768_HZ: Final = 0x26
B_SET, B_BINARY, B_24_HOURS = 1 << 7, 1 << 2, 1 << 1
D_VALID: Final = 1 << 7
PM: Final = 1 << 7
LAST: Final = calendar.timegm((9999, 12, 31, 23, 59, 59))
"""The clock goes from 1970 to here, in seconds: century and year have room for no more."""
TIME: Final = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)


def _power_on() -> bytes:
    registers = bytearray(SIZE)
    registers[A], registers[B], registers[D] = A_32768_HZ, B_24_HOURS, D_VALID
    return bytes(registers)


@attrs.frozen
class RtcState:
    """All that the clock keeps.

    Attributes:
        index: the register that is chosen.
        registers: all 128. Those of the time count only while the guest sets the time (register B, bit 7).
        ahead: seconds by which the clock is ahead of the host's.
    """

    index: int = 0
    registers: bytes = attrs.field(factory=_power_on, repr=False)
    ahead: float = 0.0

    def __attrs_post_init__(self) -> None:
        whole("index", self.index, 0, SIZE - 1)
        if not isinstance(self.registers, bytes) or len(self.registers) != SIZE:
            raise fail("registers", self.registers, f"must be {SIZE} bytes")
        if abs(number("ahead", self.ahead)) > LAST:
            raise fail("ahead", self.ahead, f"must be seconds from {-LAST} to {LAST}")


class RtcDevice(Peripheral[Rtc, RtcState]):
    """See this module."""

    State = RtcState

    def __init__(self, spec: Rtc, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self.restore(RtcState())

    def read(self, offset: int, size: int) -> int:
        if size != 1 or offset != 1:
            return 0xFF  # the index can't be read back
        index = self._index
        if index in TIME and not self._registers[B] & B_SET:
            return self._now()[index]
        return self._registers[index]

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        if offset == 0:
            self._index = value & 0x7F  # bit 7 masks NMIs on a PC
            return
        index = self._index
        if index == B:
            self._set_b(value)
        elif index not in (C, D):  # which can't be written
            self._registers[index] = value & 0x7F if index == A else value  # A's bit 7: an update is in progress
            if index in TIME and not self._registers[B] & B_SET:
                self._adopt({**self._now(), index: value})

    def _set_b(self, value: int) -> None:
        before = self._registers[B]
        if value & B_SET and not before & B_SET:  # the time stands still from here on
            for index, held in self._now().items():
                self._registers[index] = held
        self._registers[B] = value
        if before & B_SET and not value & B_SET:
            self._adopt({index: self._registers[index] for index in TIME})

    # ---- the time

    def _now(self) -> dict[int, int]:
        """The registers of the time, as register B has them."""
        moment = time.gmtime(min(max(self.hooks.wall_clock() + self._ahead, 0), LAST))
        hour = moment.tm_hour
        values = {
            SECONDS: moment.tm_sec,
            MINUTES: moment.tm_min,
            HOURS: hour if self._registers[B] & B_24_HOURS else (hour + 11) % 12 + 1,
            WEEKDAY: (moment.tm_wday + 1) % 7 + 1,  # Sunday is 1
            DAY: moment.tm_mday,
            MONTH: moment.tm_mon,
            YEAR: moment.tm_year % 100,
            CENTURY: moment.tm_year // 100,
        }
        if not self._registers[B] & B_BINARY:
            values = {index: value // 10 << 4 | value % 10 for index, value in values.items()}
        if not self._registers[B] & B_24_HOURS and hour >= 12:
            values[HOURS] |= PM
        return values

    def _adopt(self, registers: dict[int, int]) -> None:
        """Go on from that time. A time that does not exist changes nothing."""
        afternoon = registers[HOURS] & PM if not self._registers[B] & B_24_HOURS else 0
        values = {**registers, HOURS: registers[HOURS] & ~PM if afternoon else registers[HOURS]}
        if not self._registers[B] & B_BINARY:
            values = {index: (value >> 4) * 10 + (value & 0xF) for index, value in values.items()}
        hour = values[HOURS]
        if not self._registers[B] & B_24_HOURS:
            hour = hour % 12 + (12 if afternoon else 0)
        year = values[CENTURY] * 100 + values[YEAR]
        in_range = (
            1970 <= year <= 9999
            and 1 <= values[MONTH] <= 12
            and 1 <= values[DAY] <= calendar.monthrange(year, values[MONTH])[1]
            and hour <= 23
            and values[MINUTES] <= 59
            and values[SECONDS] <= 59
        )
        if in_range:
            moment = (year, values[MONTH], values[DAY], hour, values[MINUTES], values[SECONDS])
            self._ahead = calendar.timegm(moment) - self.hooks.wall_clock()

    # ---- state

    def reset(self) -> None:
        """A reset keeps the time and the memory: it has a battery. Register B goes back to what firmware leaves."""
        self._index = 0
        self._set_b(B_24_HOURS)

    def state(self) -> RtcState:
        return RtcState(self._index, bytes(self._registers), self._ahead)

    def restore(self, state: RtcState) -> None:
        self._index = state.index
        self._registers = bytearray(state.registers)
        self._ahead = state.ahead
