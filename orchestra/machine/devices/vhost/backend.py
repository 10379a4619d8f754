"""One vhost-user back-end of a device, and the thread that speaks to it, which sleeps until something changes.

    the driver sets DRIVER_OK, resets, moves a vector  → `look`            ┐              ┌ lend:   SET_VRING_*
    a pause, its end                                   → `hold`, `let_go`  ├→ the thread ─┤
    the end of the VM                                  → `stop`            │              └ recall: GET_VRING_BASE
    the socket or the process ends                                         ┘

No other thread waits for the back-end: what it takes or breaks is this VM's alone. The data go between guest and
back-end: ioeventfd in, requests in shared memory, the vector's eventfd out.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import attrs

from ....host.control.priority import end_priority
from ....model.actions import Failed
from ....model.errors import OrchestraError, ResourceLimit, VhostUserError
from ....native import lib
from ....native.core import install_signal
from .daemon import Daemon
from .frontend import FrontEnd
from .lending import Lendable, Lending
from .pace import Pace

__all__ = ["BackEnd", "Connection"]

AT_ONCE: Final = 1.0
"""Seconds for the end of a process that has closed its socket, or broken the protocol. What it has not written by then
is lost, as by a loss of power."""

STUCK: Final = 0.25
"""Seconds. A call on an eventfd takes microseconds."""


@attrs.frozen(eq=False)
class Connection:
    """A connected socket, and the process behind it if that is ours.

    Attributes:
        drain: as of `Lending`.
        explain: what the process meant by its last words; None: no more than they say.
    """

    socket: socket.socket
    daemon: Daemon | None = None
    drain: bool = False
    explain: Callable[[str], OrchestraError | None] = lambda _: None


class BackEnd:
    """Speaks to one back-end. All methods: any thread; `wait` and `stop` wait for it, but no longer than its times.

    Attributes:
        features, queues, config: of the device, as the back-end says.

    Parameters:
        name: for errors: "disk root.qcow2".
        connect: makes the connection; on the thread, which the process then belongs to.
        config_size: bytes of the device's configuration.

    Raises:
        OrchestraError: there is no connection, or no back-end at its end that can do what is needed.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], config_size: int) -> None:
        self.features, self.queues, self.config = 0, 0, b""
        install_signal()  # for `_unstick`
        self._name, self._connect, self._config_size = name, connect, config_size
        self._changed = threading.Condition()  # for what follows
        self._lending: Lending | None = None
        self._drain = False
        self._holds = {"start"}
        self._rests = True  # nothing is lent, and nothing will be while it is held
        self._told: list[Callable[[], object]] = []
        self._stopping = self._over = self._ready = False
        self._problem: OrchestraError | None = None
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise _short(name, error) from error
        self._thread = threading.Thread(target=self._run, name=f"orchestra {name}"[:64], daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the host has no thread left
            os.close(self._wake)
            raise ResourceLimit(11, f"{name}: {error}; see ulimit -u and cgroup pids.max") from error
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._over)
        if self._problem is not None:
            self.close()
            raise self._problem

    # ---- for its device

    def serve(self, device: Lendable) -> None:
        """Lend that device's queues from now on, while its driver has them running and nobody holds it."""
        try:
            lending = Lending(self._name, device, drain=self._drain)
        except OSError as error:
            raise _short(self._name, error) from error
        with self._changed:
            self._lending = lending
            problem = self._problem
        if problem is not None:
            device.end(Failed(str(problem)))
        self.look()

    def look(self) -> None:
        """The driver has changed something."""
        with self._changed, suppress(BlockingIOError):  # closed under the lock: its number may be another's next
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # ---- as an `IoThread`

    def hold(self, reason: str) -> None:
        """From now on the queues are not lent. Does not wait until they are back; `wait` does."""
        with self._changed:
            self._rests = self._rests and bool(self._holds)  # the thread may be lending just now
            self._holds.add(reason)
        self.look()

    def when_still(self, call: Callable[[], object]) -> None:
        """While it is held: call that, on the thread or on this one, once the queues are back."""
        with self._changed:
            over = self._over
            if not over:
                self._told.append(call)
        if over:
            call()
        self.look()

    @property
    def is_still(self) -> bool:
        """While it is held: whether the queues are back."""
        with self._changed:
            return self._rests or self._over

    def let_go(self, reason: str) -> None:
        """That hold is over. Nothing if there was none."""
        with self._changed:
            self._holds.discard(reason)
        self.look()

    def wait(self) -> None:
        """While it is held: wait until the queues are back."""
        with self._changed:
            self._changed.wait_for(lambda: self._rests or self._over)

    def stop(self) -> None:
        """End it: the back-end touches no guest memory any more. A second call does nothing."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.look()
        self._thread.join(STUCK)
        while self._thread.is_alive():
            at = self._at()
            self._thread.join(STUCK)
            if at >= 0:
                self._unstick(at)

    def _at(self) -> int:
        lending = self._lending
        return -1 if lending is None else lending.at

    def _unstick(self, fd: int) -> None:
        """The back-end has filled or emptied that eventfd, and the thread waits in a call on it.

        A signal makes the kernel begin the call again, by then on an eventfd of ours. The guest has ended: it rings no
        more."""
        with self._changed:  # the thread does not end meanwhile, see `_end`
            if not self._over and self._at() == fd:
                os.dup2(self._wake, fd, inheritable=False)
                signal.pthread_kill(self._thread.ident or 0, lib.orc_signal_number())

    def close(self) -> None:
        """End it, and give its descriptors back."""
        self.stop()
        with self._changed:
            wake, self._wake = self._wake, -1
            if wake >= 0:
                os.close(wake)
            if self._lending is not None:
                self._lending.close()

    # ---- the thread

    def _run(self) -> None:
        end_priority()
        connection: Connection | None = None
        try:
            connection = self._connect()
            self._drain = connection.drain
            front_end = FrontEnd(connection.socket, self._name)
            front_end.negotiate()
            self.features, self.queues = front_end.features, front_end.queues
            self.config = front_end.config(self._config_size)
            with self._changed:
                self._ready = True
                self._changed.notify_all()
            self._watch(connection, front_end)
        except Exception as error:  # whatever it is, it is this VM's alone
            self._fail(error, connection)
        finally:
            self._end(connection)

    def _watch(self, connection: Connection, front_end: FrontEnd) -> None:
        daemon, watched = connection.daemon, select.poll()
        for fd in [self._wake, connection.socket.fileno(), *([] if daemon is None else [daemon.pidfd, daemon.output])]:
            watched.register(fd, select.POLLIN)
        pace = Pace(since=time.monotonic())
        while True:
            ready, began = {fd for fd, _ in watched.poll()}, time.thread_time()
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if daemon is not None and daemon.output in ready and not daemon.read():
                watched.unregister(daemon.output)
            if self._stopping:
                if daemon is None and self._lending is not None:  # a process of ours finishes when it is told to end
                    self._lending.recall(front_end)
                return
            if daemon is not None and daemon.pidfd in ready:
                raise VhostUserError(f"{self._name}: its process has ended")
            if connection.socket.fileno() in ready:
                connection.socket.settimeout(0)
                said = connection.socket.recv(1)
                what = "says what nobody has asked for" if said else "has closed the connection"
                raise VhostUserError(f"{self._name}: its back-end {what}")
            self._follow(front_end)
            rest = pace.spent(time.thread_time() - began, time.monotonic())
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, rest)

    def _follow(self, front_end: FrontEnd) -> None:
        """Lend and recall, as holds and the driver want it by now."""
        with self._changed:
            lending, held = self._lending, bool(self._holds)
        if lending is not None:
            lending.follow(front_end, held=held)
        with self._changed:
            self._rests = held and bool(self._holds)
            self._changed.notify_all()
        if held:
            self._come_to_rest()

    def _come_to_rest(self) -> None:
        with self._changed:
            told, self._told = self._told, []
        for call in told:
            call()

    # ---- its end

    def _fail(self, error: Exception, connection: Connection | None) -> None:
        daemon = None if connection is None else connection.daemon
        problem = error if isinstance(error, OrchestraError) else VhostUserError(f"{self._name}: {error!r}")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            problem = _short(self._name, error)
        if connection is not None and daemon is not None:
            asked = not daemon.has_ended(within=AT_ONCE)  # its socket closes first
            daemon.end(patience=AT_ONCE)
            meant = None if asked and not daemon.words else connection.explain(daemon.words)
            if meant is not None and not self._ready:
                problem = meant
            else:
                how = "" if asked else f"; {daemon.how}"
                problem = VhostUserError(f"{problem}{how}{f': {daemon.words}' if daemon.words else ''}")
        with self._changed:
            self._problem = problem
            lending = self._lending
        if lending is not None and not self._stopping:
            lending.device.end(Failed(str(problem)))

    def _end(self, connection: Connection | None) -> None:
        """The last of the thread: the back-end is gone, and the queues are back."""
        if connection is not None:
            if connection.daemon is not None:
                connection.daemon.end()
            connection.socket.close()
        if self._lending is not None:
            self._lending.give_back({})  # wherever they are: the VM ends
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._come_to_rest()


def _short(name: str, error: OSError) -> ResourceLimit:
    return ResourceLimit(error.errno or 0, f"{name}: {error.strerror}: see ulimit -n")
