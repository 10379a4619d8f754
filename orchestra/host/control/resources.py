"""The resctrl control group of isolated VMs: its schemata give their share of the caches and of the memory bandwidth.

The operator makes the group and writes its schemata; this module moves threads in and out. It follows the kernel's
documentation, and was tried on directories with that layout: no CPU that has resctrl has run it yet.

Source: Documentation/filesystems/resctrl.rst ("Resource alloc and monitor groups").
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from ...model.errors import ResourceLimit, SpecError
from ..observe.resctrl import home_group

__all__ = ["ControlGroup"]


class ControlGroup:
    """A control group for threads of this process. They come from the process's own group, and go back to it.

    Parameters:
        folder: of the group, such as /sys/fs/resctrl/noisy.
        home: the process's own group; None: read from the kernel.

    Raises:
        SpecError: it can't be; the message says why, and what to do.
    """

    def __init__(self, folder: Path, home: Path | None = None) -> None:
        self.folder = folder
        self._mount = folder.parent
        self._home = home_group(self._mount) if home is None else home
        if problem := self._problem():
            raise SpecError(f"quarantine_class={str(folder)!r}: {problem}")

    def _problem(self) -> str | None:
        tasks = self.folder / "tasks"
        # The root group has all of this but the mount above it; a monitoring group has no schemata.
        if not (tasks.exists() and (self.folder / "schemata").exists() and (self._mount / "info").is_dir()):
            return (
                "is no control group of resctrl: mount it (`mount -t resctrl resctrl /sys/fs/resctrl`), make a group "
                "(`mkdir /sys/fs/resctrl/noisy`), and write what it may use to its schemata"
            )
        if self.folder == self._home:
            return "this process is in it itself, and so would be all VMs: name another"
        mode = self.folder / "mode"
        if mode.exists() and mode.read_text().strip() not in ("shareable", "exclusive"):
            return f"is {mode.read_text().strip()}: no thread can be in it; name another"
        for file in (tasks, self._home / "tasks"):
            if not os.access(file, os.W_OK):
                return f"this process may not write {file}: run it as root, or chown that file"
        return None

    def admit(self, threads: Iterable[int]) -> None:
        """Move these threads (ids as of gettid) there; one that has ended is left out.

        Raises:
            ResourceLimit: the kernel refuses it; nothing has moved then.
        """
        moved: list[int] = []
        try:
            for thread in threads:
                self._move(thread, self.folder)
                moved.append(thread)
        except ResourceLimit:
            self.release(moved)
            raise

    def release(self, threads: Iterable[int]) -> None:
        """Move these threads back to the process's own group.

        Raises:
            ResourceLimit: the kernel refuses it.
        """
        for thread in threads:
            self._move(thread, self._home)

    def _move(self, thread: int, to: Path) -> None:
        try:
            fd = os.open(to / "tasks", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            try:
                os.write(fd, f"{thread}\n".encode())
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return
            raise ResourceLimit(error.errno or 0, f"{to}/tasks: {error.strerror}{self._said()}") from error

    def _said(self) -> str:
        """What resctrl itself reports about the last write."""
        try:
            said = (self._mount / "info" / "last_cmd_status").read_text().strip()
        except OSError:
            return ""
        return "" if said in ("", "ok") else f" ({said})"
