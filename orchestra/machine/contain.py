"""Keeps what goes wrong with one thing away from all others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["contained"]

log: Final = logging.getLogger("orchestra")


@contextmanager
def contained(what: str, problems: list[str] | None = None) -> Iterator[None]:
    """An exception within the block is logged, added to `problems`, and goes no further."""
    try:
        yield
    except Exception as error:
        log.error("%s failed", what, exc_info=error)
        if problems is not None:
            problems.append(f"{what}: {type(error).__name__}: {error}")
