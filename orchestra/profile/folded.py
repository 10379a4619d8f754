"""Folded stacks, as flame graphs are made from: github.com/brendangregg/FlameGraph, speedscope.app, inferno."""

from __future__ import annotations

from collections.abc import Iterator

from .data import Instruction, Profile

__all__ = ["folded"]


def _frame(text: str) -> str:
    return " ".join(text.replace(";", ",").split())  # frames are told apart by semicolons, stacks by lines


def _space(instruction: Instruction) -> str:
    space = f"space {instruction.space:#x}" if instruction.space else "no paging"
    return f"nested guest, {space}" if instruction.nested else space


def _function(instruction: Instruction) -> str:
    name = instruction.symbol or f"{instruction.address & ~0xFFF:#x}.."
    return f"{name}_[k]" if instruction.cpl == 0 else name  # as stackcollapse-perf.pl marks what is the kernel's


def folded(profile: Profile) -> Iterator[str]:
    """A line for each instruction, ``vm;space;symbol;instruction weight``.

    Without a symbol the page stands in its place. A kernel's functions end in ``_[k]``, by which flame graphs colour.
    """
    for instruction in profile.instructions:
        what = f"{instruction.place}: {instruction.text}" if instruction.text else instruction.place
        frames = (profile.vm, _space(instruction), _function(instruction), what)
        yield f"{';'.join(map(_frame, frames))} {instruction.weight}"
