"""How a VM's vCPUs are grouped into cores and sockets."""

from __future__ import annotations

from typing import Final

import attrs

from .checks import fail, whole
from .errors import SpecError

__all__ = ["ONE_SOCKET", "Topology"]


@attrs.frozen(kw_only=True)
class Topology:
    """How a VM's vCPUs are grouped, as the guest reads it from CPUID. (It places no thread on the host.)

    Parameters:
        sockets: packages.
        threads: threads of a core.

    The cores of a socket follow from the number of vCPUs, which must divide evenly. A vCPU's number is its APIC id, so
    the threads of a core, and the vCPUs of a socket if there are several, are a power of two.
    """

    sockets: int = 1
    threads: int = 1

    def __attrs_post_init__(self) -> None:
        whole("sockets", self.sockets, 1, 64)
        whole("threads", self.threads, 1, 8)
        if self.threads & self.threads - 1:
            raise fail("threads", self.threads, "must be a power of two, as APIC ids are numbered by bits")

    def check(self, vcpus: int) -> None:
        """Check that so many vCPUs can be grouped so.

        Raises:
            SpecError: they can't.
        """
        if vcpus % (self.sockets * self.threads):
            remedy = f"vcpus={vcpus} must be a multiple of sockets times threads, {self.sockets * self.threads}"
            raise SpecError(f"topology: {remedy}")
        each = vcpus // self.sockets
        if self.sockets > 1 and each & each - 1:
            raise SpecError(f"topology: {each} vCPUs in each of {self.sockets} sockets: must be a power of two")

    def per_socket(self, vcpus: int) -> int:
        """vCPUs of a socket."""
        return vcpus // self.sockets


ONE_SOCKET: Final = Topology()
