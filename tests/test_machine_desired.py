"""The record of what is desired of a VM: askers, what the next run is made from, and that it survives being sent."""

from __future__ import annotations

import json

import attrs
import pytest
import trio
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import ScriptedExit, hlt
from orchestra.machine.desired import UNLIMITED, AskedCap, AskedLimit, Desired, LimitStack, PlacedLimits
from orchestra.machine.restraint import Restraint
from orchestra.model import codec
from orchestra.model.spec import tightest

FAIL = ScriptedExit("debug", args=(1, 0, 0, 0))
FOR_EVER = hlt(after=1e9)
ASKERS = st.one_of(st.none(), st.text(max_size=4))
RATES = st.floats(0.01, 1e6)
LIMITS = st.builds(orc.Limit, rate=RATES, burst=st.one_of(st.none(), st.floats(1, 1e6)))


def test_the_tightest_cap_counts_and_each_asker_has_one():
    desired = Desired()
    assert desired.cap is None
    desired = desired.with_cap("a", 0.5).with_cap(None, 0.8)
    assert (desired.cap, desired.cap_of("a"), desired.cap_of("b")) == (0.5, 0.5, None)
    desired = desired.with_cap("a", 0.9)
    assert desired.caps == (AskedCap(None, 0.8), AskedCap("a", 0.9))
    assert desired.with_cap("nobody", None).with_cap("a", None).caps == (AskedCap(None, 0.8),)


def test_asking_changes_nothing_before_it_is_put():
    desired = Desired()
    desired.with_cap("a", 0.5)
    assert desired.caps == ()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        desired.paused = True  # type: ignore[misc]


def test_the_next_run_logs_what_the_spec_says_until_somebody_says_otherwise():
    spec = blank(regions=[orc.MemoryRegion(0x200000, 0x1000, log_dirty=True)])
    desired = Desired()
    assert desired.spec(spec) is spec
    assert desired.logs_dirty(spec)
    off = attrs.evolve(desired, log_dirty=False)
    assert not off.logs_dirty(spec)
    assert [region.log_dirty for region in off.spec(spec).regions] == [False]
    assert attrs.evolve(desired, log_dirty=True).spec(spec).log_dirty


def test_a_launch_desires_what_its_spec_says():
    limit, each = orc.Limit(rate=5), orc.Limit(rate=2)
    spec = blank(vcpus=2, sample_every=7, limit=limit, vcpu_exit_limit=each, answer_limit=None)
    desired = Desired.of(spec, paused=True)
    assert (desired.paused, desired.sample_every, desired.isolated, desired.log_dirty) == (True, 7, False, None)
    assert desired.limits_at(orc.Meter.BUS_LOCKS) == LimitStack(limit)
    assert [desired.limits_at(orc.Meter.EXITS, vcpu) for vcpu in (None, 0, 1)] == [
        UNLIMITED,
        LimitStack(each),
        LimitStack(each),
    ]
    assert len(desired.limits) == 3  # nothing that limits nothing


