"""A guest's console: its output, a bounded buffer of the core that tasks can follow, and its input."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import attrs
import trio

from ...model.checks import fail, number, whole
from ...model.errors import ConsoleTimeout, SpecError, StateError
from ...native import ffi, lib

__all__ = ["Console", "ConsoleState"]

KEPT: Final = int(lib.ORC_CONSOLE_KEPT)
WAITING: Final = int(lib.ORC_CONSOLE_WAITING)
LINES: Final = 12
"""Of the output, which an error shows: enough to see where a guest stands."""
WIDTH: Final = 200
"""Characters of such a line. A kernel's lines are shorter, and a guest that writes none must not fill logs."""


@attrs.frozen
class ConsoleState:
    """The state of a console.

    Attributes:
        total: bytes of output ever written.
        kept: the last of them, all or as many as are kept.
        found: where the last match of `Console.wait_for` ended, of `total`: the next one is searched from there.
        typed: input that the guest has not taken yet.
    """

    total: int = 0
    kept: bytes = attrs.field(default=b"", repr=lambda kept: f"<{len(kept)} bytes>")
    found: int = 0
    typed: bytes = attrs.field(default=b"", repr=lambda typed: f"<{len(typed)} bytes>")

    def __attrs_post_init__(self) -> None:
        whole("total", self.total, 0, (1 << 64) - 1)
        whole("found", self.found, 0, self.total)
        if not isinstance(self.kept, bytes):
            raise fail("kept", self.kept, "must be bytes")
        if not isinstance(self.typed, bytes) or len(self.typed) > WAITING:
            raise fail("typed", self.typed, f"must be bytes, {WAITING} at most")
        if len(self.kept) != min(self.total, KEPT):
            raise SpecError(
                f"kept: of {self.total} bytes it has the last {min(self.total, KEPT)}, not {len(self.kept)}"
            )


