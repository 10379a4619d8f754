"""A memory balloon (native/virtio_balloon.c): which pages go back to the host is between the guest and the core."""

from __future__ import annotations

from typing import Any, Final

import attrs

from ...model.errors import ResourceLimit
from ...model.memory import PAGE
from ...model.virtio import Balloon
from ...native import ffi, lib
from .virtio import VirtioDevice

__all__ = ["BalloonDevice", "BalloonFigures"]

MOST_PAGES: Final = 0xFFFF_FFFF
BACKINGS: Final = {"anonymous": 0, "shared": int(lib.ORC_BALLOON_SHARED), "file": int(lib.ORC_BALLOON_FILE)}


@attrs.frozen
class BalloonFigures:
    """``struct orc_balloon_counters``, which says what each is. `statistic`: what the guest told, by its tag there."""

    driver: bool
    actual: int
    inflated: int
    deflated: int
    reported: int
    given_back: int
    failed: int
    updates: int
    updated: int
    statistic: dict[int, int]


PLAIN: Final = tuple(field for field in attrs.fields_dict(BalloonFigures) if field != "statistic")


class BalloonDevice(VirtioDevice[Balloon]):
    """native/virtio_balloon.c."""

    def _make(self) -> Any:
        spec, made = self.spec, ffi.new("orc_virtio **")
        flags = (
            BACKINGS[self.hooks.backing]
            | lib.ORC_BALLOON_REPORTING * spec.free_page_reporting
            | lib.ORC_BALLOON_DEFLATE_ON_OOM * spec.deflate_on_oom
            | lib.ORC_BALLOON_MUST_TELL_HOST * spec.must_tell_host
        )
        interval = round((spec.statistics_interval or 0) * 1e9)
        if result := lib.orc_virtio_balloon_new(self.hooks.guest, flags, interval, made):
            raise ResourceLimit(-result, "a balloon: its timer (timerfd)")
        return made[0]

    def take(self, size: int) -> None:
        """Ask the guest to do without so many bytes of its memory. Its driver does so in its own time."""
        lib.orc_virtio_balloon_set_target(self.handle, min(size // PAGE, MOST_PAGES))

    def figures(self) -> BalloonFigures:
        """What came of that so far. Any time, also after the VM's end."""
        raw = ffi.new("struct orc_balloon_counters *")
        lib.orc_virtio_balloon_look(self.handle, raw)
        told = {tag: int(raw.statistic[tag]) for tag in range(lib.ORC_BALLOON_STATISTICS) if raw.known >> tag & 1}
        return BalloonFigures(statistic=told, **{name: getattr(raw, name) for name in PLAIN})
