"""The 16550A against its data sheet (National Semiconductor PC16550D)."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import trio
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import orchestra as orc
from orchestra.machine.devices.bus import Device
from orchestra.machine.devices.console import Console
from orchestra.machine.devices.peripheral import Hooks
from orchestra.machine.devices.serial import Uart16550, UartState
from orchestra.native import ffi, lib

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
RX, THRE, LINE, MODEM = 1, 2, 4, 8  # IER
DLAB, LOOP, FIFOS, CLEAR_RX = 0x80, 0x10, 1, 2
NONE = 1  # IIR: no interrupt is pending


def hooks(console: Console | None = None, interrupts: Any = None) -> Hooks:
    console = console or Console(lambda wake: wake())
    return Hooks(memory=None, timer=None, console=console, end=print, interrupts=interrupts)  # type: ignore[arg-type]


class Uart(Uart16550):
    """One whose output and interrupt line can be looked at."""

    def __init__(self, output: bytearray, line: list[bool]) -> None:
        def say(to: object, by: object, data: Any, size: int) -> None:
            assert size
            output.extend(ffi.buffer(data, size))

        self._say = ffi.callback("orc_uart_output", say)
        self._interrupt = ffi.callback("orc_uart_interrupt", lambda _, level: line.append(bool(level)))
        self._adopt(lib.orc_uart_new(self._say, ffi.NULL, self._interrupt, ffi.NULL))


def receive(uart: Uart16550, data: bytes) -> int:
    """Bytes from the other side. Returns how many fitted into the FIFO."""
    return int(lib.orc_uart_receive(uart._handle, ffi.from_buffer(data), len(data)))


class Rig:
    """A UART with what comes out of it."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.line: list[bool] = []
        self.uart = Uart(self.output, self.line)

    def string(self, register: int, size: int, count: int, data: bytes | None = None) -> bytes:
        """What a string instruction does: all of its elements in one call."""
        buffer = ffi.new("uint8_t[]", data or size * count)
        assert lib.orc_device_answer(self.uart.native, register, size, count, data is not None, buffer)
        return bytes(ffi.buffer(buffer, size * count))

    def read(self, register: int, size: int = 1) -> int:
        return self.uart.read(register, size)

    def write(self, register: int, value: int, size: int = 1) -> None:
        self.uart.write(register, size, value)

    @property
    def level(self) -> bool:
        return bool(self.line) and self.line[-1]

    def interrupt(self) -> int:
        """What IIR says, without the FIFO bits."""
        return self.read(IIR) & 0x0F


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ---- after reset (data sheet, table I)


def test_registers_after_reset(rig):
    assert (rig.read(IER), rig.read(IIR), rig.read(LCR), rig.read(MCR)) == (0, 1, 0, 0)
    assert rig.read(LSR) == 0x60
    assert rig.line == []


def test_it_is_a_device(rig):
    assert isinstance(rig.uart, Device)


# ---- data


def test_bytes_written_are_transmitted_in_order(rig):
    for byte in b"hello":
        rig.write(DATA, byte)
    assert rig.output == b"hello"


def test_transmitter_is_always_empty(rig):
    rig.write(DATA, 65)
    assert rig.read(LSR) & 0x60 == 0x60


def test_received_bytes_are_read_in_order_and_lsr_says_while_there_are_some(rig):
    rig.write(FCR, FIFOS)
    assert receive(rig.uart, b"ab") == 2
    assert rig.read(LSR) & 1
    assert bytes((rig.read(DATA), rig.read(DATA))) == b"ab"
    assert not rig.read(LSR) & 1
    assert rig.read(DATA) == 0


@pytest.mark.parametrize(("fcr", "depth"), [(0, 1), (FIFOS, 16)])
def test_receiver_takes_as_much_as_fits_and_leaves_the_rest_to_the_sender(rig, fcr, depth):
    rig.write(FCR, fcr)
    assert receive(rig.uart, bytes(range(40))) == depth
    assert receive(rig.uart, b"x") == 0
    assert [rig.read(DATA) for _ in range(depth)] == list(range(depth))
    assert receive(rig.uart, b"x") == 1
    assert not rig.read(LSR) & 2  # nothing was overrun


# ---- the divisor latch


