"""A guest's output: a bounded buffer of the core that tasks can follow."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import attrs
import trio

from ...model.checks import whole
from ...model.errors import SpecError
from ...native import ffi, lib

__all__ = ["Console", "ConsoleState"]

KEPT: Final = int(lib.ORC_CONSOLE_KEPT)


@attrs.frozen
class ConsoleState:
    """The state of a console. `total`: bytes ever written. `kept`: the last of them, all or as many as are kept."""

    total: int = 0
    kept: bytes = attrs.field(default=b"", repr=lambda kept: f"<{len(kept)} bytes>")

    def __attrs_post_init__(self) -> None:
        whole("total", self.total, 0, (1 << 64) - 1)
        if len(self.kept) != min(self.total, KEPT):
            raise SpecError(
                f"kept: of {self.total} bytes it has the last {min(self.total, KEPT)}, not {len(self.kept)}"
            )


class Console:
    """What the guest wrote to its debug console and serial port.

    Bytes come from vCPU threads, without Python (`handle` is the core's ``orc_console *``), or from `write`. The last
    64 KiB are kept. A task that follows is woken once for all output until it looks again. The fleet's drain task calls
    `wake` for output of vCPUs; `write` has it called by `notify`.

    Parameters:
        notify: runs a function soon on the fleet's thread. Any thread.
    """

    def __init__(self, notify: Callable[[Callable[[], None]], None]) -> None:
        self.handle: Any = ffi.gc(lib.orc_console_new(), lib.orc_console_free)
        if self.handle == ffi.NULL:
            raise MemoryError("orc_console_new")
        self._notify = notify
        self._closed = False
        self._changed = trio.Event()

    @classmethod
    def from_state(cls, notify: Callable[[Callable[[], None]], None], state: ConsoleState) -> Console:
        """A console that has had that output.

        Raises:
            MemoryError: the host has no memory left.
        """
        console = cls(notify)
        if not lib.orc_console_load(console.handle, state.total, ffi.from_buffer(state.kept), len(state.kept)):
            raise MemoryError("orc_console_load")
        return console

    def state(self) -> ConsoleState:
        """The output so far. Any thread."""
        kept, total = self._since(max(self.total - KEPT, 0))
        return ConsoleState(total, kept)

    def write(self, data: bytes) -> None:
        """Add output. Any thread."""
        if lib.orc_console_put(self.handle, ffi.from_buffer(data), len(data)):
            self._notify(self.wake)

    def wake(self) -> None:
        """Wake the tasks that follow: there is new output. Fleet's thread."""
        self._changed.set()
        self._changed = trio.Event()

    def _since(self, position: int) -> tuple[bytes, int]:
        """The kept output from a position on, and the position after it."""
        room = min(self.total - position, KEPT)
        if not room:
            return b"", position
        at, data = ffi.new("uint64_t *", position), ffi.new("uint8_t[]", room)
        size = lib.orc_console_copy(self.handle, at, data, room)
        return bytes(ffi.buffer(data, size)), int(at[0])

    @property
    def output(self) -> bytes:
        """The last 64 KiB of output."""
        return self._since(max(self.total - KEPT, 0))[0]

    @property
    def text(self) -> str:
        """`output` as text; bytes that are not UTF-8 are replaced."""
        return self.output.decode(errors="replace")

    @property
    def total(self) -> int:
        """How many bytes were ever written."""
        return int(lib.orc_console_total(self.handle))

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """All output from the kept beginning on, as it comes, until the VM has ended.

        A follower that falls behind by more than is kept loses the oldest output.
        """
        position = 0
        while True:
            changed, closed = self._changed, self._closed
            chunk, position = self._since(position)
            if chunk:
                await trio.lowlevel.checkpoint()  # a guest that never stops talking must not keep the loop to itself
                yield chunk
            elif closed:
                return
            elif lib.orc_console_want(self.handle, position):
                await changed.wait()

    def close(self) -> None:
        """No more output will come. Fleet's thread."""
        self._closed = True
        self.wake()
