"""Keeps an error in one part from stopping the work on the other parts, and a device from ending the program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["contained", "in_device"]

log: Final = logging.getLogger("orchestra")


@contextmanager
def contained(what: str, problems: list[str] | None = None) -> Iterator[None]:
    """An exception within the block is logged, added to `problems`, and not raised. Cancellation passes through.
    SystemExit does not: the block may call a device, which has no say in whether the program ends.

    Parameters:
        what: the work of the block, for the message.
        problems: receives one line for each exception. None: the log alone has it.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        log.error("%s failed", what, exc_info=error)
        if problems is not None:
            problems.append(f"{what}: {type(error).__name__}: {error}")


@contextmanager
def in_device() -> Iterator[None]:
    """Within the block a device's own code runs, which has no say in whether the program ends: its SystemExit becomes
    an error like any other."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"the device raised {error!r}") from error
