"""Errors, named by situation. Each is also the builtin exception that fits, so that generic handlers work.

The docstring says whose fault an error is: yours (the call or the spec), the host's, or the guest's.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BusLockUnsupported",
    "ConsoleTimeout",
    "FileError",
    "GuestMemoryError",
    "KvmError",
    "KvmUnsupported",
    "NoSuchBackend",
    "OrchestraError",
    "ResourceLimit",
    "SpecError",
    "StateError",
    "UnknownTenant",
    "UnknownVm",
    "VhostUserError",
    "VmExists",
]


class OrchestraError(Exception):
    """Everything orchestra raises on purpose derives from this."""


class SpecError(OrchestraError, ValueError):
    """Your spec, limit or argument is not valid. The message names the field, the value and the remedy."""


class FileError(OrchestraError, ValueError):
    """A file that you named can't be read or written, or its content is not valid. The message begins with the file.

    Attributes:
        file: the name of the file, if `lines` has several mistakes.
        lines: all mistakes in the file, in the form of a compiler: "FILE:LINE: KEY: what". Empty if one message says
            everything.
    """

    file: str = ""
    lines: tuple[str, ...] = ()


class NoSuchBackend(SpecError):
    """You named a backend that does not exist (a typo). Compare `BackendUnavailable`."""


class UnknownVm(OrchestraError, LookupError):
    """You named a VM that this fleet does not have."""

    # LookupError and not KeyError, which shows its message as a repr.


class UnknownTenant(SpecError, LookupError):
    """Your spec names a tenant that the fleet was not opened with."""


class VmExists(SpecError):
    """You launched a second VM under a name that is in use."""


class StateError(OrchestraError, RuntimeError):
    """You asked for something that the VM's present state does not allow. The message says which state allows it."""


class ConsoleTimeout(OrchestraError, TimeoutError):
    """The guest did not say what you waited for within your time. The message has its last lines."""


class GuestMemoryError(OrchestraError, IndexError):
    """Yours or the guest's: an address range lies outside the guest's memory, or in a part that may not be written."""


class BackendUnavailable(OrchestraError, RuntimeError):
    """The host lacks what the backend needs (/dev/kvm, permission, a newer kernel). The message says what to do."""


class BusLockUnsupported(BackendUnavailable):
    """You asked to limit or require bus-lock exits and the host can't report them. Raised before any guest runs."""


class VhostUserError(OrchestraError, ConnectionError):
    """The back-end of a device, another process, is gone, does not answer, or breaks its protocol."""


class KvmError(OrchestraError, OSError):
    """A KVM ioctl failed in a way that has no error of its own here. The error has the ioctl's name and `errno`."""


class KvmUnsupported(KvmError):
    """This host's KVM, or its CPU, lacks a capability that is needed. The message names the capability."""


class ResourceLimit(KvmError):
    """The host is out of something that a VM needs (descriptors, threads, memory). The message names the limit."""
