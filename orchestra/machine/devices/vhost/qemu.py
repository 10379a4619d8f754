"""qemu-storage-daemon, which serves qcow2 images: a process for each disk, its command line, and its complaints.

The image's format, its locks and its backing files are QEMU's affair. It never takes the name of a file for a protocol
("nbd:...") and never guesses a format: all goes as JSON, with the drivers named. The names in an image's header are the
exception: whoever made the image says which backing files are opened, see docs/linux.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from typing import Final

from ....model.disk import Disk
from ....model.errors import BackendUnavailable, FileError, OrchestraError
from ....native import ffi, lib
from ..disk import QCOW2, look_at
from .backend import Connection
from .daemon import Daemon

__all__ = ["PROGRAM", "command_line", "connect", "explain"]

PROGRAM: Final = "qemu-storage-daemon"
REMEDY: Final = "install it: qemu-system-common is its Debian package, qemu-storage-daemon or qemu-tools elsewhere"


def program() -> str:
    """Where the daemon is.

    Raises:
        BackendUnavailable: it is not installed.
    """
    if (found := shutil.which(PROGRAM)) is None:
        raise BackendUnavailable(f'format="qcow2" needs {PROGRAM}, which is not here: {REMEDY}')
    return found


def command_line(program: str, disk: Disk, listening: int, *, block_device: bool, aio: str) -> list[str]:
    """The daemon's command.

    Parameters:
        listening: the descriptor of a listening socket.
        aio: "io_uring" or "threads".
    """
    cache = {"direct": disk.direct, "no-flush": False}
    common = {"read-only": disk.readonly, "auto-read-only": False, "discard": "unmap", "cache": cache}
    file = {
        "driver": "host_device" if block_device else "file",
        "node-name": "file",
        "filename": os.path.abspath(disk.path),
        "aio": aio,
        "locking": "on",
        **common,
    }
    image = {"driver": "qcow2", "node-name": "disk", "file": "file", **common}
    export = {
        "type": "vhost-user-blk",
        "id": "disk",
        "node-name": "disk",
        "addr": {"type": "fd", "str": str(listening)},
        "writable": not disk.readonly,
        "num-queues": 1,
    }
    words: list[str] = [program]
    for option, value in (("--blockdev", file), ("--blockdev", image), ("--export", export)):
        words += [option, json.dumps(value)]
    return words


def connect(disk: Disk) -> Connection:
    """Begin a daemon for that disk, and connect to it. On the thread that it belongs to.

    Raises:
        FileError: the file is not there, or no qcow2 image.
        BackendUnavailable: the daemon is not installed.
        ResourceLimit: the host has no more of what that takes.
    """
    path, (block_device, head) = program(), look_at(disk.path, readonly=disk.readonly)
    if head != QCOW2:
        raise FileError(
            f"{disk.path}: is no qcow2 image: make one with `qemu-img create -f qcow2 {disk.path} 10G`, or leave "
            'format="qcow2" out for a raw image'
        )
    listening, connection = _pair()
    try:
        with listening:
            command = command_line(
                path,
                disk,
                listening.fileno(),
                block_device=block_device,
                aio="io_uring" if _has_io_uring() else "threads",
            )
            daemon = Daemon(command, [listening.fileno()])
    except BaseException:
        connection.close()
        raise
    return Connection(connection, daemon, drain=True, explain=lambda words: explain(disk, words))


def _pair() -> tuple[socket.socket, socket.socket]:
    """A listening socket, and one that is connected to it. Nobody else can connect: its name is gone, and before that
    it is in a folder of ours."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with tempfile.TemporaryDirectory(prefix="orchestra-") as folder:
            name = os.path.join(folder, "s")
            listening.bind(name)
            listening.listen(1)
            connection.connect(name)  # does not wait until somebody accepts
    except BaseException:
        listening.close()
        connection.close()
        raise
    return listening, connection


def _has_io_uring() -> bool:
    """Whether the kernel has io_uring and lets us use it. A container may forbid it."""
    made = ffi.new("orc_uring **")
    if lib.orc_uring_new(1, made):
        return False
    lib.orc_uring_free(made[0])
    return True


def explain(disk: Disk, words: str) -> OrchestraError | None:
    """What the daemon's last words mean, by its messages up to QEMU 10. None: nothing that is known."""
    if re.search(r"Failed to get .*lock", words):
        image = re.search(r"using the image \[(.*?)\]", words)
        if image is None:  # QEMU 7.2 names the image itself, and not its backing files
            which = "it, or a backing file of it,"
        else:
            which = "it" if image[1] == os.path.abspath(disk.path) else f"its backing file {image[1]}"
        return FileError(
            f"{disk.path}: {which} is in use by another VM or program: stop that first, or give each VM its own image, "
            "which may have the same backing file"
        )
    said = re.search(r"\}: (.*)", words)  # behind the option that it is about, which is JSON
    return None if said is None else FileError(f"{disk.path}: {PROGRAM} can't use it: {said[1]}")
