"""What virtio 1.2 demands of devices (OASIS, virtio-v1.2-cs01), and the test of each demand.

Of the chapters that concern these devices: 2 (but packed queues and shared memory, which none has), 4.1 (PCI), 5.2 to
5.4, 6. Chapter 3 speaks of drivers: of what drivers must not do, a row has what a device makes of it. A MAY can't be
broken, and has no row. "c:" is a test of orchestra/native/tests, the others are of this folder.
"""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import attrs
import pytest

import orchestra as orc
from orchestra.machine.devices.pci import BRIDGE, configuration
from orchestra.model import platform, virtio
from orchestra.testing import DeviceRig
from orchestra.testing.device import CONFIGURATION, ask
from test_machine_devices_pci import capabilities

TESTS = Path(__file__).parent
NATIVE = TESTS.parent / "orchestra" / "native" / "tests"
HERE = "test_virtio_rules:"
PCI = "test_machine_devices_pci:"


@attrs.frozen
class Rule:
    """Attributes: where it is; what is demanded, in few words; the tests that fail if it is broken."""

    section: str
    demand: str
    tests: tuple[str, ...]


def rule(section: str, demand: str, *tests: str) -> Rule:
    return Rule(section, demand, tests)


RULES = [
    # ---- 2.1: device status
    rule(
        "2.1.2",
        "MUST NOT consume buffers or send used buffer notifications before DRIVER_OK",
        "c:no_device_takes_a_buffer_or_interrupts_before_driver_ok",
        "c:requests_are_served_after_driver_ok_and_those_before_it_are_found",
    ),
    rule(
        "2.1.2",
        "SHOULD set DEVICE_NEEDS_RESET in an error state; with DRIVER_OK it MUST notify of a configuration change",
        "c:a_queue_that_broke_stops_its_device_until_the_driver_resets_it",
        "c:bad_rings_are_told_by_needs_reset_when_they_are_enabled",
    ),
    # ---- 2.2: features
    rule(
        "2.2.2",
        "MUST NOT offer a feature without another that it requires",
        "c:a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered",
    ),
    rule(
        "2.2.2",
        "SHOULD accept any valid subset of the features, else MUST NOT set FEATURES_OK",
        "c:any_subset_of_the_features_is_accepted_and_again_after_a_reset",
        "c:features_are_shown_by_halves_and_accepted_if_they_were_offered",
    ),
    rule(
        "2.2.2",
        "SHOULD NOT fail to negotiate the same features again after a reset",
        "c:any_subset_of_the_features_is_accepted_and_again_after_a_reset",
    ),
    # ---- 2.4: reset
    rule(
        "2.4.1",
        "MUST set device status to 0 after a reset",
        "c:status_goes_up_in_order_and_down_to_0_alone",
        "c:a_reset_waits_for_requests_that_end_on_the_io_thread",
    ),
    rule(
        "2.4.1",
        "MUST NOT notify or touch queues once status is 0",
        "c:after_a_reset_no_device_touches_its_queues_or_interrupts",
        "c:a_reset_is_done_when_nothing_is_in_flight_and_writes_no_guest_memory",
    ),
    # ---- 2.5: configuration space
    rule(
        "2.5.2",
        "MUST let any configuration field be read before FEATURES_OK, those of offered features too",
        "c:the_configuration_is_read_before_there_is_a_driver",
    ),
    # ---- 2.6: queues
    rule(
        "2.6.1.1.1",
        "MUST NOT execute requests of a queue that was reset, or notify of it",
        "c:a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place",
        "c:one_queue_is_reset_and_enabled_again_while_the_other_goes_on",
    ),
    rule(
        "2.6.1.1.1",
        "MUST reset all state of the queue",
        "c:a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place",
        "c:a_queue_that_is_reset_in_the_middle_of_a_chain_begins_the_next_one_at_its_first_byte",
    ),
    rule(
        "2.6.1.2.1",
        "MUST observe a queue configuration that the driver has changed",
        "c:a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place",
    ),
    # ---- 2.7: split queues
    rule(
        "2.7.4.1",
        "MUST NOT make assumptions about the arrangement of descriptors",
        "c:a_request_may_be_cut_at_any_byte",
        "c:a_message_may_be_in_pieces_and_its_buffer_too_short_for_a_name",
        "c:what_a_guest_transmits_is_on_the_console",
    ),
    rule(
        "2.7.5.1",
        "MUST NOT write a device-readable buffer or a descriptor table entry",
        "c:no_device_writes_what_it_is_to_read_or_a_descriptor_or_the_available_ring",
    ),
    rule(
        "2.7.5.1",
        "SHOULD NOT read a device-writable buffer",
        "c:a_chain_is_what_is_to_be_read_and_then_what_is_to_be_written",
    ),
    rule(
        "2.7.5.3.2",
        "MUST ignore the write-only flag of a descriptor of an indirect table",
        "c:chains_with_an_indirect_table_at_their_end_are_done_whatever_its_descriptor_says_of_writing",
    ),
    rule(
        "2.7.5.3.2",
        "MUST handle descriptors that are followed by one of an indirect table",
        "c:chains_with_an_indirect_table_at_their_end_are_done_whatever_its_descriptor_says_of_writing",
        "c:an_indirect_table_ends_a_chain_and_may_lie_anywhere_and_be_longer_than_the_ring",
    ),
    rule(
        "2.7.7.2",
        "without EVENT_IDX MUST ignore used_event, and notify if flags is 0; SHOULD NOT if it is 1",
        "c:interrupts_follow_the_flags_without_event_indices_and_the_index_with_them",
    ),
    rule(
        "2.7.7.2",
        "with EVENT_IDX MUST ignore flags, and notify of the entry that used_event names; else it SHOULD NOT",
        "c:interrupts_follow_the_flags_without_event_indices_and_the_index_with_them",
        "c:an_interrupt_is_wanted_if_the_event_is_among_what_was_put",
        "c:indices_wrap_and_notifications_with_them",
    ),
    rule(
        "2.7.8.2",
        "MUST set len before the used index",
        "c:a_driver_and_a_device_on_two_threads_lose_no_notification",
    ),
    rule(
        "2.7.8.2",
        "MUST have written len bytes at least, from the first device-writable one on",
        "c:no_device_says_that_it_wrote_more_than_it_did",
        "c:each_kind_of_request_does_what_it_says",
    ),
    rule(
        "2.7.10.2",
        "MUST set the used ring's flags to 0 or 1; with EVENT_IDX to 0",
        "c:the_flags_of_the_used_ring_are_0_or_1_and_0_with_event_indices",
    ),
    rule(
        "2.7.10.2",
        "MUST handle spurious notifications",
        "c:a_notification_without_a_reason_does_nothing",
    ),
    # ---- 2.7: what drivers must not do
    rule(
        "2.7.5, 2.7.5.3.1, 2.7.13",
        "a driver MUST NOT make loops, nested tables, lengths or addresses that can't be",
        "c:whatever_a_guest_breaks_has_a_name_and_ends_the_queue",
        "c:a_chain_in_flight_is_not_taken_again_and_no_more_are_than_the_ring_has",
        "c:a_queue_with_bad_rings_is_refused_by_name_and_one_up_to_the_end_of_memory_is_not",
    ),
    rule(
        "3.1.1",
        "a driver MUST follow the steps of the initialization in their order",
        "c:status_goes_up_in_order_and_down_to_0_alone",
        "c:a_queue_is_set_up_before_it_is_enabled_and_after_features",
        "c:a_driver_that_failed_is_not_served_until_it_resets_the_device",
    ),
    # ---- 4.1: PCI
    rule(
        "4.1.1",
        "MUST meet the PCI specification",
        PCI + "test_a_function_has_the_header_of_the_specification",
        PCI + "test_whatever_a_guest_accesses_leaves_a_bus_that_can_be_saved_and_loaded",
        HERE + "test_each_device_has_the_ids_that_a_device_that_is_not_transitional_has",
    ),
    rule(
        "4.1.2.1",
        "MUST have vendor 0x1af4 and device 0x1040 + type; SHOULD have revision 1 and subsystem 0x40 or higher",
        HERE + "test_each_device_has_the_ids_that_a_device_that_is_not_transitional_has",
    ),
    rule(
        "4.1.3.2",
        "MUST allow access to each half of a 64-bit field",
        "c:a_queue_shows_a_power_of_two_and_one_that_is_not_there_0",
        "c:the_configuration_is_read_before_there_is_a_driver",
    ),
    rule(
        "4.1.4.2",
        "MUST include all extra data in cap_len",
        HERE + "test_each_device_has_the_capabilities_of_virtio_within_its_bar",
    ),
    rule(
        "4.1.4.3.1",
        "MUST present a common configuration capability, its offset aligned to 4",
        HERE + "test_each_device_has_the_capabilities_of_virtio_within_its_bar",
    ),
    rule(
        "4.1.4.3.1",
        "MUST present offered and accepted features by 32 bits, and 0 beyond 64",
        "c:features_are_shown_by_halves_and_accepted_if_they_were_offered",
    ),
    rule(
        "4.1.4.3.1",
        "MUST present another config_generation after a changed configuration was read",
        "c:a_changed_configuration_shows_another_generation_and_interrupts",
    ),
    rule(
        "4.1.4.3.1",
        "MUST reset when 0 is written to device_status, and present 0 once that is done",
        "c:a_reset_is_done_when_nothing_is_in_flight_and_writes_no_guest_memory",
    ),
    rule(
        "4.1.4.3.1",
        "MUST present 0 in queue_enable and queue_reset on reset, and 0 in queue_reset once the queue is enabled",
        "c:a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place",
    ),
    rule(
        "4.1.4.3.1",
        "MUST reset the queue for a 1 in queue_reset, present 1 meanwhile, and then 0 there and in queue_enable",
        "c:one_queue_is_reset_and_enabled_again_while_the_other_goes_on",
    ),
    rule(
        "4.1.4.3.1",
        "MUST present a power of 2 in queue_size, and 0 if there is no such queue",
        "c:a_queue_shows_a_power_of_two_and_one_that_is_not_there_0",
    ),
    rule(
        "4.1.4.4.1",
        "MUST present a notification capability: aligned to 2, multiplier an even power of 2, room for each queue",
        HERE + "test_each_queue_has_its_notify_register_within_the_capability",
    ),
    rule(
        "4.1.4.5.1",
        "MUST present an ISR capability, set its bits before it notifies, and reset it on a read",
        "c:the_isr_says_what_happened_until_it_is_read",
        HERE + "test_each_device_has_the_capabilities_of_virtio_within_its_bar",
    ),
    rule(
        "4.1.4.5.1",
        "MUST set Interrupt Status in the PCI status register to the OR of the ISR while MSI-X is off",
        HERE + "test_interrupt_status_is_that_of_the_isr_while_msix_is_off",
    ),
    rule(
        "4.1.4.6.1",
        "the offset of the device's own configuration MUST be aligned to 4",
        HERE + "test_each_device_has_the_capabilities_of_virtio_within_its_bar",
    ),
    rule(
        "4.1.4.9.1",
        "MUST present VIRTIO_PCI_CAP_PCI_CFG, and access the BAR when pci_cfg_data is accessed",
        "c:a_virtio_device_is_reached_through_its_configuration_space",
        HERE + "test_each_device_has_the_capabilities_of_virtio_within_its_bar",
    ),
    rule(
        "4.1.5.1.2.1",
        "SHOULD have 2 to 0x800 vectors, and MUST report how many",
        HERE + "test_each_device_reports_its_vectors",
        "c:any_event_goes_to_any_vector_or_to_none",
    ),
    rule(
        "4.1.5.1.2.1",
        "MUST map any event to any vector, unmap it, return it, and NO_VECTOR for what can't be or after a reset",
        "c:any_event_goes_to_any_vector_or_to_none",
    ),
    rule(
        "4.1.5.3.1",
        "MUST NOT interrupt for a queue whose vector is NO_VECTOR",
        "c:any_event_goes_to_any_vector_or_to_none",
    ),
    rule(
        "4.1.5.4.1",
        "MUST NOT interrupt for a configuration change whose vector is NO_VECTOR",
        "c:any_event_goes_to_any_vector_or_to_none",
    ),
    # ---- 5.2: disks
    rule(
        "5.2.5.2",
        "SHOULD always offer FLUSH",
        "c:a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered",
    ),
    rule(
        "5.2.5.2",
        "MUST have 0 in the padding of the configuration",
        "c:the_configuration_is_read_before_there_is_a_driver",
    ),
    rule(
        "5.2.6.2",
        "MUST answer IOERR to a write if RO is offered, and MUST NOT write",
        "c:a_disk_that_is_read_only_is_read_and_not_written",
    ),
    rule(
        "5.2.6.2",
        "MUST answer UNSUPP to discard, erase and zeroes with an unknown flag, and to discard with unmap",
        "c:what_can_not_be_done_is_an_error_for_the_guest",
    ),
    rule(
        "5.2.6.2",
        "MUST read zeroes after write-zeroes, with unmap or without",
        "c:each_kind_of_request_does_what_it_says",
    ),
    rule(
        "5.2.6.2",
        "SHOULD clear write_zeroes_may_unmap if and only if zeroes never deallocate",
        "c:the_configuration_is_read_before_there_is_a_driver",
    ),
    rule(
        "5.2.6.2",
        "MUST have a write durable when it completes, if FLUSH was offered and not negotiated",
        "c:a_driver_that_can_not_flush_has_what_it_wrote_durable_at_once",
    ),
    rule(
        "5.2.6.2",
        "MUST have writes durable when a flush that came after them completes",
        "c:what_was_flushed_survives_the_loss_of_power_and_nothing_else_is_invented",
        "test_linux:test_disk_that_a_guest_wrote_and_flushed_outlives_a_kill_of_the_fleet",
    ),
    rule(
        "5.2.6.2",
        "MUST NOT offer LIFETIME without such metrics",
        "c:a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered",
    ),
    rule(
        "5.2.6.1",
        "a driver MUST NOT send what is beyond the capacity or has no meaning",
        "c:what_can_not_be_done_is_an_error_for_the_guest",
        "c:a_request_without_room_for_its_status_ends_the_device_until_a_reset",
    ),
    # ---- 5.3: consoles
    rule(
        "5.3.5.1",
        "MUST allow a write to emerg_wr on an unconfigured device, and SHOULD put its lower byte out",
        "c:what_a_guest_transmits_is_on_the_console",
    ),
    rule(
        "5.3.6.1",
        "a driver MUST NOT put a readable buffer into a receiveq or a writable one into a transmitq",
        "c:buffers_of_the_wrong_kind_end_the_device_until_a_reset",
        "c:input_waits_until_the_guest_has_buffers_for_it",
    ),
    rule(
        "5.3.6.2.1",
        "MUST NOT add a port that exists or is not below max_nr_ports, or remove one that was not added",
        "c:a_driver_that_comes_up_is_told_of_each_port_once",
    ),
    rule(
        "5.3.6.2.2",
        "a driver MUST send DEVICE_READY, and answer; whatever else it sends has no meaning",
        "c:control_messages_that_have_no_meaning_change_nothing",
        "c:a_driver_that_never_listens_is_told_later_and_nothing_piles_up",
        "c:a_driver_without_the_feature_has_a_console_and_no_port",
    ),
    # ---- 5.4: entropy
    rule(
        "5.4.6.2",
        "MUST place one or more random bytes into the buffer",
        "c:an_entropy_device_gives_a_byte_at_least_whatever_the_buffer",
        "c:a_guest_gets_random_bytes_by_notifications_alone",
    ),
    rule(
        "5.4.6.1",
        "a driver MUST NOT place device-readable buffers into the queue",
        "c:a_guest_gets_random_bytes_by_notifications_alone",
    ),
    # ---- 6: reserved features
    rule(
        "6.2",
        "MUST offer VERSION_1, and not what it does not do: IN_ORDER, SR_IOV, ACCESS_PLATFORM",
        "c:a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered",
    ),
]


