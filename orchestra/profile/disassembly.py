"""Finds the instruction from the bytes around the reported RIP. The only module that imports iced-x86."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any, Final

import attrs

from ..model.extras import install
from .samples import Where

__all__ = ["INSTALL", "Found", "available", "find"]

INSTALL: Final = install("profile")
LONGEST: Final = 15


def available() -> bool:
    """Whether iced-x86 is installed."""
    return importlib.util.find_spec("iced_x86") is not None


@attrs.frozen
class Found:
    """An instruction: where it begins (from RIP), its bytes, how it reads, and whether it can lock the bus."""

    start: int
    code: bytes
    text: str
    locks: bool


def _locks(instruction: Any) -> bool:
    import iced_x86

    memory = any(instruction.op_kind(index) == iced_x86.OpKind.MEMORY for index in range(min(instruction.op_count, 2)))
    # XCHG with memory locks without a prefix: Intel SDM vol. 2, "XCHG".
    return memory and (instruction.has_lock_prefix or instruction.mnemonic == iced_x86.Mnemonic.XCHG)


def _decode(code: bytes, mode: int, address: int) -> Any:
    """The instruction that begins at `address`; None: no instruction does."""
    import iced_x86

    instruction = iced_x86.Decoder(mode, code, ip=address).decode()
    return None if instruction.is_invalid else instruction


def _found(instruction: Any, code: bytes, start: int) -> Found:
    import iced_x86

    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    text = formatter.format(instruction)
    return Found(start, code[: instruction.len], text, _locks(instruction))


def _at(code: bytes, mode: int, rip: int) -> Found | None:
    """The instruction that begins at `rip`."""
    instruction = _decode(code[:LONGEST], mode, rip)
    return None if instruction is None else _found(instruction, code, 0)


def _before(code: bytes, mode: int, rip: int) -> Found | None:
    """The instruction that ends there.

    Code can't be read backwards: what ends there depends on where one begins. So one begins at every byte, and each
    attempt that meets RIP votes for the instruction it came by last. Attempts that begin in the middle of an
    instruction are in step with the others after a few (Linn, Debray, "Obfuscation of executable code to improve
    resistance to static disassembly", CCS 2003, 3.1: "self-repairing"), so the true one has most votes. Instructions
    that lock go before those that can't.
    """
    end = len(code)
    last: list[int | None] = [None] * (end + 1)  # by where an attempt begins: where its last instruction does
    there: dict[int, Any] = {}
    for begin in range(end - 1, -1, -1):
        instruction = _decode(code[begin : begin + LONGEST], mode, rip - end + begin)
        if instruction is None:
            continue
        behind = begin + instruction.len
        last[begin] = begin if behind == end else last[behind]
        if behind == end:
            there[begin] = instruction
    votes = Counter(begin for begin in last if begin is not None)
    if not votes:
        return None
    # Of two with equal votes, the longer: a prefix belongs to the instruction after it.
    best = max(votes, key=lambda begin: (_locks(there[begin]), votes[begin], -begin))
    return _found(there[best], code[best:], best - end)


def find(code: bytes, before: int, mode: int, rip: int, where: Where) -> Found | None:
    """The instruction that locked the bus; None if the bytes do not tell.

    Parameters:
        code: bytes around `rip`, the first `before` of them before it.
        mode: 16, 32 or 64.
        where: RIP is on the instruction or behind it, or that is not known. Also where it is, the host may report a
            lock otherwise: an Intel one that meets a page for the first time has RIP on it. So what does not lock is
            taken only if nothing on the other side does.

    Raises:
        ModuleNotFoundError: iced-x86 is not installed; see `available`.
    """
    if mode not in (16, 32, 64):
        return None
    looks = [lambda: _before(code[:before], mode, rip), lambda: _at(code[before:], mode, rip)]
    if where != "behind":
        looks.reverse()
    first = looks[0]()
    if first is not None and first.locks:
        return first
    second = looks[1]()
    return second if second is not None and second.locks else first
