"""StaticLimits: a limit for each VM, tenant and the host, from the moment it is first seen."""

from __future__ import annotations

import attrs
import pytest

from orchestra.actions import Throttle
from orchestra.errors import SpecError
from orchestra.policy import Facts, Policy, StaticLimits, VmFacts
from orchestra.spec import Limit, Meter, Tenant

TEN, TWENTY, THIRTY = Limit(rate=10), Limit(rate=20), Limit(rate=30)


def facts(*vms: str, tenants: tuple[str, ...] = ()) -> Facts:
    return Facts(
        time=0,
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


def test_names_of_long_gone_vms_are_not_kept_for_ever() -> None:
    policy = StaticLimits({"*": TEN})
    policy.decide(facts("old", "kept"))
    gone = attrs.evolve(facts("kept", "new"), gone=(("old", 0), ("never-seen", 3)))
    assert by_vm(policy.decide(gone)) == {"new": TEN}
    assert len(policy._vms_done) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"vms": {"web": 10}}, r"vms\['web'\]=10: must be a Limit"),
        ({"tenants": {"acme": None}}, r"tenants\['acme'\]=None: must be a Limit"),
        ({"host": 5}, "host=5: must be a Limit"),
        ({"interval": 0}, "interval=0"),
        ({"interval": float("nan")}, "interval=nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        StaticLimits(**arguments)  # type: ignore[arg-type]  # that is the point
