"""A VM's I/O thread (native/io.c): who holds it, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from ...model.errors import ResourceLimit
from ...native import ffi, lib
from ...native.core import Charged

__all__ = ["IoThread"]

NAME: Final = 15
"""Bytes of a thread's name (pthread_setname_np(3)). vCPUs' threads are called likewise: "web-1/0"."""


class IoThread:
    """Serves the queues of a VM's virtio devices without Python. For the fleet's thread, but the constructor.

    It is held by reasons, and works while there are none; at first for "start".

    It is held back as the vCPUs' threads are: by a cap, and by the VM's budgets of exits.

    Parameters:
        name: the VM's.
        voice: any vCPU of the VM (``orc_vcpu *``), by which the drain task is told of output, and that a hold has come
            to rest.
        buckets: what notifications of queues are charged to, and wait for. They outlive the thread.

    Raises:
        ResourceLimit: the host has no thread or descriptor left.
    """

    def __init__(self, name: str, voice: Any, buckets: Sequence[Charged] = ()) -> None:
        made = ffi.new("orc_io **")
        if result := lib.orc_io_start(name.encode()[: NAME - 3] + b"/io", made):
            raise ResourceLimit(-result, f"the I/O thread of vm {name!r}: see ulimit -u and ulimit -n")
        self._handle = ffi.gc(made[0], lib.orc_io_free)
        self._holds: set[str] = set()
        self._stopped = self._closed = False
        self._devices: list[Any] = []
        self._living = threading.Lock()
        self._fleet: Any = None  # whose capper has a cap of it
        lib.orc_io_set_voice(self._handle, voice)
        for level, bucket in enumerate(buckets):
            lib.orc_io_set_bucket(self._handle, level, bucket.handle)
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

    def cap(self, fleet: Any, share: float | None) -> None:
        """Let it use this share of a CPU (0.01 to 1), with the threads that work for its devices; None: no cap.

        Parameters:
            fleet: the ``orc_fleet *`` whose capper holds it.

        Raises:
            ResourceLimit: the host has no thread or memory left.
        """
        if self._closed:
            return
        if result := lib.orc_io_cap(fleet, self._handle, 1.0 if share is None else share):
            raise ResourceLimit(-result, "CPU cap of an I/O thread: see ulimit -u and cgroup pids.max")
        self._fleet = None if share is None or share >= 1 else fleet

    @contextmanager
    def living(self) -> Iterator[int | None]:
        """A block that gives the kernel's number of the thread. It does not end within the block, so the number is no
        other thread's. None: it has ended, or is about to."""
        with self._living:
            yield None if self._stopped else int(lib.orc_io_tid(self._handle)) or None

    def stop(self) -> None:
        """End it, once nothing is in flight: it touches no guest memory any more. A second call does nothing."""
        with self._living:
            self._stopped = True
        lib.orc_io_stop(self._handle)

    def close(self) -> None:
        """Give its descriptors back, once it and its devices have stopped: nobody is at them any more."""
        devices, self._devices = self._devices, []
        for device in devices:
            lib.orc_io_detach(self._handle, device)
        if not self._closed:
            if self._fleet is not None:
                lib.orc_io_cap(self._fleet, self._handle, 1.0)
            self._closed = True
            ffi.release(self._handle)
