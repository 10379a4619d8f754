"""Which instruction it was, from the bytes around the RIP that was reported. The one module that imports iced-x86."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any, Final

import attrs

from .samples import Where

__all__ = ["INSTALL", "Found", "available", "find"]

INSTALL: Final = "pip install 'orchestra[profile]'"
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


def _decode(code: bytes, mode: int, address: int) -> list[Any]:
    import iced_x86

    return [i for i in iced_x86.Decoder(mode, code, ip=address) if not i.is_invalid]


def _found(instruction: Any, code: bytes, start: int) -> Found:
    import iced_x86

    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    text = formatter.format(instruction)
    return Found(start, code[: instruction.len], text, _locks(instruction))


def _at(code: bytes, mode: int, rip: int) -> Found | None:
    """The instruction that begins there."""
    decoded = _decode(code[:LONGEST], mode, rip)[:1]
    return _found(decoded[0], code, 0) if decoded and decoded[0].ip == rip else None


def _before(code: bytes, mode: int, rip: int) -> Found | None:
    """The instruction that ends there.

    Code can't be read backwards: what ends there depends on where one begins. So one begins at every byte, and each
    attempt that meets RIP votes for the instruction it came by last. Attempts that begin in the middle of an
    instruction are in step with the others after a few (Linn, Debray, "Obfuscation of executable code to improve
    resistance to static disassembly", CCS 2003, 3.1: "self-repairing"), so the true one has most votes. Instructions
    that lock go before those that can't.
    """
    votes: Counter[int] = Counter()
    last: dict[int, Any] = {}
    for begin in range(len(code)):
        at = rip - len(code) + begin
        for instruction in _decode(code[begin:], mode, at):
            if instruction.ip != at:
                break  # something invalid was left out
            at += instruction.len
            if at == rip:
                start = instruction.len
                votes[start] += 1
                last[start] = instruction
    if not votes:
        return None
    # Of two with as many votes, the longer: a prefix belongs to what follows it.
    best = max(votes, key=lambda length: (_locks(last[length]), votes[length], length))
    return _found(last[best], code[len(code) - best :], -best)


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
    on, behind = _at(code[before:], mode, rip), _before(code[:before], mode, rip)
    order = [behind, on] if where == "behind" else [on, behind]
    return next((found for found in order if found is not None and found.locks), order[0])
