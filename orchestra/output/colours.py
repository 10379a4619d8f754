"""The colours of every drawing, each with one meaning and one name, for light pages and for dark ones.

A drawing that follows its page is drawn in stand-ins (`Colour.stand_in`), which `figures.inline_svg` exchanges for
CSS variables (`Colour.variable`); `css` defines these. A drawing for a file of its own takes the light colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

__all__ = [
    "BUS_LOCKS",
    "CPU",
    "EVENT",
    "GRID",
    "GROUPS",
    "HOST",
    "INK",
    "LIMIT",
    "MUTED",
    "NOISY",
    "PAGE",
    "POLICIES",
    "QUIET",
    "TURN",
    "WITH",
    "WITHOUT",
    "Colour",
    "css",
    "variables",
]


@attrs.frozen
class Colour:
    """One meaning: its name in CSS, and what it looks like on a light and on a dark page."""

    name: str
    light: str
    dark: str

    @property
    def variable(self) -> str:
        return f"var(--{self.name})"

    @property
    def stand_in(self) -> str:
        """A colour of its own that nothing else is drawn in."""
        return f"#05{ALL.index(self):02x}05"


INK: Final = Colour("ink", "#1a1d21", "#e8eaed")
MUTED: Final = Colour("muted", "#5b6470", "#9aa4b0")
GRID: Final = Colour("grid", "#dfe3e8", "#333a42")

WITHOUT: Final = Colour("without", "#8a8f98", "#8a9099")
"""The world as it was, or as it would be without any policy."""
WITH: Final = Colour("with", "#1a1d21", "#e8eaed")
"""The world with the policies in question."""

GROUPS: Final = (
    Colour("group-1", "#1668b8", "#5fa8ee"),
    Colour("group-2", "#d4541c", "#ff8a52"),
    Colour("group-3", "#2a8c55", "#5cc98d"),
    Colour("group-4", "#8a4bc4", "#bd8cf0"),
    Colour("group-5", "#a8831a", "#d9b64a"),
    Colour("group-6", "#c13d78", "#f07fb0"),
)
"""Groups of VMs, by how much they ask for. Neither `WITH` nor `WITHOUT` is among them."""

POLICIES: Final[Mapping[str, Colour]] = {
    "nothing": WITHOUT,
    "QEMU's window": Colour("qemu", "#d4541c", "#ff8a52"),
    "token bucket": Colour("bucket", "#a8831a", "#d9b64a"),
    "max-min": Colour("max-min", "#1668b8", "#5fa8ee"),
    "adaptive": Colour("adaptive", "#c13d78", "#f07fb0"),
    "adaptive, absolute": Colour("absolute", "#8a4bc4", "#bd8cf0"),
    "ladder": Colour("ladder", "#2a8c55", "#5cc98d"),
}
"""Policies, where several are compared."""

ALL: Final = (INK, MUTED, GRID, WITH, *GROUPS, *POLICIES.values())
PAGE: Final = (INK, MUTED, GRID, WITHOUT, WITH, *GROUPS)
"""Of a simulation's report."""

NOISY: Final = ("#b3261e", "#e0701a", "#8a3ffc", "#c2185b")
"""Noisy VMs, one by one."""
QUIET: Final = "#1f6f8b"
"""The quiet VMs."""
BUS_LOCKS: Final = "#b3261e"
TURN: Final = "#e0701a"
"""What a VM waited because of a limit."""
CPU: Final = "#1f6f8b"
"""What it waited for a CPU."""
HOST: Final = "#555555"
LIMIT: Final = "black"
"""Limits, dotted, and means, dashed, of the demo and of one VM."""
EVENT: Final = "#bbbbbb"
"""Upright lines where something happened."""


def variables(colours: Iterable[Colour]) -> dict[str, str]:
    """For `figures.inline_svg`."""
    return {colour.stand_in: colour.variable for colour in colours}


def css(colours: Iterable[Colour], *, light: str = "", dark: str = "") -> str:
    """The rules that define the variables, for light and for dark pages; `light` and `dark`: more declarations."""
    colours = tuple(colours)
    day = " ".join([f"--{colour.name}: {colour.light};" for colour in colours] + [light] * bool(light))
    night = " ".join([f"--{colour.name}: {colour.dark};" for colour in colours] + [dark] * bool(dark))
    return f":root {{ {day} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {night} }} }}"
