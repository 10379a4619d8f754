"""The front-end's side of one vhost-user connection: one request at a time, each answered within its time or refused.

For one thread, which may block; never the fleet's. A back-end may answer anything, byte by byte, late or not at all.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import attrs

from ....model.errors import VhostUserError
from .messages import (
    HEADER,
    PROTOCOL_FEATURES,
    Protocol,
    RamRegion,
    Request,
    config,
    descriptor,
    parse_config,
    parse_header,
    parse_number,
    parse_vring,
    request,
    table,
    vring,
    vring_addresses,
)

__all__ = ["FrontEnd", "Vring"]

ANSWER: Final = 30.0
"""Seconds for an answer. A back-end answers in microseconds, and after its start in less than a second; on a host that
is itself emulated, and busy, in some."""

FINISH: Final = 60.0
"""Seconds for GET_VRING_BASE: the back-end finishes its requests first, and a disk may take long for one. Also for all
that is asked at a negotiation, a lend or a recall together: whoever ends the VM waits so long, and no longer for a
back-end that answers each request at the last moment."""

VERSION_1: Final = 32
BASE_SIZE: Final = 8


@attrs.frozen
class Vring:
    """A queue as a back-end gets it.

    Attributes:
        descriptors, driver, device: guest-physical addresses of its three parts.
        next: the entry to go on with.
        kick, call: descriptors. `call` -1: nobody is interrupted.
    """

    size: int
    descriptors: int
    driver: int
    device: int
    next: int
    kick: int
    call: int


class FrontEnd:
    """One connection.

    Attributes:
        features: what the back-end can, without `PROTOCOL_FEATURES`; after `negotiate`.
        queues: how many queues it has at most.

    Parameters:
        connection: a connected socket, which stays the caller's.
        name: of the back-end, for errors.
        answer, finish: seconds for an answer, and for the one that waits for requests.
    """

    def __init__(self, connection: socket.socket, name: str, *, answer: float = ANSWER, finish: float = FINISH) -> None:
        self.features, self.queues = 0, 1
        self._socket, self._name = connection, name
        self._answer, self._finish = answer, finish
        self._protocol = Protocol(0)
        self._told_memory = False
        self._until = math.inf  # when all that is asked now must be answered

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A block in which all that is asked has the time of `finish` together."""
        self._until = time.monotonic() + self._finish
        try:
            yield
        finally:
            self._until = math.inf

    def _deadline(self, seconds: float) -> float:
        return min(time.monotonic() + seconds, self._until)

    # ---- what is asked

    def negotiate(self) -> None:
        """Find out what the back-end can.

        Raises:
            VhostUserError: it lacks what this front-end needs, or is no back-end.
        """
        with self._together():
            self._negotiate()

    def _negotiate(self) -> None:
        self._tell(Request.SET_OWNER, acknowledged=False)
        features = self._ask_number(Request.GET_FEATURES)
        if not features >> VERSION_1 & 1 or not features >> PROTOCOL_FEATURES & 1:
            raise self._error(f"its features are {features:#x}: VIRTIO_F_VERSION_1 and protocol features are needed")
        self.features = features & ~(1 << PROTOCOL_FEATURES)
        offered = self._ask_number(Request.GET_PROTOCOL_FEATURES)
        needed = Protocol.REPLY_ACK | Protocol.CONFIG
        if missing := needed & ~Protocol(offered & ~(~0 << 17)):
            names = ", ".join(str(feature.name) for feature in missing)
            raise self._error(f"it lacks the protocol features {names}: use a back-end that has them")
        self._protocol = Protocol(offered & (needed | Protocol.MQ | Protocol.STATUS))
        self._tell(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", self._protocol), acknowledged=False)
        if Protocol.MQ in self._protocol:
            self.queues = self._ask_number(Request.GET_QUEUE_NUM)

    def config(self, size: int) -> bytes:
        """The first `size` bytes of the device's configuration."""
        payload = self._ask(Request.GET_CONFIG, config(size), len(config(size)))
        try:
            return parse_config(payload, size)
        except VhostUserError as error:
            raise self._error(str(error)) from None

    def start(
        self, features: int, memory: int, regions: Sequence[RamRegion], vrings: Mapping[int, Vring], status: int
    ) -> None:
        """Have the back-end serve these queues.

        Parameters:
            features: what the driver has negotiated.
            memory: the descriptor of guest memory, of which `regions` are parts.
            status: the device's status.

        Raises:
            VhostUserError: it refuses, or does not answer.
        """
        with self._together():
            self._start(features, memory, regions, vrings, status)

    def _start(
        self, features: int, memory: int, regions: Sequence[RamRegion], vrings: Mapping[int, Vring], status: int
    ) -> None:
        self._tell(Request.SET_FEATURES, struct.pack("<Q", features | 1 << PROTOCOL_FEATURES))
        if not self._told_memory:
            self._tell(Request.SET_MEM_TABLE, table(regions), [memory] * len(regions))
            self._told_memory = True
        for index, one in vrings.items():
            self._tell(Request.SET_VRING_NUM, vring(index, one.size))
            self._tell(Request.SET_VRING_BASE, vring(index, one.next))
            self._tell(Request.SET_VRING_ADDR, vring_addresses(index, one.descriptors, one.driver, one.device))
            self.call(index, one.call)  # before the kick, by which some back-ends start
            self.kick(index, one.kick)
        for index in vrings:
            self._tell(Request.SET_VRING_ENABLE, vring(index, 1))
        self._tell_status(status)

    def call(self, index: int, call: int) -> None:
        """Have the back-end write to that eventfd after requests of the queue; -1: to none."""
        given = call >= 0
        self._tell(Request.SET_VRING_CALL, descriptor(index, given=given), [call] if given else [])

    def kick(self, index: int, kick: int) -> None:
        """Have the back-end listen to that eventfd from now on, and to no other one for this queue."""
        self._tell(Request.SET_VRING_KICK, descriptor(index, given=True), [kick])

    def settle(self) -> None:
        """What the back-end was at when this was called is done: of a back-end that does one thing after the other."""
        self._ask_number(Request.GET_FEATURES)

    def stop(self, indices: Sequence[int]) -> dict[int, int]:
        """Have the back-end stop serving these queues. Returns where each is."""
        with self._together():
            return self._stop(indices)

    def _stop(self, indices: Sequence[int]) -> dict[int, int]:
        found = {}
        for index in indices:
            payload = self._ask(Request.GET_VRING_BASE, vring(index, 0), BASE_SIZE, within=self._finish)
            try:
                found[index] = parse_vring(payload, index)
            except VhostUserError as error:
                raise self._error(str(error)) from None
        self._tell_status(0)
        return found

    def _tell_status(self, status: int) -> None:
        if Protocol.STATUS in self._protocol:
            self._tell(Request.SET_STATUS, struct.pack("<Q", status))

    # ---- how

    def _tell(
        self, kind: Request, payload: bytes = b"", descriptors: Sequence[int] = (), *, acknowledged: bool = True
    ) -> None:
        deadline = self._deadline(self._answer)
        self._send(kind, request(kind, payload, acknowledged=acknowledged), descriptors, deadline)
        if acknowledged and (result := parse_number(self._receive(kind, 8, deadline))):
            raise self._error(f"it refuses {kind.name} ({result:#x})")

    def _ask_number(self, kind: Request) -> int:
        return parse_number(self._ask(kind, b"", 8))

    def _ask(self, kind: Request, payload: bytes, size: int, *, within: float | None = None) -> bytes:
        deadline = self._deadline(self._answer if within is None else within)
        self._send(kind, request(kind, payload), (), deadline)
        return self._receive(kind, size, deadline)

    def _send(self, kind: Request, message: bytes, descriptors: Sequence[int], deadline: float) -> None:
        rights = struct.pack(f"{len(descriptors)}i", *descriptors)
        more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        sent = 0
        while sent < len(message):
            try:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                sent += self._socket.sendmsg([message[sent:]], more)
            except OSError as error:
                raise self._broken(kind, error) from error
            more = []

    def _receive(self, kind: Request, size: int, deadline: float) -> bytes:
        header = self._exactly(kind, HEADER.size, deadline)
        try:
            parse_header(header, kind, size)
        except VhostUserError as error:
            raise self._error(str(error)) from None
        return self._exactly(kind, size, deadline)

    def _exactly(self, kind: Request, size: int, deadline: float) -> bytes:
        """So many bytes. Descriptors that come with them are the kernel's to drop: there is no room for them."""
        found = b""
        while len(found) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._broken(kind, TimeoutError())
            try:
                self._socket.settimeout(left)
                more = self._socket.recv(size - len(found))
            except OSError as error:
                raise self._broken(kind, error) from error
            if not more:
                raise self._error(f"{kind.name}: it has closed the connection")
            found += more
        return found

    def _broken(self, kind: Request, error: OSError) -> VhostUserError:
        if isinstance(error, TimeoutError):
            return self._error(f"{kind.name}: it does not answer")
        return self._error(f"{kind.name}: {error.strerror or error}")

    def _error(self, what: str) -> VhostUserError:
        return VhostUserError(f"{self._name}: {what}")
