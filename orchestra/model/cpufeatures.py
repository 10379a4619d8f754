"""CPU features by the names in Linux's /proc/cpuinfo: where CPUID has each, and which of them needs which.

    REGISTERS    the registers of feature bits, with a name for each bit; "-" where none is known
    PLACES       the same by name. A few names have a bit with each vendor: either will do
    NEEDS        what a feature is useless without
    FIXED        what no template decides, and why

Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, arch/x86/include/asm/cpufeatures.h (names) and
arch/x86/kernel/cpu/cpuid-deps.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeAlias

__all__ = [
    "FIXED",
    "NEEDS",
    "PLACES",
    "REGISTERS",
    "REGISTER_NAMES",
    "Place",
    "Register",
    "RegisterName",
    "closed",
    "names_of",
    "needed_by",
]

RegisterName: TypeAlias = Literal["eax", "ebx", "ecx", "edx"]
REGISTER_NAMES: Final[tuple[RegisterName, ...]] = ("eax", "ebx", "ecx", "edx")
Register: TypeAlias = tuple[int, int, RegisterName]
"""Leaf, subleaf (0 where the leaf has none) and register."""
Place: TypeAlias = tuple[Register, int]
"""A register and the number of the bit."""

_TABLE: Final = """
0x1 0 edx: fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr
    sse sse2 ss ht tm ia64 pbe
0x1 0 ecx: pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1
    sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor
0x6 0 eax: dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req
0x6 0 ecx: aperfmperf - - epb
0x7 0 ebx: fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a
    avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw
    avx512vl
0x7 0 ecx: prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni
    avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd
    sgx_lc pks
0x7 0 edx: - - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort -
    tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs
    stibp flush_l1d arch_capabilities split_lock_detect ssbd
0x7 1 eax: sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs
    wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist
0x7 1 edx: - - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10
0x7 2 edx: intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no
0xd 1 eax: xsaveopt xsavec xgetbv1 xsaves xfd
0x80000001 0 edx: - - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext
    3dnow
0x80000001 0 ecx: lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit
    wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx
0x80000007 0 edx: - - - - - - - - constant_tsc
0x80000008 0 ebx: clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp ibrs_always_on
    stibp_always_on ibrs_preferred ibrs_same_mode - - - amd_ppin ssbd virt_ssbd ssb_no cppc amd_psfd btc_no ibpb_ret
    brs
0x80000021 0 eax: no_nested_data_bp - lfence_always_serializing - - verw_clear null_sel_clr_base - autoibrs
    no_smm_ctl_msr - - - - - - - - - - prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no
0x80000021 0 ecx: - tsa_sq_no tsa_l1_no
"""
"""Each register (leaf, subleaf, name) with the names of its bits from bit 0 on."""


def _registers(table: str) -> dict[Register, tuple[str, ...]]:
    found: dict[Register, tuple[str, ...]] = {}
    for line in table.replace("\n    ", " ").strip().splitlines():
        where, _, names = line.partition(":")
        leaf, subleaf, name = where.split()
        (register,) = (known for known in REGISTER_NAMES if known == name)
        found[int(leaf, 16), int(subleaf), register] = tuple(names.split())
    return found


REGISTERS: Final[Mapping[Register, tuple[str, ...]]] = _registers(_TABLE)

_ALSO: Final[Mapping[str, Place]] = {"ibpb": ((0x7, 0, "edx"), 26)}
"""Bits with two names: Intel's SPEC_CTRL is IBRS and IBPB."""


def _places() -> dict[str, tuple[Place, ...]]:
    found: dict[str, tuple[Place, ...]] = {}
    for register, names in REGISTERS.items():
        for bit, name in enumerate(names):
            if name != "-":
                found[name] = (*found.get(name, ()), (register, bit))
    for name, place in _ALSO.items():
        found[name] = (*found.get(name, ()), place)
    return found


PLACES: Final[Mapping[str, tuple[Place, ...]]] = _places()

NEEDS: Final[Mapping[str, str]] = {
    "fxsr": "fpu",
    **dict.fromkeys(("mmx", "sse", "xsave", "fxsr_opt"), "fxsr"),
    **dict.fromkeys(("mmxext", "3dnow"), "mmx"),
    "3dnowext": "3dnow",
    "sse2": "sse",
    **dict.fromkeys(("pni", "ssse3", "sse4_1", "sse4_2", "pclmulqdq", "aes", "sha_ni", "gfni", "sse4a"), "sse2"),
    **dict.fromkeys(("xsaveopt", "xsavec", "xsaves", "xgetbv1", "avx", "pku", "mpx"), "xsave"),
    **dict.fromkeys(("xfd", "enqcmd", "shstk", "uintr", "arch_lbr", "fred"), "xsaves"),
    **dict.fromkeys(("avx2", "fma", "f16c", "vaes", "vpclmulqdq", "xop", "fma4"), "avx"),
    **dict.fromkeys(("sha512", "sm3", "sm4", "avx_vnni", "avx_ifma"), "avx2"),
    **dict.fromkeys(("avx512f", "avx_vnni_int8", "avx_ne_convert", "avx_vnni_int16"), "avx2"),
    **dict.fromkeys(("avx512ifma", "avx512pf", "avx512er", "avx512cd", "avx512dq", "avx512bw", "avx512vl"), "avx512f"),
    **dict.fromkeys(("avx512vbmi", "avx512_4vnniw", "avx512_4fmaps", "avx512_vpopcntdq", "avx10"), "avx512f"),
    **dict.fromkeys(("avx512_vbmi2", "avx512_vnni", "avx512_bitalg"), "avx512vl"),
    **dict.fromkeys(("avx512_vp2intersect", "avx512_bf16"), "avx512vl"),
    "avx512_fp16": "avx512bw",
    "amx_tile": "xfd",
    **dict.fromkeys(("amx_bf16", "amx_int8", "amx_fp16", "amx_complex"), "amx_tile"),
    "sgx_lc": "sgx",
    "virt_ssbd": "ssbd",
    "lm": "pae",
    "x2apic": "apic",
    "tsc_deadline_timer": "apic",
}

_HOSTS_POWER: Final = "power management is the host's"
_COUNTERS: Final = "orchestra keeps no state of performance counters"
FIXED: Final[Mapping[str, str]] = {
    "hypervisor": "every guest is told that it is one",
    "ht": "it follows from the number of vCPUs",
    "osxsave": "the guest's kernel switches it on",
    "ospke": "the guest's kernel switches it on",
    "waitpkg": "UMWAIT would keep a core asleep that other guests wait for",
    "ida": _HOSTS_POWER,
    "epb": _HOSTS_POWER,
    "pdcm": _COUNTERS,
    "dts": _COUNTERS,
}


def names_of(register: Register, bits: int) -> list[str]:
    """The features that have one of these bits of a register, by the bit's first name."""
    return [name for bit, name in enumerate(REGISTERS.get(register, ())) if bits >> bit & 1 and name != "-"]


def needed_by(name: str) -> tuple[str, ...]:
    """All that a feature needs, by way of others too."""
    found: list[str] = []
    while (need := NEEDS.get(name)) is not None:
        found.append(need)
        name = need
    return tuple(found)


def closed(names: Iterable[str]) -> frozenset[str]:
    """Those of the features whose needs are among them."""
    given = frozenset(names)
    return frozenset(name for name in given if given.issuperset(needed_by(name)))
