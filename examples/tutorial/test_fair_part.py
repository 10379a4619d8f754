"""Step 5: the policy tried out before any guest runs: on facts made by hand, then over a minute of virtual time."""

import trio

import orchestra as orc
from fair_part import FairPart
from orchestra import testing
from two_tenants import BUDGET, TENANTS

SECOND = 1_000_000_000  # the facts' clock counts nanoseconds


def facts(time: float, **locks: int) -> orc.Facts:
    """What a policy is told: bus locks by tenant in the fifth of a second that ends at `time`."""
    return orc.Facts(
        time=round(time * SECOND),
        interval=0.2,
        limit=BUDGET,  # 100 a second, so 20 in such a tick
        exit_limit=None,
        tenants={name: orc.Tenant(name) for name in TENANTS},
        vms={
            f"{tenant}-vm": orc.VmFacts(
                name=f"{tenant}-vm", tenant=tenant, weight=1, vcpus=1, bus_locks=count, exits=count, throttled=0
            )
            for tenant, count in locks.items()
        },
    )


def test_nobody_is_held_while_there_is_enough() -> None:
    assert list(FairPart().decide(facts(1.0, acme=4, globex=12))) == []


def test_who_takes_more_than_its_part_is_held_to_it() -> None:
    (action,) = FairPart().decide(facts(1.0, acme=4, globex=16))
    assert isinstance(action, orc.Throttle)
    assert (action.tenant, action.limit.rate) == ("globex", 50)
    assert action.evidence == {"rate": 80, "part": 50}


def test_it_is_let_go_after_a_second_of_peace() -> None:
    policy = FairPart(patience=1.0)
    assert list(policy.decide(facts(1.0, acme=4, globex=16)))
    assert list(policy.decide(facts(1.9, acme=4))) == []
    (action,) = policy.decide(facts(2.1, acme=4))
    assert isinstance(action, orc.Unthrottle)


def test_a_minute_of_a_fleet() -> None:
    async def scenario() -> None:
        policies = [FairPart()]
        async with orc.open_fleet(
            backend=testing.backend(), limit=BUDGET, tenants=TENANTS, policies=policies, strict=True
        ) as fleet:
            await fleet.launch(testing.split_locking("shop", rate=40, tenant="acme"))
            await fleet.launch(testing.split_locking("batch", rate=1000, tenant="globex"))
            await trio.sleep(60)
            acme = fleet.statistics().tenants["acme"]
            assert (acme.bus_locks or 0) > 0.99 * 60 * 40  # it got what it wanted
            (held,) = [applied.action for applied in fleet.actions()]
            assert isinstance(held, orc.Throttle)
            assert held.tenant == "globex"

    testing.run(scenario)


if __name__ == "__main__":  # where there is no pytest; with it: pytest test_fair_part.py
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print("passed:", name.removeprefix("test_").replace("_", " "))
