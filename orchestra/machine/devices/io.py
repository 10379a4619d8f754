"""A VM's I/O thread (native/io.c): who holds it, and when it ends."""

from __future__ import annotations

from typing import Any, Final

from ...model.errors import ResourceLimit
from ...native import ffi, lib

__all__ = ["IoThread"]

NAME: Final = 15
"""Bytes of a thread's name (pthread_setname_np(3)). vCPUs' threads are called likewise: "web-1/0"."""


class IoThread:
    """Serves the queues of a VM's virtio devices without Python. For the fleet's thread, but the constructor.

    It is held by reasons, and works while there are none; at first for "start".

    Parameters:
        name: the VM's.
        voice: any vCPU of the VM (``orc_vcpu *``), by which the drain task is told of output, and that a hold has come
            to rest.

    Raises:
        ResourceLimit: the host has no thread or descriptor left.
    """

    def __init__(self, name: str, voice: Any) -> None:
        made = ffi.new("orc_io **")
        if result := lib.orc_io_start(name.encode()[: NAME - 3] + b"/io", made):
            raise ResourceLimit(-result, f"the I/O thread of vm {name!r}: see ulimit -u and ulimit -n")
        self._handle = ffi.gc(made[0], lib.orc_io_free)
        self._holds: set[str] = set()
        self._stopped = self._closed = False
        self._devices: list[Any] = []
        lib.orc_io_set_voice(self._handle, voice)
        self.hold("start")

    def attach(self, device: Any) -> None:
        """Serve that ``orc_virtio *`` too.

        Raises:
            ResourceLimit: there is no room for more, here or at the host.
        """
        if result := lib.orc_io_attach(self._handle, device):
            raise ResourceLimit(-result, "a virtio device: it can't be served (epoll)")
        self._devices.append(device)

    def hold(self, reason: str) -> None:
        """From now on nothing is taken from a queue. Does not wait for what is in flight: see `is_still`, `wait`."""
        if not self._holds and not self._closed:
            lib.orc_io_hold_soon(self._handle)
        self._holds.add(reason)

    @property
    def is_still(self) -> bool:
        """While it is held: whether nothing is in flight any more. Where not, the drain task is told once that is so
        (`voice`)."""
        return self._stopped or bool(lib.orc_io_is_still(self._handle))

    def wait(self) -> None:
        """While it is held: wait until nothing is in flight."""
        if not self._stopped:
            lib.orc_io_wait(self._handle)

    def let_go(self, reason: str) -> None:
        """That hold is over. Nothing if there was none."""
        if self._holds == {reason} and not self._closed:
            lib.orc_io_let_go(self._handle)
        self._holds.discard(reason)

    def stop(self) -> None:
        """End it, once nothing is in flight: it touches no guest memory any more. A second call does nothing."""
        self._stopped = True
        lib.orc_io_stop(self._handle)

    def close(self) -> None:
        """Give its descriptors back, once it and its devices have stopped: nobody is at them any more."""
        devices, self._devices = self._devices, []
        for device in devices:
            lib.orc_io_detach(self._handle, device)
        if not self._closed:
            self._closed = True
            ffi.release(self._handle)
