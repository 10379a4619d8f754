"""The types of exits: one for each reason, told apart by class, the same beginning in all."""

from __future__ import annotations

import attrs
import pytest

import orchestra
from orchestra.model import exits
from orchestra.model.exits import BusLock, Exit, Io, OtherExit

KINDS = [getattr(exits, name) for name in exits.__all__]
COMMON = ("vm", "vcpu", "time", "rip", "wait", "bus_lock", "guest_mode", "smm")


def example(kind: type[Exit]) -> Exit:
    count = len(attrs.fields(kind)) - len(COMMON)
    return kind("vm", 1, 2, None, 4, False, False, False, *range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_begins_with_the_same_fields(kind):
    assert issubclass(kind, Exit)
    assert tuple(field.name for field in attrs.fields(kind))[: len(COMMON)] == COMMON
    made = example(kind)
    assert (made.vm, made.vcpu, made.time, made.rip, made.wait) == ("vm", 1, 2, None, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_are_slotted_as_hundreds_of_thousands_are_built_a_second(kind):
    with pytest.raises(AttributeError):
        example(kind).something_else = 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_subscribers_exits_of_one_record_are_equal(kind):
    assert example(kind) == example(kind)
    assert len({example(kind), example(kind)}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_is_documented_and_public(kind):
    assert kind.__doc__
    assert getattr(orchestra, kind.__name__) is kind


def test_each_reason_has_one_type_and_only_the_catch_alls_have_no_name():
    named = [kind.kernel_name for kind in KINDS if kind.kernel_name]
    assert len(named) == len(set(named))
    assert [kind for kind in KINDS if not kind.kernel_name] == [Exit, OtherExit]


def test_kinds_do_not_derive_from_each_other():
    # so that subscribing to one gives that one
    assert [kind for kind in KINDS if kind is not Exit and kind.__mro__[1] is not Exit] == []
    assert not issubclass(BusLock, Io)
