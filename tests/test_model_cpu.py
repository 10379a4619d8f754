"""CPU templates and topologies: what is accepted, what is refused by name, and what follows from the lists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from cputemplates import NAMES, cpu_templates
from orchestra.model import codec, cpufeatures
from orchestra.model.builtincpus import BUILT_IN
from orchestra.model.cpu import MSRS

# ---- the table of features


@pytest.mark.parametrize(
    ("name", "leaf", "register", "bit"),
    [
        ("avx2", 7, "ebx", 5),
        ("avx512vl", 7, "ebx", 31),
        ("bus_lock_detect", 7, "ecx", 24),
        ("split_lock_detect", 7, "edx", 30),
        ("arch_capabilities", 7, "edx", 29),
        ("hypervisor", 1, "ecx", 31),
        ("movbe", 1, "ecx", 22),
        ("pbe", 1, "edx", 31),
        ("lm", 0x80000001, "edx", 29),
        ("mwaitx", 0x80000001, "ecx", 29),
        ("virt_ssbd", 0x80000008, "ebx", 25),
        ("autoibrs", 0x80000021, "eax", 8),
        ("srso_no", 0x80000021, "eax", 29),
    ],
)
def test_a_feature_is_where_the_manuals_have_it(name, leaf, register, bit):
    assert ((leaf, 0, register), bit) in cpufeatures.PLACES[name]


def test_what_features_need_and_what_is_fixed_are_features():
    assert {*cpufeatures.NEEDS, *cpufeatures.NEEDS.values(), *cpufeatures.FIXED} <= set(cpufeatures.PLACES)
    for name in cpufeatures.NEEDS:
        assert name not in cpufeatures.needed_by(name)  # no circle, or this would not end
    assert cpufeatures.needed_by("avx512bw") == ("avx512f", "avx2", "avx", "xsave", "fxsr", "fpu")


@given(st.sets(st.sampled_from(NAMES)))
def test_features_without_what_they_need_are_left_out(names):
    left = cpufeatures.closed(names)
    assert left <= names
    assert all(need in left for name in left for need in cpufeatures.needed_by(name))
    assert cpufeatures.closed(left) == left


# ---- templates


def test_built_in_levels_contain_one_another_and_need_nothing_that_they_hide():
    levels = [BUILT_IN[f"x86-64-v{level}"] for level in (2, 3, 4)]
    for low, high in itertools.pairwise(levels):
        assert low.features < high.features
    assert levels[1].features < BUILT_IN["cloud-v3"].features
    assert "avx512f" not in BUILT_IN["cloud-v3"].shown(NAMES)
    for rules in BUILT_IN.values():
        assert cpufeatures.closed(rules.features | rules.optional) >= rules.features
    for name, template in orc.CPU_TEMPLATES.items():
        assert (template.name, template.rules()) == (name, BUILT_IN[name])


def test_host_hides_the_detection_of_locks_and_a_template_may_show_it():
    offered = {"avx", "xsave", "fxsr", "fpu", "bus_lock_detect"}
    assert orc.CPU_TEMPLATES["host"].rules().shown(offered) == offered - {"bus_lock_detect"}
    for base in orc.CPU_TEMPLATES:
        shows = orc.CpuTemplate(name="shows", base=base, features=("bus_lock_detect",))
        assert "bus_lock_detect" in shows.rules().shown(offered)
        assert (
            "bus_lock_detect" in orc.CpuTemplate(name="may", base=base, optional=["bus_lock_detect"]).rules().optional
        )


def test_hiding_a_feature_hides_what_needs_it_whatever_the_base_says():
    for base in ("host", "x86-64-v4"):
        template = orc.CpuTemplate(name="no-avx", base=base, hidden=("avx",))
        shown = template.rules().shown(NAMES)
        assert not {"avx", "avx2", "avx512f", "avx512bw", "fma"} & shown
        assert {"sse4_2", "popcnt"} <= shown
        assert not {"avx2", "avx512f"} & template.rules().features  # no host is asked for them


@given(cpu_templates(), st.sets(st.sampled_from(NAMES)))
def test_what_is_shown_follows_the_lists_and_never_exceeds_the_host(template, offered):
    rules = template.rules()
    shown = rules.shown(offered)
    assert shown <= offered
    assert not shown & rules.hidden
    assert not rules.features & rules.hidden
    if rules.others == "hidden":
        assert shown <= rules.features | rules.optional
    for name in shown:
        assert rules.hidden.isdisjoint(cpufeatures.needed_by(name))
    if offered >= rules.features | {need for name in rules.features for need in cpufeatures.needed_by(name)}:
        assert set(template.features) <= shown


@given(cpu_templates())
def test_a_template_survives_the_codec(template):
    spec = orc.VmSpec(name="a", boot=orc.FlatImage(code=b"\xf4"), cpu=template)
    again = codec.decode(orc.VmSpec, codec.encode(spec))
    assert again == spec
    assert hash(again.cpu) == hash(template)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"name": "no good"}, r"name='no good': must be 1 to 64 letters"),
        ({"base": "x86-64-v5"}, r"base='x86-64-v5': must be a built-in template: host, x86-64-v2.*did you mean"),
        ({"base": None}, r"base=None: must be a built-in"),
        ({"others": "none"}, r'others=.none.: must be "host", "hidden"'),
        (
            {"features": ("avx512",)},
            r"features='avx512': no such CPU feature: .*did you mean 'avx512f'",
        ),
        ({"features": "avx"}, r"features='avx': must be a tuple"),
        ({"features": (1,)}, r"features=1: no such CPU feature"),
        ({"optional": ("waitpkg",)}, r"optional='waitpkg': is fixed, as UMWAIT would keep a core asleep"),
        ({"hidden": ("hypervisor",)}, r"hidden='hypervisor': is fixed, as every guest is told"),
        ({"features": ("sse2",), "hidden": ("sse2",)}, r"hidden='sse2': is also in features"),
        ({"features": ("sse2", "sse2")}, r"features='sse2': is also in features: name each feature once"),
        ({"features": ("avx2",), "hidden": ("avx",)}, r"features='avx2': needs 'avx', which is hidden"),
        ({"features": ("avx2",), "base": "x86-64-v2"}, r"features='avx2': needs 'avx': name that as well"),
        ({"cpuid": (1,)}, r"cpuid=\(1,\): must be CpuidBits objects"),
        ({"msrs": (orc.MsrBits(number=0x10A, bits="0b1"),) * 2}, r"msrs=266: is there twice"),
        ({"cpuid": (orc.CpuidBits(leaf=7, ebx="0b1"),) * 2}, r"cpuid=\(7, 0\): is there twice"),
        ({"cpuid": tuple(orc.CpuidBits(leaf=0x2000, subleaf=n, eax="0b1") for n in range(65))}, r"at most 64 leaves"),
        (
            {"cpuid": (orc.CpuidBits(leaf=7, ebx="0b0xxxxx"),), "features": ("avx2",)},
            r"cpuid='avx2': is in features: write x for it in ebx of leaf 0x7",
        ),
        (
            {"cpuid": (orc.CpuidBits(leaf=7, ecx="0b1" + "x" * 24),)},
            r"cpuid='bus_lock_detect': is in hidden: write x for it in ecx of leaf 0x7",
        ),
    ],
)
def test_a_template_that_can_not_be_says_the_field_the_value_and_the_remedy(given_, said):
    with pytest.raises(orc.SpecError, match=said):
        orc.CpuTemplate(**{"name": "bad", **given_})


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"leaf": 7}, r"leaf=0x7: says nothing of a register"),
        ({"leaf": 1 << 32, "eax": "0b1"}, r"leaf=4294967296: must be from 0"),
        ({"leaf": True, "eax": "0b1"}, r"leaf=True: must be a whole number"),
        ({"leaf": 0xB, "eax": "0b1"}, r"leaf=0xb: orchestra makes it itself \(topology\)"),
        ({"leaf": 0xD, "eax": "0b1"}, r"leaf=0xd: orchestra makes it itself \(sizes of XSAVE areas"),
        ({"leaf": 0x40000001, "eax": "0b1"}, r"leaf=0x40000001: .*what KVM offers its guests"),
        ({"leaf": 1, "ebx": "0b1" + "x" * 31}, r"ebx=.*: orchestra makes the bits 0x80000000 itself: write x"),
        ({"leaf": 1, "ecx": "0b0" + "x" * 31}, r"ecx=.*: 'hypervisor' is fixed, as .*: write x"),
        ({"leaf": 0x80000008, "eax": "0b1"}, r"eax='0b1': orchestra makes the bits 0x1 itself"),
        ({"leaf": 7, "eax": "0b"}, r"eax='0b': must be '0b' and up to 32 digits"),
        ({"leaf": 7, "eax": "0b" + "1" * 33}, r"must be '0b' and up to 32 digits"),
        ({"leaf": 7, "eax": "0x11"}, r"must be '0b' and up to 32 digits"),
        ({"leaf": 7, "eax": "1"}, r"must be '0b' and up to 32 digits"),
        ({"leaf": 7, "eax": 1}, r"eax=1: must be '0b'"),
        ({"leaf": 7, "eax": "0b" + "_" * 1000}, r"must be '0b'"),
    ],
)
def test_bits_that_can_not_be_say_what_is_wrong(given_, said):
    with pytest.raises(orc.SpecError, match=said):
        orc.CpuidBits(**given_)


def test_a_bitmap_says_which_bits_are_set_and_which_stay():
    assert dict(orc.CpuidBits(leaf=7, ecx="0b1_x0", edx="0b" + "1" * 32).registers()) == {
        "ecx": (0b101, 0b100),
        "edx": (0xFFFFFFFF, 0xFFFFFFFF),
    }


def test_only_msrs_that_tell_what_the_cpu_is_may_be_in_a_template():
    for number in MSRS:
        assert orc.MsrBits(number=number, bits="0b" + "1" * 64).parsed() == ((1 << 64) - 1,) * 2
    with pytest.raises(orc.SpecError, match=r"number=384: must be an MSR that templates are for: 0x8b .* and 0x10a"):
        orc.MsrBits(number=0x180, bits="0b1")
    with pytest.raises(orc.SpecError, match=r"up to 64 digits"):
        orc.MsrBits(number=0x10A, bits="0b" + "1" * 65)


# ---- in a spec


def spec_with(cpu: object = "host", vcpus: int = 1, topology: object = orc.Topology()) -> orc.VmSpec:
    return orc.VmSpec(
        name="a", boot=orc.FlatImage(code=b"\xf4"), memory=2 * orc.MiB, vcpus=vcpus, cpu=cpu, topology=topology
    )


@pytest.mark.parametrize("name", orc.CPU_TEMPLATES)
def test_a_spec_takes_a_name_or_the_template(name):
    assert spec_with(name).cpu_template is orc.CPU_TEMPLATES[name]
    assert spec_with(orc.CPU_TEMPLATES[name]).cpu_template is orc.CPU_TEMPLATES[name]


def test_a_spec_that_names_a_file_has_no_template_until_it_is_launched():
    with pytest.raises(orc.SpecError, match=r"cpu='cpus/web.toml': is a file"):
        spec_with("cpus/web.toml").cpu_template  # noqa: B018


@pytest.mark.parametrize("cpu", ["hosts", "", None, 7, "x86-64", "a\0/b.toml"])
def test_a_cpu_that_is_no_name_and_no_file_is_refused_with_the_names(cpu):
    with pytest.raises(orc.SpecError, match=r"cpu=.*: must be one of host, x86-64-v2, .*, a file such as"):
        spec_with(cpu)


# ---- topology


@given(st.integers(1, 8), st.sampled_from([1, 2, 4, 8]), st.integers(1, 300))
def test_vcpus_are_grouped_so_that_ids_are_their_numbers_or_refused(sockets, threads, vcpus):
    topology = orc.Topology(sockets=sockets, threads=threads)
    each, rest = divmod(vcpus, sockets)
    if rest or each % threads or (sockets > 1 and each & each - 1):
        with pytest.raises(orc.SpecError, match=r"topology: .*must be a (multiple|power of two)"):
            spec_with(vcpus=vcpus, topology=topology)
    else:
        assert spec_with(vcpus=vcpus, topology=topology).topology.per_socket(vcpus) == each


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: orc.Topology(threads=3), r"threads=3: must be a power of two"),
        (lambda: orc.Topology(sockets=0), r"sockets=0: must be from 1 to 64"),
        (lambda: orc.Topology(threads=True), r"threads=True: must be a whole number"),
        (lambda: spec_with(topology=2), r"topology=2: must be a Topology"),
    ],
)
def test_a_topology_that_can_not_be_is_refused(make, said):
    with pytest.raises(orc.SpecError, match=said):
        make()


def test_more_vcpus_than_8_bit_apic_ids_are_refused_for_linux_by_what_they_would_need(tmp_path):
    boot = orc.LinuxBoot(kernel="vmlinuz")
    orc.VmSpec(name="many", boot=boot, memory=64 * orc.MiB, vcpus=255)
    with pytest.raises(orc.SpecError, match=r"vcpus=300: must be at most 255 .*x2APIC ids above 255 need"):
        orc.VmSpec(name="many", boot=boot, memory=64 * orc.MiB, vcpus=300)
