"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from orchestra.backend.emulated import library
from orchestra.backend.kvm.machine import cpu_vendor
from orchestra.backend.kvm.system import Kvm
from orchestra.model.errors import OrchestraError
from orchestra.native import lib

__all__ = ["describe", "host_kind", "sees_bus_locks"]


def sees_bus_locks() -> bool:
    """This host's KVM reports bus locks."""
    with Kvm.open() as kvm:
        return bool(kvm.extension(lib.KVM_CAP_X86_BUS_LOCK_EXIT) & lib.KVM_BUS_LOCK_DETECTION_EXIT)


def _kvm_problem() -> str | None:
    try:
        Kvm.open().close()
        return None
    except OrchestraError as error:
        return str(error)


def host_kind() -> str:
    """The kernel's KVM modules beside `kvm` itself, such as "kvm_amd"; of the CPU's vendor if they are built in."""
    if _kvm_problem() is not None:
        return "no-kvm"
    modules = sorted(path.name for path in Path("/sys/module").glob("kvm_*"))
    return "+".join(modules) or f"kvm-{cpu_vendor() or platform.machine()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def describe() -> dict[str, str]:
    """The machine, in the words of its own files."""
    problem = _kvm_problem()
    return {
        "cpu": f"{_cpu()} ({os.cpu_count()} CPUs)",
        "kernel": platform.release(),
        "kvm": problem or f"{host_kind()}, bus locks {'reported' if sees_bus_locks() else 'not reported'}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, trio {version('trio')}, "
        f"unicorn {library.version() or 'not installed'}",
        "orchestra": _commit(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) + " (1, 5, 15 min) at the start",
    }
