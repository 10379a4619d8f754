"""Random CPU templates and CPUID tables for property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

import orchestra as orc
from orchestra.backend.kvm.cpuid import CpuidEntry
from orchestra.model.cpufeatures import FIXED, PLACES, needed_by

NAMES = sorted(set(PLACES) - set(FIXED))


@st.composite
def cpu_templates(draw: Any, bases: Any = None) -> orc.CpuTemplate:
    """A template that is accepted: what its features need is among them, and hidden nowhere."""
    base = draw(bases or st.sampled_from(sorted(orc.CPU_TEMPLATES)))
    some = st.sets(st.sampled_from(NAMES), max_size=12)
    wanted = draw(some)
    features = wanted | {need for name in wanted for need in needed_by(name)}
    hidden = draw(some) - features
    optional = draw(some) - features - hidden
    return orc.CpuTemplate(
        name="random",
        base=base,
        features=tuple(sorted(features)),
        optional=tuple(sorted(optional)),
        hidden=tuple(sorted(hidden)),
        others=draw(st.sampled_from([None, "host", "hidden"])),
    )


WORDS = st.integers(0, (1 << 32) - 1)
LEAVES = [0, 1, 2, 4, 6, 7, 0xA, 0xB, 0xD, 0x12, 0x14, 0x1D, 0x1F, 0x40000000, 0x40000001]
LEAVES += [0x80000001, 0x80000007, 0x80000008, 0x8000000A, 0x8000001D, 0x8000001E, 0x80000021, 0x80000026]


def tables() -> st.SearchStrategy[list[CpuidEntry]]:
    """What a KVM may support: each leaf and subleaf once."""
    entry = st.builds(
        CpuidEntry,
        function=st.sampled_from(LEAVES),
        index=st.integers(0, 3),
        flags=st.just(1),
        eax=WORDS,
        ebx=WORDS,
        ecx=WORDS,
        edx=WORDS,
    )
    return st.lists(entry, max_size=30, unique_by=lambda one: (one.function, one.index))
