"""Errors, named by situation. Each also is the builtin exception that fits, so that generic handlers work.

Whose fault it is stands in the docstring: yours (the call or the spec), the host's, or the guest's.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BusLockUnsupported",
    "FileError",
    "GuestMemoryError",
    "KvmError",
    "NoSuchBackend",
    "OrchestraError",
    "ResourceLimit",
    "SpecError",
    "StateError",
    "UnknownTenant",
    "UnknownVm",
    "VmExists",
]


class OrchestraError(Exception):
    """Everything orchestra raises on purpose derives from this."""


class SpecError(OrchestraError, ValueError):
    """Your spec, limit or argument can't be: the message names the field, the value and the remedy."""


class FileError(OrchestraError, ValueError):
    """A file that you named can't be read or written, or holds what can't be; the message begins with the file.

    Attributes:
        file: its name, where `lines` has more than one message could say.
        lines: all that is wrong with it, as compilers write it: "FILE:LINE: KEY: what". Empty where one message does.
    """

    file: str = ""
    lines: tuple[str, ...] = ()


class NoSuchBackend(SpecError):
    """You named a backend that does not exist (a typo). Compare `BackendUnavailable`."""


class UnknownVm(OrchestraError, LookupError):
    """You named a VM that this fleet does not have."""

    # LookupError, not KeyError: KeyError shows its message as a repr.


class UnknownTenant(SpecError, LookupError):
    """Your spec names a tenant that the fleet was not opened with."""


class VmExists(SpecError):
    """You launched a second VM under a name that is in use."""


class StateError(OrchestraError, RuntimeError):
    """You asked for something that the VM's present state does not allow; the message says which state does."""


class GuestMemoryError(OrchestraError, IndexError):
    """An address range lies outside the guest's memory, or in a part that may not be written."""


class BackendUnavailable(OrchestraError, RuntimeError):
    """The host lacks what the backend needs (/dev/kvm, permission, a newer kernel); the message says what to do."""


class BusLockUnsupported(BackendUnavailable):
    """You asked to limit or require bus-lock exits and the host can't report them. Raised before any guest runs."""


class KvmError(OrchestraError, OSError):
    """A KVM ioctl failed in a way that has no name of its own here. Carries the ioctl's name and `errno`."""


class ResourceLimit(KvmError):
    """The host is out of something that a VM needs (file descriptors, threads, memory); the message names the limit."""