def test_divisor_latch_takes_the_place_of_data_and_interrupt_enable(rig):
    rig.write(IER, RX)
    rig.write(LCR, DLAB | 3)
    rig.write(DATA, 0x34)
    rig.write(IER, 0x12)
    assert (rig.read(DATA), rig.read(IER)) == (0x34, 0x12)
    assert rig.output == b""
    rig.write(LCR, 3)
    assert rig.read(IER) == RX
    rig.write(LCR, DLAB)
    assert (rig.read(DATA), rig.read(IER)) == (0x34, 0x12)


def test_divisor_latch_does_not_take_received_bytes(rig):
    receive(rig.uart, b"a")
    rig.write(LCR, DLAB)
    rig.read(DATA)
    rig.write(LCR, 0)
    assert rig.read(DATA) == ord("a")


# ---- plain registers


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_register_keeps_its_bits(rig, register, kept):
    rig.write(register, 0xFF)
    assert rig.read(register) == kept
    rig.write(LCR, 0)
    rig.write(register, 0)
    assert rig.read(register) == 0


@pytest.mark.parametrize("register", [LSR, MSR])
def test_status_can_not_be_written(rig, register):
    before = rig.read(register)
    rig.write(register, before ^ 0xFF)
    assert rig.read(register) == before


# ---- FIFOs


def test_iir_says_whether_fifos_are_enabled(rig):
    assert rig.read(IIR) == NONE
    rig.write(FCR, FIFOS)
    assert rig.read(IIR) == 0xC0 | NONE
    rig.write(FCR, 0)
    assert rig.read(IIR) == NONE


@pytest.mark.parametrize("fcr", [FIFOS | CLEAR_RX, 0], ids=["cleared", "switched off"])
def test_fifo_is_emptied_by_its_clear_bit_and_by_a_change_of_mode(rig, fcr):
    rig.write(FCR, FIFOS)
    receive(rig.uart, b"abc")
    rig.write(FCR, fcr)
    assert not rig.read(LSR) & 1
    assert receive(rig.uart, bytes(20)) == (16 if fcr else 1)


def test_switching_fifos_on_drops_the_byte_that_waited(rig):
    receive(rig.uart, b"a")
    rig.write(FCR, FIFOS)
    assert not rig.read(LSR) & 1


def test_fifo_keeps_its_bytes_when_it_is_enabled_again(rig):
    rig.write(FCR, FIFOS)
    receive(rig.uart, b"abc")
    rig.write(FCR, FIFOS | 0xC0)
    assert rig.read(DATA) == ord("a")


def test_clear_bit_without_the_enable_bit_is_not_programmed(rig):
    receive(rig.uart, b"a")
    rig.write(FCR, CLEAR_RX)
    assert rig.read(DATA) == ord("a")


# ---- loopback


def test_in_loopback_what_is_sent_is_received_and_nothing_leaves(rig):
    rig.write(FCR, FIFOS)
    rig.write(MCR, LOOP)
    for byte in b"loop":
        rig.write(DATA, byte)
    assert rig.output == b""
    assert bytes(rig.read(DATA) for _ in range(4)) == b"loop"


def test_in_loopback_the_input_is_cut_off(rig):
    rig.write(MCR, LOOP)
    assert receive(rig.uart, b"x") == 0
    rig.write(MCR, 0)
    assert receive(rig.uart, b"x") == 1


@pytest.mark.parametrize(
    ("mcr", "msr"), [(0, 0), (1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80), (0x0A, 0x90), (0x0F, 0xF0)]
)
def test_in_loopback_the_modem_lines_are_the_outputs(rig, mcr, msr):
    rig.write(MCR, LOOP | mcr)
    assert rig.read(MSR) & 0xF0 == msr


def test_outside_loopback_a_terminal_is_there(rig):
    rig.write(MCR, 0x0F)
    assert rig.read(MSR) == 0xB0  # CTS, DSR, DCD; nothing changed


def test_fifo_size_is_found_as_drivers_do(rig):
    # Linux, size_fifo(): loopback, send 256, count what comes back
    rig.write(FCR, FIFOS)
    rig.write(MCR, LOOP)
    for i in range(256):
        rig.write(DATA, i)
    count = 0
    while rig.read(LSR) & 1:
        assert rig.read(DATA) == count
        count += 1
    assert count == 16


