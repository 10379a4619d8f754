"""A disk (native/virtio_blk.c): its files are opened, checked and locked here, and the core does the rest."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from ...backend.files import Opener, open_path
from ...model.disk import Disk
from ...model.errors import FileError, ResourceLimit, SpecError
from ...native import ffi, lib
from .peripheral import Hooks
from .virtio import VirtioDevice, VirtioState

__all__ = ["QCOW2", "DiskDevice", "look_at", "open_store"]

SECTOR: Final = 512
QCOW2: Final = b"QFI\xfb"
"""How a qcow2 image begins (QEMU's docs/interop/qcow2.txt)."""
FLOCK: Final = "hhqqi4x"  # struct flock on x86-64
F_OFD_SETLK: Final = 37  # include/uapi/asm-generic/fcntl.h; `fcntl` has it from Python 3.9 on where the libc has it
SHORT: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Of the host's resources, and not of the file."""
BLKGETSIZE64: Final = 0x80081272  # include/uapi/linux/fs.h: _IOR(0x12, 114, size_t)


class DiskDevice(VirtioDevice[Disk]):
    """native/virtio_blk.c."""

    def __init__(self, spec: Disk, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        try:
            for level, budget in enumerate(() if hooks.disk is None else hooks.disk.budgets):
                self._limit_by(level, () if budget is None else budget.buckets)
        except BaseException:  # the error may live for long, and this with it: the next launch locks the same files
            self.stop()
            raise
        if hooks.disk is not None:
            hooks.disk.plugged(self)

    def _limit_by(self, level: int, buckets: Sequence[Any]) -> None:
        for meter, bucket in enumerate(buckets):
            if result := lib.orc_virtio_blk_set_bucket(self.handle, meter, level, bucket):
                raise ResourceLimit(-result, f"the limits of disk {self.spec.path}")

    def _make(self) -> Any:
        store = open_store(self.spec, self.hooks.open_file)
        made = ffi.new("orc_virtio **")
        name = os.path.basename(os.fsencode(self.spec.path))[:20]
        if result := lib.orc_virtio_blk_new(self.hooks.guest, store, name, made):
            lib.orc_store_free(store)
            raise ResourceLimit(-result, f"disk {self.spec.path}")
        return made[0]

    @property
    def label(self) -> str:
        return f"Disk {self.spec.path}"

    def limit_changed(self) -> None:
        """A limit of it has changed: what waits looks again. Any thread."""
        lib.orc_virtio_blk_limit_changed(self.handle)

    def counters(self) -> Any:
        """What was done: ``struct orc_blk_counters``, which says what each is. Any thread."""
        counters = ffi.new("struct orc_blk_counters *")
        lib.orc_virtio_blk_look(self.handle, counters)
        return counters

    @property
    def thread(self) -> int:
        """The kernel's number of the thread that does what io_uring can't; 0: there is none."""
        return int(lib.orc_virtio_blk_thread(self.handle))

    def restore(self, state: VirtioState) -> None:
        had, has = (int.from_bytes(config[:8], "little") for config in (state.config, self.state().config))
        if had != has:  # the guest has read it, and does not look again
            raise SpecError(
                f"Disk: its state is of a disk of {had * SECTOR} bytes, and {self.spec.path} has {has * SECTOR}"
            )
        if state.config != (ours := self.state().config):  # by its spec, and the driver can't change it
            block, have = (int.from_bytes(config[20:24], "little") for config in (state.config, ours))
            what = (
                f"with blocks of {block} bytes, and {self.spec.path} has {have}" if block != have else "of another kind"
            )
            raise SpecError(f"Disk: its state is of a disk {what}: give readonly, direct and base as they were")
        super().restore(state)

    def drained(self) -> None:
        lib.orc_virtio_blk_close(self.handle)  # at once: the VM's next run locks the same files

    def stop(self) -> None:
        if self.hooks.disk is not None:
            self.hooks.disk.unplugged(self)
        lib.orc_virtio_blk_close(self.handle)  # of one that was never served; else nothing
        super().stop()


def open_store(disk: Disk, open_file: Opener = open_path) -> Any:
    """The ``orc_store *`` of a disk, whose files it has had opened and has locked. Its device frees it.

    Raises:
        FileError: a file can't be used as it is; the message names it.
        ResourceLimit: the host has no more of what that takes.
    """
    made = ffi.new("orc_store **")
    with ExitStack() as opened:
        flags = lib.ORC_STORE_READONLY * disk.readonly | lib.ORC_STORE_DIRECT * disk.direct
        if disk.base is None:
            file = _open(opened, open_file, disk.path, readonly=disk.readonly, more=os.O_DIRECT * disk.direct)
            _check_raw(disk, disk.path, file)
            size = _size(file, disk.path)
            block = _block(file, disk.path, size) if disk.direct else SECTOR
            result = lib.orc_file_new(file, size, block, flags, made)
        else:
            base = _open(opened, open_file, disk.base, readonly=True)
            _check_raw(disk, disk.base, base)
            size = _size(base, disk.base)
            file = _open(opened, open_file, disk.path, readonly=disk.readonly, more=os.O_CREAT * (not disk.readonly))
            if not disk.readonly and os.fstat(file).st_size == 0:  # locked: nobody else makes it at the same time
                _check(lib.orc_overlay_create(file, size), disk)
            result = lib.orc_overlay_new(file, base, size, flags, made)
        _check(result, disk)
        opened.pop_all()  # the store has them
    return made[0]


def _check(result: int, disk: Disk) -> None:
    if result == -errno.EBADMSG:
        raise FileError(f"{disk.path}: is not what a disk with a base has written: give an empty or another file")
    if result == -errno.ESTALE:
        raise FileError(f"{disk.path}: was written over a base of another size than {disk.base}: give that base")
    if -result in SHORT:
        raise ResourceLimit(-result, f"disk {disk.path}")
    if result:
        raise FileError(f"{disk.path}: can't be used as a disk: {os.strerror(-result)}")


def _check_raw(disk: Disk, path: str, file: int) -> None:
    """Refuse a file whose format was not given, and that begins as a qcow2 image. A format is never guessed: the guest
    writes the first bytes, and a qcow2 header names other files of the host's."""
    if disk.format is None and _head(file) == QCOW2:
        raise FileError(
            f'{path}: begins as a qcow2 image: say format="qcow2" if it is one, or format="raw" if a guest has written '
            "that into its raw disk"
        )


def _head(file: int) -> bytes:
    """The first four bytes. Of a page, into a page: the file may have been opened with O_DIRECT."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        os.preadv(file, [page], 0)
        return page[: len(QCOW2)]


def look_at(path: str, *, readonly: bool) -> tuple[bool, bytes]:
    """Whether a file that another process will open is a block device, and not an image; and its first four bytes.

    Raises:
        FileError: it can't be opened so, or is neither; the message names it.
    """
    with ExitStack() as opened:
        file = _opened(opened, open_path, path, readonly=readonly)
        return stat.S_ISBLK(os.fstat(file).st_mode), _head(file)


def _open(opened: ExitStack, open_file: Opener, path: str, *, readonly: bool, more: int = 0) -> int:
    file = _opened(opened, open_file, path, readonly=readonly, more=more)
    _lock(file, path, readonly)
    return file


def _opened(opened: ExitStack, open_file: Opener, path: str, *, readonly: bool, more: int = 0) -> int:
    mode = os.O_RDONLY if readonly else os.O_RDWR
    try:
        # O_NONBLOCK: not to wait for the writer of a pipe. On files and block devices it has no effect.
        file = open_file(path, mode | os.O_NONBLOCK | more)
    except OSError as error:
        if error.errno in SHORT:
            raise ResourceLimit(error.errno, f"disk {path}: see ulimit -n and fs.file-max") from error
        raise FileError(f"{path}: {_why(error, readonly, more)}") from error
    opened.callback(os.close, file)
    kind = os.fstat(file).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        what = "a directory" if stat.S_ISDIR(kind) else "no file or block device"
        raise FileError(f"{path}: is {what}: a disk needs an image or a block device")
    return file


def _why(error: OSError, readonly: bool, more: int) -> str:
    match error.errno:
        case errno.ENOENT:
            return "does not exist: make it first, such as with truncate -s 1G FILE"
        case errno.EISDIR:
            return "is a directory: a disk needs a raw image or a block device"
        case errno.EACCES | errno.EROFS | errno.EPERM if not readonly:
            return f"can't be written ({os.strerror(error.errno)}): change its permissions, or use readonly=True"
        case errno.EINVAL if more & os.O_DIRECT:
            return "its file system has no O_DIRECT: leave direct=True out"
    return f"can't be opened as a disk: {error.strerror}"


def _lock(file: int, path: str, readonly: bool) -> None:
    """Of the open file, not of the process: two VMs of one process are two."""
    wanted = struct.pack(FLOCK, fcntl.F_RDLCK if readonly else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(file, F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise FileError(f"{path}: can't be locked: {os.strerror(error.errno or 0)}") from error
        remedy = (
            "stop that VM first"
            if readonly
            else "stop that VM first, give each VM its own copy, or share it by readonly=True or as their base"
        )
        raise FileError(f"{path}: is in use by another VM{' that writes it' * readonly}: {remedy}") from None


def _size(file: int, path: str) -> int:
    if stat.S_ISBLK(os.fstat(file).st_mode):
        size = int.from_bytes(fcntl.ioctl(file, BLKGETSIZE64, bytes(8)), "little")
    else:
        size = os.fstat(file).st_size
    if not size:
        raise FileError(f"{path}: is empty: give it the size of the disk, such as with truncate -s 1G {path}")
    if size % SECTOR:
        raise FileError(f"{path}: has {size} bytes: a disk's size is a multiple of {SECTOR} (is it a raw image?)")
    return size


def _block(file: int, path: str, size: int) -> int:
    block = int(lib.orc_file_block(file))
    if block <= 0:
        raise FileError(f"{path}: its file system has no O_DIRECT: leave direct=True out")
    if size % block:
        raise FileError(f"{path}: has {size} bytes: with direct=True the size is a multiple of {block} here")
    return block
