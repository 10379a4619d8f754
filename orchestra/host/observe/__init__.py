"""Signals of a host and of the threads that run guests. A missing signal is absent, with the reason, and never zero."""

from __future__ import annotations

from .metrics import HostReading, HostSignals
from .pressure import Trigger
from .threads import ThreadTimes

__all__ = ["HostReading", "HostSignals", "ThreadTimes", "Trigger"]
