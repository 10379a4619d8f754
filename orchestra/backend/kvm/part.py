"""A part of KVM's state: two ioctls, a structure, and the capability that the part needs."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from ...model.errors import KvmError, KvmUnsupported, SpecError
from ...native import ffi, lib
from .ioctl import call

__all__ = ["Owner", "Part", "StructPart", "copy_exactly", "opaque"]

T = TypeVar("T")


class Owner(Protocol):
    """The vCPU or VM that has the state."""

    fd: int

    def extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says."""


class Part(ABC, Generic[T]):
    """One part of the state.

    Attributes:
        name: as the kernel calls it, for messages.
        needs: the name of the capability without which KVM has no such state; None: every KVM has it.
        get, set: the names of its ioctls. Several parts may share them.
    """

    def __init__(self, name: str, needs: str | None = None, ioctl: str | None = None) -> None:
        self.name = name
        self.needs = needs
        self.get = f"KVM_GET_{ioctl or name}"
        self.set = f"KVM_SET_{ioctl or name}"

    def __repr__(self) -> str:
        return f"<Part {self.name}>"

    def supported(self, owner: Owner) -> bool:
        """Whether this host's KVM has this part."""
        return self.needs is None or owner.extension(getattr(lib, self.needs)) > 0

    def require(self, owner: Owner) -> None:
        """Raises KvmUnsupported: this host's KVM lacks it."""
        if not self.supported(owner):
            raise KvmUnsupported(errno.EOPNOTSUPP, f"{self.name}: this host's KVM has no {self.needs}")

    def call(self, owner: Owner, name: str, argument: Any = 0) -> int:
        """The ioctl. What this host lacks is looked up only if it fails: a vCPU can be read when its VM is closed."""
        try:
            return call(owner.fd, name, argument)
        except KvmError as error:
            # KVM answers an ioctl that it lacks with one of these, but each of them may also mean a bad argument.
            if error.errno in (errno.EINVAL, errno.ENOTTY, errno.ENXIO, errno.EIO):
                self.require(owner)
            raise

    @abstractmethod
    def read(self, owner: Owner) -> T:
        """Ask the kernel. Waits for a KVM_RUN in progress, as all ioctls of a vCPU do.

        Raises KvmUnsupported (`needs`), KvmError.
        """

    @abstractmethod
    def write(self, owner: Owner, value: T) -> None:
        """Raises SpecError (a value that does not fit), KvmUnsupported (`needs`), KvmError (EINVAL: not possible)."""


class StructPart(Part[T]):
    """A structure of a fixed size, with a Python class for it."""

    def __init__(
        self,
        name: str,
        struct: str,
        decode: Callable[[Any], T],
        encode: Callable[[T], Any],
        needs: str | None = None,
        ioctl: str | None = None,
        given: Mapping[str, int] | None = None,
    ) -> None:
        """`given`: fields that the kernel wants filled in when it is asked."""
        super().__init__(name, needs, ioctl)
        self._kind = ffi.typeof(f"struct {struct} *")
        self._decode = decode
        self._encode = encode
        self._given = dict(given or {})

    def read(self, owner: Owner) -> T:
        struct = ffi.new(self._kind, self._given)
        self.call(owner, self.get, struct)
        return self._decode(struct)

    def write(self, owner: Owner, value: T) -> None:
        self.call(owner, self.set, self._encode(value))


def opaque(name: str, struct: str, needs: str | None = None, ioctl: str | None = None, **given: int) -> Part[bytes]:
    """A structure that nobody looks into. `given`: as for `StructPart`; a structure that says otherwise is refused."""
    kind = ffi.typeof(f"struct {struct} *")

    def decode(pointer: Any) -> bytes:
        return bytes(ffi.buffer(pointer))

    def encode(state: bytes) -> Any:
        pointer = ffi.new(kind)
        copy_exactly(name, ffi.buffer(pointer), state)
        for field, value in given.items():
            if getattr(pointer, field) != value:
                raise SpecError(f"{name}: {field} is {getattr(pointer, field)}, must be {value}: it is another part")
        return pointer

    return StructPart(name, struct, decode, encode, needs, ioctl, given)


def copy_exactly(what: str, target: Any, state: bytes) -> None:
    if len(state) != len(target):
        raise SpecError(f"{what}: {len(state)} bytes, must be {len(target)}: read it on a host like this one")
    target[:] = state
