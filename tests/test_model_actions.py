"""What can be done to a fleet, and how a VM ends."""

from __future__ import annotations

import attrs
import pytest

from orchestra.model import actions
from orchestra.model.actions import (
    Action,
    Applied,
    Failed,
    Halted,
    Kill,
    Outcome,
    Pause,
    Reload,
    Resume,
    SetLimit,
    Shutdown,
    State,
    Stop,
    Stopped,
    Throttle,
    Unthrottle,
)
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter

LIMIT = Limit(rate=10)
ON_A_VM = (Pause, Resume, Stop, Kill)


@pytest.mark.parametrize("kind", ON_A_VM)
def test_action_on_a_vm_carries_its_reason_and_evidence(kind):
    action = kind(vm="web-1", reason="noisy", evidence={"rate": 900})
    assert (action.vm, action.reason, action.evidence) == ("web-1", "noisy", {"rate": 900})
    assert isinstance(action, Action)


@pytest.mark.parametrize("kind", ON_A_VM)
def test_action_on_a_vm_needs_its_name_and_takes_it_by_keyword_only(kind):
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind("web-1")


@pytest.mark.parametrize(
    "action",
    [*(kind(vm="a") for kind in ON_A_VM), Throttle(limit=LIMIT), Unthrottle(), Halted(), Shutdown(), Failed("x")],
)
def test_actions_and_outcomes_are_frozen_hashable_and_equal_by_value(action):
    assert action == attrs.evolve(action)
    assert hash(action) == hash(attrs.evolve(action))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        action.reason = "other"


def test_different_actions_on_the_same_vm_are_not_equal():
    assert len({kind(vm="a") for kind in ON_A_VM}) == len(ON_A_VM)


@pytest.mark.parametrize(
    "make", [lambda **more: Throttle(limit=LIMIT, **more), Unthrottle, lambda **more: SetLimit(limit=None, **more)]
)
def test_a_launch_is_one_of_a_vm(make):
    assert make(vm="web-1", generation=3).generation == 3
    assert make(vm="web-1").generation is None
    with pytest.raises(SpecError, match="generation=3: name its vm as well"):
        make(tenant="acme", generation=3)


@pytest.mark.parametrize("target", [{}, {"vm": "web-1"}, {"tenant": "acme"}], ids=["the host", "one vm", "one tenant"])
def test_throttle_and_unthrottle_are_for_one_place(target):
    for action in (Throttle(limit=LIMIT, **target), Unthrottle(**target)):
        assert (action.vm, action.tenant) == (target.get("vm"), target.get("tenant"))
        assert action.meter is Meter.BUS_LOCKS


@pytest.mark.parametrize("make", [lambda **target: Throttle(limit=LIMIT, **target), Unthrottle])
def test_throttle_of_a_vm_and_a_tenant_at_once_names_both(make):
    with pytest.raises(SpecError, match="vm='web-1', tenant='acme': name one of them, or neither for the host"):
        make(vm="web-1", tenant="acme")


@pytest.mark.parametrize("limit", [None, 10, "10/s"])
def test_throttle_without_a_limit_points_to_unthrottle(limit):
    with pytest.raises(SpecError, match=r"limit=.*: must be a Limit; use Unthrottle"):
        Throttle(vm="web-1", limit=limit)


def test_meter_may_be_named_by_a_word():
    assert Throttle(limit=LIMIT, meter="exits").meter is Meter.EXITS
    assert Unthrottle(meter="exits").meter is Meter.EXITS


@pytest.mark.parametrize("meter", ["io", None, 5])
def test_unknown_meter_is_refused_with_the_known_ones(meter):
    with pytest.raises(SpecError, match=r'meter=.*"bus_locks", "exits" or "answers"'):
        Throttle(limit=LIMIT, meter=meter)
    with pytest.raises(SpecError, match=r'meter=.*"bus_locks", "exits" or "answers"'):
        Unthrottle(meter=meter)


def test_applied_says_who_asked_and_what_came_of_it():
    done = Applied(time=5, action=Pause(vm="a"))
    failed = Applied(time=6, action=None, policy="mine", error="ValueError: x")
    assert (done.policy, done.error) == (None, None)
    assert (failed.action, failed.policy, failed.error) == (None, "mine", "ValueError: x")


def test_failure_reads_as_a_sentence_with_vcpu_and_registers():
    assert str(Failed("triple fault")) == "triple fault"
    assert str(Failed("EFAULT", {"rip": 0x1000, "rax": 5}, vcpu=3)) == "vCPU 3: EFAULT (rip=0x1000 rax=0x5)"
    assert str(Failed("EFAULT", vcpu=0)) == "vCPU 0: EFAULT"


def test_every_way_to_end_is_an_outcome_and_no_action_is():
    assert all(isinstance(outcome, Outcome) for outcome in (Halted(), Shutdown(code=3), Stopped("why"), Failed("x")))
    assert not isinstance(Stop(vm="a"), Outcome)
    assert not isinstance(Stopped(), Action)


def test_states_read_as_plain_words():
    assert [str(state) for state in State] == ["created", "running", "paused", "waiting", "stopped", "failed"]


def test_all_lists_what_the_module_offers():
    assert sorted(actions.__all__) == actions.__all__
    assert all(hasattr(actions, name) for name in actions.__all__)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Pause(vm=None), "vm=None"),
        (lambda: Throttle(vm=b"a", limit=LIMIT), "vm=b'a'"),
        (lambda: Unthrottle(tenant=3), "tenant=3"),
        (lambda: SetLimit(limit=None, vm=["a"]), "vm=\\['a'\\]"),
        (lambda: Stop(vm="a", reason=None), "reason=None"),
        (lambda: Reload(reason=b"x"), "reason=b'x'"),
        (lambda: Stopped({"x": 1}), "reason={'x': 1}"),
        (lambda: Kill(vm="a", evidence=[("rate", 1)]), "evidence="),
        (lambda: Kill(vm="a", evidence={("x", 1): 2}), "evidence=.*keys are strings"),
        (lambda: Applied(time=1, action=None, policy=7), "policy=7"),
        (lambda: Applied(time=1, action=None, error=ValueError("no")), "error=ValueError"),
    ],
)
def test_what_could_not_be_journaled_is_refused_when_it_is_made(make, field):
    with pytest.raises(SpecError, match=field):
        make()
