"""Encodings of every instruction that may be locked, in every form of address. Table-driven, and bytes: a machine that
runs the tests need not have an assembler.

Source: Intel SDM vol. 2, 2.1 (ModR/M, SIB), "LOCK" and "XCHG", and the opcode maps of appendix A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import attrs

__all__ = ["ADDRESSES", "FORMS", "Address", "Form", "Mode", "encode", "load", "lock_program", "locks", "prelude"]

Mode = Literal[16, 32, 64]

AX, CX, DX, BX, SP, BP, SI, DI = range(8)
SEGMENT_BASE: Final = 0x20000
"""Of FS in 32 and 64-bit guests, after `prelude`."""
REAL_BASE: Final = 0x8000
"""Of ES, and GS in 16-bit guests."""


@attrs.frozen
class Form:
    """An instruction that may be locked: opcode, what ModR/M's reg field must be, the operand's width, constants."""

    opcode: bytes
    extension: int | None = None  # None: a register
    byte: bool = False
    wide: bool = False  # CMPXCHG8B and 16B
    constant: int = 0  # bytes; 4 is 2 with a 16-bit operand
    bits: bool = False  # the register moves the operand
    implicit: bool = False  # locks without the prefix
    legacy: bool = False  # not in 64-bit code


def _forms() -> Iterator[Form]:
    for opcode in (0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30):  # ADD OR ADC SBB AND SUB XOR
        yield Form(bytes([opcode]), byte=True)
        yield Form(bytes([opcode + 1]))
    for extension in range(7):  # the same with a constant
        yield Form(b"\x80", extension, byte=True, constant=1)
        yield Form(b"\x81", extension, constant=4)
        yield Form(b"\x82", extension, byte=True, constant=1, legacy=True)
        yield Form(b"\x83", extension, constant=1)
    yield Form(b"\x86", byte=True, implicit=True)  # XCHG
    yield Form(b"\x87", implicit=True)
    for extension in (2, 3):  # NOT NEG
        yield Form(b"\xf6", extension, byte=True)
        yield Form(b"\xf7", extension)
    for extension in (0, 1):  # INC DEC
        yield Form(b"\xfe", extension, byte=True)
        yield Form(b"\xff", extension)
    for opcode in (0xB0, 0xC0):  # CMPXCHG XADD
        yield Form(bytes([0x0F, opcode]), byte=True)
        yield Form(bytes([0x0F, opcode + 1]))
    for opcode in (0xAB, 0xB3, 0xBB):  # BTS BTR BTC
        yield Form(bytes([0x0F, opcode]), bits=True)
    for extension in (5, 6, 7):
        yield Form(b"\x0f\xba", extension, constant=1)
    yield Form(b"\x0f\xc7", 1, wide=True)


FORMS: Final = tuple(_forms())


@attrs.frozen
class Address:
    """A form of address: ModR/M without its reg field, SIB, displacement; prefixes; the registers it takes."""

    mod: int
    rm: int
    sib: tuple[int, int, int] | None = None  # scale as a power of two, index, base: numbers up to 15
    bits: int = 32
    prefixes: bytes = b""
    segment_base: int = 0
    relative: bool = False

    @property
    def base(self) -> int | None:
        """Number of the base register (32 and 64-bit forms)."""
        number = self.rm if self.sib is None else self.sib[2]
        return None if self.mod == 0 and number & 7 == BP else number

    @property
    def index(self) -> int | None:
        if self.sib is None or self.sib[1] == SP:
            return None
        return self.sib[1]

    @property
    def displacement(self) -> int:
        """Its size in bytes."""
        if self.bits == 16:
            return 2 if self.mod == 0 and self.rm == 6 else self.mod
        if self.mod == 0:
            return 4 if self.base is None else 0
        return 1 if self.mod == 1 else 4

    def registers(self) -> list[int]:
        if self.bits == 16:
            pairs = [[BX, SI], [BX, DI], [BP, SI], [BP, DI], [SI], [DI], [BP], [BX]]
            return [] if self.displacement == 2 and self.mod == 0 else pairs[self.rm]
        return sorted({number for number in (self.base, self.index) if number is not None})


def _addresses(mode: Mode) -> Iterator[Address]:
    for bits in {16: (16, 32), 32: (32, 16), 64: (64, 32)}[mode]:
        override = b"\x67" if bits != mode else b""
        if bits == 16:
            for mod in range(3):
                for rm in range(8):
                    yield Address(mod, rm, bits=16, prefixes=override)
            continue
        registers = range(16 if mode == 64 else 8)
        for mod in range(3):
            for rm in registers:
                if rm & 7 == SP:
                    continue
                relative = mod == 0 and rm & 7 == BP and mode == 64
                yield Address(mod, rm, bits=bits, prefixes=override, relative=relative)
            for base in registers:
                for index in registers:
                    if base == index and base & 7 != BP:
                        continue
                    if (base + index) % 3 == mod or index & 7 == SP or base & 7 in (SP, BP):
                        yield Address(mod, SP, ((base + index + mod) % 4, index, base), bits, override)
    # segments: FS and GS in protected mode, ES and GS in real mode have a base of their own
    for segment, base in ((0x26, REAL_BASE), (0x65, REAL_BASE)) if mode == 16 else ((0x64, SEGMENT_BASE),):
        yield Address(1, 7, bits=mode, prefixes=bytes([segment]), segment_base=base)
        plain = {16: 6, 32: BP, 64: BP}[mode]
        yield Address(0, plain, bits=mode, prefixes=bytes([segment]), segment_base=base, relative=mode == 64)
    for segment in (0x36, 0x3E) if mode == 32 else (0x2E, 0x36, 0x3E):  # what CS is about can't be written there
        yield Address(2, 7, bits=mode, prefixes=bytes([segment]))


ADDRESSES: Final = {mode: tuple(_addresses(mode)) for mode in (16, 32, 64)}


def load(mode: Mode, number: int, value: int) -> bytes:
    """MOV register, constant: the whole register."""
    if mode == 64:
        return bytes([0x48 | number >> 3, 0xB8 | number & 7]) + (value & 2**64 - 1).to_bytes(8, "little")
    prefix = b"\x66" if mode == 16 else b""
    return prefix + bytes([0xB8 | number]) + (value & 2**32 - 1).to_bytes(4, "little")


def prelude(mode: Mode, table: int) -> bytes:
    """Gives segments their bases; clobbers AX, CX, DX, and in 32-bit code the 24 bytes at `table`."""
    if mode == 16:
        segment = (REAL_BASE >> 4).to_bytes(2, "little")
        return b"\xb8" + segment + b"\x8e\xc0\x8e\xe8"  # mov ax, segment; mov es, ax; mov gs, ax
    if mode == 64:  # wrmsr FS_BASE
        return load(64, CX, 0xC0000100) + load(64, AX, SEGMENT_BASE) + load(64, DX, 0) + b"\x0f\x30"
    descriptor = 0x00CF_9300_0000_FFFF | (SEGMENT_BASE & 0xFFFFFF) << 16
    store = b"".join(
        b"\xc7\x05" + (table + 4 * i).to_bytes(4, "little") + (value & 0xFFFFFFFF).to_bytes(4, "little")
        for i, value in enumerate((15 | (table + 8) << 16, (table + 8) >> 16, 0, 0, descriptor, descriptor >> 32))
    )
    # the null descriptor is at table + 8; lgdt [table]; mov ax, 8; mov fs, ax
    return store + b"\x0f\x01\x15" + table.to_bytes(4, "little") + b"\x66\xb8\x08\x00\x8e\xe0"


def _operand(mode: Mode, form: Form, size: int) -> tuple[bytes, int]:
    """The prefix, and REX.W as a bit, for an operand of that size."""
    if form.byte:
        return b"", 0
    if form.wide:
        return b"", 8 if size == 16 else 0
    return (b"\x66" if (size == 2) != (mode == 16) and size != 8 else b""), 8 if size == 8 else 0


def encode(
    mode: Mode, form: Form, address: Address, size: int, target: int, at: int, lock: bytes = b"\xf0", bit: int = 0
) -> tuple[bytes, bytes]:
    """Code that loads the registers, and the instruction, whose operand is at linear address `target`; `at`: where the
    code goes. `bit`: for BTS and its like with a register, an offset that moves the operand."""
    moved = bit >> {2: 4, 4: 5, 8: 6}[size] if form.bits else 0
    offset = target - address.segment_base - moved * size
    reg = form.extension
    if reg is None:
        taken = address.registers()
        reg = next(number for number in (DX, CX, BX, SI, 9) if number not in taken and (number < 8 or mode == 64))
    values: dict[int, int] = {} if form.extension is not None else {reg: bit if form.bits else 0x1234}
    displacement = 0
    if address.displacement:
        displacement = {1: -0x21, 2: 0x0123, 4: 0x0000_0456}[address.displacement]
    registers = address.registers()
    scale = 1 << address.sib[0] if address.sib else 1
    if address.bits == 16:
        if not registers:
            displacement = offset
        elif len(registers) == 2:
            values |= {registers[0]: 0x0111, registers[1]: offset - displacement - 0x0111}
        else:
            values |= {registers[0]: offset - displacement}
        values = {number: value & 0xFFFF for number, value in values.items()}
    elif not registers:
        displacement = offset
    elif address.base is None:
        assert address.index is not None
        values[address.index] = 0x10
        displacement = offset - 0x10 * scale
    elif address.index is None:
        values[address.base] = offset - displacement
    elif address.index == address.base:
        values[address.base] = 0x10
        displacement = offset - 0x10 * (scale + 1)
    else:
        values |= {address.index: 0x30, address.base: offset - displacement - 0x30 * scale}
    if form.byte and mode != 64 and reg >= SP and form.extension is None:
        raise ValueError("AH to BH")
    setup = b"".join(load(mode, number, value) for number, value in sorted(values.items()))

    prefix, rex = _operand(mode, form, size)
    rex |= (reg >> 3) << 2 if form.extension is None else 0
    modrm = address.mod << 6 | (reg & 7) << 3 | (address.rm & 7)
    tail = b""
    if address.sib is not None:
        rex |= (address.sib[1] >> 3) << 1 | address.sib[2] >> 3
        tail = bytes([address.sib[0] << 6 | (address.sib[1] & 7) << 3 | address.sib[2] & 7])
    else:
        rex |= address.rm >> 3
    constant = b"\x01\x00\x00\x00"[: 2 if form.constant == 4 and size == 2 else form.constant]
    head = lock + address.prefixes + prefix + (bytes([0x40 | rex]) if rex else b"") + form.opcode
    length = len(head) + 1 + len(tail) + address.displacement + len(constant)
    if address.relative:
        displacement -= at + len(setup) + length
    mask = (1 << 8 * address.displacement) - 1
    tail += (displacement & mask).to_bytes(address.displacement, "little")
    return setup, head + bytes([modrm]) + tail + constant


def sizes(mode: Mode, form: Form) -> tuple[int, ...]:
    if form.byte:
        return (1,)
    if form.wide:
        return (8,)  # CMPXCHG16B faults unless it is aligned, and then it does not cross a line
    return (2, 4, 8) if mode == 64 else (2, 4)


def locks(mode: Mode) -> Iterator[tuple[Form, Address, int, bytes]]:
    """Forms, addresses, sizes and LOCK prefixes: each form in some addresses, and some forms in each address."""
    addresses = ADDRESSES[mode]
    turn = 0
    forms = [form for form in FORMS if not (form.legacy and mode == 64)]
    for form in forms:
        for size in sizes(mode, form):
            for _ in range(3):
                turn += 1
                yield form, addresses[turn * 37 % len(addresses)], size, b"" if form.implicit and turn % 2 else b"\xf0"
    few = [form for form in forms if not form.byte and form.opcode in (b"\x01", b"\x81", b"\x87", b"\x0f\xab")]
    for number, address in enumerate(addresses):
        form = few[number % len(few)]
        yield form, address, sizes(mode, form)[number % len(sizes(mode, form))], b"\xf0"


@attrs.frozen
class Locking:
    """One instruction of `lock_program`: where it is, what is behind it, whether it crosses a cache line."""

    at: int
    behind: int
    split: bool
    what: str


def lock_program(mode: Mode, at: int = 0x1000) -> tuple[bytes, list[Locking]]:
    """A guest that executes each of `locks` with its operand across two cache lines, and with it in one; then HLT."""
    code, done = bytearray(prelude(mode, 0xA0)), []
    for number, (form, address, size, lock) in enumerate(locks(mode)):
        for split in (True, False):
            target = address.segment_base or (0xE000 if address.bits == 16 or mode == 16 else 0x30000)
            target += 0x100 * (1 + number % 5) + (0x40 - size // 2 if split else 0x40 * (number % 3))
            if split and number % 7 == 0:  # on two pages
                target = (target | 0xFFF) + 1 - (1 + number % (size - 1) if size > 1 else 1)
            bit = (-100 if number % 2 else 77) if form.bits else 0
            setup, instruction = encode(mode, form, address, size, target, at + len(code), lock, bit)
            code += setup
            start, crosses = at + len(code), target % 64 + size > 64
            code += instruction
            done.append(Locking(start, at + len(code), crosses, f"{instruction.hex()} {form} {address} {target:#x}"))
    return bytes(code) + b"\xf4", done
