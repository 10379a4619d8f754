"""Linux for tests: kernels, and an initrd made of busybox and a script. What is fetched is kept outside of the tree.

    debian_kernel()   Debian's cloud kernel, by apt-get download
    host_kernel()     the kernel of the machine in a box that the tests run in, from its own folder
    vmlinux(kernel)   the ELF file that is compressed in a bzImage
    modules(...)      modules of Debian's kernel
    program(source)   a program in C, for a guest
    initrd(...)       a cpio archive with busybox and /init

A machine in a box has no network, and forgets what is written there. `python tests/linux_kit.py` fetches all before.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path


class NotHereError(Exception):
    """What Linux guests are made of can't be had here. The message says why."""


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestra-tests"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
SHELL = b"# "
INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
{script}
echo ready
exec setsid -c sh
"""


def kvmhost() -> Path:
    """The command that runs others in a box (ORCHESTRA_KVMHOST), beside which its kernel lies. It may not be there."""
    return Path(os.environ.get("ORCHESTRA_KVMHOST", Path(__file__).parents[2] / "shared" / "kvmhost" / "kvmhost"))


@functools.cache
def host_kernel() -> Path:
    """The kernel that the box itself runs."""
    kernel = kvmhost().parent / "vmlinuz"
    if not kernel.is_file():
        raise NotHereError(f"no {kernel}: ORCHESTRA_KVMHOST names the command beside which a kernel lies")
    return kernel


@functools.cache
def debian_kernel() -> Path:
    """Debian's kernel for virtual machines."""
    return _unpacked(_newest(KERNEL_PACKAGE), "boot/vmlinuz-*")


VIRTIO = ("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci")
"""What every virtio device needs, each behind what it needs itself."""
MODULES = (*VIRTIO, "virtio_blk", "virtio-rng", "virtio_console", "button", "pvpanic", "pvpanic-mmio")
LOAD = "for module in /*.ko; do insmod $module; done"
"""A script for `initrd` with `modules`."""


def modules(*names: str) -> dict[str, bytes]:
    """Modules of Debian's kernel as files of an initrd, whose names have this order."""
    package = _newest(KERNEL_PACKAGE)
    patterns = [f"lib/modules/*/kernel/drivers/**/{name}.ko" for name in names]
    return {
        f"{place:02}-{name}.ko": _unpacked(package, pattern).read_bytes()
        for place, (name, pattern) in enumerate(zip(names, patterns, strict=True))
    }


def program(source: Path) -> bytes:
    """A program for a guest, which needs no library there."""
    if not shutil.which("gcc"):
        raise NotHereError("gcc is not here, which makes programs for guests")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "program"
        done = subprocess.run(
            ["gcc", "-O1", "-static", "-o", made, source], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotHereError(f"{source} can't be compiled here: {done.stderr}")
        return made.read_bytes()


@functools.cache
def busybox() -> Path:
    return _unpacked(BUSYBOX_PACKAGE, "bin/busybox")


@functools.cache
def _newest(package: str) -> str:
    """The package that a package without content depends on."""
    if kept := sorted(CACHE.glob("linux-image-*-cloud-amd64")):
        return kept[-1].name
    if not (shutil.which("apt-cache") and shutil.which("dpkg-deb")):
        raise NotHereError("Linux guests are made of Debian's packages, and there is no apt here")
    found = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False)
    names = [line.split()[-1] for line in found.stdout.splitlines() if line.strip().startswith("Depends: linux-image-")]
    if not names:
        raise NotHereError(f"apt knows no {package}: {found.stderr.strip() or 'it is of another distribution'}")
    return names[0]


def _unpacked(package: str, pattern: str) -> Path:
    """A file of a Debian package."""
    folder = CACHE / package
    if not sorted(folder.glob(pattern)):
        making = CACHE / f"{package}.{os.getpid()}"
        making.mkdir(parents=True, exist_ok=True)
        try:
            for command in (["apt-get", "download", package], ["sh", "-c", "dpkg-deb -x *.deb content"]):
                done = subprocess.run(command, cwd=making, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise NotHereError(f"{package} can't be had: {done.stderr.strip().splitlines()[-1:] or command}")
            folder.mkdir(exist_ok=True)
            for found in sorted((making / "content").glob(pattern)):
                target = folder / found.relative_to(making / "content")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(found, target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    (found,) = sorted(folder.glob(pattern))[-1:]
    return found


def vmlinux(kernel: Path, *, pvh: bool = True) -> bytes:
    """The ELF kernel that is compressed in a bzImage.

    Parameters:
        pvh: with its PVH note. Without it, the kernel is one for the 64-bit boot protocol.
    """
    packed = kernel.read_bytes()
    setup = (packed[0x1F1] + 1) * 512
    offset, size = struct.unpack_from("<II", packed, 0x248)
    payload = packed[setup + offset : setup + offset + size - 4]  # the last four bytes are the length
    tools = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz"}
    tool = tools.get(payload[:4])
    if tool is None or not shutil.which(tool):
        raise NotHereError(f"{kernel} is compressed with {tool or payload[:4]!r}, which is not here")
    unpacked = subprocess.run([tool, "-dcf"], input=payload, capture_output=True, check=True).stdout
    note = struct.pack("<III4s", 4, 8, 18, b"Xen\0")
    assert unpacked.startswith(b"\x7fELF")
    assert unpacked.count(note) == 1
    return unpacked if pvh else unpacked.replace(note, struct.pack("<III4s", 4, 8, 0x100, b"Xen\0"))


# ---- the initrd


def cpio(files: Mapping[str, bytes | str | tuple[int, int, int]]) -> bytes:
    """A cpio archive ("newc").

    Directories end with "/", programs are bytes, symbolic links are text, and devices are (mode, major, minor).
    """
    made = bytearray()

    def add(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal made
        encoded = name.encode() + b"\0"
        fields = (len(made) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + encoded, content):
            made += part + bytes(-len(made + part) % 4)

    for name, content in files.items():
        if name.endswith("/"):
            add(name.rstrip("/"), stat.S_IFDIR | 0o755)
        elif isinstance(content, str):
            add(name, stat.S_IFLNK | 0o777, content.encode())
        elif isinstance(content, tuple):
            add(name, content[0], device=content[1:])
        else:
            add(name, stat.S_IFREG | 0o755, content)
    add("TRAILER!!!", 0)
    return bytes(made)


def initrd(script: str = "", files: Mapping[str, bytes] | None = None) -> bytes:
    """An initrd whose /init runs `script`, says "ready", and starts a shell on the console."""
    program = busybox().read_bytes()
    names = (
        *("sh", "mount", "umount", "setsid", "poweroff", "reboot", "cat", "uname", "grep", "ls", "nproc", "dmesg"),
        *("insmod", "head", "od", "dd", "md5sum", "sync", "mkdir", "sleep"),
    )
    return cpio(
        {
            **dict.fromkeys(("bin/", "dev/", "proc/", "sys/"), b""),
            "dev/console": (stat.S_IFCHR | 0o600, 5, 1),
            "bin/busybox": program,
            **{f"bin/{name}": "busybox" for name in names},
            "init": INIT.format(script=script).encode(),
            **(files or {}),
        }
    )


if __name__ == "__main__":
    print(debian_kernel(), busybox(), *modules(*MODULES))
