"""What holds of every device with a spec: it survives any access, its state is all of it, a reset is power-on."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import orchestra as orc
from alarm import Alarm, AlarmState
from orchestra.machine.devices.digest import DigestState
from orchestra.machine.devices.ports import Stateless
from orchestra.machine.devices.rtc import RtcState
from orchestra.machine.devices.serial import UartState
from orchestra.model.chipset import AcpiRegisters, PciHostBridge, Rtc
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


# ---- states from outside

HOSTILE = (
    *(None, True, False, "x", b"", b"x" * 100_000, (), (None,), [], {}),
    *(0, 1, -1, 255, 256, 1 << 16, 1 << 32, (1 << 64) - 1, 1 << 64, 10**400),
    *(0.0, 1.5, -1e300, 1e300, float("nan"), float("inf"), -float("inf")),
)
WITH_STATE = (orc.Serial(), orc.Rng(), orc.Console(), orc.Digest(), Rtc(), AcpiRegisters(), PciHostBridge())


def fields_of(state: Any) -> list[tuple[str, Any]]:
    """Each field replaced by hostile values: of the state itself, and of what is in it."""
    found = []
    for name, value in attrs.asdict(state, recurse=False).items():
        found += [(name, hostile) for hostile in HOSTILE]
        if isinstance(value, tuple) and value and attrs.has(type(value[0])):
            for inner, hostile in fields_of(value[0]):
                found.append((name, (attrs.evolve(value[0], **{inner: hostile}), *value[1:])))
    return found


@pytest.mark.parametrize("spec", WITH_STATE, ids=lambda spec: type(spec).__name__)
def test_a_hostile_state_is_refused_or_makes_a_device_that_works(spec):
    with DeviceRig(spec) as rig:
        state = rig.device.state()
    for name, hostile in fields_of(state):
        try:
            changed = attrs.evolve(state, **{name: hostile})
            rig = DeviceRig(spec, state=changed)
        except orc.SpecError:
            continue
        with rig:
            for offset in range(256):  # nothing that was taken stays behind to fail later
                rig.read(offset, 1)
                rig.write(offset, 0x71 if offset == 0 else 0xFF, 1)
            rig.device.state()
            rig.device.reset()


@given(st.floats(), st.floats(0, 4e9), st.binary(min_size=128, max_size=128))
def test_a_clock_shows_a_time_whatever_its_state_and_the_hosts_clock_are(ahead, now, registers):
    try:
        state = RtcState(registers=registers, ahead=ahead)
    except orc.SpecError:
        assert not abs(ahead) < 2.5e11
        return
    with DeviceRig(Rtc(), state=state) as rig:
        rig.wall_clock = now
        for index in range(128):
            rig.write(0, index, 1)
            assert 0 <= rig.read(1, 1) <= 255
        rig.write(0, 0x0B, 1)
        for value in (0x80, 0x02, 0x86, 0x06):  # setting the time, and taking it
            rig.write(1, value, 1)
        with rig.again() as other:
            assert other.device.state() == rig.device.state()