class Console:
    """What the guest wrote to its serial port and consoles, and what you type for it.

        await vm.console.wait_for("login: ", timeout=60)
        await vm.console.write(b"root\\n")
        print(vm.console.log().decode())

    Output comes from vCPU threads, without Python (`handle` is the core's ``orc_console *``), or from `put`. The last
    64 KiB are kept. A task that follows is woken once for all output until it looks again. The fleet's drain task calls
    `wake` for output of vCPUs; `put` has it called by `notify`. Input goes to the first device of the spec that takes
    any; up to 4 KiB wait there until the guest reads them.

    Parameters:
        notify: runs a function soon on the fleet's thread. Any thread.
        name: the VM's, for messages.
    """

    def __init__(self, notify: Callable[[Callable[[], None]], None], name: str = "") -> None:
        self.handle: Any = ffi.gc(lib.orc_console_new(), lib.orc_console_free)
        if self.handle == ffi.NULL:
            raise MemoryError("orc_console_new")
        self._notify = notify
        self._name = name
        self._closed = False
        self._found = 0  # where the last match of `wait_for` ended
        self._changed = trio.Event()

    @classmethod
    def from_state(cls, notify: Callable[[Callable[[], None]], None], state: ConsoleState, name: str = "") -> Console:
        """A console that has had that output, and goes on there. `name`: the VM's, which need not be the same.

        Raises:
            MemoryError: the host has no memory left.
        """
        console = cls(notify, name)
        kept, typed = ffi.from_buffer(state.kept), ffi.from_buffer(state.typed)
        if not lib.orc_console_load(console.handle, state.total, kept, len(kept), typed, len(typed)):
            raise MemoryError("orc_console_load")
        console._found = state.found
        return console

    def state(self) -> ConsoleState:
        """The output so far, and the input that waits. While the VM is quiesced; any thread."""
        kept, total = self._since(max(self.total - KEPT, 0))
        waiting = ffi.new("uint8_t[]", WAITING)
        size = lib.orc_console_copy_typed(self.handle, waiting, WAITING)
        return ConsoleState(total, kept, self._found, bytes(ffi.buffer(waiting, size)))

    def put(self, data: bytes) -> None:
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

    def log(self) -> bytes:
        """The last 64 KiB of output. Any thread."""
        return self._since(max(self.total - KEPT, 0))[0]

    @property
    def text(self) -> str:
        """`log` as text; bytes that are not UTF-8 are replaced."""
        return self.log().decode(errors="replace")

    def last_lines(self, most: int = LINES) -> str:
        """The last lines, for an error: so many at most, long ones cut off. Any thread."""
        return "\n".join(line[:WIDTH] for line in self.text.splitlines()[-most:])

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

    async def wait_for(self, pattern: bytes | str, *, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (its error has the last lines)
        """Wait until the guest has written `pattern`. Output from before this call counts, from the last match on.

        Cancelling changes nothing: the next call looks at the same output.

        Parameters:
            pattern: as it is, not a regular expression.
            timeout: seconds; None: for as long as the VM lives.

        Returns:
            The output from the end of the last match up to the end of this match, as far as it is kept.

        Raises:
            ConsoleTimeout: it did not come in time. The message has the guest's last lines.
            StateError: the VM has ended without it. The message has them as well.
            SpecError: the pattern is empty.
        """
        wanted = pattern.encode() if isinstance(pattern, str) else bytes(pattern)
        if not wanted:
            raise SpecError(f"pattern={pattern!r}: must be at least one byte, of what the guest will write")
        if timeout is not None:
            number("timeout", timeout)
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            return await self._find(wanted)
        raise ConsoleTimeout(f"{self._who}{wanted!r} did not come within {timeout} s; {self._last_lines()}")

    async def _find(self, wanted: bytes) -> bytes:
        begin = searched = self._found
        while True:
            changed, closed = self._changed, self._closed
            chunk, end = self._since(searched)
            at = chunk.find(wanted)
            if at >= 0:
                stop = end - len(chunk) + at + len(wanted)
                kept, kept_end = self._since(begin)  # the guest writes on: the match itself may be overwritten by now
                size = len(kept) - (kept_end - stop)
                await trio.lowlevel.checkpoint()
                self._found = max(self._found, stop)
                return kept[:size] if size >= len(wanted) else wanted
            searched = max(searched, end - len(wanted) + 1)  # the rest of a match may still come
            if closed:
                await trio.lowlevel.checkpoint()
                raise StateError(f"{self._who}ended before {wanted!r} came; {self._last_lines()}")
            if lib.orc_console_want(self.handle, end):
                await changed.wait()
            else:  # a guest that never stops talking must not keep the loop to itself
                await trio.lowlevel.checkpoint()

    @property
    def _who(self) -> str:
        return f"vm {self._name!r}: " if self._name else ""

    def _last_lines(self) -> str:
        lines = self.last_lines()
        return f"its last lines are:\n{lines}" if lines else "it wrote nothing"

    async def write(self, data: bytes | str) -> None:
        """Type for the guest. Returns when all of it is on its way: up to 4 KiB wait until the guest reads them.

        If this is cancelled, a part of the data may be on its way.

        Raises:
            StateError: no device takes input: the VM has none, has ended, or is between two runs.
            MemoryError: the host has no memory for the input that waits.
        """
        left = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
        while True:
            changed = self._changed
            if self._closed or not lib.orc_console_listened(self.handle):
                await trio.lowlevel.checkpoint()
                raise StateError(
                    f"{self._who}nothing takes input now: it has ended, is between two runs, or has no device that "
                    "takes any, such as Serial()"
                )
            taken = lib.orc_console_type(self.handle, ffi.from_buffer(left), len(left))
            if taken < 0:  # nobody would ever say that there is room
                await trio.lowlevel.checkpoint()
                raise MemoryError(f"{self._who}no memory for what is typed")
            left = left[taken:]
            if not left:
                await trio.lowlevel.checkpoint()
                return
            await changed.wait()

    def close(self) -> None:
        """No more output will come. Fleet's thread."""
        self._closed = True
        self.wake()