# ---- each demand has its test


def native_tests() -> set[str]:
    """Those that are run: listed in the table of a file that `main.c` has."""
    runs = set(re.findall(r"\b(\w+)_tests\b", (NATIVE / "main.c").read_text()))
    found = set()
    for path in NATIVE.glob("test_*.c"):
        text = path.read_text()
        if set(re.findall(r"const struct test (\w+)_tests\[\]", text)) & runs:
            found |= set(re.findall(r"^\tTEST\((\w+)\),", text, re.MULTILINE))
    return found


def python_tests() -> set[str]:
    return {
        f"{path.stem}:{name}"
        for path in TESTS.glob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }


KNOWN = {f"c:{name}" for name in native_tests()} | python_tests()


@pytest.mark.parametrize("one", RULES, ids=lambda one: f"{one.section} {one.demand[:50]}")
def test_each_demand_has_tests_that_are_there(one):
    assert one.tests
    assert [test for test in one.tests if test not in KNOWN] == []


def test_each_test_of_the_rules_is_of_a_rule():
    """A demand that is left out of the table would leave its test here without a row."""
    text = (NATIVE / "test_rules.c").read_text()
    ours = {f"c:{name}" for name in re.findall(r"^\tTEST\((\w+)\),", text, re.MULTILINE)}
    assert ours <= {test for one in RULES for test in one.tests}


