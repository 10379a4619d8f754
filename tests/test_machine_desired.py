"""The record of what is desired of a VM: askers, what the next run is made from, and that it survives being sent."""

from __future__ import annotations

import json

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import blank
from orchestra.machine.desired import UNLIMITED, AskedCap, AskedLimit, Desired, Limits, PlacedLimits
from orchestra.model import codec
from orchestra.model.spec import tightest

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
    assert desired.limits_at(orc.Meter.BUS_LOCKS) == Limits(limit)
    assert [desired.limits_at(orc.Meter.EXITS, vcpu) for vcpu in (None, 0, 1)] == [
        UNLIMITED,
        Limits(each),
        Limits(each),
    ]
    assert len(desired.limits) == 3  # nothing that limits nothing


def test_what_does_not_fit_the_spec_is_refused_by_name():
    desired = Desired(limits=[PlacedLimits(orc.Meter.EXITS, 2, Limits(orc.Limit(rate=1)))])
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
        (lambda: Desired(limits=[Limits()]), r"limits=.*must be of PlacedLimits only"),
        (lambda: Desired(limits=[PlacedLimits("exits", None, Limits())] * 2), r"limits:.*'exits'.*is there twice"),
        (lambda: AskedCap("a", 0), r"share=0: must be from 0.01 to 1"),
        (lambda: AskedCap("a", float("nan")), r"share=nan"),
        (lambda: AskedCap(5, 0.5), r"by=5: must be a policy's name"),
        (lambda: Limits(5), r"base=5: must be a Limit"),
        (lambda: Limits(None, [AskedLimit(None, orc.Limit(rate=1))] * 2), r"throttles: by: None is there twice"),
        (lambda: PlacedLimits("locks", None, Limits()), r"meter='locks'"),
        (lambda: PlacedLimits("exits", True, Limits()), r"vcpu=True: must be the number of a vCPU"),
        (lambda: PlacedLimits("exits", -1, Limits()), r"vcpu=-1"),
    ],
)
def test_what_is_wrong_is_refused_with_field_and_value(make, says):
    with pytest.raises(orc.SpecError, match=says):
        make()


@given(LIMITS, st.lists(st.tuples(ASKERS, st.one_of(st.none(), LIMITS)), max_size=8))
def test_each_asker_has_one_throttle_and_the_tightest_is_in_force(base, asked):
    limits, held = Limits(base), {}
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
PLACED = st.builds(
    PlacedLimits,
    st.sampled_from(orc.Meter),
    st.one_of(st.none(), st.integers(0, 3)),
    st.builds(Limits, st.one_of(st.none(), LIMITS), THROTTLES),
)
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
