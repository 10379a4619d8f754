"""Errors are named by situation, and are the builtin that fits as well."""

from __future__ import annotations

import errno
import pickle

import pytest

from orchestra.model import errors
from orchestra.model.errors import KvmError, OrchestraError, ResourceLimit, UnknownTenant, UnknownVm

BUILTIN = {
    "BackendUnavailable": RuntimeError,
    "BusLockUnsupported": RuntimeError,
    "ConsoleTimeout": TimeoutError,
    "FileError": ValueError,
    "GuestMemoryError": IndexError,
    "KvmError": OSError,
    "KvmUnsupported": OSError,
    "NoSuchBackend": ValueError,
    "OrchestraError": Exception,
    "ResourceLimit": OSError,
    "SpecError": ValueError,
    "StateError": RuntimeError,
    "UnknownTenant": ValueError,
    "UnknownVm": LookupError,
    "VhostUserError": ConnectionError,
    "VmExists": ValueError,
}


def test_every_error_has_its_builtin_here():
    assert sorted(BUILTIN) == errors.__all__


@pytest.mark.parametrize(("name", "builtin"), BUILTIN.items())
def test_error_is_an_orchestra_error_and_the_builtin_that_fits(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, OrchestraError)
    assert issubclass(kind, builtin)
    with pytest.raises(builtin, match="what to do"):
        raise kind("what to do")


@pytest.mark.parametrize("name", BUILTIN)
def test_error_says_whose_fault_it_is(name):
    assert len(getattr(errors, name).__doc__) > 20


@pytest.mark.parametrize("name", BUILTIN)
def test_message_is_shown_as_it_is_written(name):
    # KeyError would show it in quotes
    assert str(getattr(errors, name)("vm='a': no such VM")) == "vm='a': no such VM"


def test_names_that_are_not_known_are_also_lookup_errors():
    assert issubclass(UnknownTenant, LookupError)
    assert issubclass(UnknownVm, LookupError)


@pytest.mark.parametrize("kind", [KvmError, ResourceLimit])
def test_kvm_errors_carry_the_errno(kind):
    error = kind(errno.EMFILE, "KVM_CREATE_VM: raise ulimit -n")
    assert error.errno == errno.EMFILE
    assert "KVM_CREATE_VM" in str(error)


@pytest.mark.parametrize("name", BUILTIN)
def test_errors_survive_pickling(name):
    error = pickle.loads(pickle.dumps(getattr(errors, name)("why")))
    assert str(error) == "why"
    assert type(error).__name__ == name
