"""A file of the host that a guest boots: opened once, checked, and read straight into guest memory."""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import Final

from ...backend.files import Opener, open_path
from ...backend.memory import GuestMemory
from ...model.errors import FileError

__all__ = ["BootFile"]

CHUNK: Final = 1 << 30  # the kernel reads at most 2 GiB at once


class BootFile:
    """An open file, which the spec names in `field`. Errors begin with its name, and say the field.

    Parameters:
        open_file: who opens it: `GuestMemory.open_file`.

    Raises:
        FileError: it can't be opened, is no regular file, or is empty.
    """

    def __init__(self, field: str, path: str, open_file: Opener = open_path) -> None:
        self.field, self.path = field, path
        try:
            self.descriptor = open_file(path, os.O_RDONLY | os.O_NONBLOCK)  # no wait for a pipe's writer
        except OSError as error:
            raise self.error(f"can't be opened: {error.strerror}", "name a file") from error
        try:
            found = os.fstat(self.descriptor)
            if not stat.S_ISREG(found.st_mode):
                what = "is a directory" if stat.S_ISDIR(found.st_mode) else "is no regular file"
                raise self.error(what, "name the file itself")
            self.size = found.st_size
            if not self.size:
                raise self.error("is empty", "name another file")
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> BootFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)

    def error(self, what: str, remedy: str) -> FileError:
        return FileError(f"{self.path}: {self.field}: {what}: {remedy}")

    def truncated(self, needed: int) -> FileError:
        return self.error(f"has {self.size} bytes, and by its own header {needed}", "copy it again, it is not complete")

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; fewer where it ends.

        Raises:
            FileError: the disk can't read them.
        """
        try:
            return os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise self.error(f"can't be read: {os.strerror(error.errno or 0)}", "look at its disk") from error

    def read_to(self, memory: GuestMemory, address: int, offset: int, size: int) -> None:
        """Bytes of the file to guest memory.

        Raises:
            FileError: the file ends before, or the disk can't read them.
            GuestMemoryError: not all of the range is memory.
        """
        for done in range(0, size, CHUNK):
            part = min(CHUNK, size - done)
            try:
                got = memory.read_file(address + done, part, self.descriptor, offset + done)
            except OSError as error:
                raise self.error(f"can't be read: {os.strerror(error.errno or 0)}", "look at its disk") from error
            if got < part:  # it was long enough a moment ago
                raise self.truncated(offset + size)
