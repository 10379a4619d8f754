"""What guests do on the emulated backend: every lock counted, code that changes, faults, ports, memory nobody backs."""

from __future__ import annotations

import pytest

from orchestra import Halted
from orchestra.backend.emulated.machine import EmulatedBackend
from played import Detection, play
from x86 import Mode, lock_program

pytestmark = pytest.mark.emulated

MODES: list[Mode] = [16, 32, 64]


@pytest.fixture(scope="module")
def emulated() -> EmulatedBackend:
    return EmulatedBackend()


# ---- locks


@pytest.mark.parametrize("detection", ["fault-like", "trap-like"])
@pytest.mark.parametrize("mode", MODES)
def test_each_lockable_instruction_in_each_form_of_address_is_counted_once_if_split_and_never_if_not(
    emulated: EmulatedBackend, mode: Mode, detection: Detection
) -> None:
    code, table = lock_program(mode)
    played = play(emulated, code, mode, detection=detection)
    assert played.outcome == Halted()
    where = {lock.at if detection == "fault-like" else lock.behind: lock.what for lock in table}
    expected = [lock.at if detection == "fault-like" else lock.behind for lock in table if lock.split]
    assert not {where.get(rip or 0, rip) for rip in set(played.locks) ^ set(expected)}
    assert played.locks == expected
    assert played.counters.bus_locks == len(expected) > 300
