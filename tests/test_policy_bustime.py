"""BusTime: so many percent of the bus, in locks a second."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from closed_loop import SECOND, Guest, World, steady
from orchestra.model.actions import Throttle
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter, Tenant
from orchestra.policy import CPU_MODELS, BusTime, CpuModel, Facts, Policy

# 0.35 % of a 2 GHz bus are 1000 locks of 7000 cycles a second, as the kernel's documentation has it.
KERNELS_EXAMPLE = BusTime(0.0035)


def facts(*tenants: Tenant) -> Facts:
    return Facts(SECOND, 0.1, None, None, {tenant.name: tenant for tenant in tenants}, {})


def test_it_is_a_policy_on_bus_locks():
    assert isinstance(BusTime(0.05), Policy)
    assert BusTime(0.05).meter is Meter.BUS_LOCKS


def test_the_example_of_the_kernels_documentation():
    assert KERNELS_EXAMPLE.limit.rate == pytest.approx(1000)
    assert BusTime(share=0.05).limit.rate == pytest.approx(14285.71, abs=0.01)


@given(st.floats(1e-4, 1), st.floats(1e8, 1e10), st.floats(100, 1e5), st.floats(0.5, 20))
def test_the_budget_takes_up_its_share_of_the_bus(share, frequency, cycles, damage):
    rate = BusTime(share, frequency=frequency, model=CpuModel("mine", cycles, damage)).limit.rate
    assert rate * cycles * damage / frequency == pytest.approx(share)


def test_models_count_the_damage():
    assert BusTime(0.05, model="zen-5").limit.rate == pytest.approx(BusTime(0.05).limit.rate / 10)
    assert all(name == model.name and model.source for name, model in CPU_MODELS.items())


def test_the_host_and_tenants_are_limited_once_and_it_is_told_how_it_was_reckoned():
    policy = BusTime(0.05, frequency=3e9, tenants={"ac*": 0.02})
    host, acme = policy.decide(facts(Tenant(name="acme"), Tenant(name="other")))
    assert host == Throttle(
        limit=policy.limit,
        reason="5 % of the bus for the host: 21428.6 locks/s at 3 GHz, 7000 cycles each",
        evidence={
            "share": 0.05,
            "frequency": 3e9,
            "cycles": 7000,
            "damage": 1,
            "model": "default",
            "source": CPU_MODELS["default"].source,
        },
    )
    assert acme.tenant == "acme"
    assert acme.limit.rate == pytest.approx(0.02 * 3e9 / 7000)
    assert acme.evidence["share"] == pytest.approx(0.02)
    assert acme.evidence["pattern"] == "ac*"
    assert policy.decide(facts(Tenant(name="acme"))) == []


def test_without_fairness_it_looks_once():
    assert BusTime(0.05, fair=False).interval is None
    assert BusTime(0.05, interval=0.2).interval == 0.2
    assert len(BusTime(0.05, fair=False).decide(facts())) == 1


def test_tenants_share_by_weight_and_no_more_than_their_part():
    tenants = [Tenant(name="gold", weight=3), Tenant(name="brass"), Tenant(name="capped", weight=100)]
    guests = [Guest(tenant.name, steady(2000), tenant.name) for tenant in tenants]
    policy = BusTime(0.0035, tenants={"capped": 0.0007})  # 1000/s for all, 200/s for one of them
    world = World(policy, guests, tenants=tenants).run(6)
    assert world.rate("capped", 3) == pytest.approx(200, rel=0.03)
    assert world.rate("gold", 3) == pytest.approx(600, rel=0.03)
    assert world.rate("brass", 3) == pytest.approx(200, rel=0.03)


def test_a_tenants_own_tighter_limit_stays():
    tenants = [Tenant(name="tight", limit=Limit(rate=50)), Tenant(name="other")]
    guests = [Guest(tenant.name, steady(2000), tenant.name) for tenant in tenants]
    world = World(BusTime(0.0035, tenants={"*": 0.003}), guests, tenants=tenants).run(5)
    assert world.rate("tight", 2) == pytest.approx(50, rel=0.05)
    assert world.rate("other", 2) > 800


@settings(max_examples=10)
@given(st.lists(st.floats(10, 600), min_size=1, max_size=4), st.floats(100, 800))
def test_what_is_done_adds_up_to_the_budget_or_to_what_is_asked_for(rates, budget):
    policy = BusTime(budget * 7000 / 2e9)
    world = World(policy, [Guest(f"v{n}", steady(rate)) for n, rate in enumerate(rates)]).run(4)
    done = sum(world.totals[-20:]) / 20
    assert done <= budget * 1.03 + 1
    # A guest that is delayed asks for less: near the budget some of it is not asked for at all.
    assert done >= 0.9 * min(budget, sum(rates)) - 1


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"share": 0}, "share=0: .*such as 0.05 for 5 %"),
        ({"share": 5}, "share=5"),
        ({"frequency": 2}, "frequency=2"),
        ({"model": "z80"}, "model='z80': must be a CpuModel or one of default"),
        ({"share": 1e-9}, "0.001 to 1e9"),
        ({"tenants": {"acme": 5}}, "acme"),
        ({"burst": -1}, "burst=-1"),
        ({"interval": 0}, "interval=0"),
    ],
)
def test_bad_parameters_are_named(more, named):
    with pytest.raises(SpecError, match=named):
        BusTime(**({"share": 0.05} | more))


def test_bad_models_are_named():
    with pytest.raises(SpecError, match="cycles=0"):
        CpuModel("mine", cycles=0)
    with pytest.raises(SpecError, match="damage=0"):
        CpuModel("mine", damage=0)
