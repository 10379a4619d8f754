"""What goes wrong within a block is logged, kept as a reason, and goes no further."""

from __future__ import annotations

import pytest

from orchestra.machine.contain import contained, in_device


def test_an_exception_is_logged_and_a_reason(caplog):
    problems: list[str] = []
    for what in ("first", "second"):
        with contained(what, problems):
            raise ZeroDivisionError(f"in the {what}")
    with contained("third", problems):
        pass
    assert problems == ["first: ZeroDivisionError: in the first", "second: ZeroDivisionError: in the second"]
    assert caplog.messages == ["first failed", "second failed"]


def test_nobody_needs_the_reasons(caplog):
    with contained("it"):
        raise ZeroDivisionError
    assert caplog.messages == ["it failed"]


def test_what_is_no_exception_of_the_programs_goes_on():
    with pytest.raises(KeyboardInterrupt), contained("it"):
        raise KeyboardInterrupt


def test_a_device_that_exits_ends_neither_the_program_nor_the_work_on_the_others():
    problems: list[str] = []
    with contained("its end", problems):
        raise SystemExit("bye")
    assert problems == ["its end: SystemExit: bye"]
    with pytest.raises(RuntimeError, match="the device raised SystemExit"), in_device():
        raise SystemExit("bye")
