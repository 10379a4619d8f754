"""StaticLimits: a limit for each VM, tenant and the host, from the moment it is first seen."""

from __future__ import annotations

import attrs
import pytest

from orchestra.model.actions import Throttle
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter, Tenant
from orchestra.policy import Facts, Policy, StaticLimits, VmFacts

TEN, TWENTY, THIRTY = Limit(rate=10), Limit(rate=20), Limit(rate=30)


def facts(*vms: str, tenants: tuple[str, ...] = (), time: float = 0) -> Facts:
    return Facts(
        time=round(time * 1e9),
        interval=0.1,
        limit=None,
        exit_limit=None,
        tenants={name: Tenant(name=name) for name in tenants},
        vms={name: VmFacts(name, "default", 1.0, 1, 5, 5, 0.0) for name in vms},
    )


def by_vm(actions: list[Throttle]) -> dict[str | None, Limit]:
    return {action.vm: action.limit for action in actions}


def test_it_is_a_policy() -> None:
    assert isinstance(StaticLimits(), Policy)


def test_a_vm_is_limited_when_it_is_first_seen_and_never_again() -> None:
    policy = StaticLimits({"web-1": TEN})
    assert by_vm(policy.decide(facts("db-1"))) == {}
    assert by_vm(policy.decide(facts("db-1", "web-1"))) == {"web-1": TEN}
    assert by_vm(policy.decide(facts())) == {}
    assert by_vm(policy.decide(facts("web-1"))) == {}


def test_patterns_match_names_and_a_full_name_goes_before_them() -> None:
    policy = StaticLimits({"web-*": TEN, "*": TWENTY, "web-7": THIRTY})
    assert by_vm(policy.decide(facts("web-1", "web-7", "db"))) == {"web-1": TEN, "web-7": THIRTY, "db": TWENTY}


def test_case_counts() -> None:
    assert StaticLimits({"web-*": TEN}).decide(facts("WEB-1")) == []


def test_host_and_tenants_are_limited_at_the_first_tick_even_if_no_vm_did_anything() -> None:
    policy = StaticLimits(tenants={"ac*": TEN}, host=THIRTY)
    actions = policy.decide(facts(tenants=("acme", "other")))
    assert [(action.vm, action.tenant, action.limit) for action in actions] == [
        (None, None, THIRTY),
        (None, "acme", TEN),
    ]
    assert policy.decide(facts(tenants=("acme", "other"))) == []


def test_every_action_says_why_and_on_which_meter() -> None:
    policy = StaticLimits({"web-*": TEN}, {"acme": TWENTY}, THIRTY, meter="exits")
    actions = policy.decide(facts("web-1", tenants=("acme",)))
    assert [action.reason for action in actions] == [
        "static limit of the host",
        "static limit of tenant acme",
        "static limit of VMs named web-*",
    ]
    assert {action.meter for action in actions} == {Meter.EXITS}
    assert actions[-1].evidence == {"pattern": "web-*"}


def test_it_looks_again_only_if_there_may_be_new_vms() -> None:
    assert StaticLimits({"*": TEN}, interval=2).interval == 2
    assert StaticLimits(host=TEN).interval is None


def test_meters_have_names_of_their_own() -> None:
    assert {StaticLimits().name, StaticLimits(meter=Meter.EXITS).name} == {"static-limits", "static-limits-exits"}


def test_what_was_refused_is_asked_for_again_ever_more_seldom() -> None:
    policy = StaticLimits({"web-*": TEN})
    asked = []
    for tick in range(3000):
        for action in policy.decide(facts("web-1", "web-2", time=tick / 10)):
            asked.append((action.vm, tick / 10))
            if action.vm == "web-2" and tick < 1000:
                policy.refused(action, "too many")
    assert [time for vm, time in asked if vm == "web-1"] == [0]
    assert [time for vm, time in asked if vm == "web-2"] == [0, 1, 3, 7, 15, 31, 63, 127]


def test_another_vm_of_the_name_does_not_wait_for_what_was_refused_to_the_one_before() -> None:
    policy = StaticLimits({"web": TEN})
    (action,) = policy.decide(facts("web"))
    policy.refused(action, "too many")
    again = attrs.evolve(facts("web", time=0.1), vms={"web": attrs.evolve(facts("web").vms["web"], generation=2)})
    assert by_vm(policy.decide(again)) == {"web": TEN}


@pytest.mark.parametrize("where", [{"host": TEN}, {"tenants": {"ac*": TEN}}])
def test_one_that_looks_once_looks_again_while_something_was_refused(where) -> None:
    policy = StaticLimits(**where)
    assert policy.interval is None
    (action,) = policy.decide(facts(tenants=("acme", "other")))
    assert policy.interval is None
    policy.refused(action, "too many")
    assert policy.interval == 0.1
    assert policy.decide(facts(tenants=("acme", "other"), time=0.5)) == []
    assert policy.decide(facts(tenants=("acme", "other"), time=1)) == [action]
    assert policy.interval is None


def test_names_of_long_gone_vms_are_not_kept_for_ever() -> None:
    policy = StaticLimits({"*": TEN})
    policy.decide(facts("old", "kept"))
    gone = attrs.evolve(facts("kept", "new"), gone=(("old", 0), ("never-seen", 3)))
    assert by_vm(policy.decide(gone)) == {"new": TEN}
    assert len(policy._generations) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"vms": {"web": 10}}, r"vms\['web'\]=10: must be a Limit"),
        ({"tenants": {"acme": None}}, r"tenants\['acme'\]=None: must be a Limit"),
        ({"host": 5}, "host=5: must be a Limit"),
        ({"interval": 0}, "interval=0"),
        ({"interval": 1e-9}, "interval=1e-09: must be from 1e-06"),
        ({"interval": float("nan")}, "interval=nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        StaticLimits(**arguments)  # type: ignore[arg-type]  # that is the point
