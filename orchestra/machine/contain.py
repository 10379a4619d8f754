"""Keeps an error in one part from stopping the work on the other parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["contained"]

log: Final = logging.getLogger("orchestra")


@contextmanager
def contained(what: str, problems: list[str] | None = None) -> Iterator[None]:
    """An exception within the block is logged, added to `problems`, and not raised. Cancellation passes through.

    Parameters:
        what: the work of the block, for the message.
        problems: receives one line for each exception. None: the log alone has it.
    """
    try:
        yield
    except Exception as error:
        log.error("%s failed", what, exc_info=error)
        if problems is not None:
            problems.append(f"{what}: {type(error).__name__}: {error}")
