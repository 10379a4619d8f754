"""The core's decoder of what the emulated backend has to know, against iced, which knows all of x86."""

from __future__ import annotations

from typing import Any, Final

import iced_x86 as iced
import pytest
from hypothesis import example, given, settings, strategies as st

from orchestra.native import ffi, lib
from x86 import Mode, lock_program

MODES: list[Mode] = [16, 32, 64]
KINDS: Final = {
    getattr(iced.Mnemonic, name): kind
    for kind, names in {
        "IN": "IN",
        "OUT": "OUT",
        "INS": "INSB INSW INSD",
        "OUTS": "OUTSB OUTSW OUTSD",
        "HLT": "HLT",
        "INT": "INT INT3 INTO",
        "SYSCALL": "SYSCALL SYSENTER",
    }.items()
    for name in names.split()
}
IN_MEMORY: Final = {
    getattr(iced.Mnemonic, name): kind
    for kind, names in {
        "LOCK": "XCHG",
        "WIDE": "CMPXCHG8B CMPXCHG16B",
        "FLAGS": "RCL RCR SETO SETNO SETB SETAE SETE SETNE SETBE SETA SETS SETNS SETP SETNP SETL SETGE SETLE SETG",
    }.items()
    for name in names.split()
}
STRING_BITS: Final = {
    getattr(iced.OpKind, name): bits
    for name, bits in {
        "MEMORY_SEG_SI": 16,
        "MEMORY_SEG_ESI": 32,
        "MEMORY_SEG_RSI": 64,
        "MEMORY_ESDI": 16,
        "MEMORY_ESEDI": 32,
        "MEMORY_ESRDI": 64,
    }.items()
}


def names(register: str) -> dict[int, int]:
    return {
        getattr(iced.Register, name): number
        for number, name in enumerate(register.split())
        if hasattr(iced.Register, name)
    }


REGISTERS: Final = (
    names("AX CX DX BX SP BP SI DI R8W R9W R10W R11W R12W R13W R14W R15W")
    | names("EAX ECX EDX EBX ESP EBP ESI EDI R8D R9D R10D R11D R12D R13D R14D R15D")
    | names("RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15")
    | {iced.Register.NONE: int(lib.ORC_NO_REGISTER)}
)
SEGMENTS: Final = names("ES CS SS DS FS GS")


def ours(code: bytes, mode: Mode) -> Any | None:
    """What orc_decode says of exactly these bytes; None if it is nothing of interest."""
    insn = ffi.new("struct orc_insn *")
    return insn if lib.orc_decode(ffi.new("uint8_t[]", code) if code else ffi.NULL, len(code), mode, insn) else None


def kind_of(instruction: Any) -> str | None:
    """By iced, what it should be."""
    if instruction.has_lock_prefix:
        return "LOCK"
    memory = any(kind == iced.OpKind.MEMORY for kind in (instruction.op0_kind, instruction.op1_kind))
    return KINDS.get(instruction.mnemonic) or (IN_MEMORY.get(instruction.mnemonic) if memory else None)


def agree(code: bytes, mode: Mode) -> str | None:
    """Check that both say the same of what begins there; what it is."""
    instruction = iced.Decoder(mode, code).decode()
    found = ours(code, mode)
    if instruction.code == iced.Code.INVALID:
        # We look no closer than we have to: unicorn raises the exception for what is undefined otherwise.
        if found is not None and found.kind == lib.ORC_INSN_ILLEGAL:
            assert b"\xf0" in code[:15]
            return "ILLEGAL"
        return None
    kind = kind_of(instruction)
    if kind is None:
        assert found is None, instruction
        return None
    assert found is not None, instruction
    assert found.kind == getattr(lib, f"ORC_INSN_{kind}"), instruction
    assert found.length == instruction.len
    assert lib.orc_may_matter(ffi.from_buffer("uint8_t[]", code[prefixes(code, mode) :]), len(code)) or kind == "LOCK"
    if kind in ("IN", "OUT"):
        data = instruction.op0_register if kind == "IN" else instruction.op1_register
        assert found.size == {iced.Register.AL: 1, iced.Register.AX: 2, iced.Register.EAX: 4}[data]
        immediate = iced.OpKind.IMMEDIATE8 in (instruction.op0_kind, instruction.op1_kind)
        assert found.port == (instruction.immediate8 if immediate else -1)
    elif kind in ("INS", "OUTS"):
        assert found.size == iced.MemorySizeExt.size(instruction.memory_size)
        assert found.rep == (instruction.has_rep_prefix or instruction.has_repne_prefix)
        string = instruction.op0_kind if kind == "INS" else instruction.op1_kind
        assert found.address_bits == STRING_BITS[string]
        if kind == "OUTS":
            same_segment(found, instruction, mode)
    elif kind == "INT":
        vector = {iced.Mnemonic.INT3: 3, iced.Mnemonic.INTO: 4}.get(instruction.mnemonic)
        assert found.port == (instruction.immediate8 if vector is None else vector)
    elif kind in ("LOCK", "WIDE", "FLAGS"):
        same_operand(found, instruction, mode)
    return kind


