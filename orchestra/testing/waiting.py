"""Waits for what a test expects, and returns at the moment when it becomes true; virtual time without pytest-trio."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import trio
import trio.testing

from ..machine.vm import Vm
from ..model.actions import State

__all__ = ["run", "wait_state", "wait_until"]

T = TypeVar("T")

TICK: Final = 0.005  # seconds


def run(async_fn: Callable[..., Awaitable[T]], *args: object) -> T:
    """As ``trio.run``, in virtual time: whenever all tasks wait, the clock jumps to the next deadline.

    For tests without pytest-trio. Only with the scripted backend: real guests take real time.
    """
    return trio.run(async_fn, *args, clock=trio.testing.MockClock(autojump_threshold=0))


class _Watch(trio.abc.Instrument):
    """Checks the predicate each time trio has run every task that could run, and is about to wait or to jump."""

    def __init__(self, predicate: Callable[[], object]) -> None:
        self.seen = trio.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self._predicate = predicate
        self._token = trio.lowlevel.current_trio_token()

    def look(self) -> bool:
        try:
            self.value = self._predicate()
        except BaseException as error:  # pytest.fail() among them; trio would only log it
            self.error = error
            return True
        return bool(self.value)

    def before_io_wait(self, timeout: float) -> None:
        if not self.seen.is_set() and self.look():
            # set() alone is not enough: trio has already decided how long to wait.
            self._token.run_sync_soon(self.seen.set)


async def wait_until(predicate: Callable[[], T], *, within: float = 60.0) -> T:
    """Wait until the predicate is true, and return what it returned.

    In virtual time the predicate is called whenever something has happened, so this returns at the moment when the
    predicate becomes true. In real time it is also called every 5 ms, as vCPU threads change figures without waking
    any task.

    Parameters:
        predicate: takes nothing, and does nothing but look; it is called often, outside of any task. What it raises is
            raised here.
        within: seconds on trio's clock.

    Raises:
        AssertionError: the predicate was not true in that time.
    """
    watch = _Watch(predicate)
    if watch.look():
        await trio.lowlevel.checkpoint()
    else:
        virtual = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
        trio.lowlevel.add_instrument(watch)
        try:
            with trio.move_on_after(within):
                while not watch.seen.is_set():
                    with trio.move_on_after(math.inf if virtual else TICK):
                        await watch.seen.wait()
        finally:
            trio.lowlevel.remove_instrument(watch)
        if not watch.seen.is_set() and not watch.look():
            raise AssertionError(f"not true within {within:g} s: {getattr(predicate, '__qualname__', predicate)}")
    if watch.error is not None:
        raise watch.error
    value: T = watch.value
    return value


async def wait_state(vm: Vm, state: State | str, *, within: float = 60.0) -> None:
    """Wait until the VM is in that state ("running", "waiting", "paused", "stopped", "failed").

    Parameters:
        vm: as `Fleet.launch` returned it.
        state: a `State` or its value.
        within: seconds on trio's clock.

    Raises:
        AssertionError: the VM was not in that state in time, or has ended in another; the message says how.
    """
    wanted = State(state)
    try:
        await wait_until(lambda: vm.state is wanted or vm.outcome is not None, within=within)
    except AssertionError:
        raise AssertionError(f"vm {vm.name!r} is {vm.state}, and not {wanted} within {within:g} s") from None
    if vm.state is not wanted:
        raise AssertionError(f"vm {vm.name!r} is {vm.state}, and will not be {wanted}: {vm.outcome}")
