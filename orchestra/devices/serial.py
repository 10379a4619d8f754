"""A 16550A UART.

Source: National Semiconductor PC16550D data sheet. The line is infinitely fast: the transmitter is always empty, so a
THR-empty interrupt is pending whenever it is enabled, until the guest reads IIR or writes THR.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Uart16550"]

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
IER_RX, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_THRE, IIR_RX, IIR_LINE, IIR_MODEM, IIR_FIFO = 1, 2, 4, 6, 0, 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB: Final = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_DATA, LSR_OVERRUN, LSR_THRE, LSR_IDLE = 1, 2, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_CHANGED: Final = 4  # each line's bit says four bits lower that it changed
FIFO: Final = 16


class Uart16550:
    """Eight registers. `output` takes transmitted bytes, `interrupt` the level of the line; `receive` feeds it."""

    def __init__(self, output: Callable[[bytes], None], interrupt: Callable[[bool], None]) -> None:
        self._output = output
        self._interrupt = interrupt
        self._received: deque[int] = deque()
        self._ier = self._lcr = self._mcr = self._scratch = self._fcr = 0
        self._divisor = 12  # 9600 baud, as firmware leaves it
        self._line_errors = 0
        self._thre_pending = False
        self._modem_changes = 0
        self._level = False

    def receive(self, data: bytes) -> int:
        """Bytes from the other side; returns how many fitted in the FIFO. Callers keep the rest for later."""
        room = 0 if self._mcr & MCR_LOOP else self._depth() - len(self._received)  # in loopback the input is cut off
        taken = data[: max(room, 0)]
        self._received.extend(taken)
        self._update()
        return len(taken)

    def _depth(self) -> int:
        return FIFO if self._fcr & FCR_ENABLE else 1

    def read(self, offset: int, size: int) -> int:
        # Wider accesses than a byte reach one register after the other, as on the 8-bit bus it sits on.
        return sum(self._read_byte(offset + i) << (8 * i) for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            self._write_byte(offset + i, value >> (8 * i) & 0xFF)

    def _read_byte(self, register: int) -> int:
        match register:
            case 0 if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            case 1 if self._lcr & LCR_DLAB:
                return self._divisor >> 8
            case 0:
                byte = self._received.popleft() if self._received else 0
                self._update()
                return byte
            case 1:
                return self._ier
            case 2:
                cause = self._cause()
                if cause == IIR_THRE:
                    self._thre_pending = False
                    self._update()
                return cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 5:
                status = LSR_THRE | LSR_IDLE | self._line_errors | (LSR_DATA if self._received else 0)
                self._line_errors = 0
                self._update()
                return status
            case 6:
                modem = self._modem_lines() | self._modem_changes
                self._modem_changes = 0
                self._update()
                return modem
            case 7:
                return self._scratch
        return 0xFF

    def _write_byte(self, register: int, value: int) -> None:
        match register:
            case 0 if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            case 1 if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            case 0:
                self._transmit(value)
                self._thre_pending = True
            case 1:
                if value & IER_THRE and not self._ier & IER_THRE:
                    self._thre_pending = True
                self._ier = value & 0x0F
            case 2:
                # A change of FIFO mode clears the FIFOs; without the enable bit the others are not programmed.
                if (value ^ self._fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
                    self._received.clear()
                self._fcr = value if value & FCR_ENABLE else 0
            case 3:
                self._lcr = value
            case 4:
                before = self._modem_lines()
                self._mcr = value & 0x1F
                after = self._modem_lines()
                # The ring indicator tells its trailing edge only, the others any change.
                self._modem_changes |= ((before ^ after) & ~(MSR_RI & after)) >> MSR_CHANGED
            case 7:
                self._scratch = value
        self._update()

    def _transmit(self, value: int) -> None:
        if not self._mcr & MCR_LOOP:
            self._output(bytes((value,)))
            return
        if len(self._received) < self._depth():
            self._received.append(value)
            return
        self._line_errors |= LSR_OVERRUN
        if not self._fcr & FCR_ENABLE:  # without a FIFO the new byte takes the old one's place, with one it is lost
            self._received[0] = value

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        wires = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(status for control, status in wires if self._mcr & control)

    def _cause(self) -> int:
        if self._ier & IER_LINE and self._line_errors:
            return IIR_LINE
        if self._ier & IER_RX and self._received:
            return IIR_RX
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MODEM and self._modem_changes:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._interrupt(level)