def test_rows_are_in_the_order_of_the_specification():
    sections = [[int(part) for part in one.section.split(",")[0].split(".")] for one in RULES]
    chapters = [section[:2] for section in sections]
    assert chapters == sorted(chapters)


# ---- what each device is on the bus

KINDS = {
    orc.Rng(): 4,
    orc.Console(): 3,
    orc.Console(ports=("a", "b")): 3,
    orc.Disk("disk.img"): 2,
}
SPECS = pytest.mark.parametrize("spec", KINDS, ids=lambda spec: type(spec).__name__)


def space_of(spec: orc.DeviceSpec) -> bytes:
    function = spec.wiring().pci
    assert function is not None
    return configuration(function, platform.BARS.start).reset


def parts_of(spec: orc.DeviceSpec) -> dict[int, tuple[int, int, int, int]]:
    """The structures of virtio: length of the capability, BAR, offset and length in it."""
    space, found = space_of(spec), {}
    for at, number in capabilities(space):
        if number == virtio.VENDOR_CAPABILITY:
            length, kind, bar = struct.unpack_from("<BBB", space, at + 2)
            found[kind] = (length, bar, *struct.unpack_from("<II", space, at + 8))
    return found


@SPECS
def test_each_device_has_the_ids_that_a_device_that_is_not_transitional_has(spec):
    space = space_of(spec)
    assert struct.unpack_from("<HH", space, 0) == (0x1AF4, 0x1040 + KINDS[spec])
    assert space[8] >= 1
    assert struct.unpack_from("<H", space, 0x2E)[0] >= 0x40


