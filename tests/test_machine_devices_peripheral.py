"""What holds of every device with a spec: it survives any access, its state is all of it, a reset is power-on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import orchestra as orc
from alarm import Alarm, AlarmState
from orchestra.machine.devices.digest import DigestState
from orchestra.machine.devices.ports import Stateless
from orchestra.machine.devices.serial import UartState
from orchestra.model.codec import decode, encode
from orchestra.model.errors import StateError
from orchestra.testing import DeviceRig

SPECS = [orc.Serial(), orc.DebugConsole(), orc.ExitPort(), orc.Digest(), Alarm()]
EACH = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)

LISTS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # long lists, on machines that are busy

OFFSETS = st.sampled_from([0, 4, 8, 0x18]) | st.integers(0, 0x30) | st.integers(0, (1 << 52) - 1)
VALUES = st.integers(0, 0xFF) | st.integers(0, (1 << 64) - 1)
ACCESSES = st.lists(
    st.tuples(st.sampled_from(["read", "write", "ring", "time"]), OFFSETS, st.sampled_from([1, 2, 4, 8]), VALUES),
    max_size=40,
)


def play(rig: DeviceRig, accesses: Any) -> list[int]:
    """What the guest sees of it."""
    seen = []
    bells = len(rig.device.spec.wiring().doorbells)
    for what, offset, size, value in accesses:
        if what == "read":
            seen.append(rig.read(offset, size))
        elif what == "write":
            rig.write(offset, value & (1 << 8 * size) - 1, size)
        elif what == "time":
            rig.advance(value % 10**10)
        elif bells:
            rig.ring(offset % bells, 1 + value % 100)
    return seen


def interrupts(rig: DeviceRig) -> object:
    return rig.line.levels[-1:], [msi.where for msi in rig.msis]


@EACH
@LISTS
@given(accesses=ACCESSES)
def test_any_accesses_are_survived_and_what_is_read_fits_its_size(spec, accesses):
    with DeviceRig(spec) as rig:
        for what, offset, size, value in accesses:
            (seen,) = play(rig, [(what, offset, size, value)]) or [0]
            assert 0 <= seen < 1 << 8 * size


@EACH
@LISTS
@given(before=ACCESSES, after=ACCESSES)
def test_one_that_goes_on_from_a_state_that_was_data_in_between_does_what_the_first_does(spec, before, after):
    with DeviceRig(spec) as first:
        play(first, before)
        state = first.device.state()
        assert decode(type(state), encode(state)) == state
        with first.again() as second:
            assert second.device.state() == state == first.device.state()  # neither was changed by that
            assert play(second, after) == play(first, after)
            assert second.device.state() == first.device.state()
            assert interrupts(second)[1] == interrupts(first)[1]  # type: ignore[index]


@EACH
@LISTS
@given(accesses=ACCESSES, after=ACCESSES)
def test_after_a_reset_it_is_as_at_power_on(spec, accesses, after):
    with DeviceRig(spec) as used, DeviceRig(spec) as new:
        play(used, accesses)
        new.advance(used.now - new.now)
        used.device.reset()
        assert used.device.state() == new.device.state()
        assert used.line.levels[-1:] in ([], [False])
        assert [msi.where for msi in used.msis] == [None] * len(used.msis)
        used.memory.write(0, bytes(64 * 1024))
        assert play(used, after) == play(new, after)


@EACH
@pytest.mark.parametrize("other", [UartState(), DigestState(), AlarmState(), Stateless(), None, {}], ids=repr)
def test_another_devices_state_is_refused_by_name(spec, other):
    with DeviceRig(spec) as rig:
        if not isinstance(other, rig.device.State):
            kind = type(rig.device)
            with pytest.raises(StateError, match=f"{kind.__name__}: can't go on from {type(other).__name__}"):
                kind.from_state(spec, rig.device.hooks, other)


@EACH
def test_it_can_be_stopped(spec):
    with DeviceRig(spec) as rig:
        rig.device.stop()