def test_overrun_with_fifo_loses_the_new_byte_and_is_told_once(rig):
    rig.write(FCR, FIFOS)
    rig.write(MCR, LOOP)
    for i in range(17):
        rig.write(DATA, i)
    assert rig.read(LSR) & 2
    assert not rig.read(LSR) & 2
    assert [rig.read(DATA) for _ in range(17)] == [*range(16), 0]


def test_overrun_without_fifo_destroys_the_old_byte(rig):
    rig.write(MCR, LOOP)
    rig.write(DATA, 1)
    rig.write(DATA, 2)
    assert rig.read(LSR) & 3 == 3
    assert rig.read(DATA) == 2
    assert not rig.read(LSR) & 1


# ---- modem status


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (0, 1, 2),  # DTR → DSR
        (1, 0, 2),
        (0, 2, 1),  # RTS → CTS
        (0, 8, 8),  # OUT2 → DCD
        (0, 4, 0),  # OUT1 → RI: its trailing edge only
        (4, 0, 4),
        (0x0F, 0x0F, 0),
        (0x0F, 0, 0x0F),
    ],
)
def test_msr_says_which_lines_changed_until_it_is_read(rig, before, after, changes):
    rig.write(MCR, LOOP | before)
    rig.read(MSR)
    rig.write(MCR, LOOP | after)
    assert rig.read(MSR) & 0x0F == changes
    assert rig.read(MSR) & 0x0F == 0


def test_changed_modem_line_interrupts_until_msr_is_read(rig):
    rig.write(MCR, LOOP)
    rig.read(MSR)
    rig.write(IER, MODEM)
    assert not rig.level
    rig.write(MCR, LOOP | 1)
    assert rig.level
    assert rig.interrupt() == 0
    rig.read(MSR)
    assert not rig.level
    assert rig.interrupt() == NONE


# ---- interrupts


def test_without_enabled_interrupts_the_line_stays_low(rig):
    rig.write(MCR, LOOP)
    for byte in range(20):
        rig.write(DATA, byte)
    assert rig.interrupt() == NONE
    assert rig.line == []


def test_received_data_interrupt_lasts_until_all_is_read(rig):
    rig.write(FCR, FIFOS)
    rig.write(IER, RX)
    receive(rig.uart, b"ab")
    assert rig.level
    assert rig.interrupt() == 4
    rig.read(DATA)
    assert rig.level
    rig.read(DATA)
    assert not rig.level
    assert rig.line == [True, False]


def test_data_that_waits_interrupts_as_soon_as_that_is_enabled(rig):
    receive(rig.uart, b"a")
    assert not rig.level
    rig.write(IER, RX)
    assert rig.level
    rig.write(IER, 0)
    assert not rig.level


def test_empty_transmitter_interrupts_when_that_is_enabled_until_iir_is_read(rig):
    rig.write(IER, THRE)
    assert rig.level
    assert rig.interrupt() == 2
    assert not rig.level
    assert rig.interrupt() == NONE


def test_empty_transmitter_interrupts_again_after_each_byte(rig):
    rig.write(IER, THRE)
    rig.interrupt()
    rig.write(DATA, 65)
    assert rig.level
    assert rig.interrupt() == 2
    assert not rig.level


def test_enabling_what_is_enabled_interrupts_no_second_time_but_off_and_on_does(rig):
    # Linux tests for this (UART_BUG_THRE)
    rig.write(IER, THRE)
    rig.interrupt()
    rig.write(IER, THRE)
    assert rig.interrupt() == NONE
    rig.write(IER, 0)
    rig.write(IER, THRE)
    assert rig.interrupt() == 2


def test_line_status_comes_before_data_before_transmitter_before_modem(rig):
    rig.write(MCR, LOOP)
    rig.read(MSR)
    rig.write(DATA, 1)
    rig.write(DATA, 2)  # overrun
    rig.write(MCR, LOOP | 1)
    rig.write(IER, RX | THRE | LINE | MODEM)
    assert rig.interrupt() == 6
    assert rig.interrupt() == 6  # reading IIR ends only the transmitter's
    rig.read(LSR)
    assert rig.interrupt() == 4
    rig.read(DATA)
    assert rig.interrupt() == 2
    assert rig.interrupt() == 0
    rig.read(MSR)
    assert rig.interrupt() == NONE
    assert rig.line == [True, False]