def test_what_does_not_fit_the_spec_is_refused_by_name():
    desired = Desired(limits=[PlacedLimits(orc.Meter.EXITS, 2, LimitStack(orc.Limit(rate=1)))])
    desired.check_for(blank(vcpus=3))
    with pytest.raises(orc.SpecError, match=r"limits: vcpu=2: vm 'guest' has vCPUs 0 to 1"):
        desired.check_for(blank(vcpus=2))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Desired(paused=1), r"paused=1: must be True or False"),
        (lambda: Desired(isolated=None), r"isolated=None: must be"),
        (lambda: Desired(log_dirty="on"), r"log_dirty='on': must be"),
        (lambda: Desired(sample_every=-1), r"sample_every=-1"),
        (lambda: Desired(caps=5), r"caps=5: must be of AskedCap only"),
        (lambda: Desired(caps=[0.5]), r"caps=.*must be of AskedCap only"),
        (lambda: Desired(caps=[AskedCap("a", 0.5), AskedCap("a", 0.4)]), r"caps: by: 'a' is there twice"),
        (lambda: Desired(limits=[LimitStack()]), r"limits=.*must be of PlacedLimits only"),
        (lambda: Desired(limits=[PlacedLimits("exits", None, LimitStack())] * 2), r"limits:.*'exits'.*is there twice"),
        (lambda: AskedCap("a", 0), r"share=0: must be from 0.01 to 1"),
        (lambda: AskedCap("a", float("nan")), r"share=nan"),
        (lambda: AskedCap(5, 0.5), r"by=5: must be a policy's name"),
        (lambda: LimitStack(5), r"base=5: must be a Limit"),
        (lambda: LimitStack(None, [AskedLimit(None, orc.Limit(rate=1))] * 2), r"throttles: by: None is there twice"),
        (lambda: PlacedLimits("locks", None, LimitStack()), r"meter='locks'"),
        (lambda: PlacedLimits("exits", True, LimitStack()), r"vcpu=True: must be the number of a vCPU"),
        (lambda: PlacedLimits("exits", -1, LimitStack()), r"vcpu=-1"),
        (lambda: PlacedLimits("exits", 0, LimitStack().with_throttle("a", orc.Limit(rate=1))), r"vcpu=0, limits"),
    ],
)
def test_what_is_wrong_is_refused_with_field_and_value(make, says):
    with pytest.raises(orc.SpecError, match=says):
        make()


@given(LIMITS, st.lists(st.tuples(ASKERS, st.one_of(st.none(), LIMITS)), max_size=8))
def test_each_asker_has_one_throttle_and_the_tightest_is_in_force(base, asked):
    limits, held = LimitStack(base), {}
    for by, limit in asked:
        limits = limits.with_throttle(by, limit)
        held.pop(by, None)
        if limit is not None:
            held[by] = limit
    assert {one.by: one.limit for one in limits.throttles} == held
    assert limits.in_force == tightest(base, [one.limit for one in limits.throttles])
    assert limits.with_base(None).throttles == limits.throttles


def unique(values, key):
    return list({key(value): value for value in values}.values())


THROTTLES = st.lists(st.builds(AskedLimit, ASKERS, LIMITS), max_size=3).map(lambda some: unique(some, lambda o: o.by))
OF_VM = st.builds(
    PlacedLimits,
    st.sampled_from(orc.Meter),
    st.none(),
    st.builds(LimitStack, st.one_of(st.none(), LIMITS), THROTTLES),
)
OF_VCPU = st.builds(
    PlacedLimits, st.sampled_from(orc.Meter), st.integers(0, 3), st.builds(LimitStack, st.one_of(st.none(), LIMITS))
)
PLACED = st.one_of(OF_VM, OF_VCPU)
RECORDS = st.builds(
    Desired,
    paused=st.booleans(),
    caps=st.lists(st.builds(AskedCap, ASKERS, st.floats(0.01, 1)), max_size=3).map(
        lambda some: unique(some, lambda one: one.by)
    ),
    isolated=st.booleans(),
    log_dirty=st.one_of(st.none(), st.booleans()),
    sample_every=st.integers(0, 1000),
    limits=st.lists(PLACED, max_size=4).map(lambda some: unique(some, lambda one: (one.meter, one.vcpu))),
)


@given(RECORDS)
def test_the_record_survives_a_file_and_a_wire(desired):
    data = json.loads(json.dumps(codec.to_document(desired)))
    assert codec.from_document(Desired, data) == desired


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.sampled_from([field.name for field in attrs.fields(Desired)]), JSON)
def test_whatever_comes_instead_of_a_field_is_a_record_or_a_clear_error(field, data):
    try:
        made = codec.decode(Desired, {field: data})
    except orc.SpecError as error:
        said = str(error)
    else:
        assert isinstance(made, Desired)
        return
    assert field in said


# ---- put into force, by one call


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, object]]:
    """A backend that can cap and isolate: what it was told."""
    told: list[tuple[str, object]] = []
    monkeypatch.setattr(Restraint, "cap_cpu", lambda self, share: told.append(("cap", share)))
    monkeypatch.setattr(Restraint, "isolate", lambda self, on: told.append(("isolate", on)))
    return told


