"""The instructions of a guest that lock the bus: sampled, disassembled and named.

It may import the silicon and the words.
The one to copy: `folded.py`.
"""

from __future__ import annotations

from .data import Instruction, Profile
from .samples import Place, Row, Samples, from_rows
from .symbols import SymbolError, Symbols
from .view import make_profile

__all__ = [
    "Instruction",
    "Place",
    "Profile",
    "Row",
    "Samples",
    "SymbolError",
    "Symbols",
    "from_rows",
    "make_profile",
]
