"""``orchestra demo``: tells the story to whoever is there, a terminal, a pipe or a script."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from ..backend import Backend, choose
from ..backend.detection import Asked, look
from ..backend.scripted import ScriptedBackend
from ..demo.account import Result, document
from ..demo.plain import Plain
from ..demo.story import Plan, Story
from ..model.errors import BusLockUnsupported
from ..output.target import check_target
from .interrupts import until_interrupted

__all__ = ["demo"]

VMS_PER_CPU = 3
"""Where nothing but CPU time is taken from the quiet VMs, so many share a CPU, as on a host that is full."""


def demo(plan: Plan, *, as_json: bool, plain: bool, plot: Path | None) -> int:
    """Run it; the exit status.

    Raises:
        OrchestraError: it can't be done; the message says why.
    """
    draw: Callable[[Result, Path], None] | None = None
    if plot is not None:  # what is wrong with it is told now, not after the last act
        draw = _artist()
        check_target("--plot", plot, ".svg")
    with _staged(plan) as staged:
        audience: Any = Plain(sys.stderr) if as_json else Plain(sys.stdout)
        if not (as_json or plain) and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            from .render import LiveTable

            audience = LiveTable()
        story = Story(staged, audience)
        with audience:
            number = trio.run(until_interrupted, story.play)
            result = story.result
            if result is not None:
                audience.ending(result)
    if as_json and result is not None:
        json.dump(document(result), sys.stdout, allow_nan=False)
        print()
    if draw and plot and result is not None and result.samples:
        draw(result, plot)
        print(f"orchestra: wrote {plot}", file=sys.stderr)
    if number:
        return 128 + number
    return 0 if result is not None and result.complete else 1


@contextmanager
def _staged(plan: Plan) -> Iterator[Plan]:
    """The plan with its backend open, and what follows from which one that is."""
    backend, advice = _opened(plan.backend)
    try:
        seen = backend.bus_lock_detection() is not None
        if backend.name == "kvm" and not seen and not advice:
            advice = "`--backend emulated` tells it with real split locks."
        cpus: int | None = None if backend.name == "scripted" else len(os.sched_getaffinity(0))
        if cpus is not None and (backend.name == "emulated" or not seen):
            cpus = min(max(plan.vms // VMS_PER_CPU, 1), cpus)
        yield attrs.evolve(plan, backend=backend, advice=advice, cpus=cpus)
    finally:
        backend.close()


def _opened(backend: str | Backend) -> tuple[Backend, str]:
    """The backend, and what would make the demonstration better."""
    if backend == "scripted":
        from ..demo.scripts import scripts

        return ScriptedBackend(scripts), ""
    try:
        return choose(backend, Asked("the demo")), ""
    except BusLockUnsupported:  # only "auto" asks whether they are seen: exits tell the same story
        unicorn = next(found for found in look() if found.name == "emulated")
        return choose(backend), f"With real split locks: {unicorn.remedy}, then once more."


def _artist() -> Callable[[Result, Path], None]:
    from ..demo.plot import draw

    return draw