# ---- string instructions


def test_a_string_is_transmitted_in_one_piece(rig):
    rig.write(IER, THRE)
    rig.interrupt()
    text = bytes(range(256)) * 4
    rig.string(DATA, 1, len(text), text)
    assert rig.output == text
    assert rig.interrupt() == 2


def test_a_string_read_takes_what_was_received_and_then_zeros(rig):
    rig.write(FCR, FIFOS)
    receive(rig.uart, b"abc")
    assert rig.string(DATA, 1, 5) == b"abc\0\0"


STRINGS = st.tuples(st.integers(0, 8), st.sampled_from([1, 2, 4]), st.binary(min_size=1, max_size=48))


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=8), st.binary(max_size=20), st.lists(STRINGS)
)
def test_a_string_does_what_its_elements_do_one_after_the_other(registers, received, strings):
    whole, single = Rig(), Rig()
    for rig in (whole, single):
        for register, value in registers:
            rig.write(register, value)
        receive(rig.uart, received)
    for register, size, data in strings:
        data = data[: len(data) // size * size]
        count = len(data) // size
        if not count:
            continue
        whole.string(register, size, count, data)
        for at in range(0, len(data), size):
            single.write(register, int.from_bytes(data[at : at + size], "little"), size)
        assert whole.string(register, size, count) == b"".join(
            single.read(register, size).to_bytes(size, "little") for _ in range(count)
        )
    assert (whole.output, whole.level) == (single.output, single.level)


# ---- state


def test_the_state_has_all_of_it_the_oldest_byte_first(rig):
    rig.write(FCR, FIFOS)
    receive(rig.uart, b"xab")
    rig.read(DATA)
    rig.write(LCR, DLAB)
    rig.write(DATA, 0x34)
    rig.write(LCR, 3)
    rig.write(IER, RX)
    rig.write(SCR, 7)
    assert rig.uart.state() == UartState(b"ab", ier=RX, lcr=3, scratch=7, fcr=FIFOS, divisor=0x34, level=True)


def test_after_a_reset_it_is_as_it_was_made_and_its_line_is_low(rig):
    rig.write(FCR, FIFOS)
    rig.write(IER, RX)
    receive(rig.uart, b"x")
    assert rig.level
    rig.uart.reset()
    assert rig.uart.state() == UartState()
    assert not rig.level


def test_one_that_goes_on_raises_its_line_again(rig):
    rig.write(IER, THRE)
    other = Rig()
    other.uart.restore(rig.uart.state())
    assert other.line == [True]  # the irqchip may be another one, and know nothing of it
    assert other.interrupt() == 2
    assert other.line == [True, False]


@pytest.mark.parametrize(
    "state",
    [
        UartState(received=bytes(17), fcr=FIFOS),
        UartState(received=b"ab"),  # without a FIFO there is room for one
        UartState(ier=0x10),
        UartState(ier=256),
        UartState(ier=-1),
        UartState(mcr=0x20),
        UartState(fcr=CLEAR_RX),
        UartState(line_errors=4),
        UartState(modem_changes=0x10),
        UartState(divisor=1 << 16),
        UartState(level=True),  # of which nothing is the cause
        UartState(ier="1"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_a_state_that_no_uart_can_be_in_is_refused_and_changes_nothing(rig, state):
    rig.write(SCR, 7)
    with pytest.raises(orc.SpecError, match=r"received|serial port"):
        rig.uart.restore(state)
    assert rig.uart.state() == UartState(scratch=7)


# ---- on a console


def test_what_it_transmits_is_on_the_console():
    console = Console(lambda wake: wake())
    uart = Uart16550(orc.Serial(), hooks(console))
    for byte in b"hello":
        uart.write(DATA, 1, byte)
    assert console.log() == b"hello"


def test_an_interrupt_that_is_wired_to_nothing_is_none():
    uart = Uart16550(orc.Serial(irq=None), hooks())
    uart.write(IER, 1, THRE)
    assert uart.read(IIR, 1) == 2


def test_interrupt_lines_of_a_vm_that_was_closed_are_set_nowhere():
    interrupts = ffi.gc(lib.orc_interrupts_new(1 << 20), lib.orc_interrupts_free)  # no such descriptor
    uart = Uart16550(orc.Serial(irq=4), hooks(interrupts=interrupts))
    assert lib.orc_interrupts_set(interrupts, 4, True) < 0
    lib.orc_interrupts_close(interrupts)
    assert lib.orc_interrupts_set(interrupts, 4, True) == 0
    uart.write(IER, 1, RX)
    receive(uart, b"x")


def test_bytes_received_while_the_guest_accesses_it_keep_the_order_and_the_line(rig):
    sent, got, ended = bytes(range(256)) * 8, bytearray(), threading.Event()
    rig.write(FCR, FIFOS)
    rig.write(IER, RX)

    def send() -> None:
        at = 0
        while at < len(sent) and not ended.is_set():
            at += receive(rig.uart, sent[at : at + 5])

    thread = threading.Thread(target=send)
    thread.start()
    try:
        while len(got) < len(sent):
            if rig.read(LSR) & 1:
                got.append(rig.read(DATA))
    finally:
        ended.set()
        thread.join()
    assert got == sent
    assert rig.line == [i % 2 == 0 for i in range(len(rig.line))]


# ---- whatever a guest does


def test_wider_accesses_reach_one_register_after_the_other(rig):
    rig.write(LCR, 0x0B03, size=2)  # LCR and MCR
    assert (rig.read(LCR), rig.read(MCR)) == (3, 0x0B)
    assert rig.read(LCR, 2) == 0x0B03
    assert rig.read(SCR, 4) == 0xFFFFFF00  # behind the last register there is nobody


VALUES = {size: st.integers(0, (1 << 8 * size) - 1) for size in (1, 2, 4, 8)}
ACCESSES = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda size: st.tuples(st.sampled_from(["read", "write"]), st.integers(0, 12), st.just(size), VALUES[size])
)


class AnyAccess(RuleBasedStateMachine):
    """Whatever a guest and the other side do: values stay in range, and the line is the level that IIR tells."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.written = 0  # bytes

    @rule(access=ACCESSES)
    def access(self, access):
        what, register, size, value = access
        if what == "read":
            assert 0 <= self.rig.read(register, size) < 1 << 8 * size
        else:
            self.rig.write(register, value, size)
            self.written += size

    @rule(register=st.integers(0, 7), value=st.integers(0, 255))
    def write_byte(self, register, value):
        self.rig.write(register, value)
        self.written += 1

    @rule(
        register=st.integers(0, 8), size=st.sampled_from([1, 2, 4]), count=st.integers(1, 40), byte=st.integers(-1, 255)
    )
    def string(self, register, size, count, byte):
        data = None if byte < 0 else bytes([byte]) * size * count
        assert len(self.rig.string(register, size, count, data)) == size * count
        self.written += size * count if data else 0

    @rule(data=st.binary(max_size=20))
    def receive(self, data):
        assert 0 <= receive(self.rig.uart, data) <= min(len(data), 16)

    @invariant()
    def nothing_comes_out_that_was_not_written(self):
        assert len(self.rig.output) <= self.written

    @invariant()
    def line_changes_only_when_its_level_does(self):
        line = self.rig.line
        assert line == [i % 2 == 0 for i in range(len(line))]

    @invariant()
    def line_is_high_exactly_while_an_interrupt_is_pending(self):
        level = self.rig.level
        assert (self.rig.interrupt() != NONE) == level


AnyAccess.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAnyAccess = AnyAccess.TestCase


@given(st.integers(0, 1 << 52), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
def test_no_offset_is_too_far(offset, size, value):
    rig = Rig()
    rig.write(offset, value & (1 << 8 * size) - 1, size)
    assert 0 <= rig.read(offset, size) < 1 << 8 * size


# ---- on a console


def listening() -> tuple[Console, Uart16550]:
    console = Console(lambda wake: wake())
    uart = Uart16550(orc.Serial(irq=None), hooks(console))
    uart.write(FCR, 1, FIFOS)
    uart.listen()
    return console, uart


def read_all(uart: Uart16550) -> bytes:
    found = bytearray()
    while uart.read(LSR, 1) & 1:
        found.append(uart.read(DATA, 1))
    return bytes(found)


async def test_what_is_typed_comes_out_of_the_fifo_in_order():
    console, uart = listening()
    await console.write(bytes(range(100)))
    assert read_all(uart) == bytes(range(100))


async def test_what_was_typed_before_the_device_listened_is_read():
    console, uart = listening()
    other = Uart16550(orc.Serial(irq=None), hooks(console))
    await console.write(b"a" * 17)
    read_all(uart)
    await console.write(b"b" * 40)
    other.listen()  # 16 of them are in the first one's FIFO already
    assert read_all(other) == b"b" * 24


async def test_typing_more_than_the_queue_holds_waits_for_the_guest():
    console, uart = listening()
    data = bytes(n % 251 for n in range(3 * lib.ORC_CONSOLE_TYPED))
    got = bytearray()

    def guest() -> None:
        while len(got) < len(data):
            got.extend(read_all(uart))
            if lib.orc_console_typed(console.handle) < lib.ORC_CONSOLE_TYPED // 2:
                trio.from_thread.run_sync(console.wake)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, guest)
            await console.write(data)
    assert got == data


async def test_loopback_keeps_input_out_until_it_ends():
    console, uart = listening()
    uart.write(MCR, 1, LOOP)
    await console.write(b"x")
    assert read_all(uart) == b""
    uart.write(MCR, 1, 0)
    assert read_all(uart) == b"x"


async def test_a_uart_that_was_stopped_takes_no_input_though_somebody_still_has_it():
    """As between two runs: the last one's devices are kept until there are others."""
    console, uart = listening()
    uart.stop()
    with pytest.raises(orc.StateError, match="nothing takes input"):
        await console.write(b"x")
    assert read_all(uart) == b""


def test_a_uart_that_is_freed_is_typed_at_no_more():
    console, uart = listening()
    assert lib.orc_console_listened(console.handle)
    del uart
    gc.collect()
    assert not lib.orc_console_listened(console.handle)
    assert lib.orc_console_type(console.handle, b"x", 1) == 1  # kept for the next one


RTS = 2


def attached() -> tuple[Console, Uart16550]:
    """As at power-on, and it takes the console's input."""
    console = Console(lambda wake: wake())
    uart = Uart16550(orc.Serial(irq=None), hooks(console))
    uart.listen()
    return console, uart


def found_by_linux(uart: Uart16550) -> None:
    """What Linux does to a port that it finds (drivers/tty/serial/8250/8250_port.c, autoconfig)."""
    for register, value in ((IER, 0), (IER, 0x0F), (IER, 0), (MCR, LOOP | 0x0A), (MCR, 0), (FCR, FIFOS), (IER, 0)):
        uart.write(register, 1, value)
        uart.read(IIR, 1)
    cleared_by_linux(uart)
    uart.read(DATA, 1)


def cleared_by_linux(uart: Uart16550) -> None:
    for value in (FIFOS, FIFOS | CLEAR_RX | 4, 0):
        uart.write(FCR, 1, value)


def made_the_console_by_linux(uart: Uart16550) -> None:
    """serial8250_console_setup: FIFOs, DTR and RTS are on from then on, and nobody reads."""
    uart.write(IER, 1, 0)
    uart.write(FCR, 1, FIFOS)
    uart.write(FCR, 1, FIFOS | 0x80)
    uart.write(MCR, 1, 0x0B)


def said_by_linux(uart: Uart16550) -> None:
    """A line of its console, while nobody has opened it for reading."""
    uart.write(IER, 1, 0)
    for byte in b"booting":
        assert uart.read(LSR, 1) & 0x20
        uart.write(DATA, 1, byte)
    assert uart.read(LSR, 1) & 0x60 == 0x60
    uart.write(IER, 1, 0)


def opened_by_linux(uart: Uart16550) -> None:
    """serial8250_do_startup, serial8250_do_set_termios and uart_port_startup: `read for luck`, and then it listens."""
    cleared_by_linux(uart)
    for _ in range(2):
        for register in (LSR, DATA, IIR, MSR, LSR, LSR):  # for luck; is the port there; can it transmit
            uart.read(register, 1)
        uart.write(IER, 1, THRE)
        uart.read(LSR, 1)
        uart.write(IER, 1, 0)
    uart.write(IER, 1, RX | LINE)
    uart.write(FCR, 1, FIFOS)
    uart.write(FCR, 1, FIFOS | 0x80)
    uart.write(MCR, 1, 0x0B)


async def test_what_is_typed_before_linux_listens_waits_for_it_byte_for_byte():
    data = bytes(range(1, 101))
    console, uart = attached()
    await console.write(data[:3])
    found_by_linux(uart)
    made_the_console_by_linux(uart)
    await console.write(data[3:40])
    said_by_linux(uart)
    await console.write(data[40:70])
    said_by_linux(uart)
    opened_by_linux(uart)
    await console.write(data[70:])
    assert read_all(uart) == data


async def test_a_guest_that_polls_gets_its_input_however_little_it_has_set_up():
    console, uart = attached()
    await console.write(b"abc")
    assert read_all(uart) == b"abc"  # one that has set up nothing
    for register, value in ((IER, 0), (FCR, 0), (LCR, 3), (MCR, 0)):
        uart.write(register, 1, value)
    await console.write(b"def")
    got = bytearray()
    for _ in range(10):
        if uart.read(LSR, 1) & 1:
            got.append(uart.read(DATA, 1))
    assert got == b"def"


@pytest.mark.parametrize(("register", "value"), [(IER, RX), (FCR, FIFOS)])
async def test_a_guest_that_listens_gets_its_input_at_the_first_look(register, value):
    console, uart = attached()
    uart.write(IER, 1, 0)
    await console.write(b"abc")
    assert not uart.read(LSR, 1) & 1
    uart.write(register, 1, value)
    assert read_all(uart) == b"abc"


async def test_what_is_cleared_unread_comes_again_and_what_was_looped_back_does_not():
    console, uart = attached()
    uart.write(FCR, 1, FIFOS)
    await console.write(b"abc")
    uart.write(MCR, 1, LOOP)
    for byte in b"mine":
        uart.write(DATA, 1, byte)
    uart.write(FCR, 1, FIFOS | CLEAR_RX)
    assert read_all(uart) == b""  # in loopback the input is cut off
    uart.write(MCR, 1, 0)
    assert read_all(uart) == b"abc"


async def test_what_a_guest_has_not_read_is_the_next_runs():
    console, uart = attached()
    uart.write(FCR, 1, FIFOS)
    await console.write(b"ab")
    assert uart.read(DATA, 1) == ord("a")
    uart.reset()
    assert uart.state() == UartState()
    uart.stop()
    again = Uart16550(orc.Serial(irq=None), hooks(console))
    again.listen()
    await console.write(b"c")
    assert read_all(again) == b"bc"


async def test_one_that_is_not_the_consoles_takes_nothing_of_its_input():
    """As beside a virtio console, which comes first in the spec."""
    console, uart = attached()
    other = Uart16550(orc.Serial(port=0x2F8, irq=None), hooks(console))
    for each in (uart, other):
        each.write(FCR, 1, FIFOS)
    uart.write(MCR, 1, LOOP)  # busy with itself
    await console.write(b"abc")
    assert read_all(other) == b""
    uart.write(MCR, 1, 0)
    assert read_all(uart) == b"abc"


@given(
    st.lists(
        st.one_of(st.binary(max_size=30), st.tuples(st.integers(1, 7), st.integers(0, 255)), st.none()), max_size=30
    )
)
def test_input_comes_in_order_and_whole_whatever_the_guest_sets_up(steps):
    async def main() -> None:
        console, uart = attached()
        sent, got = bytearray(), bytearray()
        for step in steps:
            match step:
                case bytes():
                    await console.write(step)
                    sent += step
                case (register, value):
                    uart.write(register, 1, value)
                case None:
                    uart.write(LCR, 1, 0)
                    got += read_all(uart) if not uart.state().mcr & LOOP else b""
        for register, value in ((LCR, 0), (MCR, RTS), (IER, RX)):
            uart.write(register, 1, value)
        got += read_all(uart)
        assert got == sent

    trio.run(main)
