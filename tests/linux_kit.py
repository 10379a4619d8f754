"""Linux for tests: kernels, and an initrd made of busybox and a script. What is fetched is kept outside of the tree.

    debian_kernel()   Debian's cloud kernel, by apt-get download
    host_kernel()     the kernel of the machine in a box that the tests run in, from its own folder
    vmlinux(kernel)   the ELF file that is compressed in a bzImage
    modules(...)      modules of Debian's kernel
    kernel_module(source)   one more, in C
    program(source)   a program in C, for a guest
    lspci()           Debian's, with the libraries that it needs
    initrd(...)       a cpio archive with busybox and /init

A machine in a box has no network, and forgets what is written there. `python tests/linux_kit.py` fetches all before.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
"""What every virtio device needs."""
KVM = ("irqbypass", "kvm", "kvm-amd")
"""Of a guest that has guests itself."""
GUESTS = Path(__file__).parent / "guests"
KERNEL_LOCKS = GUESTS / "kernlocks.c"
PROGRAMS = ("splitlocks", "works", "nested")
MODULES = (*VIRTIO, "virtio_blk", "virtio-rng", "virtio_console", "virtio_balloon", "button", "pvpanic", "pvpanic-mmio")
LOAD = "for module in /*.ko; do insmod $module; done"
"""A script for `initrd` with `modules`."""


def modules(*names: str) -> dict[str, bytes]:
    """Modules of Debian's kernel as files of an initrd, whose names have the order in which the kernel takes them.

    Which needs which changes with the kernel: each says so itself (modinfo's "depends").
    """
    package = _newest(KERNEL_PACKAGE)
    known = {name.replace("-", "_"): name for name in names}
    content = {name: _unpacked(package, f"lib/modules/*/kernel/**/{name}.ko").read_bytes() for name in names}
    needs = {name: [known[need] for need in _needs(file) if need in known] for name, file in content.items()}
    order = graphlib.TopologicalSorter(needs).static_order()
    return {f"{place:02}-{name}.ko": content[name] for place, name in enumerate(order)}


def _needs(module: bytes) -> list[str]:
    """The modules that a module is to be loaded behind."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return found[1].decode().split(",") if found and found[1] else []


def program(source: Path) -> bytes:
    """A program for a guest, which needs no library there."""

    def make(folder: Path) -> Path:
        if not shutil.which("gcc"):
            raise NotHereError("gcc is not here, which makes programs for guests")
        _run("gcc", "-O1", "-static", "-o", str(folder / "program"), str(source))
        return folder / "program"

    return _kept(source.stem, source.read_bytes(), make)


def _kept(name: str, source: bytes, make: Callable[[Path], Path]) -> bytes:
    """What `make` leaves in a file of the folder that it is given, made once of that source: a box has no tools."""
    kept = CACHE / "made" / f"{name}-{hashlib.sha256(source).hexdigest()[:16]}"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            os.replace(make(Path(folder)), kept)
    return kept.read_bytes()


@functools.cache
def lspci() -> dict[str, bytes]:
    """``lspci`` as files of an initrd, with its libraries. What is not of its package is this machine's."""
    program, library = _unpacked("pciutils", "usr/bin/lspci"), _unpacked("libpci3", "usr/lib/*/libpci.so.3*")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    found = subprocess.run(["ldd", program], env=environment, capture_output=True, text=True, check=False)
    paths = re.findall(r"(/\S+) \(0x", found.stdout)
    if found.returncode or "not found" in found.stdout or not paths:
        raise NotHereError(f"lspci lacks libraries here: {found.stdout}{found.stderr}")
    files = {"bin/lspci": program.read_bytes()}
    for path in paths:
        # The loader by the path that the program names it by; a library wherever the loader looks.
        name = path if Path(path).name.startswith("ld-") else f"/lib/{Path(path).name}"
        files[name.lstrip("/")] = Path(path).read_bytes()
    return {"lib/": b"", "lib64/": b"", **files}


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


def kernel_module(source: Path) -> bytes:
    """A module in C for Debian's kernel, made with the headers of just that kernel."""
    headers = _newest(KERNEL_PACKAGE).replace("linux-image", "linux-headers")

    def make(folder: Path) -> Path:
        if missing := [tool for tool in ("gcc", "make") if not shutil.which(tool)]:
            raise NotHereError(f"{' and '.join(missing)}: not here, where modules of kernels are made by them")
        common = headers.replace("-cloud-amd64", "-common")
        series = ".".join(headers.split("-")[2].split(".")[:2])
        with _content(headers, common, f"linux-kbuild-{series}") as content:
            tree = content / "usr/src" / headers
            (tree / "Makefile").write_text(f"include {content}/usr/src/{common}/Makefile\n")  # it names /usr/src
            shutil.copy(source, folder)
            (folder / "Makefile").write_text(f"obj-m := {source.stem}.o\n")
            _run("make", "-C", str(tree), f"M={folder}", "CC=gcc", "modules")
        made = folder / f"{source.stem}.ko"
        _run("strip", "--strip-debug", str(made))
        return made

    return _kept(f"{source.stem}.ko", headers.encode() + source.read_bytes(), make)


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip().splitlines()[-3:]}")


@contextlib.contextmanager
def _content(*packages: str) -> Iterator[Path]:
    """Debian packages, unpacked into one folder, which is on the file system of CACHE and goes at the end."""
    making = CACHE / f"{packages[0]}.{os.getpid()}"
    making.mkdir(parents=True, exist_ok=True)
    try:
        _run("apt-get", "download", *packages, cwd=making)
        for file in making.glob("*.deb"):
            _run("dpkg-deb", "-x", file.name, "content", cwd=making)
        yield making / "content"
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _unpacked(package: str, pattern: str) -> Path:
    """A file of a Debian package."""
    folder = CACHE / package
    if not sorted(folder.glob(pattern)):
        with _content(package) as content:
            folder.mkdir(exist_ok=True)
            for found in sorted(content.glob(pattern)):
                target = folder / found.relative_to(content)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(found, target)
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

    def unpack(folder: Path) -> Path:
        tools = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz"}
        tool = tools.get(payload[:4])
        if tool is None or not shutil.which(tool):
            raise NotHereError(f"{kernel} is compressed with {tool or payload[:4]!r}, which is not here")
        done = subprocess.run([tool, "-dcf"], input=payload, capture_output=True, check=True)
        (folder / "vmlinux").write_bytes(done.stdout)
        return folder / "vmlinux"

    unpacked = _kept(kernel.name.replace("vmlinuz", "vmlinux"), payload, unpack)
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
        *("insmod", "head", "od", "dd", "md5sum", "sync", "mkdir", "rm", "stty", "sleep"),
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


def with_files(archive: Path, files: Mapping[str, bytes]) -> bytes:
    """An initrd with more files: the kernel unpacks one archive behind the other."""
    return archive.read_bytes() + bytes(-archive.stat().st_size % 4) + cpio(files)


if __name__ == "__main__":
    print(debian_kernel(), busybox(), *modules(*MODULES, *KVM), *lspci())
    kernel_module(KERNEL_LOCKS)
    vmlinux(debian_kernel())
    for name in PROGRAMS:
        program(GUESTS / f"{name}.c")
