"""From an asyncio task to a trio run and back: calls, and cancellation both ways.

asyncio's cancellation is an exception thrown once into whoever waits; trio's holds for as long as its scope lasts.
What is cancelled here is cancelled there, and the asyncio task then waits until it has unwound, however often it is
cancelled again meanwhile: nothing of a call is left running behind its caller.
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
    """The trio run ended under a call, in an orderly way."""


def _only_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def chained(cancelled: asyncio.CancelledError, error: BaseException | None) -> BaseException:
    """What to raise of both: the cancellation, which has an error as its cause. Ctrl-C and exits are no such errors."""
    if error is None or isinstance(error, Closed):
        return cancelled
    if not isinstance(error, Exception | BaseExceptionGroup):
        return error
    cancelled.__cause__ = error
    return cancelled


class Flag:
    """Set once, on the loop's thread, and waited for whatever happens meanwhile."""

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
        """Wait until it is set; cancelling this does not end it. The first cancellation, for the caller to raise.

        `on_cancel` is called at each of them.
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
        finished: set when nothing of it runs any more. Then one of these holds what came of it:
        value: what was returned.
        error: what was raised.
        unwound: it was cancelled by `cancel`.
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
                return  # not by our scope, so the run is ending: `Bridge.over` knows why
            error = raised
        self._bridge.tell(self.finish, error, self._scope.cancelled_caught)

    def finish(self, error: BaseException | None, unwound: bool = False) -> None:
        self.error = error
        self.unwound = unwound
        self._bridge.calls.discard(self)
        self.finished.set()
        if self._on_finish is not None:
            self._on_finish()

    def cancel(self) -> None:
        """Ask it to unwind; `finished` tells when it has."""
        self._bridge.post(self._scope.cancel)


class Bridge(abc.ABC):
    """A trio run as the asyncio tasks of one loop see it.

    It is counted: `acquire` and `release` by each fleet; with the last release the run ends.

    Attributes:
        loop: the asyncio loop.
        calls: those that have not finished.
        ending: its last user has left; what is called from now on is called on a run of its own.
        ended: set when the run is over and nothing of it is left.
        wrappers: those in use, by what they wrap, so that one thing is one object on this side too.
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
        """One that runs, taken into use; cancelled, it is given back."""

    @abc.abstractmethod
    def start(self, call: Call[Any]) -> None:
        """Run it as a trio task, in a copy of the context that this is called in. Not while `ending`."""

    @abc.abstractmethod
    def post(self, function: Callable[[], object]) -> None:
        """Run it in the trio run, soon. Nothing happens if that has ended."""

    @abc.abstractmethod
    def tell(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run it on the loop's thread, called from the trio run."""

    @abc.abstractmethod
    def sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that does not wait where the fleet's objects may be touched, and return what it does."""

    # ---- life

    def acquire(self) -> None:
        self._users += 1

    async def release(self) -> None:
        """The last user ends the run and waits until it is over, also if it is cancelled meanwhile."""
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
        """The run has ended. By itself it does so only by a failure: then whoever waits for it is told that."""
        self.ending = True
        self._failure = failure
        for call in list(self.calls):
            call.finish(failure or Closed(CLOSED))
            self._failure = None  # it comes out there
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

        Cancelled, the trio function is cancelled and waited for, and then CancelledError is raised, whatever came of
        it: a task that gets anything else goes on, and is not cancelled again. If it was an error, that is the cause.

        Parameters:
            keep: given what is returned, whether or not the caller still gets it.
            undo: awaited in the trio run with what is returned, if the caller does not get it.
        """
        if self.ending:  # what was closed can still be asked how it ended
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
                del call  # or the error's traceback would keep itself alive
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
        """An async generator of trio's."""
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
