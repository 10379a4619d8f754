"""Which CPU a guest finds: templates of CPU features. Plain data, checked when made.

    VmSpec.cpu   a name of CPU_TEMPLATES, such as "host" | a file of a template | a CpuTemplate
    base         a template begins with one of CPU_TEMPLATES, and says what is different
    features     the guest has them; a host that lacks one refuses the VM
    optional     the guest has them where the host has
    hidden       the guest never has them
    others       the features that no list names: as the host has them, or hidden

A template is about what CPUID says. It keeps no guest from trying an instruction that CPUID does not announce.

Source: Firecracker, docs/cpu_templates (bitmaps).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

import attrs

from .builtincpus import BUILT_IN, Rules
from .checks import fail, whole
from .cpufeatures import FIXED, PLACES, REGISTER_NAMES, RegisterName, names_of, needed_by
from .errors import SpecError
from .mistakes import meant

__all__ = [
    "CPU_TEMPLATES",
    "MSRS",
    "CpuTemplate",
    "CpuidBits",
    "MsrBits",
    "check_cpu",
    "is_template_file",
]

WORD: Final = 0xFFFF_FFFF
MOST_LEAVES: Final = 64
"""CPUs have about 60, and KVM takes 256 (KVM_MAX_CPUID_ENTRIES)."""
_HYPERVISOR_LEAVES: Final = range(0x4000_0000, 0x4001_0000)

_MADE: Final[Mapping[tuple[int, RegisterName], int]] = {
    (0x1, "ebx"): 0xFFFF_0000,
    (0x4, "eax"): 0xFFFF_C000,
    (0x8000_0008, "eax"): 0x00FF_FFFF,
    (0x8000_0008, "ecx"): 0x0000_F0FF,
}
_MADE_LEAVES: Final = {
    0xA: "performance counters",
    0xB: "topology",
    0xD: "sizes of XSAVE areas, by the features",
    0x1F: "topology",
    0x8000_001E: "topology",
}
"""What orchestra makes itself, of the VM's vCPUs, memory and features: bits of a register, and whole leaves."""

MSRS: Final[Mapping[int, str]] = {0x8B: "IA32_BIOS_SIGN_ID", 0x10A: "IA32_ARCH_CAPABILITIES"}
"""The MSRs that tell a guest what its CPU is: the revision of its microcode, and what it is not vulnerable to."""

Bits: TypeAlias = tuple[int, int]
"""A mask of the bits that are said, and their values."""


def _bits(field: str, text: object, width: int) -> Bits:
    """Read a bitmap as Firecracker writes them: "0b", then 1, 0 or x (as the host has it) for each bit."""
    digits = text.removeprefix("0b").replace("_", "") if isinstance(text, str) and len(text) <= 200 else ""
    if not (isinstance(text, str) and text.startswith("0b") and re.fullmatch(f"[01x]{{1,{width}}}", digits)):
        remedy = f"must be '0b' and up to {width} digits: 1, 0, or x for a bit that stays as the host has it"
        raise fail(field, text, f"{remedy} ('_' between them is allowed)")
    return int(re.sub("[01]", "1", digits).replace("x", "0"), 2), int(digits.replace("x", "0"), 2)


