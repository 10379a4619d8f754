"""The one door to unicorn: finds its shared library through its Python package, and has the C core load it.

Unicorn is an optional extra and under the GPL: nothing of it is linked or built in. Its Python bindings are not used
but for where the library lies and what its constants are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from struct import unpack_from
from typing import Any, Final

from ...model.errors import BackendUnavailable
from ...model.extras import install
from ...native import ffi, lib

__all__ = ["load", "version"]

INSTALL: Final = install("emulated")
# Of unicorn alone: with those options, pip would fetch orchestra and all that it needs anew.
UPGRADE: Final = "pip install --upgrade unicorn"
REINSTALL: Final = "pip install --force-reinstall unicorn==2.1.4"  # of what is known to work
OLDEST: Final = (2, 1, 2)  # the first with uc_vmem_translate
MESSAGE: Final = 256


def version() -> str | None:
    """The version of unicorn that is installed; None if it is not."""
    try:
        return importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        return None


def _unavailable(problem: str, remedy: str = "") -> BackendUnavailable:
    return BackendUnavailable(f"backend='emulated': {problem}: {remedy or f'`{INSTALL}`'}")


def _cut_short() -> bool:
    """Whether the library lacks its end: the dynamic loader does not look, and would have the program die of SIGBUS."""
    spec = importlib.util.find_spec("unicorn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "lib", "libunicorn.so.2")
        if path.exists():
            with path.open("rb") as file:
                header = file.read(64)
            if len(header) == 64 and header.startswith(b"\x7fELF\x02"):
                (offset,), (size, number) = unpack_from("<Q", header, 0x28), unpack_from("<HH", header, 0x3A)
                return int(offset + size * number) > path.stat().st_size  # the section headers, which stand at the end
    return False


def load() -> Any:
    """The loaded library as the C core's ``orc_unicorn *``, let go of with the last reference to it.

    Raises:
        BackendUnavailable: it is missing, too old, or can't be loaded; the message says which command helps.
    """
    found = version()
    if found is None:
        raise _unavailable("unicorn is not installed")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise _unavailable(f"unicorn {found} is too old, it must be {oldest} at least")
    try:
        if _cut_short():
            raise ImportError("its library was cut short")
        bindings = importlib.import_module("unicorn.unicorn_py3.unicorn")
        constants = vars(importlib.import_module("unicorn.unicorn_const"))
        constants = constants | vars(importlib.import_module("unicorn.x86_const"))
        path = Path(bindings.uclib._name)
    except Exception as error:  # a broken installation can raise anything at import
        what = " ".join(str(error).split())
        raise _unavailable(f"unicorn {found} can't be imported ({what})", f"`{REINSTALL}`") from error

    numbers = ffi.new("struct orc_unicorn_numbers *")
    for name, _ in ffi.typeof("struct orc_unicorn_numbers").fields:
        if name not in constants:
            raise _unavailable(f"unicorn {found} has no {name}", f"`{UPGRADE}`")
        setattr(numbers, name, constants[name])
    enter = Path(__file__).with_name("enter.bin").read_bytes()
    problem = ffi.new("char[]", MESSAGE)
    loaded = lib.orc_unicorn_load(str(path).encode(), numbers, enter, len(enter), problem, MESSAGE)
    if loaded == ffi.NULL:
        what = ffi.string(problem).decode(errors="replace")
        raise _unavailable(f"unicorn {found} at {path}: {what}", f"`{REINSTALL}`")
    return ffi.gc(loaded, lib.orc_unicorn_free)
