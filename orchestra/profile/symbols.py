"""Names for addresses: from the guest's ELF file, or the text of its kernel's System.map.

The one module that imports pyelftools.
"""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import attrs

from ..model.errors import FileError
from ..model.extras import install

__all__ = ["SymbolError", "Symbols"]

INSTALL: Final = install("profile")
FARTHEST: Final = 1 << 16
"""Bytes that a symbol without a size, and with none behind it, is taken to go on for."""
NESTED: Final = 16
"""How many symbols that have ended are looked past for one that has not."""
CODE_TYPES: Final = "TtWw"  # of System.map, as nm has them: in the text section, and weak ones


class SymbolError(FileError):
    """A file holds no symbols that can be read; the message says what was expected."""


@attrs.frozen(order=True)
class _Symbol:
    address: int
    size: int  # 0: not known
    name: str


class Symbols:
    """Functions by address.

    Parameters:
        symbols: (address, size, name) of each; size 0 where it is not known: up to the next.
        slide: how much higher the guest has them than the file says (KASLR, position-independent programs).
    """

    def __init__(self, symbols: Iterable[tuple[int, int, str]], slide: int = 0) -> None:
        self._symbols = sorted(_Symbol(address + slide, size, name) for address, size, name in symbols)
        self._addresses = [symbol.address for symbol in self._symbols]

    def __len__(self) -> int:
        return len(self._symbols)

    @classmethod
    def load(cls, path: str | Path, slide: int = 0) -> Symbols:
        """Read an ELF file or a System.map.

        Raises:
            SymbolError: it can't be read, is neither, or has no functions; or an ELF file and pyelftools is not
                installed.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SymbolError(f"{path}: {error.strerror or error}") from error
        found = _elf(path) if data.startswith(b"\x7fELF") else _system_map(path, data)
        if not found:
            raise SymbolError(f"{path}: names no function (was it stripped?)")
        return cls(found, slide)

    def find(self, address: int) -> tuple[str, int] | None:
        """The function an address is in, and how far; None if it is in none."""
        # Of several at one address the last by size: one with a size goes before one without.
        index = bisect_right(self._addresses, address) - 1
        for nearest in range(index, max(index - NESTED, -1), -1):  # a small one may end within a larger one
            symbol = self._symbols[nearest]
            offset = address - symbol.address
            if symbol.size:
                if offset < symbol.size:
                    return symbol.name, offset
            elif nearest == index and (index + 1 < len(self._symbols) or offset < FARTHEST):
                return symbol.name, offset
        return None


def _elf(path: Path) -> list[tuple[int, int, str]]:
    try:
        # By name: both are parts of one library, and mypy has no types for it.
        elffile: Any = importlib.import_module("elftools.elf.elffile")
        sections: Any = importlib.import_module("elftools.elf.sections")
        problems: Any = importlib.import_module("elftools.common.exceptions")
    except ModuleNotFoundError as error:
        raise SymbolError(f"{path}: an ELF file, which needs pyelftools: `{INSTALL}`") from error
    found = []
    try:
        with path.open("rb") as file:
            for section in elffile.ELFFile(file).iter_sections():
                if not isinstance(section, sections.SymbolTableSection):
                    continue
                for symbol in section.iter_symbols():
                    kind, where = symbol["st_info"]["type"], symbol["st_shndx"]
                    # Assembly has labels of no type; those that begin with a dot or $ are an assembler's own.
                    code = kind == "STT_FUNC" or (kind == "STT_NOTYPE" and symbol.name[:1] not in ("", ".", "$"))
                    if code and where not in ("SHN_UNDEF", "SHN_ABS"):
                        found.append((int(symbol["st_value"]), int(symbol["st_size"]), str(symbol.name)))
    except (problems.ELFError, OSError, UnicodeDecodeError) as error:
        raise SymbolError(f"{path}: a broken ELF file ({error})") from error
    return found


def _system_map(path: Path, data: bytes) -> list[tuple[int, int, str]]:
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            address, kind, name = int(fields[0], 16), fields[1].decode("ascii"), fields[2].decode()
        except (ValueError, IndexError):
            raise SymbolError(
                f"{path}:{number}: neither an ELF file nor a System.map, whose lines are like "
                "`ffffffff81000000 T _text`"
            ) from None
        if kind in CODE_TYPES:
            found.append((address, 0, name))
    return found
