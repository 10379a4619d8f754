"""From samples to a profile: which instruction each was, what it reads, and where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from . import disassembly
from .data import Instruction, Profile
from .samples import Place, Sum
from .symbols import Symbols

__all__ = ["make_profile"]


def _name(address: int, symbols: Iterable[Symbols]) -> tuple[str | None, int]:
    for table in symbols:
        found = table.find(address)
        if found is not None:
            return found
    return None, 0


def _instruction(place: Place, total: Sum, disassemble: bool) -> Instruction:
    found = None
    if disassemble and total.code:
        found = disassembly.find(total.code, total.before, place.mode, place.rip, place.where)
    wrap = 64 if place.mode in (0, 64) else 32
    return Instruction(
        address=(place.rip + (found.start if found else 0)) % (1 << wrap),
        mode=place.mode,
        cpl=place.cpl,
        space=place.space,
        samples=total.samples,
        weight=total.weight,
        share=0.0,
        error=total.error,
        exact=found.locks if found else place.where == "on",
        code=found.code if found else b"",
        text=found.text if found else None,
        nested=place.nested,
    )


def make_profile(
    vm: str,
    places: Mapping[Place, Sum],
    *,
    symbols: Iterable[Symbols] = (),
    bus_locks: int | None = None,
    unplaced: int = 0,
    every: int | None = None,
) -> Profile:
    """Parameters as `Profile`'s fields; `symbols`: the first that knows an address names it."""
    symbols = tuple(symbols)
    disassemble = disassembly.available()
    merged: dict[tuple[int, int, int, int, bool], Instruction] = {}
    for place, total in places.items():
        one = _instruction(place, total, disassemble)
        key = (one.address, one.mode, one.cpl, one.space, one.nested)
        same = merged.get(key)  # reported on it as well as behind it
        if same is not None:
            one = attrs.evolve(
                one if one.exact >= same.exact else same,
                samples=one.samples + same.samples,
                weight=one.weight + same.weight,
                error=one.error + same.error,
            )
        merged[key] = one
    weight = sum(one.weight for one in merged.values())
    instructions = []
    for one in sorted(merged.values(), key=lambda one: (-one.weight, one.address, one.space, one.cpl)):
        symbol, offset = (None, 0) if one.nested else _name(one.address, symbols)
        instructions.append(
            attrs.evolve(one, share=one.weight / weight if weight else 0.0, symbol=symbol, offset=offset)
        )
    return Profile(
        vm=vm,
        instructions=tuple(instructions),
        samples=sum(one.samples for one in instructions),
        weight=weight,
        bus_locks=bus_locks,
        unplaced=unplaced,
        every=every,
    )