@attrs.frozen(kw_only=True)
class CpuidBits:
    """Bits of one CPUID leaf, for what has no name: applied behind the features.

    Parameters:
        leaf, subleaf: EAX and ECX of the CPUID instruction. A leaf that the host lacks is made.
        eax, ebx, ecx, edx: bitmaps such as "0b1xx0": ``1`` and ``0`` set a bit, ``x`` leaves it as the host has it, and
            so are the bits left of the first digit. None: the whole register is as the host has it.

    Raises:
        SpecError: a bitmap is none, or names bits that orchestra makes itself (topology, the hypervisor's leaves).
    """

    leaf: int
    subleaf: int = 0
    eax: str | None = None
    ebx: str | None = None
    ecx: str | None = None
    edx: str | None = None

    def __attrs_post_init__(self) -> None:
        whole("leaf", self.leaf, 0, WORD)
        whole("subleaf", self.subleaf, 0, WORD)
        if self.leaf in _HYPERVISOR_LEAVES or self.leaf in _MADE_LEAVES:
            what = _MADE_LEAVES.get(self.leaf, "what KVM offers its guests")
            raise SpecError(f"leaf={self.leaf:#x}: orchestra makes it itself ({what}): leave it out")
        said = dict(self.registers())
        if not said:
            raise SpecError(f"leaf={self.leaf:#x}: says nothing of a register: give one of eax, ebx, ecx and edx")
        for name, (mask, _) in said.items():
            if made := mask & _MADE.get((self.leaf, name), 0):
                raise fail(name, getattr(self, name), f"orchestra makes the bits {made:#x} itself: write x for them")
            for feature in names_of((self.leaf, self.subleaf, name), mask):
                if feature in FIXED:
                    raise fail(name, getattr(self, name), f"{feature!r} is fixed, as {FIXED[feature]}: write x for it")

    def registers(self) -> Iterator[tuple[RegisterName, Bits]]:
        """The registers that it says anything about, with the bits."""
        for name in REGISTER_NAMES:
            if (text := getattr(self, name)) is not None:
                yield name, _bits(name, text, 32)


@attrs.frozen(kw_only=True)
class MsrBits:
    """Bits of an MSR that tells the guest what its CPU is: 0x10a (IA32_ARCH_CAPABILITIES), 0x8b (microcode revision).

    Parameters:
        number: the MSR.
        bits: a bitmap of up to 64 digits, as in `CpuidBits`.
    """

    number: int
    bits: str

    def __attrs_post_init__(self) -> None:
        whole("number", self.number, 0, WORD)
        if self.number not in MSRS:
            known = " and ".join(f"{number:#x} ({name})" for number, name in MSRS.items())
            raise fail("number", self.number, f"must be an MSR that templates are for: {known}")
        self.parsed()

    def parsed(self) -> Bits:
        return _bits("bits", self.bits, 64)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # what is none, the template refuses


