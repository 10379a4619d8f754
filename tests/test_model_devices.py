"""Device specs: what they declare, what a VM that can't have it says, and that theirs is an open set."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from alarm import Alarm
from orchestra.machine.devices.peripheral import implementation
from orchestra.model.codec import decode, encode, from_document, to_document
from orchestra.model.devices import DeviceSpec, Irqchip, irqchip_kind, unwired

HALT = orc.FlatImage(code=b"\xf4")


def spec(*devices: Any, irqchip: Any = "full", **more: Any) -> orc.VmSpec:
    return orc.VmSpec(name="guest", boot=HALT, devices=devices, irqchip=irqchip, **more)


# ---- what a device may declare

BAD = [
    (lambda: orc.Wiring(), "a device answers at one of them"),
    (lambda: orc.Wiring(ports=range(5, 5)), "ports=range"),
    (lambda: orc.Wiring(ports=range(0, 8, 2)), "step 1"),
    (lambda: orc.Wiring(ports=(0, 8)), "must be a range"),  # type: ignore[arg-type]
    (lambda: orc.Wiring(ports=range(0xFFFF, 0x10001)), r"must lie in 0-0xffff"),
    (lambda: orc.Wiring(mmio=range(-1, 8)), "must be a range"),
    (lambda: orc.Wiring(mmio=range((1 << 52) - 1, (1 << 52) + 1)), "must lie in 0-0xfffffffffffff"),
    (lambda: orc.Wiring(mmio=range(8), msis=-1), "msis=-1"),
    (lambda: orc.Wiring(mmio=range(8), msis=65), "msis=65"),
    (lambda: orc.Wiring(mmio=range(8), doorbells=(orc.Doorbell(6),)), "doorbell offset=6.*within the device's mmio"),
    (lambda: orc.Wiring(mmio=range(8), doorbells=(orc.Doorbell(0, bus="ports"),)), "within the device's ports"),
    (lambda: orc.Wiring(mmio=range(8), doorbells=(orc.Doorbell(0),) * 65), "doorbells=65"),
    (lambda: orc.Wiring(mmio=range(8), doorbells=(3,)), "doorbells=3: must be Doorbell objects"),  # type: ignore[arg-type]
    (lambda: orc.Wiring(mmio=range(8), line=5), "line=5: must be a Line"),  # type: ignore[arg-type]
    (lambda: orc.Doorbell(-1), "doorbell offset=-1"),
    (lambda: orc.Doorbell(0, size=3), "doorbell size=3"),
    (lambda: orc.Doorbell(0, size=8, bus="ports"), "must be one of 1, 2, 4 bytes"),
    (lambda: orc.Doorbell(0, size=1, value=256), "doorbell value=256"),
    (lambda: orc.Doorbell(0, bus="pci"), 'must be "mmio" or "ports"'),  # type: ignore[arg-type]
    (lambda: orc.Line(24), "irq=24"),
    (lambda: orc.Line(4, "low"), "trigger='low'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_a_declaration_that_can_not_be_is_refused_with_field_value_and_remedy(make, message):
    with pytest.raises(orc.SpecError, match=message):
        make()


# ---- what a VM has


@pytest.mark.parametrize(("irqchip", "kind"), [(False, "none"), (True, "full"), ("full", "full"), ("split", "split")])
def test_irqchip_is_none_full_or_split(irqchip, kind):
    assert irqchip_kind(irqchip) == kind
    assert spec(irqchip=irqchip).irqchip == irqchip


@pytest.mark.parametrize("irqchip", ["none", "half", "", 1, 2.0])
def test_another_irqchip_is_refused(irqchip):
    with pytest.raises(orc.SpecError, match="irqchip="):
        spec(irqchip=irqchip)


REFUSED: list[tuple[DeviceSpec, Irqchip | bool, str]] = [
    (orc.Digest(), False, r'Digest: its interrupts need irqchip="full" or irqchip="split"'),
    (Alarm(), False, r'Alarm: irq=5: needs irqchip="full"'),
    (Alarm(), "split", r'Alarm: irq=5: irqchip="split" has no interrupt lines: use irqchip="full"$'),
    (orc.Serial(), "split", r'irq=4: .*use irqchip="full", or irq=None'),
    (orc.Digest(base=0x8000), "full", r"Digest: mmio 0x8000-0x8027 overlaps the guest's memory at 0x0-0xfffff"),
    (orc.Digest(base=0xFEC0_0000), "full", "overlaps the interrupt controllers at 0xfec00000"),
    (orc.Digest(base=0xFEDF_FFF8), "split", "overlaps the interrupt controllers"),
]


@pytest.mark.parametrize(("device", "irqchip", "message"), REFUSED)
def test_a_device_whose_vm_lacks_what_it_needs_is_refused_when_the_spec_is_made(device, irqchip, message):
    with pytest.raises(orc.SpecError, match=message):
        spec(device, irqchip=irqchip)


def test_no_two_devices_have_one_line():
    with pytest.raises(orc.SpecError, match=r"Alarm: irq=5: Serial has that line: choose another one$"):
        spec(orc.Serial(irq=5), Alarm())
    with pytest.raises(orc.SpecError, match="Serial: irq=4: Serial has that line: choose another one, or irq=None"):
        spec(orc.Serial(), orc.Serial(port=0x2F8))
    spec(orc.Serial(), orc.Serial(port=0x2F8, irq=3), orc.Serial(port=0x3E8, irq=None), Alarm())
    spec(orc.Serial(), orc.Serial(port=0x2F8), irqchip=False)  # where interrupts go nowhere


def test_a_line_of_a_pcs_own_is_refused_by_its_owners_name():
    with pytest.raises(orc.SpecError, match="Serial: irq=5: AcpiRegisters has that line"):
        orc.VmSpec(name="guest", boot=orc.LinuxBoot("vmlinuz"), memory=orc.MiB * 64, devices=(orc.Serial(irq=5),))


def test_a_serial_port_does_without_its_interrupt():
    assert spec(orc.Serial(), irqchip=False).devices == (orc.Serial(),)
    assert spec(orc.Serial(irq=None), irqchip="split").devices == (orc.Serial(irq=None),)


@pytest.mark.parametrize("wrong", ["serial", orc.Limit(rate=1), orc.Serial])
def test_what_is_no_device_spec_is_refused(wrong):
    with pytest.raises(orc.SpecError, match=r"devices=.*must be DeviceSpec objects"):
        spec(wrong)


def test_what_a_backend_without_interrupts_and_ioeventfds_lacks_is_named():
    @attrs.frozen
    class Bell(DeviceSpec):
        def wiring(self) -> orc.Wiring:
            return orc.Wiring(mmio=range(8), doorbells=(orc.Doorbell(0),))

    assert unwired([orc.Serial(), orc.DebugConsole(), orc.ExitPort()], "none") is None
    assert unwired([], "split") == "irqchip='split'"
    assert unwired([Bell()], "none") == "the doorbells of Bell (ioeventfd)"


# ---- an open set


def test_a_spec_of_somebody_elses_is_found_by_name_and_names_its_device():
    assert DeviceSpec.kinds()["Alarm"] is Alarm
    assert implementation(Alarm()).__name__ == "AlarmDevice"


MADE = {
    orc.Disk: [lambda: orc.Disk("disk.img"), lambda: orc.Disk("disk.qcow2", format="qcow2")],
    orc.VhostUserDisk: [lambda: orc.VhostUserDisk("blk.sock")],
}
"""Specs that can't be made without a name."""


