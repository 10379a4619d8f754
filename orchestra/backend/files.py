"""Who opens the files of the host that a VM needs: disks, kernels, memory.

Whatever a VM's spec names as a file is opened by the fleet's `Opener`. By default that opens the path. A process that
may open nothing (a jail) has one that knows descriptors which somebody else has opened: `OpenedFiles`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from typing import Final, Protocol

__all__ = ["OpenedFiles", "Opener", "open_path"]

_STATUS: Final = os.O_DIRECT | os.O_NONBLOCK


class Opener(Protocol):
    """Opens a file by the name that a spec has for it. Called on worker threads, at each run of a VM."""

    def __call__(self, path: str, flags: int) -> int:
        """A descriptor, which the caller closes: close-on-exec, as open(2) with these flags makes it.

        Raises:
            OSError: as open(2).
        """


def open_path(path: str, flags: int) -> int:
    """The file of that path. One that is made here is for its owner alone."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class OpenedFiles:
    """Files that are open already: descriptors by the names that specs have for them. No other file is there.

    A disk's lock belongs to the open file, which duplicates share: it stays until the giver closes its own as well, and
    it can't tell two VMs apart that have the same one. So open a file once for each VM that has it.

    Parameters:
        files: the descriptors stay the caller's, and open for as long as a VM may need them.
    """

    def __init__(self, files: Mapping[str, int]) -> None:
        self._files = dict(files)

    def __call__(self, path: str, flags: int) -> int:
        if path not in self._files:
            raise OSError(errno.EBADF, "it was not opened for this process", path)
        given = self._files[path]
        has, wants = fcntl.fcntl(given, fcntl.F_GETFL) & os.O_ACCMODE, flags & os.O_ACCMODE
        if has not in (os.O_RDWR, wants):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        made = fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            status = fcntl.fcntl(made, fcntl.F_GETFL)
            fcntl.fcntl(made, fcntl.F_SETFL, status & ~_STATUS | flags & _STATUS)
        except OSError:
            os.close(made)
            raise
        return made
