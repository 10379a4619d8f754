"""``orchestra simulate``: rehearses policies on a simulated fleet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ..model.errors import SpecError
from ..output.target import check_target

__all__ = ["audience", "simulate"]


class _Audience(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, label: str, done: int, of: int) -> None: ...


class _Lines:
    """Progress where there is no terminal: a line for each quarter of each world."""

    def __init__(self) -> None:
        self._shown: tuple[str, int] = ("", -1)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, label: str, done: int, of: int) -> None:
        quarter = 4 * done // max(of, 1)
        if (label, quarter) != self._shown:
            self._shown = (label, quarter)
            print(f"{label}: {25 * quarter} %", file=sys.stderr, flush=True)


def simulate(scenario: Path, *, seed: int | None, html: Path | None, as_json: bool) -> int:
    """Run it; the exit status.

    Raises:
        OrchestraError: it can't be done; the message says why, of a scenario all that is wrong with it.
    """
    draw: Callable[[Any], str] | None = None
    if html is not None:  # what is wrong with it is told now, not when all is done
        check_target("--html", html, ".html", ".htm")
        draw = _artist()
    if seed is not None and seed < 0:
        raise SpecError(f"--seed {seed}: must be 0 or more")
    from ..simulate import read_scenario, simulate
    from ..simulate.report import document, summary

    asked = read_scenario(scenario)
    with audience() as watching:
        result = simulate(asked, seed=seed, progress=watching.show)
    if html is not None and draw is not None:
        html.write_text(draw(result))
        print(f"orchestra: wrote {html}", file=sys.stderr)
    if as_json:
        json.dump(document(result), sys.stdout, allow_nan=False)
        print()
    else:
        print(*summary(result), sep="\n")
    return 1 if any(world.errors for world in result.worlds) else 0


def _artist() -> Callable[[Any], str]:
    from ..simulate.html import page

    return page


def audience() -> _Audience:
    """Whom to tell how far it is: a bar on a terminal, a line now and then elsewhere; on standard error."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from .render import Progress

        return Progress()
    return _Lines()
