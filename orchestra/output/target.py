"""Checks the files that a command has to write. All commands report a problem before the work begins, in the same
way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..model.errors import FileError, SpecError

__all__ = ["check_target"]


def check_target(option: str, path: Path, *suffixes: str) -> None:
    """Check that a file can be written there.

    Parameters:
        option: what named it, such as "--plot".
        suffixes: the ways in which its name may end; none: any.

    Raises:
        SpecError: its name ends otherwise.
        FileError: it can't be written.
    """
    if suffixes and path.suffix not in suffixes:
        raise SpecError(f"{option} {path}: must end in {' or '.join(suffixes)}")
    number = 0
    if path.is_dir():
        number = errno.EISDIR
    elif not path.parent.is_dir():
        number = errno.ENOENT
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        number = errno.EACCES
    if number:
        raise FileError(f"{path}: {os.strerror(number)}")
