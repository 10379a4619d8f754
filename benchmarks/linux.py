"""The Linux guest of the measurements: its files, its VM in a fleet, and why there may be none.

The kernel is Debian's for virtual machines. Its whole user space is guests/linux.c, which does what the host types.
``python -m benchmarks.linux`` fetches and compiles what they need: a machine in a box has no network, and is slow.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import trio

import orchestra as orc
from orchestra.backend.kvm.masks import missing_features
from orchestra.backend.kvm.system import Kvm
from orchestra.model.errors import OrchestraError

from . import floor, machine, qemu

__all__ = [
    "BOOTED",
    "CMDLINE",
    "MEMORY",
    "PEER_CMDLINE",
    "Files",
    "Guest",
    "made",
    "order",
    "peer",
    "progress",
    "skipped",
    "spec",
]

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # who fetches kernels: one place for tests and benchmarks
import linux_kit

MEMORY = 256 * orc.MiB
CMDLINE = "quiet"
PEER_CMDLINE = f"console=ttyS0 reboot=a {CMDLINE}"
"""The same, with what orchestra adds."""
BOOTED = 300.0
"""Seconds. In an emulated machine a kernel takes half a minute."""
ANSWERED = 60.0
"""Seconds. No order takes longer than ten."""


@attrs.frozen
class Files:
    """What is booted.

    Attributes:
        bare: an initrd without a module.
        loaded: one that loads the drivers of all devices.
    """

    kernel: Path
    bare: Path
    loaded: Path


def _host_problem() -> str | None:
    try:
        with Kvm.open() as kvm:
            missing = missing_features(kvm.supported_cpuid().entries(), orc.LinuxBoot.cpu_features)
    except OrchestraError as error:
        return str(error)
    if missing:
        return f"this host's KVM ({machine.host_kind()}) does not give guests what Linux needs: {', '.join(missing)}"
    if not {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split()):
        return f"this host's KVM ({machine.host_kind()}) interprets guests, and Linux takes minutes on it, or fails"
    return None


def skipped(name: str, *, peer: bool) -> bool:
    """Linux can't be measured here: says so and why, in one line. `peer`: it is measured against QEMU."""
    problem = _host_problem()
    if problem is None and peer and shutil.which(qemu.PROGRAM) is None:
        problem = f"{qemu.PROGRAM} is not installed, the peer (Debian: qemu-system-x86)"
    if problem is None:
        try:
            linux_kit.debian_kernel(), linux_kit.modules(*linux_kit.MODULES)
        except linux_kit.NotHereError as error:
            problem = f"{error} (tests/linux_kit.py fetches it)"
    if problem is not None:
        print(f"{name}: skipped: {problem}", file=sys.stderr)
    return problem is not None


def _program() -> Path:
    """guests/linux.c, compiled; kept beside the kernel for as long as the source is the same."""
    source = (floor.HERE / "guests" / "linux.c").read_bytes()
    kept = linux_kit.CACHE / f"benchmarks-guest-{hashlib.sha256(source).hexdigest()[:16]}"
    if not kept.is_file():
        floor.compile_c("guests/linux.c", kept.with_suffix(".new"), "-static").rename(kept)
    return kept


def made(build: Path) -> Files:
    """Make the initrds, and a copy of the kernel beside them: whose file system is slow is not measured."""
    root = {"dev/": b"", "dev/console": (stat.S_IFCHR | 0o600, 5, 1), "init": _program().read_bytes()}
    kernel = Path(shutil.copy(linux_kit.debian_kernel(), build / "vmlinuz"))
    files = Files(kernel, build / "initrd-bare", build / "initrd-loaded")
    files.bare.write_bytes(linux_kit.cpio(root))
    files.loaded.write_bytes(linux_kit.cpio({**root, **linux_kit.modules(*linux_kit.MODULES)}))
    return files


def spec(
    name: str, files: Files, *, initrd: Path | None = None, devices: tuple[Any, ...] = (), **more: Any
) -> orc.VmSpec:
    """A VM of a serial port and these devices; with the initrd without modules, unless it is given."""
    boot = orc.LinuxBoot(kernel=files.kernel, initrd=initrd or files.bare, cmdline=CMDLINE)
    return orc.VmSpec(name=name, memory=MEMORY, boot=boot, devices=(orc.Serial(), *devices), **more)


def peer(files: Files, machine: str, *, initrd: Path | None = None, more: tuple[str, ...] = ()) -> Any:
    """The same in QEMU, as an async context manager."""
    return qemu.qemu(files.kernel, initrd or files.bare, PEER_CMDLINE, machine, more)


Guest: TypeAlias = orc.Vm | qemu.Qemu


async def order(guest: Guest, text: str) -> list[int]:
    """Type a line to a guest that is ready, and return the numbers of its answer.

    Raises:
        RuntimeError: it failed, or did not answer.
    """
    console = guest.console if isinstance(guest, orc.Vm) else guest
    await console.write(f"{text}\n".encode())
    with trio.move_on_after(ANSWERED):
        while True:
            said = (await console.wait_for(b"\n")).decode(errors="replace").split()
            if said[:1] == ["failed:"]:
                raise RuntimeError(" ".join(said))
            if said[:1] == ["did"]:
                return [int(word) for word in said[1:] if word.isdigit()]
    written = guest.console.log() if isinstance(guest, orc.Vm) else guest.console
    raise RuntimeError(f"no answer to {text!r} in {ANSWERED:g} s: {written[-2000:].decode(errors='replace')}")


def progress(text: str) -> None:
    """What is measured just now, for a person who waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(linux_kit.debian_kernel(), _program(), *linux_kit.modules(*linux_kit.MODULES))
