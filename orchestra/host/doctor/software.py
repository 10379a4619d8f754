"""Checks what is installed: the kernel's headers, the parts of orchestra that are extras, and QEMU's storage daemon."""

from __future__ import annotations

from collections.abc import Iterator

from ...model.extras import install
from .files import Host
from .report import Finding

__all__ = ["extras", "headers", "storage"]

EXTRAS = {
    "cli": ("cyclopts", "rich"),
    "emulated": ("unicorn",),
    "parquet": ("pyarrow",),
    "plot": ("matplotlib",),
    "profile": ("iced_x86", "elftools"),
    "simulate": ("numpy",),
    "testing": ("pytest", "pytest_trio"),
}


def headers(host: Host) -> Iterator[Finding]:
    text = host.read("usr/include/linux/kvm.h")
    if not text:
        remedy = "install linux-libc-dev (Debian, Ubuntu) or kernel-headers (Fedora)"
        yield Finding("kernel headers", "note", "missing", "needed only to build orchestra from source", remedy)
    elif "KVM_CAP_X86_BUS_LOCK_EXIT" not in text:
        meaning = "orchestra can't be built from source with headers from before Linux 5.12"
        yield Finding("kernel headers", "note", "too old", meaning, "install those of a newer kernel")
    else:
        yield Finding("kernel headers", "ok", "/usr/include/linux/kvm.h", "orchestra can be built from source")


def extras(host: Host) -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if not host.importable(name)]
        if missing:
            remedy = f"`{install(extra)}`"
            yield Finding(
                f"extra {extra}", "note", f"{', '.join(missing)} missing", "that part is not available", remedy
            )
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(modules), "installed")


def storage(host: Host) -> Iterator[Finding]:
    places = [f"/{folder}/qemu-storage-daemon" for folder in ("usr/bin", "usr/local/bin")]
    found = next((place for place in places if (host.root / place[1:]).exists()), None)
    if found is not None:
        yield Finding("qcow2 disks", "ok", found, "a Linux guest may have disks of qcow2 images")
        return
    remedy = "install qemu-system-common (Debian, Ubuntu) or qemu-tools (Fedora, openSUSE)"
    meaning = "disks must be raw images or block devices"
    yield Finding("qcow2 disks", "note", "qemu-storage-daemon missing", meaning, remedy)
