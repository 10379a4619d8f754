"""The demo's guests: nasm sources, and their bytes beside them (``nasm -f bin -o NAME.bin NAME.asm``).

Each counts what it got done in the 32-bit word at `WORK` of its memory, so that whoever watches sees its own progress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...model.spec import FlatImage, MiB

__all__ = ["MEMORY", "WORK", "image", "work_done"]

WORK: Final = 0x8000
MEMORY: Final = 6 * MiB
WRAP: Final = 1 << 32


def image(name: str) -> FlatImage:
    """The guest of that name ("quiet_exits", "quiet_locks", "noisy_exits", "noisy_locks")."""
    return FlatImage(code=(Path(__file__).parent / f"{name}.bin").read_bytes(), mode=32)


def work_done(before: int, word: bytes) -> int:
    """The guest's count, carried on beyond its 32 bits.

    Parameters:
        before: what this returned last for that guest.
        word: the 4 bytes at `WORK` now.
    """
    return before + (int.from_bytes(word, "little") - before) % WRAP