@attrs.frozen(kw_only=True, cache_hash=True)
class CpuTemplate:
    """A CPU as a fleet's guests are to find it, whichever host they run on.

    Vendor, family and model stay the host's, as a kernel's mitigations and errata depend on them.

    Parameters:
        name: for messages.
        base: the built-in template that this one begins with (`CPU_TEMPLATES`).
        features: what the guest has, by the names in /proc/cpuinfo. A host that lacks one refuses the VM by its name.
        optional: what the guest has where the host has it.
        hidden: what the guest never has. What needs such a feature is hidden with it.
        others: features that no list names: "host" (as it has them) or "hidden". None: as `base` has it.
        cpuid: bits without a name.
        msrs: bits of MSRs.

    Raises:
        SpecError: a feature is not known, is in two lists, is fixed, or needs one that the guest would not have.
    """

    name: str
    base: str = "host"
    features: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    optional: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    hidden: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    others: Literal["host", "hidden"] | None = None
    cpuid: tuple[CpuidBits, ...] = attrs.field(default=(), converter=_tuple)
    msrs: tuple[MsrBits, ...] = attrs.field(default=(), converter=_tuple)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise fail("name", self.name, "must be 1 to 64 letters, digits, '.', '_' or '-', the first no sign")
        if not isinstance(self.base, str) or self.base not in BUILT_IN:
            known = ", ".join(BUILT_IN)
            raise fail("base", self.base, f"must be a built-in template: {known}{meant(self.base, BUILT_IN)}")
        if self.others not in (None, "host", "hidden"):
            raise fail("others", self.others, 'must be "host", "hidden", or None for what the base has')
        seen: dict[str, str] = {}
        for field in ("features", "optional", "hidden"):
            for feature in _checked(field, getattr(self, field)):
                if feature in seen:
                    raise fail(field, feature, f"is also in {seen[feature]}: name each feature once")
                seen[feature] = field
        for field, kind in (("cpuid", CpuidBits), ("msrs", MsrBits)):
            given = getattr(self, field)
            if not isinstance(given, tuple) or not all(isinstance(one, kind) for one in given):
                raise fail(field, given, f"must be {kind.__name__} objects, in a tuple")
        if len(self.cpuid) > MOST_LEAVES:
            raise fail("cpuid", len(self.cpuid), f"must be at most {MOST_LEAVES} leaves")
        rules = self.rules()
        self._check_needs(rules)
        self._check_bits(rules)

    def rules(self) -> Rules:
        """What it and its base say together. What it says itself counts more."""
        base = BUILT_IN[self.base]
        features, optional, hidden = map(frozenset, (self.features, self.optional, self.hidden))
        own = features | optional | hidden
        gone = own | {name for name in base.features | base.optional if not hidden.isdisjoint(needed_by(name))}
        return Rules(
            features=base.features - gone | features,
            optional=base.optional - gone | optional,
            hidden=base.hidden - own | hidden,
            others=self.others or base.others,
        )

    def _check_needs(self, rules: Rules) -> None:
        for feature in self.features:
            for need in needed_by(feature):
                if need in rules.hidden:
                    raise fail("features", feature, f"needs {need!r}, which is hidden: show both, or none")
                if rules.others == "hidden" and need not in rules.features | rules.optional:
                    raise fail("features", feature, f"needs {need!r}: name that as well")

    def _check_bits(self, rules: Rules) -> None:
        places = [(one.leaf, one.subleaf) for one in self.cpuid]
        for leaf, subleaf in places:
            if places.count((leaf, subleaf)) > 1:
                raise fail("cpuid", (leaf, subleaf), "is there twice, by leaf and subleaf: make it one")
        for one in self.cpuid:
            for name, (mask, value) in one.registers():
                for feature in names_of((one.leaf, one.subleaf, name), mask):
                    on = feature in names_of((one.leaf, one.subleaf, name), value)
                    if feature in (rules.hidden if on else rules.features):
                        said = "hidden" if on else "features"
                        raise fail("cpuid", feature, f"is in {said}: write x for it in {name} of leaf {one.leaf:#x}")
        numbers = [one.number for one in self.msrs]
        for number in MSRS:
            if numbers.count(number) > 1:
                raise fail("msrs", number, "is there twice: make it one")


def _checked(field: str, names: object) -> tuple[str, ...]:
    """The list, if all its names are features that a template may name."""
    if not isinstance(names, tuple):
        raise fail(field, names, "must be a tuple of features, by their names in /proc/cpuinfo")
    for name in names:
        if not isinstance(name, str) or name not in PLACES:
            remedy = "no such CPU feature: use the names in Linux's /proc/cpuinfo, or `cpuid` for bits without a name"
            raise fail(field, name, remedy + meant(name, PLACES))
        if name in FIXED:
            raise fail(field, name, f"is fixed, as {FIXED[name]}: leave it out")
    return names


CPU_TEMPLATES: Final[Mapping[str, CpuTemplate]] = {name: CpuTemplate(name=name, base=name) for name in BUILT_IN}
"""The built-in templates, by name: ``host``, ``x86-64-v2``, ``x86-64-v3``, ``x86-64-v4`` and ``cloud-v3``."""


def is_template_file(cpu: str) -> bool:
    """Whether `VmSpec.cpu` names a file: it has a slash, or ends with ".toml"."""
    return "/" in cpu or cpu.endswith(".toml")


def check_cpu(cpu: object) -> None:
    """Check what `VmSpec.cpu` may be.

    Raises:
        SpecError: it is no template, no name of one, and no file.
    """
    if isinstance(cpu, CpuTemplate) or (isinstance(cpu, str) and cpu in CPU_TEMPLATES):
        return
    if not isinstance(cpu, str) or not is_template_file(cpu) or "\0" in cpu:
        known = ", ".join(CPU_TEMPLATES)
        remedy = f"must be one of {known}, a file such as 'cpus/web.toml', or a CpuTemplate{meant(cpu, CPU_TEMPLATES)}"
        raise fail("cpu", cpu, remedy)
