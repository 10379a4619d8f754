"""What actions do is said once, as data; what is in force is read from what was done."""

from __future__ import annotations

from typing import get_args

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.model.effects import EFFECTS, ActionsInForce, What, inverse, key_of, releases

LIMIT = orc.Limit(rate=1)
EXAMPLES = [
    orc.Throttle(vm="a", limit=LIMIT),
    orc.Unthrottle(vm="a"),
    orc.SetLimit(vm="a", limit=LIMIT),
    orc.SetLimit(vm="a", limit=None),
    orc.CapCpu(vm="a", share=0.5),
    orc.CapCpu(vm="a", share=None),
    orc.SetMemory(vm="a", memory=64 * orc.MiB),
    orc.SetMemory(vm="a", memory=None),
    orc.Pause(vm="a"),
    orc.Resume(vm="a"),
    orc.Isolate(vm="a"),
    orc.Rejoin(vm="a"),
    orc.Evict(vm="a"),
    orc.Stop(vm="a"),
    orc.Kill(vm="a"),
    orc.Warn(vm="a"),
    orc.Reload(),
]


def test_every_action_has_one_entry():
    assert set(EFFECTS) == set(get_args(orc.Action))
    assert {type(action) for action in EXAMPLES} == set(EFFECTS)


@pytest.mark.parametrize("action", EXAMPLES, ids=str)
def test_what_takes_an_action_back_is_an_action_at_the_same_place_that_releases(action):
    back = inverse(action)
    assert (back is not None) == (
        not releases(action) and isinstance(action, orc.Throttle | orc.CapCpu | orc.SetMemory | orc.Pause | orc.Isolate)
    )
    if back is not None:
        assert releases(back)
        assert key_of(back) == key_of(action)
        held = ActionsInForce()
        held.note(action, "p")
        assert held
        held.note(back, "p")
        assert not held


def test_what_ends_a_vm_or_holds_it_interrupts_its_guest():
    hard = {kind for kind, effect in EFFECTS.items() if effect.hard}
    assert hard == {orc.Pause, orc.Isolate, orc.Evict, orc.Stop, orc.Kill}
    assert all(EFFECTS[kind].axis is not None for kind in hard)


def test_a_policy_holds_what_it_put_in_force_and_nothing_else():
    held = ActionsInForce()
    for action, policy in (
        (orc.Throttle(limit=LIMIT), "p"),
        (orc.Throttle(vm="a", limit=LIMIT, meter="exits"), "p"),
        (orc.Throttle(vm="b", limit=LIMIT), "p"),
        (orc.Throttle(vm="a", limit=LIMIT), "q"),
        (orc.CapCpu(vm="a", share=0.5), "p"),
        (orc.CapCpu(vm="b", share=0.5), "p"),
        (orc.CapCpu(vm="b", share=None), "p"),
        (orc.SetMemory(vm="a", memory=64 * orc.MiB), "p"),
        (orc.SetMemory(vm="b", memory=64 * orc.MiB), "p"),
        (orc.SetMemory(vm="b", memory=None), "p"),
        (orc.Pause(vm="a"), "p"),
        (orc.Pause(vm="b"), "p"),
        (orc.Resume(vm="b"), None),  # somebody else let it go
        (orc.Isolate(vm="a"), "p"),
        (orc.Warn(vm="a"), "p"),
        (orc.SetLimit(vm="a", limit=LIMIT), "p"),  # nobody takes a limit itself back
        (orc.Unthrottle(vm="b"), "p"),
    ):
        held.note(action, policy)
    assert held.undo("p") == [
        orc.Rejoin(vm="a"),
        orc.Resume(vm="a"),
        orc.SetMemory(vm="a", memory=None),
        orc.CapCpu(vm="a", share=None),
        orc.Unthrottle(vm="a", meter="exits"),
        orc.Unthrottle(),
    ]
    assert held.undo("q") == [orc.Unthrottle(vm="a")]
    held.note(orc.Stop(vm="a"), None)
    assert held.undo("p") == [orc.Unthrottle()]
    assert held.undo("nobody") == []


def test_what_is_let_go_of_an_earlier_launch_holds_the_later_one_still():
    held = ActionsInForce()
    held.note(orc.Pause(vm="a", generation=2), "p")
    held.note(orc.Resume(vm="a", generation=1), "p")
    assert held.undo("p") == [orc.Resume(vm="a", generation=2)]
    held.note(orc.Resume(vm="a"), "p")
    assert not held


def test_since_is_when_the_same_policy_began():
    held = ActionsInForce()
    held.note(orc.Throttle(vm="a", limit=LIMIT), "p", 10)
    held.note(orc.Throttle(vm="a", limit=attrs.evolve(LIMIT, rate=2)), "p", 20)
    held.note(orc.Throttle(vm="a", limit=LIMIT), "q", 30)
    [(key, first), (_, second)] = list(held)
    assert key.what is What.THROTTLE
    assert (first.since, first.action.limit.rate, second.since) == (10, 2, 30)


actions = st.sampled_from([attrs.evolve(one, vm=vm) if one.vm else one for one in EXAMPLES for vm in "ab"])


@given(st.lists(st.tuples(actions, st.sampled_from(["p", "q", None])), max_size=40))
def test_undoing_what_everybody_holds_leaves_limits_only(done):
    held = ActionsInForce()
    for action, policy in done:
        held.note(action, policy)
    for policy in ("p", "q"):
        for back in held.undo(policy):
            held.note(back, policy)
    assert all(held_by.policy is None or key.what is What.LIMIT for key, held_by in held)
    held.forget("a")
    held.forget("b")
    assert not held
    assert held.on("a") == ()