async def test_a_vm_that_arrives_is_held_as_it_was_where_it_left(autojump_clock, told):
    slow, slower, each = (orc.Limit(rate=rate, burst=1) for rate in (50, 5, 20))
    spec = blank(vcpus=2, limit=slow, sample_every=3)
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(spec)
        vm.cap_cpu(0.5)
        vm.isolate()
        vm.set_sampling(9)
        await vm.set_limit(each, meter="exits", vcpu=1)
        await fleet.apply(orc.CapCpu(vm="guest", share=0.2), policy="p")
        await fleet.apply(orc.Throttle(vm="guest", limit=slower), policy="p")
        await vm.pause()
        record = json.dumps(codec.to_document(vm.desired))
    told.clear()
    async with play([FOR_EVER]) as fleet:
        desired = codec.from_document(Desired, json.loads(record))
        vm = (await fleet._context.supervisor.admit(spec, desired)).handle
        assert vm.desired == desired
        assert (vm.state, vm.quiesced) == ("paused", True)
        assert told == [("cap", 0.2), ("isolate", True)]
        assert (vm.statistics().limit.rate, vm.desired.sample_every) == (5, 9)
        assert vm.desired.limits_at(orc.Meter.EXITS, 1).base == each
        done = {(type(applied.action).__name__, applied.policy) for applied in fleet.actions()}
        assert done == {("Pause", None), ("CapCpu", None), ("CapCpu", "p"), ("Isolate", None), ("Throttle", "p")}
        # Whoever held it there holds it here, and lets it go by the same actions.
        for action in (orc.Unthrottle(vm="guest"), orc.CapCpu(vm="guest", share=None)):
            assert (await fleet.apply(action, policy="p")).outcome == "done"
        assert (vm.statistics().limit, vm.desired.cap) == (slow, 0.5)
        await vm.resume()
        assert vm.state == "running"


async def test_a_record_that_does_not_fit_is_refused_before_anything_is_made(autojump_clock):
    limits = [PlacedLimits("exits", 4, LimitStack(orc.Limit(rate=1)))]
    async with play([FOR_EVER]) as fleet:
        with pytest.raises(orc.SpecError, match="vcpu=4"):
            await fleet._context.supervisor.admit(blank(), Desired(limits=limits))
        assert dict(fleet.vms) == {}


async def test_what_cant_be_put_into_force_where_it_arrives_is_not_said_to_be(autojump_clock):
    """The scripted backend has no threads."""
    async with play([FOR_EVER]) as fleet:
        vm = (await fleet._context.supervisor.admit(blank(), Desired(caps=[AskedCap("p", 0.5)], isolated=True))).handle
        assert (vm.state, vm.desired.caps, vm.desired.isolated) == ("running", (), False)
        last = [applied.action for applied in fleet.actions()][-2:]
        assert [(type(action), action.reason[:20]) for action in last] == [
            (orc.CapCpu, "the host can't put i"),
            (orc.Rejoin, "the host can't put i"),
        ]


@pytest.mark.parametrize("again", ["restart", "reset"])
async def test_each_run_is_held_as_the_one_before(autojump_clock, told, again):
    lives = iter([[attrs.evolve(FAIL, after=5)], [FOR_EVER]])
    backend = orc.ScriptedBackend(lambda spec, vcpu: next(lives))
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(restart=orc.Restart("on-failure", backoff=1)))
        vm.cap_cpu(0.5)
        vm.isolate()
        await fleet.apply(orc.Throttle(vm="guest", limit=orc.Limit(rate=5)), policy="p")
        await vm.pause()
        await vm.resume()
        before = vm.desired
        told.clear()
        if again == "reset":
            await vm.reset()
        else:
            await trio.sleep(10)
        assert (vm.restarts, vm.statistics().resets) == ((1, 0) if again == "restart" else (0, 1))
        assert vm.desired == before
        assert told == [("cap", 0.5), ("isolate", True)]
