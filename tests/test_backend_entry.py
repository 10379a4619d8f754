"""Entry states: every register of a vCPU's start reaches the guest, and a state that can't be is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import attrs
import pytest
import trio
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import Stage
from orchestra.backend.entry import APPLICATION_PROCESSOR, REAL, EntryState, Mode, segment_of
from orchestra.backend.kvm.machine import KvmBackend, KvmMachine
from orchestra.backend.kvm.state import LAPIC, MP_STATE, REGISTERS, SPECIAL, XSAVE
from orchestra.backend.memory import GuestMemory
from orchestra.backend.memory_layout import entries
from orchestra.backend.registers import DescriptorTable, MpState, Registers, Segment
from orchestra.model import codec
from orchestra.model.errors import KvmError, SpecError
from orchestra.native import ffi
from orchestra.native.core import FleetCore, VcpuCore

U64 = st.integers(0, (1 << 64) - 1)


# ---- segments


@given(
    base=st.integers(0, 0xFFFF_FFFF),
    limit=st.integers(0, 0xF_FFFF),
    kind=st.integers(0, 15),
    bits=st.lists(st.booleans(), min_size=5, max_size=5),
    dpl=st.integers(0, 3),
    selector=st.integers(0, 0xFFFF),
)
def test_a_segment_is_what_its_descriptor_says(base, limit, kind, bits, dpl, selector):
    s, avl, long, big, pages = map(int, bits)
    high = kind << 8 | s << 12 | dpl << 13 | 1 << 15 | (limit >> 16) << 16 | avl << 20 | long << 21 | big << 22
    high |= pages << 23 | (base >> 16 & 0xFF) | (base >> 24) << 24
    made = segment_of(high << 32 | (base & 0xFFFF) << 16 | limit & 0xFFFF, selector)
    assert made == Segment(
        base=base,
        limit=limit * 4096 + 4095 if pages else limit,
        selector=selector,
        type=kind,
        present=1,
        dpl=dpl,
        db=big,
        s=s,
        l=long,
        g=pages,
        avl=avl,
    )


def test_a_descriptor_that_is_not_present_is_refused():
    with pytest.raises(SpecError, match="not present"):
        segment_of(0, 0)


# ---- as the core takes them


@given(values=st.lists(U64, min_size=18, max_size=18), msrs=st.lists(st.tuples(st.integers(0, 2**32 - 1), U64)))
def test_every_register_and_msr_reaches_the_core(values, msrs):
    names = [field.name for field in attrs.fields(Registers)]
    registers = Registers(**dict(zip(names, values, strict=True)))
    made, _kept = entries([EntryState(mode=REAL, registers=registers, msrs=tuple(msrs))])
    assert Registers.from_struct(made[0].registers) == registers
    got = made[0].msrs
    count = 0 if got == ffi.NULL else got.nmsrs
    assert [(got.entries[i].index, got.entries[i].data) for i in range(count)] == msrs


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (EntryState(mode=REAL, registers=Registers(r9=1 << 64)), "r9="),
        (EntryState(mode=REAL, msrs=((0x10, -1),)), "entries="),
        (EntryState(mode=Mode(bits=16, special=attrs.evolve(REAL.special, cr3=-1))), "cr3="),
    ],
)
def test_a_value_that_does_not_fit_is_named(state, what):
    with pytest.raises(SpecError, match=what):
        entries([state])


# ---- as a vCPU starts with them


@pytest.fixture
def kvm(nothing_left: Callable[[], None]) -> Iterator[KvmBackend]:
    backend = KvmBackend.open()
    yield backend
    backend.close()


class Maker:
    """Makes machines of any entry states."""

    def __init__(self, backend: KvmBackend) -> None:
        self.backend = backend
        self.fleet = FleetCore()
        self.made: list[KvmMachine] = []
        self.cores: list[VcpuCore] = []
        self.memories: list[GuestMemory] = []

    def make(self, *states: EntryState, irqchip: bool = False) -> KvmMachine:
        spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4"), vcpus=len(states), irqchip=irqchip)
        self.memories.append(GuestMemory(spec))
        cores = [VcpuCore(self.fleet, len(self.cores) + index) for index in range(len(states))]
        self.cores += cores
        self.made.append(self.backend.create(spec, cores, self.memories[-1], states, bus_locks=False))
        return self.made[-1]

    def close(self) -> None:
        for machine in self.made:
            machine.close()
        for core in self.cores:
            core.close()
        self.fleet.close()
        for memory in self.memories:
            memory.close()


@pytest.fixture
def maker(kvm: KvmBackend) -> Iterator[Maker]:
    made = Maker(kvm)
    yield made
    made.close()


@pytest.mark.kvm
def test_the_state_after_reset_is_the_kernels_own_but_for_the_code_segment(kvm):
    with kvm.kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        kernels = vcpu.read(SPECIAL)
    # A CPU takes its reset vector, and sets the accessed bit or not. TR is a TSS of 16 bits on AMD, and on Intel one of
    # 32 bits, with which every mode can be entered.
    ours = attrs.evolve(REAL.special, apic_base=kernels.apic_base)
    for name in ("ds", "es", "fs", "gs", "ss", "cs", "tr", "ldt"):
        a, b = getattr(ours, name), getattr(kernels, name)
        either = 1 if name != "tr" else 8
        assert (a.type | either, a.s, a.limit, a.present) == (b.type | either, b.s, b.limit, b.present), name
    for name in ("gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"):
        assert getattr(ours, name) == getattr(kernels, name), name


@pytest.mark.kvm
def test_a_vcpu_has_all_the_registers_of_its_entry_state(maker):
    names = [field.name for field in attrs.fields(Registers)]
    registers = Registers(**{name: 0x1111 * (n + 1) for n, name in enumerate(names)} | {"rflags": 0x46})
    special = attrs.evolve(
        REAL.special,
        gs=attrs.evolve(REAL.special.gs, base=0x12340, selector=0x1234),
        idt=DescriptorTable(base=0x3000, limit=0x7FF),
        cr2=0xABC,
    )
    machine = maker.make(EntryState(mode=Mode(bits=16, special=special), registers=registers))
    vcpu = machine.engines[0].vcpu
    assert vcpu.read(REGISTERS) == registers
    got = vcpu.read(SPECIAL)
    assert (got.gs, got.idt, got.cr2) == (special.gs, special.idt, 0xABC)
    assert got.apic_base & 0x900 == 0x900  # on, and the boot processor: the kernel's own


@pytest.mark.kvm
def test_the_fpu_starts_as_boot_loaders_leave_it(maker):
    # Where FCW and MXCSR are in an XSAVE area: Intel SDM vol. 1, table 10-2.
    area = maker.make(EntryState(mode=REAL)).engines[0].vcpu.read(XSAVE)
    assert struct.unpack_from("<H", area, 0) == (0x37F,)
    assert struct.unpack_from("<I", area, 24) == (0x1F80,)


SYSENTER_CS, NO_MSR = 0x174, 0xDEAD


@pytest.mark.kvm
def test_msrs_are_set_on_each_vcpu_that_has_some(maker):
    first = EntryState(mode=REAL, msrs=((SYSENTER_CS, 0x10),))
    machine = maker.make(first, attrs.evolve(first, msrs=((SYSENTER_CS, 0x18),)), EntryState(mode=REAL))
    assert [engine.vcpu.msrs([SYSENTER_CS])[SYSENTER_CS] for engine in machine.engines] == [0x10, 0x18, 0]


@pytest.mark.kvm
def test_an_msr_that_is_refused_is_named_and_nothing_stays_behind(maker):
    with pytest.raises(KvmError, match="KVM_SET_MSRS of MSR 0xdead: Invalid argument"):
        maker.make(EntryState(mode=REAL, msrs=((SYSENTER_CS, 0x10), (NO_MSR, 1), (0x175, 2))))


@pytest.mark.kvm
def test_with_an_irqchip_vcpus_start_or_wait_as_their_states_say(maker):
    machine = maker.make(EntryState(mode=REAL), APPLICATION_PROCESSOR, EntryState(mode=REAL), irqchip=True)
    found = [engine.vcpu.read(MP_STATE) for engine in machine.engines]
    assert found == [MpState.RUNNABLE, MpState.UNINITIALIZED, MpState.RUNNABLE]


@pytest.mark.kvm
def test_local_apics_take_the_pics_interrupts_and_nmis_as_firmware_leaves_them(maker):
    machine = maker.make(EntryState(mode=REAL), APPLICATION_PROCESSOR, irqchip=True)
    for engine in machine.engines:
        apic = engine.vcpu.read(LAPIC)
        lint0, lint1 = struct.unpack_from("<I", apic, 0x350)[0], struct.unpack_from("<I", apic, 0x360)[0]
        assert (lint0 >> 8 & 7, lint0 >> 16 & 1) == (7, 0)  # ExtINT, not masked
        assert (lint1 >> 8 & 7, lint1 >> 16 & 1) == (4, 0)  # NMI


# ---- what guests see of it

WANTED, COUNT, FOUND, FIRST = 0x4010, 0x4004, 0x4008, 0x4014


def starts_others(stage: Stage, vcpus: int) -> orc.VmSpec:
    spec = stage.spec("sipi_32", mode=32, vcpus=vcpus, irqchip=True)
    return attrs.evolve(spec, boot=attrs.evolve(spec.boot, starts="first"))


@pytest.fixture
def stage(nothing_left: Callable[[], None]) -> Stage:
    return Stage("kvm")


@pytest.mark.kvm
async def test_processors_wait_until_the_first_starts_them(stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(starts_others(stage, vcpus=3), paused=True)
        vm.write_memory(WANTED, struct.pack("<I", 2))
        await vm.resume()
        with trio.fail_after(20):
            assert await vm.wait() == orc.Shutdown(code=42)
        count, cs, protected = struct.unpack("<IHH", vm.read_memory(COUNT, 8))
        assert (count, cs, protected) == (2, 0x800, 0)  # in real mode, where the first said
        assert vm.read_memory(FIRST, 4) == struct.pack("<I", 1)  # and nowhere else


@pytest.mark.kvm
async def test_processors_that_nobody_starts_are_paused_resumed_and_stopped_like_others(stage):
    spec = stage.spec("spin", vcpus=3, irqchip=True)
    spec = attrs.evolve(spec, boot=attrs.evolve(spec.boot, starts="first"))
    async with stage.open() as fleet:
        vm = await fleet.launch(spec)
        with trio.fail_after(20):
            await vm.pause()
            assert [vm.registers(vcpu=index).rip for index in (1, 2)] == [0xFFF0] * 2  # as after reset
            await vm.resume()
            await vm.stop()


def test_waiting_for_a_signal_needs_an_irqchip():
    image = orc.FlatImage(code=b"\xf4", starts="first")
    with pytest.raises(SpecError, match=r'starts="first".*irqchip=True'):
        orc.VmSpec(name="vm", boot=image, vcpus=2)
    assert orc.VmSpec(name="vm", boot=image, vcpus=2, irqchip=True)


# ---- boot specs of one's own


@attrs.frozen
class Knock(orc.BootSpec):
    """Starts at `at`, with a value in RBX."""

    loader = f"{__name__}:load_knock"
    at: int
    value: int = 5

    def check(self, layout: orc.Layout) -> None:
        if self.at >= layout.size:
            raise SpecError(f"at={self.at:#x}: outside the guest's memory")


def load_knock(spec: Knock, layout: orc.Layout, memory: GuestMemory) -> list[EntryState]:
    memory.write(spec.at, b"\x89\xd8\xe6\xf4\xf4")  # mov ax, bx; out 0xf4, al; hlt
    return [EntryState(mode=REAL, registers=Registers(rip=spec.at, rbx=spec.value))] * layout.vcpus


@pytest.mark.parametrize(
    "backend", [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)]
)
async def test_a_boot_spec_of_ones_own_is_checked_loaded_and_entered_like_any(backend):
    with pytest.raises(SpecError, match="outside"):
        orc.VmSpec(name="vm", boot=Knock(1 << 40))
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(orc.VmSpec(name="vm", boot=Knock(0x2000, value=77), devices=[orc.ExitPort()]))
        with trio.fail_after(20):
            assert await vm.wait() == orc.Shutdown(code=77)


@attrs.frozen
class Lost(Knock):
    loader = f"{__name__}:nowhere"


@attrs.frozen
class Short(Knock):
    loader = f"{__name__}:load_none"


def load_none(spec: Knock, layout: orc.Layout, memory: GuestMemory) -> list[EntryState]:
    return []


@attrs.frozen
class Idle(Knock):
    loader = f"{__name__}:load_idle"


def load_idle(spec: Knock, layout: orc.Layout, memory: GuestMemory) -> list[EntryState]:
    return [*load_knock(spec, layout, memory)[1:], APPLICATION_PROCESSOR]


@pytest.mark.kvm
@pytest.mark.parametrize(("vcpus", "irqchip"), [(1, True), (2, False)])
async def test_a_loader_that_has_vcpus_wait_for_a_signal_that_can_not_come_is_named(vcpus, irqchip, nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        with pytest.raises(SpecError, match="load_idle' has vCPUs wait"):
            await fleet.launch(orc.VmSpec(name="vm", boot=Idle(0x2000), vcpus=vcpus, irqchip=irqchip))


@attrs.frozen
class Odd(Knock):
    loader = f"{__name__}:load_odd"


def load_odd(spec: Knock, layout: orc.Layout, memory: GuestMemory) -> list[EntryState]:
    state = load_knock(spec, layout, memory)[0]
    return [attrs.evolve(state, mode=Mode(bits=16, special=attrs.evolve(REAL.special, cs=Segment(base=0x10))))]


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("boot", "message"),
    [(Lost(0x2000), "the loader of Lost, .*:nowhere', can't be imported"), (Short(0x2000), "told where 0 vCPUs start")],
)
async def test_a_loader_that_is_missing_or_tells_too_little_is_named(boot, message, nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        with pytest.raises(SpecError, match=message):
            await fleet.launch(orc.VmSpec(name="vm", boot=boot))


@pytest.mark.emulated
async def test_the_emulated_backend_refuses_segments_that_it_can_not_start_with(nothing_left):
    async with orc.open_fleet(backend="emulated") as fleet:
        with pytest.raises(SpecError, match="starts 16-bit guests with flat segments"):
            await fleet.launch(orc.VmSpec(name="vm", boot=Odd(0x2000)))


def test_boot_specs_go_through_the_codec_by_their_names():
    spec = orc.VmSpec(name="vm", boot=Knock(0x2000, value=7))
    data = codec.to_document(spec)
    assert data["boot"] == {"kind": "Knock", "at": 0x2000, "value": 7}
    assert codec.from_document(orc.VmSpec, data) == spec
