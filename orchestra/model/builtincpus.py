"""The CPU templates that come with orchestra, as rules about named features.

Sources: x86-64 psABI, 3.1.1 (micro-architecture levels); Firecracker, docs/cpu_templates/cpu-templates.md (T2, T2A).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import attrs

from .cpufeatures import closed, needed_by

__all__ = ["BUILT_IN", "Rules"]


@attrs.frozen
class Rules:
    """What a template says of named features, with its base: of a feature in no set, `others` says it."""

    features: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    others: Literal["host", "hidden"] = "host"

    def shown(self, offered: Iterable[str]) -> frozenset[str]:
        """Which of the features that a host offers the guest is shown."""
        given = frozenset(offered)
        if self.others == "hidden":
            return closed(given & (self.features | self.optional))
        return frozenset(one for one in given - self.hidden if self.hidden.isdisjoint(needed_by(one)))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KERNEL: Final = _words(
    """fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2
    syscall nx lm x2apic"""
)
"""What every 64-bit kernel takes for granted, all x86-64 CPUs since 2008 have, and KVM gives."""

_MITIGATIONS: Final = _words(
    """ibrs ibpb stibp ssbd virt_ssbd md_clear flush_l1d arch_capabilities ssb_no btc_no ibpb_ret autoibrs sbpb
    ibpb_brtype srso_no srso_user_kernel_no verw_clear tsa_sq_no tsa_l1_no intel_psfd amd_psfd ipred_ctrl rrsba_ctrl
    bhi_ctrl mcdt_no ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode srbds_ctrl rtm_always_abort
    no_nested_data_bp lfence_always_serializing null_sel_clr_base fdp_excptn_only zero_fcs_fds"""
)
"""How the CPU's errata and side channels are dealt with: a guest that is not told goes without, or assumes too much."""

_MACHINE: Final = _words("constant_tsc tsc_deadline_timer tsc_adjust arat ss topoext cmp_legacy")
"""Clocks and timers, and how the topology is told."""

_V2: Final = _KERNEL | _words("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3")
_V3: Final = _V2 | _words("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave")
_V4: Final = _V3 | _words("avx512f avx512bw avx512cd avx512dq avx512vl")
_XSAVE: Final = _words("xsaveopt xsavec xgetbv1")
_CLOUD: Final = _V3 | _words(
    "aes pclmulqdq rdrand rdseed adx fsgsbase smep smap erms 3dnowprefetch rdtscp pdpe1gb xsaveopt"
)


def _only(features: frozenset[str], optional: frozenset[str] = frozenset()) -> Rules:
    return Rules(features, _MITIGATIONS | _MACHINE | optional - features, others="hidden")


BUILT_IN: Final[Mapping[str, Rules]] = {
    "host": Rules(hidden=_words("bus_lock_detect split_lock_detect")),
    "x86-64-v2": _only(_V2),
    "x86-64-v3": _only(_V3, _XSAVE),
    "x86-64-v4": _only(_V4, _XSAVE),
    "cloud-v3": _only(_CLOUD, _XSAVE),
}
"""
- ``host``: all that the host's KVM offers, but for the detection of bus locks and split locks.
- ``x86-64-v2``, ``x86-64-v3``, ``x86-64-v4``: the levels of the psABI, and nothing beyond but what the host has of
  mitigations, clocks and XSAVE's forms.
- ``cloud-v3``: x86-64-v3 with what cloud machines of both vendors have besides (Intel since Broadwell, AMD since Zen):
  AES, PCLMULQDQ, RDRAND, RDSEED, ADX, SMEP, SMAP, 1 GiB pages. As Firecracker's T2 and T2A, it hides AVX-512.
"""