@SPECS
def test_each_device_has_the_capabilities_of_virtio_within_its_bar(spec):
    parts = parts_of(spec)
    assert set(parts) - {virtio.DEVICE_CFG} == {virtio.COMMON_CFG, virtio.NOTIFY_CFG, virtio.ISR_CFG, virtio.PCI_CFG}
    for kind, (length, bar, offset, size) in parts.items():
        assert length == (20 if kind in (virtio.NOTIFY_CFG, virtio.PCI_CFG) else 16)  # with its extra data
        assert bar == 0
        assert offset % 4 == 0
        assert offset + size <= virtio.BAR_SIZE
    assert parts[virtio.COMMON_CFG][3] >= 60  # up to queue_reset
    ranges = sorted((offset, offset + size) for _, _, offset, size in parts.values() if size)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))


@SPECS
def test_each_queue_has_its_notify_register_within_the_capability(spec):
    space = space_of(spec)
    _, _, offset, length = parts_of(spec)[virtio.NOTIFY_CFG]
    at = next(at for at, number in capabilities(space) if number == 9 and space[at + 3] == virtio.NOTIFY_CFG)
    (multiplier,) = struct.unpack_from("<I", space, at + 16)
    assert multiplier.bit_count() == 1
    assert multiplier.bit_length() % 2  # an even power
    if isinstance(spec, orc.Disk):  # made from a file: its one queue has offset 0
        assert length >= 2
        return
    with DeviceRig(spec) as rig:
        queues = rig.read(0x12, 2)
        for queue in range(queues):
            rig.write(0x16, queue, 2)
            assert length >= rig.read(0x1E, 2) * multiplier + 2
        assert offset % 2 == 0


