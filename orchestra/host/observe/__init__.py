"""What can be seen of a host and of the threads that run guests. What can't is absent, with the reason; never zero."""

from __future__ import annotations

from .metrics import HostReading, HostSignals
from .pressure import Trigger
from .threads import ThreadTimes

__all__ = ["HostReading", "HostSignals", "ThreadTimes", "Trigger"]
