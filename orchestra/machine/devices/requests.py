"""Accesses that a task answers: a script claims a range and answers each access from async code."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import trio

from ...model.errors import SpecError, StateError

__all__ = ["Bell", "Request", "Requests"]


class Bell(Protocol):
    """Where a reader may wait for questions itself, in the place of the task that delivers them (`machine.inbox`)."""

    def may_stand_in(self) -> bool: ...

    async def stand_in(self) -> None: ...

    def recall(self) -> None: ...


def _is_bytes(data: object, size: int) -> bool:
    return isinstance(data, bytes | bytearray | memoryview) and memoryview(data).nbytes == size


class Request:
    """One access of a guest, held until it is answered.

    Attributes:
        vcpu: number of the vCPU, which waits outside the guest meanwhile.
        address: the port, or the guest-physical address.
        size: 1, 2, 4 or 8 bytes.
        write: the guest writes.
        data: what it writes; empty for a read.
    """

    __slots__ = (
        "_among",
        "_settle",
        "address",
        "answer_bytes",
        "answered",
        "data",
        "returned",
        "size",
        "vcpu",
        "write",
    )

    def __init__(
        self, vcpu: int, address: int, size: int, write: bool, data: bytes, settle: Callable[[Request], object]
    ) -> None:
        """`settle` is called once: when it is `answered`, or `returned`."""
        self.vcpu = vcpu
        self.address = address
        self.size = size
        self.write = write
        self.data = data
        self.answered = False
        self.returned = False  # nobody will answer this request: it goes back to the bus
        self.answer_bytes = b""
        self._among: set[Request] | None = None  # the unanswered requests
        self._settle = settle

    def answer(self, data: bytes | None = None) -> None:
        """Let the guest go on. The first answer counts.

        Parameters:
            data: for a read exactly `size` bytes, little-endian; for a write nothing.

        Raises:
            SpecError: too many or too few bytes, or bytes for a write.
            StateError: the request was answered already. (A VM that has ended is no error: nobody needs the answer.)
        """
        if self.write:
            if data is not None:
                raise SpecError(f"data={data!r}: a write is answered without data")
        elif not (type(data) is bytes and len(data) == self.size) and not _is_bytes(data, self.size):
            raise SpecError(f"data={data!r}: this read wants exactly {self.size} bytes")
        if self.answered:
            raise StateError(f"the {'write' if self.write else 'read'} at {self.address:#x} is answered already")
        self.answer_bytes = b"" if data is None else bytes(data)
        self.answered = True
        if self._among is not None:
            self._among.discard(self)
        if not self.returned:
            self._settle(self)

    def put_among(self, outstanding: set[Request]) -> None:
        """Join this set; the request leaves the set when it is answered."""
        self._among = outstanding
        outstanding.add(self)

    def give_back(self) -> None:
        if not self.answered and not self.returned:
            self.returned = True
            self._settle(self)

    def __repr__(self) -> str:
        what = f"write {self.data!r}" if self.write else "read"
        return f"<Request {what} of {self.size} bytes at {self.address:#x} by vCPU {self.vcpu}>"


class Requests:
    """The claimed range's accesses, in order: ``async for request in requests``. One task at a time.

    The queue can't overflow: each vCPU has at most one access outstanding. All methods: fleet's thread.
    """

    def __init__(self, bell: Bell | None = None) -> None:
        self._bell = bell
        self._queue: deque[Request] = deque()
        self._outstanding: set[Request] = set()
        self._arrived: Any = None  # the task that waits to be rescheduled
        self._stands_in = False  # a task waits at the bell
        self._closed = False
        self._ended = False

    def deliver(self, request: Request) -> None:
        """Queue a request. The vCPU waits until the request is `answered` or `returned`."""
        if self._closed:
            request.give_back()
            return
        request.put_among(self._outstanding)
        self._queue.append(request)
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._arrived is not None:
            task, self._arrived = self._arrived, None
            trio.lowlevel.reschedule(task)
        elif self._stands_in and self._bell is not None:
            self._bell.recall()

    def __aiter__(self) -> Requests:
        return self

    async def __anext__(self) -> Request:
        """The next access. Ends when the VM has ended. A checkpoint; cancelling it loses no access."""
        if self._queue:
            await trio.lowlevel.checkpoint_if_cancelled()
            request = self._queue.popleft()
            await trio.lowlevel.cancel_shielded_checkpoint()
            return request
        stood_in = False
        while not self._queue:
            if self._ended:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise StopAsyncIteration
            # The queue may be empty again, if another task took the request.
            if self._arrived is not None or self._stands_in:
                raise trio.BusyResourceError("another task is waiting for these requests")
            # Only once. A reader that was woken by a question to another one leaves its place to that one.
            if not stood_in and self._bell is not None and self._bell.may_stand_in():
                stood_in = self._stands_in = True
                try:
                    await self._bell.stand_in()
                finally:
                    self._stands_in = False
                continue
            self._arrived = trio.lowlevel.current_task()

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._arrived = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        return self._queue.popleft()

    def drop(self, request: Request) -> None:
        """The guest waits for this access no more: no task is handed it. A task that has it may still answer, which
        changes nothing."""
        request.returned = True
        self._outstanding.discard(request)
        if request in self._queue:
            self._queue.remove(request)

    def end(self) -> None:
        """The VM has ended: readers stop after what is queued."""
        self._ended = True
        self._wake_reader()

    def close(self) -> None:
        """Nobody answers any more: give the outstanding requests back to the bus."""
        self._closed = True
        self._ended = True
        while self._outstanding:
            self._outstanding.pop().give_back()
        self._queue.clear()
        self._wake_reader()
