"""Times as people type and read them. Inside they are nanoseconds since the epoch, as in the journal."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

__all__ = ["day_and_time", "duration", "parse_time", "time_of_day"]

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def parse_time(text: str, now: datetime | None = None) -> int:
    """A time: "14:05", "yesterday 14:05", "tuesday", "2026-10-13 14:05:06", ISO 8601, "now", or how long ago: "90s",
    "2h30m", "3 d ago".

    Raises:
        ValueError: it is none.
    """
    now = (now or datetime.now()).astimezone()
    said = " ".join(text.lower().split())
    try:
        if said == "now":
            found = now
        elif ago := re.fullmatch(r"-?((?:\d+(?:\.\d+)? ?[smhdw] ?)+)(?: ?ago)?", said):
            parts = re.findall(r"(\d+(?:\.\d+)?) ?([smhdw])", ago[1])
            found = now - timedelta(seconds=sum(float(number) * UNITS[unit] for number, unit in parts))
        else:
            found = _clock(said, now)
        return int(found.timestamp()) * 1_000_000_000 + found.microsecond * 1000
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is not a time such as 14:05, 'yesterday 14:05', '2026-10-13 14:05:06', or 2h for two hours ago"
        ) from None


def _clock(said: str, now: datetime) -> datetime:
    day, _, clock = said.partition(" ")
    if day in ("today", "yesterday", *DAYS):
        back = {"today": 0, "yesterday": 1}.get(day)
        if back is None:  # the last one, not today's
            back = (now.weekday() - DAYS.index(day) - 1) % 7 + 1
        date = (now - timedelta(days=back)).date()
        found = datetime.fromisoformat(f"{date}T{clock or '00:00'}")
    elif re.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?", said):
        found = datetime.fromisoformat(f"{now.date()}T{said.zfill(5) if said.count(':') == 1 else said}")
        if found.astimezone() > now:  # of yesterday: the journal knows nothing of what is to come
            found -= timedelta(days=1)
    else:
        found = datetime.fromisoformat(said.upper().replace(" ", "T", 1))
    return found.astimezone() if found.tzinfo is None else found


def _local(time: int) -> datetime:
    return datetime.fromtimestamp(time // 1_000_000_000).astimezone()


def time_of_day(time: int, near: int | None = None) -> str:
    """14:05:06; with the day if that is not the one of `near`."""
    found = _local(time)
    if near is not None and found.date() != _local(near).date():
        return day_and_time(time)
    return f"{found:%H:%M:%S}"


def day_and_time(time: int) -> str:
    """2026-10-13 14:05:06."""
    return f"{_local(time):%Y-%m-%d %H:%M:%S}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    minutes = round(seconds / 60)
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60} min".replace(" 0 min", "")
    return f"{minutes // 1440} d {minutes % 1440 // 60} h".replace(" 0 h", "")
