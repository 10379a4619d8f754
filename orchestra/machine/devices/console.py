"""A guest's console: its output, a bounded buffer of the core that tasks can follow, and its input."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Final

import attrs
import trio

from ...model.checks import fail, number, whole
from ...model.errors import ConsoleTimeout, SpecError, StateError
from ...model.printable import printable
from ...native import ffi, lib
from .stream import Notify, Stream

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


class Console(Stream):
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

    Attributes:
        size: columns and rows of the terminal that shows it (`resize`); None: nobody has said.
    """

    def __init__(self, notify: Notify, name: str = "") -> None:
        super().__init__(lib.orc_console_new(), notify, name)
        self.size: tuple[int, int] | None = None
        self._found = 0  # where the last match of `wait_for` ended
        self._screens: list[Callable[[int, int], None]] = []

    @classmethod
    def from_state(cls, notify: Notify, state: ConsoleState, name: str = "") -> Console:
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
            self.changed()

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
        """The last lines, for an error: so many at most, long ones cut off, control characters as text. Any thread."""
        return "\n".join(printable(line[:WIDTH]) for line in self.text.splitlines()[-most:])

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
            else:  # there is more, but the guest overwrote it all while it was read
                await trio.lowlevel.checkpoint()

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
        return f"vm {self._vm!r}: " if self._vm else ""

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
        await self._type(data, self._refusal)

    def _refusal(self) -> str | None:
        if not self._closed and lib.orc_console_listened(self.handle):
            return None
        return (
            f"{self._who}nothing takes input now: it has ended, is between two runs, or has no device that "
            "takes any, such as Serial()"
        )

    # ---- its size

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest how large the terminal is that shows its console: its virtio consoles, also of later runs.

        A serial port has no size. There the guest has to ask the terminal, as ``resize`` of xterm does.

        Raises:
            SpecError: it is no number from 1 to 65535.
        """
        self.size = whole("columns", columns, 1, 0xFFFF), whole("rows", rows, 1, 0xFFFF)
        for shows in self._screens:
            shows(columns, rows)

    def add_screen(self, shows: Callable[[int, int], None]) -> None:
        """Call that with columns and rows: now, if there are any, and whenever they change. For devices. Any thread."""
        self._screens.append(shows)
        if self.size is not None:
            shows(*self.size)

    def remove_screen(self, shows: Callable[[int, int], None]) -> None:
        """Not any more."""
        if shows in self._screens:
            self._screens.remove(shows)
