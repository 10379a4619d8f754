"""The CPUID that is made: of what KVM supports, a template and a topology."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st

import orchestra as orc
from conftest import kvm_problem
from cputemplates import WORDS, cpu_templates, tables
from orchestra.backend.kvm.cpu import lacking, make_cpuid, msr_values
from orchestra.backend.kvm.cpuid import Cpuid, CpuidEntry
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.backend.kvm.masks import features_of, missing_features
from orchestra.backend.kvm.state import CPUID
from orchestra.backend.kvm.system import Kvm
from orchestra.model.cpufeatures import FIXED, PLACES, needed_by
from orchestra.model.errors import BackendUnavailable


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    try:
        opened = Kvm.open()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


LEAVES = st.sampled_from([0, 1, 2, 4, 6, 7, 0xA, 0xB, 0xD, 0x1F, 0x40000000, 0x80000001, 0x80000008, 0x8000001E])
ENTRIES = st.builds(
    CpuidEntry, function=LEAVES, index=st.integers(0, 3), flags=st.just(1), eax=WORDS, ebx=WORDS, ecx=WORDS, edx=WORDS
)


@given(st.lists(ENTRIES, max_size=20), st.integers(1, 4096), st.booleans())
def test_a_made_cpuid_tells_of_a_guest_of_so_many_processors_whatever_the_host_is(supported, vcpus, local_apics):
    made = make_cpuid(supported, vcpus, local_apics)
    Cpuid.from_entries(made)  # all values fit
    for one in made:
        if one.function == 1:
            assert one.ecx >> 31 & 1  # a hypervisor is there
            assert (one.ecx >> 24 & 1, one.ecx >> 15 & 1, one.edx >> 21 & 1) == (local_apics, 0, 0)
            assert one.edx >> 28 & 1 == (vcpus > 1)
            assert one.ebx >> 16 & 0xFF >= min(vcpus, 255)
        if one.function == 0xA:
            assert (one.eax, one.ebx, one.ecx, one.edx) == (0, 0, 0, 0)
        if one.function == 7 and one.index == 0:
            assert not one.ecx >> 5 & 1  # UMWAIT
            assert not one.ecx >> 24 & 1  # bus-lock detection
            assert not one.edx >> 30 & 1  # split-lock detection
        assert one.function != 0x1F  # levels that would have to agree with those of 0xB
    # What is not about topology, power or counters is the host's.
    kept = (0, 2, 0xD, 0x40000000, 0x80000001)
    assert [one for one in made if one.function in kept] == [one for one in supported if one.function in kept]
    # The levels: each APIC id has a place, and the levels end.
    levels = [one for one in made if one.function == 0xB]
    assert bool(levels) == any(one.function == 0 and one.eax >= 0xB for one in supported)
    if levels:
        threads, cores, end = levels
        assert [one.index for one in levels] == [0, 1, 2]
        assert (threads.eax, threads.ebx, threads.ecx >> 8) == (0, 1, 1)
        assert (cores.ebx, cores.ecx >> 8) == (vcpus, 2)
        assert 1 << cores.eax >= vcpus
        assert (end.eax, end.ebx, end.ecx >> 8) == (0, 0, 0)


def leaves(edx_of_power: int) -> list[CpuidEntry]:
    kvm = CpuidEntry(function=0x40000000, eax=0x40000001, ebx=0x4B4D564B)
    return [CpuidEntry(function=0, eax=1), kvm, CpuidEntry(function=0x80000007, edx=edx_of_power)]


def test_a_guest_whose_tsc_is_invariant_is_told_where_its_rate_is():
    made = {one.function: one for one in make_cpuid(leaves(1 << 8), 1, True)}
    assert made[0x40000000] == CpuidEntry(function=0x40000000, eax=0x40000010, ebx=0x4B4D564B)
    assert made[0x40000010].ebx == 1_000_000  # kHz of the local APIC's timer
    assert make_cpuid(leaves(0), 1, True) == leaves(0)
    assert make_cpuid(leaves(1 << 8), 1, False) == leaves(1 << 8)  # no local APIC, so nothing to tell


def test_features_that_kvm_does_not_give_are_named():
    given = [CpuidEntry(function=1, edx=1 << 25), CpuidEntry(function=0x80000001, edx=1 << 29)]
    assert missing_features(given, ("sse", "sse2", "lm")) == ["sse2"]
    assert missing_features([], ("lm", "such")) == ["lm", "such"]


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 3, 16])
def test_kvm_takes_what_is_made_of_what_it_supports(kvm, vcpus):
    made = make_cpuid(kvm.supported_cpuid().entries(), vcpus, True)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            vcpu.write(CPUID, made)
            got = {(one.function, one.index): one for one in vcpu.read(CPUID)}
            assert got[(1, 0)].ecx >> 31 & 1


# ---- with a template

APICS = {"tsc_deadline_timer"}
MADE = {"hypervisor", "ht"}
"""Features that follow from the VM."""


@given(tables(), cpu_templates(), st.integers(1, 300), st.booleans())
def test_a_guest_finds_no_feature_that_its_template_hides_and_none_that_the_host_lacks(
    supported, template, vcpus, local_apics
):
    made = make_cpuid(supported, vcpus, local_apics, template)
    Cpuid.from_entries(made)  # all values fit
    rules, shown = template.rules(), features_of(made)
    assert shown <= features_of(supported) | MADE | (APICS if local_apics else set())
    aliased = {name for name in rules.hidden if any(set(PLACES[name]) & set(PLACES[other]) for other in shown - {name})}
    assert not shown & rules.hidden - aliased
    if rules.others == "hidden":
        assert shown - aliased - MADE <= rules.features | rules.optional | {"ibrs", "ibpb"}
    assert not {name for name in FIXED if name not in {*MADE, "osxsave", "ospke"}} & shown
    if not lacking(supported, {}, template, local_apics):
        assert set(template.features) <= shown | FIXED.keys()


@given(tables(), tables(), cpu_templates(), st.integers(1, 64))
def test_two_hosts_that_have_all_of_an_exact_template_show_the_same_features(one, other, template, vcpus):
    exact = attrs.evolve(template, others="hidden", optional=())
    rules = exact.rules()
    if rules.optional:  # inherited ones may differ
        exact = attrs.evolve(exact, base="host", features=tuple(sorted(rules.features)), hidden=())
        rules = exact.rules()
    shown = []
    for host in (one, other):
        full = [*host, *(CpuidEntry(function=leaf, index=index) for leaf, index in places(rules.features, host))]
        full = [with_features(entry, rules.features) for entry in full]
        assert lacking(full, {}, exact, True) == sorted(rules.features & {"tsc_deadline_timer"} - features_of(full))
        shown.append(features_of(make_cpuid(full, vcpus, True, exact)) - MADE)
    assert shown[0] == shown[1]


def places(features: frozenset[str], host: list[CpuidEntry]) -> list[tuple[int, int]]:
    """Leaves that a host lacks for these features."""
    there = {(one.function, one.index) for one in host}
    return sorted({register[:2] for name in features for register, _ in PLACES[name]} - there)


def with_features(entry: CpuidEntry, features: frozenset[str]) -> CpuidEntry:
    for name in features:
        for (leaf, subleaf, register), bit in PLACES[name]:
            if (leaf, subleaf) == (entry.function, entry.index):
                entry = attrs.evolve(entry, **{register: getattr(entry, register) | 1 << bit})
    return entry


def full_host() -> list[CpuidEntry]:
    """A CPU with all named features, and some of the state of XSAVE: x87, SSE, AVX, AVX-512, PKRU."""
    leaves = {register[:2] for all_places in PLACES.values() for register, _ in all_places}
    found = [with_features(CpuidEntry(function=leaf, index=sub, flags=1), frozenset(PLACES)) for leaf, sub in leaves]
    states = {2: (256, 576), 5: (64, 1088), 6: (512, 1152), 7: (1024, 1664), 9: (8, 2688)}
    found.append(CpuidEntry(function=0xD, index=0, flags=1, eax=0b10_1110_0111, ebx=2696, ecx=2696))
    found += [CpuidEntry(function=0xD, index=n, flags=1, eax=size, ebx=at) for n, (size, at) in states.items()]
    return [CpuidEntry(function=0, eax=0x20), CpuidEntry(function=0x14, eax=1), *found]


def found(made: list[CpuidEntry], leaf: int, subleaf: int = 0) -> CpuidEntry | None:
    return next((one for one in made if (one.function, one.index) == (leaf, subleaf)), None)


@pytest.mark.parametrize(
    ("template", "states", "size"),
    [
        ("host", {2, 5, 6, 7, 9}, 2696),
        ("x86-64-v4", {2, 5, 6, 7}, 2688),
        ("x86-64-v3", {2}, 832),
        ("x86-64-v2", set(), None),
    ],
)
def test_the_states_of_hidden_features_go_from_xsave_and_its_size_with_them(template, states, size):
    made = make_cpuid(full_host(), 1, True, orc.CPU_TEMPLATES[template])
    whole = found(made, 0xD)
    assert {one.index for one in made if one.function == 0xD and one.index > 1} == states
    assert (whole and whole.ecx) == size
    if whole:
        assert whole.eax == 0b11 | sum(1 << state for state in states)
    assert (found(made, 0x14) is not None) == (template == "host")  # Intel PT, which the levels hide


def test_amds_copies_of_hidden_features_are_hidden_with_them():
    template = orc.CpuTemplate(name="no-mtrr", hidden=("mtrr",))
    made = make_cpuid(full_host(), 1, True, template)
    assert not found(made, 1).edx >> 12 & 1
    host = [attrs.evolve(one, edx=one.edx | 1 << 12) if one.function == 0x80000001 else one for one in full_host()]
    assert not found(make_cpuid(host, 1, True, template), 0x80000001).edx >> 12 & 1
    assert found(make_cpuid(host, 1, True), 0x80000001).edx >> 12 & 1


def test_bits_are_applied_last_and_make_leaves_that_are_not_there():
    bits = (
        orc.CpuidBits(leaf=1, eax="0b0110_xxxx_xxxx_1111", ecx="0b" + "0x" * 6 + "0"),
        orc.CpuidBits(leaf=0x80000002, eax="0b" + "1" * 32),
        orc.CpuidBits(leaf=7, subleaf=3, ebx="0b0"),
    )
    template = orc.CpuTemplate(name="bits", cpuid=bits)
    assert lacking(full_host(), {}, template, True) == []
    made = make_cpuid(
        [attrs.evolve(one, eax=0x0FF0) if one.function == 1 else one for one in full_host()], 1, True, template
    )
    assert found(made, 1).eax == 0x6FFF
    assert found(made, 1).ecx & 0b1010101010101 == 0
    assert found(made, 0x80000002).eax == 0xFFFFFFFF
    assert (found(made, 7, 3).flags, found(made, 7, 3).ebx) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 0x30), st.integers(0, 3), WORDS, WORDS), max_size=8), tables())
def test_any_bits_that_are_accepted_give_a_table_with_each_leaf_once(said, supported):
    bits = {}
    for leaf, subleaf, mask, value in said:
        text = "0b" + "".join("x" if not mask >> n & 1 else str(value >> n & 1) for n in reversed(range(32)))
        try:
            bits[leaf, subleaf] = orc.CpuidBits(leaf=leaf, subleaf=subleaf, edx=text)
        except orc.SpecError:
            continue
    try:
        template = orc.CpuTemplate(name="bits", cpuid=tuple(bits.values()))
    except orc.SpecError:
        return
    made = make_cpuid(supported, 4, True, template)
    Cpuid.from_entries(made)
    keys = [(one.function, one.index) for one in made]
    assert len(keys) == len(set(keys))
    assert set(keys) >= bits.keys()


def test_what_a_host_lacks_is_named_and_bits_without_a_name_by_their_place():
    host = [CpuidEntry(function=1, ecx=1 << 20, edx=1 << 25), CpuidEntry(function=7, flags=1, ebx=1)]
    wanted = orc.CpuTemplate(
        name="wanted",
        features=("fpu", "fxsr", "sse", "sse2", "sse4_2"),
        cpuid=(orc.CpuidBits(leaf=7, ebx="0b100001", edx="0b11"), orc.CpuidBits(leaf=2, eax="0b1")),
        msrs=(orc.MsrBits(number=0x10A, bits="0b10001"), orc.MsrBits(number=0x8B, bits="0b1")),
    )
    assert lacking(host, {0x8B: 0, 0x10A: 1}, wanted, True) == [
        "fpu",
        "fxsr",
        "sse2",
        "avx2",
        "CPUID 0x7/0x0/edx bit 0",
        "CPUID 0x7/0x0/edx bit 1",
        "IA32_ARCH_CAPABILITIES bit 4",
    ]
    assert lacking(host, {}, wanted, True)[-2:] == ["MSR 0x10a", "MSR 0x8b"]


def test_msrs_keep_the_hosts_bits_where_the_template_says_nothing():
    template = orc.CpuTemplate(name="msrs", msrs=(orc.MsrBits(number=0x10A, bits="0b01x"),))
    assert msr_values({0x10A: 0b1101}, template) == ((0x10A, 0b1011),)
    assert msr_values({}, orc.CPU_TEMPLATES["host"]) == ()


# ---- with a topology


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4, 8, 16, 64, 255])
@pytest.mark.parametrize(("sockets", "threads"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_apic_ids_divide_into_the_threads_cores_and_sockets_that_were_asked_for(vcpus, sockets, threads):
    topology = orc.Topology(sockets=sockets, threads=threads)
    try:
        topology.check(vcpus)
    except orc.SpecError:
        pytest.skip("these vCPUs can't be grouped so")
    each = vcpus // sockets
    host = [
        CpuidEntry(function=0, eax=0xD),
        CpuidEntry(function=1),
        CpuidEntry(function=4, index=0, flags=1, eax=1 | 1 << 5),
        CpuidEntry(function=4, index=3, flags=1, eax=3 | 3 << 5),
        CpuidEntry(function=0x80000008, ecx=0x7007),
        CpuidEntry(function=0x8000001D, index=3, flags=1, eax=3 | 3 << 5),
        CpuidEntry(function=0x8000001E, ebx=0x0107),
    ]
    made = make_cpuid(host, vcpus, True, topology=topology)
    smt, core = found(made, 0xB, 0), found(made, 0xB, 1)
    assert (1 << smt.eax, smt.ebx) == (threads, threads)
    assert 1 << core.eax >= core.ebx == each
    groups = {apic >> core.eax for apic in range(vcpus)}
    assert len(groups) == sockets
    assert found(made, 1).edx >> 28 & 1 == (each > 1)
    assert (found(made, 4, 0).eax >> 14 & 0xFFF, found(made, 4, 3).eax >> 14 & 0xFFF) == (threads - 1, each - 1)
    assert found(made, 4, 0).eax >> 26 == min(each // threads - 1, 63)
    assert found(made, 0x8000001D, 3).eax >> 14 == each - 1
    assert found(made, 0x80000008).ecx & 0xFF == each - 1
    table = Cpuid.from_entries(made)
    cores = set()
    for apic in range(vcpus):
        table.with_apic_id(apic)
        one = table.find(0x8000001E)
        assert (one.eax, one.ebx >> 8 & 0xFF) == (apic, threads - 1)
        cores.add(one.ebx & 0xFF)
    assert len(cores) == vcpus // threads


@pytest.mark.parametrize(
    ("vendor", "shown"), [(b"AuthenticAMD", False), (b"HygonGenuine", False), (b"GenuineIntel", True)]
)
def test_amd_cpus_have_no_arch_capabilities(vendor, shown):
    """KVM offers it for all; the one of Linux 6.18 was seen to take it away again from guests whose vendor is AMD."""
    ebx, edx, ecx = struct.unpack("<III", vendor)
    host = [CpuidEntry(function=0, eax=7, ebx=ebx, ecx=ecx, edx=edx), CpuidEntry(function=7, flags=1, edx=1 << 29)]
    assert ("arch_capabilities" in features_of(make_cpuid(host, 1, True))) == shown
    template = orc.CpuTemplate(name="wants", features=("arch_capabilities",))
    assert lacking(host, {}, template, True) == ([] if shown else ["arch_capabilities"])


# ---- on this host


@pytest.mark.kvm
@pytest.mark.parametrize("name", orc.CPU_TEMPLATES)
def test_kvm_takes_each_built_in_template_that_it_can_show(kvm, name):
    supported = kvm.supported_cpuid().entries()
    if lost := lacking(supported, {}, orc.CPU_TEMPLATES[name], True):
        pytest.skip(f"this host's KVM lacks {', '.join(lost)}")
    made = make_cpuid(supported, 2, True, orc.CPU_TEMPLATES[name])
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            vcpu.write(CPUID, made)
            # A software KVM, whose page walks have four levels, takes this one away.
            assert features_of(vcpu.read(CPUID)) >= features_of(made) - {"la57"}


@pytest.fixture
def backend() -> Iterator[KvmBackend]:
    try:
        opened = KvmBackend.open()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def spec_with(cpu: object, boot: orc.BootSpec | None = None) -> orc.VmSpec:
    return orc.VmSpec(name="a", boot=boot or orc.FlatImage(code=b"\xf4"), memory=64 * orc.MiB, cpu=cpu)


@pytest.mark.kvm
def test_a_host_that_lacks_a_feature_refuses_the_vm_by_its_name_before_anything_is_made(backend):
    lost = next(name for name in ("fma4", "3dnow", "xop", "lwp") if name not in features_of(backend._supported))
    template = orc.CpuTemplate(name="web", optional=("nx",), features=(lost, *needed_by(lost)))
    with pytest.raises(
        orc.SpecError, match=rf"vm 'a': cpu: this host's KVM lacks .*{lost}.* template 'web' has; use a"
    ):
        backend.check(spec_with(template))
    backend.check(spec_with(orc.CpuTemplate(name="web", optional=(lost,))))


@pytest.mark.kvm
def test_a_guest_that_needs_what_its_template_hides_is_refused(backend):
    if missing_features(backend._supported, orc.LinuxBoot.cpu_features):
        pytest.skip("this host's KVM gives less than Linux needs")
    template = orc.CpuTemplate(name="old", hidden=("sse2",))
    with pytest.raises(orc.SpecError, match=r"a LinuxBoot needs CPU features that template 'old' hides: sse2; show"):
        backend.check(spec_with(template, orc.LinuxBoot(kernel="vmlinuz")))
    backend.check(spec_with(template))


@pytest.mark.kvm
def test_threads_that_an_amd_guest_would_not_find_are_refused(backend, monkeypatch):
    bare = [one for one in backend._supported if one.function not in (0, 0x80000001)]
    extended = next(one for one in backend._supported if one.function == 0x80000001)
    vendor = dict(zip(("ebx", "edx", "ecx"), struct.unpack("<III", b"AuthenticAMD"), strict=True))
    spec = attrs.evolve(spec_with("host"), vcpus=4, irqchip=True, topology=orc.Topology(threads=2))
    for topoext in (True, False):
        changed = attrs.evolve(extended, ecx=extended.ecx | 1 << 22 if topoext else extended.ecx & ~(1 << 22))
        monkeypatch.setattr(backend, "_supported", [CpuidEntry(function=0, eax=0xD, **vendor), changed, *bare])
        backend._shown.clear()
        if topoext:
            backend.check(spec)
        else:
            with pytest.raises(orc.SpecError, match=r"threads=2: .*topoext, which .* lacks .*; leave threads out"):
                backend.check(spec)
            backend.check(attrs.evolve(spec, topology=orc.Topology(sockets=2)))


@pytest.mark.kvm
def test_any_number_of_templates_may_come_and_go(backend):
    for number in range(300):
        backend.check(spec_with(orc.CpuTemplate(name=f"t{number}", hidden=("avx",))))
    assert len(backend._shown) <= 256


LEAVES_OF_NUMBERS = st.sampled_from([0, 1, 2, 4, 7, 0x15, 0x16, 0x20, 0x80000000, 0x80000001, 0x80000006, 0x80000021])
REGISTER_VALUES = st.one_of(st.none(), WORDS, st.sampled_from([0, (1 << 32) - 1]))


@pytest.mark.kvm
@settings(max_examples=25, deadline=None)
@given(st.dictionaries(LEAVES_OF_NUMBERS, st.tuples(*[REGISTER_VALUES] * 4), min_size=1, max_size=6))
def test_a_hostile_template_is_refused_or_gives_a_guest_that_runs_and_harms_no_other(said):
    """It may call the CPU anything. What it can't: have KVM fail, or take anything from another VM of the fleet."""
    if (problem := kvm_problem()) is not None:
        pytest.skip(problem)

    async def run() -> None:
        async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
            other = await fleet.launch(attrs.evolve(spec_with("host"), name="other"), paused=True)
            try:
                bits = tuple(
                    orc.CpuidBits(
                        leaf=leaf, **{n: bitmap(v) for n, v in zip(NAMED, values, strict=True) if v is not None}
                    )
                    for leaf, values in said.items()
                )
                vm = await fleet.launch(spec_with(orc.CpuTemplate(name="hostile", cpuid=bits)))
            except orc.SpecError:
                assert list(fleet.vms) == ["other"]
            else:
                assert await vm.wait() == orc.Halted()
            await other.resume()
            assert await other.wait() == orc.Halted()

    trio.run(run)


NAMED = ("eax", "ebx", "ecx", "edx")


def bitmap(value: int) -> str:
    return f"0b{value:032b}"
