"""KVM's binary statistics: a file that describes itself (KVM_GET_STATS_FD, api.rst section 4.133).

Which statistics there are and what they are called is discovered and differs from kernel to kernel: none of it is ABI.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

import attrs

from ...model.errors import KvmError
from ...native import ffi, lib
from .ioctl import call, failure

__all__ = ["Statistic", "StatisticsReader", "parse"]

_KINDS = {
    lib.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    lib.KVM_STATS_TYPE_INSTANT: "instant",
    lib.KVM_STATS_TYPE_PEAK: "peak",
    lib.KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    lib.KVM_STATS_TYPE_LOG_HIST: "logarithmic histogram",
}
_UNITS = {
    lib.KVM_STATS_UNIT_NONE: "",
    lib.KVM_STATS_UNIT_BYTES: "bytes",
    lib.KVM_STATS_UNIT_SECONDS: "seconds",
    lib.KVM_STATS_UNIT_CYCLES: "cycles",
    lib.KVM_STATS_UNIT_BOOLEAN: "boolean",
}
_BASES = {lib.KVM_STATS_BASE_POW10: 10, lib.KVM_STATS_BASE_POW2: 2}

_HEADER: int = ffi.sizeof("struct kvm_stats_header")
_DESCRIPTOR: int = ffi.sizeof("struct kvm_stats_desc")
_VALUE = 8
# Today's kernels need a few KiB and exponents of -9 to 20. More than this is no statistics file, and would only let a
# broken one take memory or overflow a float.
_MOST_BYTES = 16 << 20
_MOST_EXPONENT = 64


@attrs.frozen(kw_only=True)
class Statistic:
    """One statistic as read.

    Attributes:
        name: the kernel's, such as "halt_wait_ns".
        kind: "cumulative", "instant", "peak", "linear histogram", "logarithmic histogram", or "unknown (n)".
        unit: "" (a count), "bytes", "seconds", "cycles", "boolean", or "unknown (n)".
        base, exponent: one step of a value is base ** exponent units: seconds in steps of 10 ** -9 are nanoseconds.
        values: one number; of a histogram, its buckets.
        bucket_size: of a linear histogram, how many steps wide a bucket is. A logarithmic one's buckets are 0, 1,
            2 to 3, 4 to 7 and so on. The last one also has everything larger.
    """

    name: str
    kind: str
    unit: str
    base: int
    exponent: int
    values: tuple[int, ...]
    bucket_size: int = 0

    @property
    def value(self) -> int:
        """The first number, which is the only one but for histograms."""
        return self.values[0]

    @property
    def scaled(self) -> float:
        """`value` in whole units: seconds for nanoseconds."""
        return self.value * float(self.base) ** self.exponent


@attrs.frozen(kw_only=True)
class _Descriptor:
    name: str
    kind: str
    unit: str
    base: int
    exponent: int
    bucket_size: int
    offset: int
    size: int

    def take(self, block: bytes) -> Statistic:
        end = self.offset + self.size * _VALUE
        if end > len(block):
            raise _malformed(f"{self.name!r} ends at byte {end} of a data block of {len(block)}")
        return Statistic(
            name=self.name,
            kind=self.kind,
            unit=self.unit,
            base=self.base,
            exponent=self.exponent,
            bucket_size=self.bucket_size,
            values=struct.unpack_from(f"={self.size}Q", block, self.offset),
        )


@attrs.frozen(kw_only=True)
class _Header:
    name_size: int
    count: int
    descriptors: int
    data: int

    @property
    def stride(self) -> int:
        return self.name_size + _DESCRIPTOR

    @property
    def end(self) -> int:
        """Where the descriptors end."""
        return self.descriptors + self.count * self.stride


def _malformed(why: str) -> KvmError:
    return KvmError(errno.EBADMSG, f"KVM statistics: not understood: {why}")


def _parse_header(data: bytes) -> _Header:
    if len(data) < _HEADER:
        raise _malformed(f"{len(data)} bytes, and the header alone has {_HEADER}")
    raw = ffi.from_buffer("struct kvm_stats_header *", data)
    header = _Header(name_size=raw.name_size, count=raw.num_desc, descriptors=raw.desc_offset, data=raw.data_offset)
    if not header.name_size:
        raise _malformed("names of no length")
    if header.descriptors < _HEADER or header.data < _HEADER:
        raise _malformed("descriptors or data inside the header")
    if max(header.end, header.data) > _MOST_BYTES:
        raise _malformed(
            f"{header.count} descriptors of {header.stride} bytes at {header.descriptors}, data at {header.data}"
        )
    return header


def _parse_descriptors(header: _Header, data: bytes) -> list[_Descriptor]:
    if len(data) < header.end:
        raise _malformed(f"the descriptors end at byte {header.end} of {len(data)}")
    start = ffi.from_buffer("char[]", data)
    return [_parse_descriptor(header, data, start, header.descriptors + i * header.stride) for i in range(header.count)]


def _parse_descriptor(header: _Header, data: bytes, start: Any, at: int) -> _Descriptor:
    raw = ffi.cast("struct kvm_stats_desc *", start + at)
    name = data[at + _DESCRIPTOR : at + header.stride].partition(b"\0")[0].decode("ascii", "backslashreplace")
    kind, unit = raw.flags & lib.KVM_STATS_TYPE_MASK, raw.flags & lib.KVM_STATS_UNIT_MASK
    base = _BASES.get(raw.flags & lib.KVM_STATS_BASE_MASK)
    if base is None or not raw.size or abs(raw.exponent) > _MOST_EXPONENT:
        raise _malformed(f"{name!r} has flags {raw.flags:#x}, exponent {raw.exponent} and {raw.size} values")
    return _Descriptor(
        name=name,
        kind=_KINDS.get(kind, f"unknown ({kind})"),
        unit=_UNITS.get(unit, f"unknown ({unit})"),
        base=base,
        exponent=raw.exponent,
        bucket_size=raw.bucket_size,
        offset=raw.offset,
        size=raw.size,
    )


def parse(data: bytes) -> dict[str, Statistic]:
    """Parse a whole statistics file. Raises KvmError (EBADMSG) if it is not one, and nothing else."""
    header = _parse_header(data)
    block = data[header.data :]
    return {descriptor.name: descriptor.take(block) for descriptor in _parse_descriptors(header, data)}


class StatisticsReader:
    """The statistics file of one VM or vCPU, kept open. Descriptors are read once, values at each `read`."""

    __slots__ = ("_descriptors", "_fd", "_header", "_size")

    def __init__(self, fd: int) -> None:
        """Take over the statistics file `fd`; it stays the caller's if this raises."""
        self._header = _parse_header(_pread(fd, _HEADER, 0))
        self._descriptors = _parse_descriptors(self._header, _pread(fd, self._header.end, 0))
        self._size = max((d.offset + d.size * _VALUE for d in self._descriptors), default=0)
        if self._size > _MOST_BYTES:
            raise _malformed(f"a data block of {self._size} bytes")
        self._fd = fd

    @classmethod
    def open(cls, fd: int) -> StatisticsReader:
        """For the VM or vCPU `fd`. Raises KvmError where KVM has no statistics files (KVM_CAP_BINARY_STATS_FD)."""
        stats_fd = call(fd, "KVM_GET_STATS_FD")
        try:
            os.set_inheritable(stats_fd, False)
            return cls(stats_fd)
        except BaseException:
            os.close(stats_fd)
            raise

    def read(self) -> dict[str, Statistic]:
        """All of them by name, as they are now."""
        block = _pread(self._fd, self._size, self._header.data)
        return {descriptor.name: descriptor.take(block) for descriptor in self._descriptors}

    def close(self) -> None:
        """Done at once if it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _pread(fd: int, size: int, offset: int) -> bytes:
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        raise failure(error.errno or 0, "read of KVM statistics") from error
    if len(data) < size:
        raise _malformed(f"{len(data)} bytes at {offset} where {size} were announced")
    return data