def prefixes(code: bytes, mode: Mode) -> int:
    """How many bytes of them there are."""
    count = 0
    while lib.orc_is_prefix(code[count], mode):
        count += 1
    return count


def same_segment(found: Any, instruction: Any, mode: Mode) -> None:
    segment = SEGMENTS[instruction.memory_segment]
    assert found.segment == segment or (mode == 64 and segment < 4 and found.segment < 4)


def same_operand(found: Any, instruction: Any, mode: Mode) -> None:
    assert found.size == iced.MemorySizeExt.size(instruction.memory_size)
    same_segment(found, instruction, mode)
    mask = (1 << found.address_bits) - 1
    displacement = found.displacement
    if instruction.is_ip_rel_memory_operand:
        assert found.relative
        displacement += found.length  # iced was told that the instruction is at 0
    else:
        assert not found.relative
        assert found.base == REGISTERS[instruction.memory_base]
        assert found.index == REGISTERS[instruction.memory_index]
        if instruction.memory_index != iced.Register.NONE:
            assert found.scale == instruction.memory_index_scale
    assert displacement & mask == instruction.memory_displacement & mask
    bits = instruction.mnemonic in (iced.Mnemonic.BTS, iced.Mnemonic.BTR, iced.Mnemonic.BTC)
    moves = bits and instruction.op1_kind == iced.OpKind.REGISTER
    assert found.bit_offset == (REGISTERS[instruction.op1_register] if moves else lib.ORC_NO_REGISTER)


PREFIXES: Final = bytes.fromhex("262e363e646566 67f0f0f0f2f3404142444849 4a4c4f")
OPCODES: Final = [
    *(bytes([opcode]) for opcode in range(256)),
    *(bytes([0x0F, opcode]) for opcode in range(256)),
]


@st.composite
def instructions(draw: Any) -> bytes:
    """Prefixes, an opcode, and whatever follows."""
    prefix = bytes(draw(st.lists(st.sampled_from(PREFIXES), max_size=draw(st.sampled_from([1, 3, 14])))))
    return prefix + bytes(draw(st.sampled_from(OPCODES))) + bytes(draw(st.binary(max_size=12)))


@pytest.mark.parametrize("mode", MODES)
@given(code=instructions())
@settings(max_examples=500)
@example(code=bytes.fromhex("f0"))
@example(code=b"\x66" * 15 + b"\xf4")
def test_it_agrees_with_iced_on_any_bytes(mode: Mode, code: bytes) -> None:
    agree(code, mode)


@pytest.mark.parametrize("mode", MODES)
def test_it_agrees_with_iced_on_each_opcode_and_modrm(mode: Mode) -> None:
    seen = set()
    rest = bytes.fromhex("25 11 22 33 44 55 66 77 88 99")
    for prefix in ("", "f0", "66 f0", "67", "f0 67", "f3", "48", "f0 49", "f0 4c", "64 f0", "f2 66"):
        for opcode in OPCODES:
            for modrm in (*range(0, 256, 8), 0x04, 0x05, 0x06, 0x44, 0x84, 0xC1, 0x0D, 0x8D, 0x5C, 0xFF):
                seen.add(agree(bytes.fromhex(prefix) + opcode + bytes([modrm]) + rest, mode))
    assert seen >= {"LOCK", "IN", "OUT", "INS", "OUTS", "HLT", "INT", "SYSCALL", "FLAGS", "WIDE", "ILLEGAL", None}


@pytest.mark.parametrize("mode", MODES)
def test_the_table_of_locks_is_what_it_claims_to_be(mode: Mode) -> None:
    program, table = lock_program(mode)
    for lock in table:
        code = program[lock.at - 0x1000 : lock.behind - 0x1000]
        assert agree(code, mode) == "LOCK"
        assert iced.Decoder(mode, code).decode().len == len(code)


@given(code=instructions(), mode=st.sampled_from(MODES))
@settings(max_examples=500)
def test_it_says_nothing_of_an_instruction_of_which_bytes_are_missing(code: bytes, mode: Mode) -> None:
    found = ours(code, mode)
    if found is None:
        return
    whole = found.length if found.kind != lib.ORC_INSN_ILLEGAL else 0
    for known in range(whole):
        assert ours(code[:known], mode) is None
    if whole:
        same = ours(code[:whole], mode)
        assert same is not None
        assert bytes(ffi.buffer(same)) == bytes(ffi.buffer(found))
