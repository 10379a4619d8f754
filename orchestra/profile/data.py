"""A profile as its readers get it: plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ..model.codec import encode

__all__ = ["Instruction", "Profile"]


@attrs.frozen
class Instruction:
    """A guest instruction whose bus locks were sampled.

    Attributes:
        address: linear (with the base of CS), of its first byte; of what was reported if `exact` is False.
        mode: the code's: 16, 32 or 64 bits; 0 where the backend does not know (scripted).
        cpl: privilege: 0 is the guest's kernel, 3 a program of it.
        space: whose address space: where its top page table lies; 0 without paging. Of a Linux guest each process has
            its own (and with page-table isolation two, 0x1000 apart, one of them for the kernel).
        samples: how many of its locks were sampled.
        weight: how many locks these stand for.
        share: its part of all that was sampled, from 0 to 1.
        error: how much of `weight` may be another instruction's, as there were more places than the table has.
        exact: it is known which instruction it is. False: the bytes around do not tell, or no disassembler is
            installed and the host reports what is behind the instruction.
        code: its bytes; empty if they are not known.
        text: disassembly, Intel syntax; None without a disassembler or bytes.
        symbol: the function it is in; None if no symbols were given or none fits.
        offset: bytes from the symbol to it.
        nested: a guest of the guest made the locks. The address, the ring and the space are then in that guest, and
            no symbol is given: the files are about another.
    """

    address: int
    mode: int
    cpl: int
    space: int
    samples: int
    weight: int
    share: float
    error: int = 0
    exact: bool = True
    code: bytes = b""
    text: str | None = None
    symbol: str | None = None
    offset: int = 0
    nested: bool = False

    @property
    def place(self) -> str:
        """``symbol+0x1c``, or the address."""
        if self.symbol is None:
            return f"{self.address:#x}"
        return f"{self.symbol}+{self.offset:#x}" if self.offset else self.symbol

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of it, the bytes in hexadecimal."""
        return {**encode(self), "code": self.code.hex(), "place": self.place}


@attrs.frozen
class Profile:
    """Which instructions of a VM locked the bus.

    Every Nth lock is sampled, and each vCPU's first; the gaps are random with a mean of N, so a pattern in the guest
    does not hide anything. `weight` is how many locks the samples stand for: those since the sample before. Over all
    instructions the weights add up to the locks counted while sampling was on, but for the last gap of each vCPU. A
    share p of n samples has a standard error of about ``sqrt(1.33 * p * (1 - p) / n)``.

    Bias: on AMD hosts a lock that first faults a page in is reported once more, and so is weighed. What locks the bus
    without being a locked instruction (a CPU that sets a bit in a descriptor which crosses a line) is put to the
    instruction that caused it.

    Attributes:
        vm: its name.
        instructions: the heaviest first.
        samples: of all of them.
        weight: of all of them.
        bus_locks: how many the VM made since it was launched, sampled or not; None if the host reports none, or, in a
            profile made from a journal, if it is not known.
        unplaced: locks sampled that can't be put to an instruction.
        every: one lock of so many is sampled now; 0: none; None: not known.
    """

    vm: str
    instructions: tuple[Instruction, ...]
    samples: int
    weight: int
    bus_locks: int | None = None
    unplaced: int = 0
    every: int | None = None

    def by_space(self) -> Mapping[int, int]:
        """Weight of each address space, the heaviest first."""
        sums: dict[int, int] = {}
        for instruction in self.instructions:
            sums[instruction.space] = sums.get(instruction.space, 0) + instruction.weight
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**encode(self), "instructions": [instruction.as_dict() for instruction in self.instructions]}