@SPECS
def test_each_device_reports_its_vectors(spec):
    function, space = spec.wiring().pci, space_of(spec)
    at = next(at for at, number in capabilities(space) if number == 0x11)
    (control,) = struct.unpack_from("<H", space, at + 2)
    assert function is not None
    assert control & 0x7FF == function.vectors - 1
    assert 2 <= function.vectors <= 0x800


def test_a_function_that_is_no_virtio_device_has_no_interrupt_status():
    assert not configuration(BRIDGE).reset[6] & 8


def test_interrupt_status_is_that_of_the_isr_while_msix_is_off():
    spec = orc.Console()
    space = space_of(spec)
    msix = next(at for at, number in capabilities(space) if number == 0x11)
    with DeviceRig(spec) as rig:

        def status() -> int:
            return ask(rig.bus.ecam, CONFIGURATION + 6, 2)

        rig.write(0x8, 1)
        rig.write(0xC, 1)  # VIRTIO_F_VERSION_1
        for value in (1, 3, 11, 15):
            rig.write(0x14, value, 1)
        assert rig.read(0x14, 1) == 15
        assert status() == 0x10  # it has capabilities
        rig.console.resize(100, 40)
        assert status() == 0x18
        assert ask(rig.bus.ecam, CONFIGURATION + 4, 4) == 0x18 << 16
        assert ask(rig.bus.ecam, CONFIGURATION + 7, 1) == 0
        rig.configure(msix + 2, 0x8000, 2)
        assert status() == 0x10
        rig.configure(msix + 2, 0, 2)
        assert status() == 0x18
        rig.configure(6, 0xFFFF, 2)  # no bit of it can be written
        assert status() == 0x18
        assert rig.read(0x1000, 1) == 2  # which ends it
        assert status() == 0x10
