"""From an asyncio task to a trio run and back: calls, and cancellation both ways.

asyncio cancels by an exception, thrown once into the task that waits; trio's cancellation holds for as long as its
scope lasts. If an asyncio task is cancelled, its trio call is cancelled, and the asyncio task waits until the call has
unwound, however often the task is cancelled again meanwhile. So no part of a call outlives its caller.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

import trio

from ..model.errors import StateError

__all__ = ["Bridge", "Call", "Closed", "Flag", "chained"]

T = TypeVar("T")
P = ParamSpec("P")

CLOSED: Final = "the last fleet of this trio run was closed before the call had ended"


class Closed(StateError):
    """The trio run ended without an error while a call was on."""


def _only_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def chained(cancelled: asyncio.CancelledError, error: BaseException | None) -> BaseException:
    """The exception to raise for both: the cancellation, with the error as its cause; but Ctrl-C or an exit as
    itself."""
    if error is None or isinstance(error, Closed):
        return cancelled
    if not isinstance(error, Exception | BaseExceptionGroup):
        return error
    cancelled.__cause__ = error
    return cancelled


class Flag:
    """An event that is set once, on the loop's thread. Cancellation does not end a wait for it."""

    __slots__ = ("_waiters", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiters: list[asyncio.Future[None]] = []

    def set(self) -> None:
        self.is_set = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def outlast(self, on_cancel: Callable[[], object] | None = None) -> asyncio.CancelledError | None:
        """Wait until the flag is set, even if cancelled. Returns the first cancellation, for the caller to raise.

        Parameters:
            on_cancel: called at each cancellation.
        """
        cancelled: asyncio.CancelledError | None = None
        while not self.is_set:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException as error:
                if on_cancel is not None:
                    on_cancel()
                if not isinstance(error, asyncio.CancelledError):
                    raise  # GeneratorExit: the coroutine is thrown away, and can't wait any more
                cancelled = cancelled or error
            finally:
                self._waiters.remove(waiter)
        return cancelled


class Call(Generic[T]):
    """One trio function called for an asyncio task. `run` is its trio task; everything else is the loop's side.

    Attributes:
        finished: set when no part of the call runs any more. Then one of these three has the result:
        value: what the function returned.
        error: what the function raised.
        unwound: the call was cancelled by `cancel`.
    """

    __slots__ = ("_args", "_bridge", "_function", "_on_finish", "_scope", "error", "finished", "unwound", "value")

    def __init__(
        self,
        bridge: Bridge,
        function: Callable[..., Awaitable[T]],
        args: tuple[Any, ...] = (),
        on_finish: Callable[[], object] | None = None,
    ) -> None:
        self.finished = Flag()
        self.value: T
        self.error: BaseException | None = None
        self.unwound = False
        self._bridge = bridge
        self._function = function
        self._args = args
        self._on_finish = on_finish
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        error: BaseException | None = None
        try:
            with self._scope:
                self.value = await self._function(*self._args)
        except BaseException as raised:
            if _only_cancelled(raised):
                return  # not cancelled by this scope, so the run is ending: `Bridge.over` knows why
            error = raised
        self._bridge.notify(self.finish, error, self._scope.cancelled_caught)

    def finish(self, error: BaseException | None, unwound: bool = False) -> None:
        self.error = error
        self.unwound = unwound
        self._bridge.calls.discard(self)
        self.finished.set()
        if self._on_finish is not None:
            self._on_finish()

    def cancel(self) -> None:
        """Ask the call to unwind; `finished` is set when it has."""
        self._bridge.post(self._scope.cancel)


class Bridge(abc.ABC):
    """A trio run as the asyncio tasks of one loop see it.

    The bridge counts its users: each fleet calls `acquire` and `release`. With the last release the run ends.

    Attributes:
        loop: the asyncio loop.
        calls: the calls that have not finished.
        ending: the last user has left; a call from now on gets a trio run of its own.
        ended: set when the run is over and nothing of it is left.
        wrappers: the wrappers in use, by the object that they wrap, so that one object has one wrapper.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.calls: set[Call[Any]] = set()
        self.ending = False
        self.ended = Flag()
        self.wrappers: WeakValueDictionary[object, Any] = WeakValueDictionary()
        self._users = 0
        self._stop = trio.Event()
        self._failure: BaseException | None = None

    # ---- what the two kinds do in their own way

    @classmethod
    @abc.abstractmethod
    async def open(cls) -> Self:
        """A running bridge, acquired for the caller. If this call is cancelled, the bridge is released."""

    @abc.abstractmethod
    def start(self, call: Call[Any]) -> None:
        """Run a call as a trio task, in a copy of the caller's context. Not while `ending`."""

    @abc.abstractmethod
    def post(self, function: Callable[[], object]) -> None:
        """Run a function soon in the trio run. Nothing happens if the run has ended."""

    @abc.abstractmethod
    def notify(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a function on the loop's thread. Called from the trio run."""

    @abc.abstractmethod
    def sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that does not wait, on the thread that owns the fleet's objects, and return its result."""

    # ---- life

    def acquire(self) -> None:
        self._users += 1

    async def release(self) -> None:
        """Leave the run. The last user ends it, and waits until it is over, even if cancelled meanwhile."""
        self._users -= 1
        if self._users:
            return
        self.ending = True
        self.post(self._stop.set)
        cancelled = await self.ended.outlast()
        failure, self._failure = self._failure, None
        if cancelled is not None:
            raise chained(cancelled, failure)
        if failure is not None:
            raise failure

    def over(self, failure: BaseException | None) -> None:
        """The run has ended. `failure`: why it ended by itself; every call that waits then gets that error."""
        self.ending = True
        self._failure = failure
        for call in list(self.calls):
            call.finish(failure or Closed(CLOSED))
            self._failure = None  # a call raises the failure, and once is enough
        self.ended.set()

    # ---- calls

    def begin(self, call: Call[Any]) -> None:
        self.calls.add(call)
        self.start(call)

    async def call(
        self,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        keep: Callable[[T], object] | None = None,
        undo: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        """Await a trio function.

        If this call is cancelled, the trio function is cancelled and waited for. Then CancelledError is raised in any
        case: a task that got a result instead would go on, and would not be cancelled again. An error of the function
        is the cause of the CancelledError.

        Parameters:
            keep: called with the result, even if the caller does not get it.
            undo: awaited in the trio run with the result, if the caller does not get it.
        """
        if self.ending:  # a closed fleet can still be asked how it ended
            another = await self.open()
            try:
                return await another.call(function, *args, keep=keep, undo=undo)
            finally:
                await another.release()
        call = Call(self, function, args)
        self.begin(call)
        cancelled = await call.finished.outlast(call.cancel)
        if call.error is not None:
            try:
                raise call.error if cancelled is None else chained(cancelled, call.error)
            finally:
                del call  # otherwise the error's traceback would be part of a reference cycle
        if call.unwound and cancelled is not None:
            raise cancelled
        if keep is not None:
            keep(call.value)
        if cancelled is not None:
            if undo is not None and not self.ending:
                back: Call[object] = Call(self, undo, (call.value,))
                self.begin(back)
                await back.finished.outlast()
            raise cancelled
        return call.value

    async def iterate(self, function: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """Iterate over an async generator of trio's."""
        source = function()
        try:
            while True:
                try:
                    item = await self.call(source.__anext__)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            await self.call(source.aclose)
