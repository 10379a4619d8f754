"""Random guest programs on kvm and on emulated: the same exits, answers, registers and memory.

Where the manual allows both, programs hide it: flags that an instruction leaves undefined (Intel SDM vol. 1, appendix
A) are cleared behind it, and CMPS is given one device at most, as nowhere is said which of two it reads first.

ORCHESTRA_DIFFERENTIAL=N: so many programs in each mode, other ones in each run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, note, settings, strategies as st

from orchestra.backend.emulated.machine import EmulatedBackend
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.model import exits
from played import MMIO, PORTS, Played, play
from x86 import FORMS, Mode, load

pytestmark = [pytest.mark.emulated, pytest.mark.kvm]

EXAMPLES: Final = int(os.environ.get("ORCHESTRA_DIFFERENTIAL", "0"))
MEMORY: Final = 0x80000
"""Behind it comes memory that nobody backs, which real-mode code can reach."""
TABLES: Final = MEMORY - 16 * 4096
LOAD, STACK, DATA = 0x1000, 0x7000, 0x8000
HOLE: Final = range(MEMORY, MEMORY + 0x2000)
NOBODY: Final = HOLE.stop + 0x100
CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
STATUS: Final = CF | PF | AF | ZF | SF | OF

REGISTERS: Final = (
    *(f"r{name}" for name in ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp", *range(8, 16))),
    "rip",
    "rflags",
)
VALUES: Final = (0, 1, 0x7F, 0x80, 0xFFFF, 0x1234, 0x7FFFFFFF, 0xDEADBEEF, 0x8000_0000_0000_0001, 2**64 - 1)

AX, CX, DX, BX, SP, BP, SI, DI = range(8)
Draw = Callable[[Any], Any]


class Assembler:
    """Draws instructions and their operands."""

    def __init__(self, draw: Draw, mode: Mode) -> None:
        self.draw, self.mode = draw, mode
        self.code = bytearray()

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    @property
    def at(self) -> int:
        return LOAD + len(self.code)

    # ---- operands

    def register(self) -> int:
        number = self.number(0, 15 if self.mode == 64 else 7)
        return BX if number == SP else number

    def address(self, size: int, *, code: bool = False) -> int:
        """Of memory of different kinds, at its edges too."""
        mmio = HOLE if self.mode == 16 else MMIO
        kind = self.pick("ram", "ram", "ram", "line", "page", "mmio", "mmio page", "edge", "nobody")
        match kind:
            case "ram":
                return DATA + self.number(0, 255)
            case "line":
                return DATA + 0x200 + 64 * self.number(0, 3) + self.pick(-1, -2, -3, -4, -7)
            case "page":
                return DATA + 0x1000 + self.pick(-1, -2, -3, -5)
            case "mmio":
                return mmio.start + self.number(0, 70)
            case "mmio page":
                return mmio.start + 0x1000 - self.number(0, size)
            case "edge":
                return MEMORY - self.number(0, size)
        return NOBODY if self.mode == 16 else MMIO.stop + 8

    def size(self, *sizes: int) -> int:
        return int(self.pick(*[size for size in sizes or (1, 2, 4, 8) if size != 8 or self.mode == 64]))

    # ---- encoding

    def op(
        self, opcode: bytes, size: int, reg: int, operand: int | None = None, rm: int = 0, constant: bytes = b"",
        prefix: bytes = b"",
    ) -> None:  # fmt: skip
        """An instruction with ModR/M: `operand` is an address, or None for the register `rm`."""
        head = prefix
        if size == (4 if self.mode == 16 else 2):
            head += b"\x66"
        rex = (8 if size == 8 else 0) | (reg >> 3) << 2
        if operand is None:
            rex |= rm >> 3
            if size == 1 and self.mode == 64:
                rex |= 0x40  # SPL to DIL instead of AH to BH
            tail = bytes([0xC0 | (reg & 7) << 3 | (rm & 7)])
        else:
            if size == 1 and self.mode == 64:
                rex |= 0x40
            if self.mode == 16:
                if operand >= 0x10000:
                    head += b"\x64"
                    operand -= 0x78000
                tail = bytes([(reg & 7) << 3 | 6]) + (operand & 0xFFFF).to_bytes(2, "little")
            elif self.mode == 32:
                tail = bytes([(reg & 7) << 3 | 5]) + operand.to_bytes(4, "little")
            else:
                head += b"\x67"
                tail = bytes([(reg & 7) << 3 | 4, 0x25]) + operand.to_bytes(4, "little")
        if rex:
            rex |= 0x40
        self.code += head + (bytes([rex]) if rex else b"") + opcode + tail + constant

    def undefined(self, flags: int) -> None:
        """PUSHF; AND word [SP], what is defined; POPF."""
        mask = (~flags & 0xFFFF).to_bytes(2, "little")
        self.code += b"\x9c" + (b"\x67" if self.mode == 16 else b"\x66") + b"\x81\x24\x24" + mask + b"\x9d"

    def set(self, number: int, value: int) -> None:
        self.code += load(self.mode, number, value)

    def either(self, size: int) -> dict[str, int]:
        """A register or memory."""
        return {"rm": self.register()} if self.pick(True, False) else {"operand": self.address(size)}

    def constant(self, size: int) -> bytes:
        value = self.pick(0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0x12345678)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    # ---- instructions

    def arithmetic(self) -> None:
        operation, size = self.number(0, 7), self.size()
        self.op(bytes([operation << 3 | (size > 1) | self.pick(0, 2)]), size, self.register(), **self.either(size))
        if operation in (1, 4, 6):
            self.undefined(AF)

    def arithmetic_constant(self) -> None:
        operation, size, short = self.number(0, 7), self.size(), self.pick(True, False)
        opcode = b"\x80" if size == 1 else b"\x83" if short else b"\x81"
        constant = self.constant(1 if opcode != b"\x81" else min(size, 4))
        self.op(opcode, size, operation, **self.either(size), constant=constant)
        if operation in (1, 4, 6):
            self.undefined(AF)

    def move(self) -> None:
        size = self.size()
        self.op(bytes([0x88 | (size > 1) | self.pick(0, 2)]), size, self.register(), **self.either(size))

    def move_constant(self) -> None:
        size = self.size()
        self.op(b"\xc6" if size == 1 else b"\xc7", size, 0, **self.either(size), constant=self.constant(min(size, 4)))

    def test(self) -> None:
        size = self.size()
        self.op(bytes([0x84 | (size > 1)]), size, self.register(), **self.either(size))
        self.undefined(AF)

    def exchange(self) -> None:
        size = self.size()
        opcode = self.pick(b"\x86", b"\x0f\xc0", b"\x0f\xb0")
        self.op(opcode[:-1] + bytes([opcode[-1] | (size > 1)]), size, self.register(), **self.either(size))

    def exchange_8b(self) -> None:
        self.op(b"\x0f\xc7", {16: 2, 32: 4, 64: 4}[self.mode], 1, self.address(8))

    def one_operand(self) -> None:
        size = self.size()
        opcode, extension = self.pick((0xF6, 2), (0xF6, 3), (0xFE, 0), (0xFE, 1))
        self.op(bytes([opcode | (size > 1)]), size, extension, **self.either(size))

    def multiply(self) -> None:
        size = self.size()
        self.op(bytes([0xF6 | (size > 1)]), size, self.pick(4, 5), **self.either(size))
        self.undefined(SF | ZF | AF | PF)

    def multiply_two(self) -> None:
        size = self.size(2, 4, 8)
        self.op(b"\x0f\xaf", size, self.register(), **self.either(size))
        self.undefined(SF | ZF | AF | PF)

    def divide(self) -> None:
        size = self.size(2, 4, 8)
        self.set(DX, 0)
        self.set(AX, self.number(0, 0x7FFF))
        self.set(BX, self.number(1, 0x7F))
        self.op(b"\xf7", size, self.pick(6, 7), rm=BX)
        self.undefined(STATUS)

    def shift(self) -> None:
        size, by_cl = self.size(), self.pick(True, False)
        opcode = bytes([(0xD2 if by_cl else 0xC0) | (size > 1)])
        constant = b"" if by_cl else bytes([self.number(0, 7)])
        self.op(opcode, size, self.pick(0, 1, 2, 3, 4, 5, 7), **self.either(size), constant=constant)
        self.undefined(OF | AF | (CF if by_cl else 0))

    def shift_double(self) -> None:
        size = self.size(2, 4, 8)
        opcode = self.pick(b"\x0f\xa4", b"\x0f\xac")
        self.op(opcode, size, self.register(), **self.either(size), constant=bytes([self.number(1, 15)]))
        self.undefined(OF | AF)

    def bits(self) -> None:
        size, extension = self.size(2, 4, 8), self.number(4, 7)
        if self.pick(True, False):
            self.op(b"\x0f\xba", size, extension, **self.either(size), constant=bytes([self.number(0, 63)]))
        else:
            register = self.register()
            self.set(register, self.number(-40, 40))
            self.op(bytes([0x0F, 0x83 | extension << 3]), size, register, DATA + 0x100 + self.number(0, 64))
        self.undefined(OF | SF | AF | PF)

    def scan(self) -> None:
        register = self.register()
        self.op(b"\x83", 4, 1, rm=register, constant=b"\x10")  # or: not 0, as the result would be undefined
        self.op(self.pick(b"\x0f\xbc", b"\x0f\xbd"), 4, self.register(), rm=register)
        self.undefined(STATUS & ~ZF)

    def extend(self) -> None:
        source = self.size(1, 2)
        size = self.size(*[size for size in (2, 4, 8) if size > source])
        opcode = bytes([0x0F, self.pick(0xB6, 0xBE) | (source == 2)])
        self.op(opcode, size, self.register(), self.address(source))

    def conditional(self) -> None:
        condition = self.number(0, 15)
        if self.pick(True, False):
            self.op(bytes([0x0F, 0x90 | condition]), 1, 0, **self.either(1))
        else:
            size = self.size(2, 4, 8)
            self.op(bytes([0x0F, 0x40 | condition]), size, self.register(), **self.either(size))

    def flags(self) -> None:
        self.code += self.pick(b"\xf8", b"\xf9", b"\xf5", b"\xfc", b"\xfd", b"\x98", b"\x99", b"\x90")
        if self.mode != 64:
            self.code += self.pick(b"", b"\x9e", b"\x9f")

    def stack(self) -> None:
        register = self.register()
        rex = b"\x41" if register > 7 else b""
        if self.pick(True, False):
            self.code += rex + bytes([0x50 | register & 7]) + b"\x9c\x58"
        elif self.mode != 64 and self.pick(True, False):
            self.code += self.pick(b"", b"\x66") + b"\x60" + b"\x61"
        else:
            size = {16: 2, 32: 4, 64: 4}[self.mode]  # of 64-bit code it is 8 without a prefix
            self.op(b"\xff", size, 6, self.address(8))
            self.op(b"\x8f", size, 0, self.address(8))

    def jump(self) -> None:
        self.code += bytes([0x70 | self.number(0, 15), 3]) + b"\xb0\x77\x90"

    def loop(self) -> None:
        self.set(CX, self.number(1, 4))
        start = len(self.code)
        size = self.size()
        self.op(bytes([0x00 | (size > 1)]), size, self.pick(AX, BX, DX), self.address(size))
        self.code += bytes([0xE2, (start - len(self.code) - 2) & 0xFF])

    def string(self) -> None:
        size = self.size()
        opcode = self.pick(0xA4, 0xA6, 0xAA, 0xAC, 0xAE) | (size > 1)
        self.set(CX, self.number(0, 4))
        for register in (SI, DI):
            address = self.address(size)
            plain = (address >= 0x10000 and self.mode == 16) or (opcode & 0xFE == 0xA6 and register == DI)
            self.set(register, DATA + 0x300 if plain else address)
        prefix = self.pick(b"", b"\xf3", b"\xf2")
        if size == (4 if self.mode == 16 else 2):
            prefix += b"\x66"
        self.code += self.pick(b"\xfc", b"\xfd") + prefix + (b"\x48" if size == 8 else b"") + bytes([opcode])

    def port(self) -> None:
        size, out = self.size(1, 2, 4), self.pick(0, 2)
        prefix = b"\x66" if size == (4 if self.mode == 16 else 2) else b""
        if self.pick(True, False):
            self.set(DX, self.pick(PORTS.start, PORTS.start + self.number(1, 8), 0x80))
            self.code += prefix + bytes([0xEC | (size > 1) | out])
        else:
            self.code += prefix + bytes([0xE4 | (size > 1) | out, 0x81])

    def port_string(self) -> None:
        size, out = self.size(1, 2, 4), self.pick(0, 2)
        self.set(DX, self.pick(PORTS.start, 0x80))
        self.set(CX, self.number(0, 5))
        near = DATA + self.pick(0x400, 0x1000 - 3, 0x1000 - 8, 0x1000)
        self.set(SI, near)
        self.set(DI, near + self.number(0, 3))
        prefix = self.pick(b"", b"\xf3") + (b"\x66" if size == (4 if self.mode == 16 else 2) else b"")
        self.code += self.pick(b"\xfc", b"\xfd") + prefix + bytes([0x6C | (size > 1) | out])

    def lock(self) -> None:
        form = self.pick(*[form for form in FORMS if not (form.legacy and self.mode == 64)])
        size = 1 if form.byte else {16: 2, 32: 4, 64: 4}[self.mode] if form.wide else self.size(2, 4, 8)
        reg = form.extension
        if reg is None:
            reg = self.register()
            if form.bits:
                self.set(reg, self.number(-10, 40))
        constant = bytes([self.number(0, 31)]) * (min(size, 4) if form.constant == 4 else form.constant)
        address = self.address(8 if form.wide else size)
        self.op(form.opcode, size, reg, address, constant=constant, prefix=b"\xf0")
        self.undefined(OF | SF | AF | PF if form.bits or form.opcode == b"\x0f\xba" else AF)

    def modify(self) -> None:
        """Write into the next instruction, MOV AL, constant: plainly, locked, and as a string."""
        kind = self.number(0, 2)
        before = len(self.code)
        target = LOAD
        for _ in range(2):  # once more, now that its length is known
            del self.code[before:]
            if kind == 0:
                self.op(b"\xc6", 1, 0, target, constant=b"\x5a")
            elif kind == 1:
                self.op(b"\x80", 1, 0, target, constant=b"\x21", prefix=b"\xf0")
            else:
                self.set(DI, target)
                self.set(AX, 0x6B)
                self.code += b"\xfc\xaa"
            target = self.at + 1
        self.code += b"\xb0\x11"

    def program(self, length: int) -> bytes:
        if self.mode == 16:
            self.code += b"\xb8\x00\x78\x8e\xe0"  # FS: what it reaches goes from RAM into the hole
        for number in range(16 if self.mode == 64 else 8):
            value = self.pick(
                0, 1, 0x7F, 0x80, 0xFFFF, 0x1234, 0x7FFFFFFF, 0xDEADBEEF, 0x8000_0000_0000_0001, 2**64 - 1
            )
            self.set(number, STACK if number == SP else value)
        for _ in range(length):
            self.pick(*INSTRUCTIONS)(self)
        return bytes(self.code) + b"\xf4"


INSTRUCTIONS: Final = (
    Assembler.arithmetic,
    Assembler.arithmetic_constant,
    Assembler.move,
    Assembler.move_constant,
    Assembler.test,
    Assembler.exchange,
    Assembler.exchange_8b,
    Assembler.one_operand,
    Assembler.multiply,
    Assembler.multiply_two,
    Assembler.divide,
    Assembler.shift,
    Assembler.shift_double,
    Assembler.bits,
    Assembler.scan,
    Assembler.extend,
    Assembler.conditional,
    Assembler.flags,
    Assembler.stack,
    Assembler.jump,
    Assembler.loop,
    Assembler.string,
    Assembler.port,
    Assembler.port_string,
    Assembler.lock,
    Assembler.modify,
)


@st.composite
def programs(draw: Draw, mode: Mode) -> bytes:
    assembler = Assembler(draw, mode)
    return assembler.program(assembler.number(1, 25))


def facts(played: Played) -> dict[str, Any]:
    """What both backends must agree on."""

    def told(exit: exits.Exit) -> tuple[Any, ...]:
        match exit:
            case exits.Io(port=port, size=size, count=count, write=write, data=data):
                return "io", hex(port), size, count, write, data.hex()
            case exits.Mmio(address=address, size=size, write=write, data=data):
                return "mmio", hex(address), size, write, data.hex()
        return (type(exit).__name__,)

    registers = {name: hex(getattr(played.registers, name)) for name in REGISTERS}
    return {
        "outcome": type(played.outcome).__name__,
        "exits": [told(exit) for exit in played.exits if not isinstance(exit, exits.BusLock)],
        "accesses": played.accesses,
        **registers,
        "memory": played.memory[0][:TABLES],
    }


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[EmulatedBackend, KvmBackend]]:
    kvm = KvmBackend.open()
    yield EmulatedBackend(), kvm
    kvm.close()


def compare(backends: tuple[EmulatedBackend, KvmBackend], code: bytes, mode: Mode) -> None:
    note(f"mode {mode}: {code.hex()}")
    emulated, kvm = (
        facts(play(backend, code, mode, load=LOAD, memory=MEMORY, mmio=(MMIO, HOLE))) for backend in backends
    )
    for key, expected in kvm.items():
        assert emulated[key] == expected, key


@pytest.mark.parametrize("mode", [16, 32, 64])
@given(data=st.data())
@settings(
    max_examples=EXAMPLES or 80,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_a_random_program_does_the_same_on_emulated_as_on_kvm(backends: Any, mode: Mode, data: st.DataObject) -> None:
    compare(backends, data.draw(programs(mode)), mode)