def test_all_of_ours_name_a_device_that_is_there():
    ours = [kind for kind in DeviceSpec.kinds().values() if kind.__module__.startswith("orchestra.")]
    assert {kind.__name__ for kind in ours} >= {"DebugConsole", "Digest", "ExitPort", "Serial"}
    for kind in ours:
        for one in MADE.get(kind, [kind]):
            assert implementation(one()).State


@given(st.integers(0, 0xFFF8), st.integers(0, 23), st.sampled_from(["level", "edge", "resample"]))
def test_a_spec_of_somebody_elses_goes_through_the_codec(port, irq, trigger):
    given_ = spec(Alarm(port, irq, trigger), orc.Serial(irq=None), orc.Digest())
    assert decode(orc.VmSpec, encode(given_)) == given_
    assert from_document(orc.VmSpec, to_document(given_)) == given_
    assert from_document(Alarm, to_document(Alarm(port, irq, trigger))) == Alarm(port, irq, trigger)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"kind": "Alarm", "port": "0x600"}, r"devices\[0\].port='0x600'"),
        ({"kind": "Alarm", "volume": 1}, r"devices\[0\].volume: no such key; there are: port, irq, trigger"),
        ({"kind": "Nobody"}, r"devices\[0\].kind='Nobody': must be one of .*Alarm, .*Serial.*imported before"),
        ({"port": 1}, r"devices\[0\].kind=None: must be one of"),
        ({"kind": "DeviceSpec"}, r"devices\[0\].kind='DeviceSpec': must be one of"),
        ("Nobody", r"devices\[0\].kind='Nobody': must be one of"),
        (["Serial"], r"devices\[0\]: a list: must be an object"),
    ],
)
def test_data_that_are_no_device_are_refused_with_the_path(device, message):
    data = encode(spec()) | {"devices": [device]}
    with pytest.raises(orc.SpecError, match=message):
        decode(orc.VmSpec, data)


def test_two_devices_of_one_name_are_an_error_that_names_both_modules():
    gc.collect()

    @attrs.frozen
    class Serial(DeviceSpec):
        pass

    try:
        with pytest.raises(orc.SpecError, match=r"'Serial': orchestra.model.devices and test_model_devices"):
            DeviceSpec.kinds()
    finally:
        del Serial
        gc.collect()
    assert DeviceSpec.kinds()["Serial"] is orc.Serial


@pytest.mark.parametrize(
    "name", ["", "alarm", "alarm:Nothing", "nowhere.at.all:Device", "alarm:MILLISECOND", "alarm:Alarm"]
)
def test_a_spec_whose_device_is_not_there_is_refused_by_name(name):
    @attrs.frozen
    class Lost(DeviceSpec):
        implementation: ClassVar[str] = name

    with pytest.raises(orc.SpecError, match=f"device Lost: implementation={name!r}"):
        implementation(Lost())
    del Lost
    gc.collect()


def test_a_device_whose_wiring_is_none_is_refused_by_its_name():
    @attrs.frozen
    class Miswired(DeviceSpec):
        def wiring(self) -> Any:
            return 3

    with pytest.raises(orc.SpecError, match=r"Miswired: wiring\(\) returned 3: it must return a Wiring"):
        spec(Miswired())
    del Miswired
    gc.collect()


def test_a_spec_must_say_its_wiring():
    @attrs.frozen
    class Silent(DeviceSpec):
        pass

    with pytest.raises(NotImplementedError, match="Silent must say its wiring"):
        Silent().wiring()
    del Silent
    gc.collect()
