"""A fleet as data: it comes back from JSON and TOML as it was, opens as often as asked, and refuses what can't be."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st

import orchestra as orc
from orchestra import aio
from orchestra.config import TomlError, load_fleet
from orchestra.journal import Journal, read_journal
from orchestra.model.codec import decode, encode, from_document, to_document
from orchestra.policy import policy_kinds
from test_model_codec import JSON, KEYS, LIMITS

NAMES = st.sampled_from(["acme", "web-1", "default", "b"])
CONDITIONS = st.builds(
    orc.Condition, signal=st.sampled_from(["bus_locks", "exits", "run_delay"]), over=st.floats(50, 900)
)
STEPS = st.builds(orc.Step, rung=st.just(orc.Rung.WARN), when=st.tuples(CONDITIONS), dwell=st.floats(0.5, 9))
ARGUMENTS = {
    "adaptive": {"floor": st.floats(1, 99), "max_delay": st.none() | st.floats(0.1, 9)},
    "burst-credits": {"baseline": st.floats(1, 90), "most": st.floats(100, 900)},
    "bus-time": {"share": st.floats(0.01, 0.5), "model": st.sampled_from(["zen-5", orc.CPU_MODELS["skylake"]])},
    "ladder": {"steps": st.tuples(STEPS), "meter": st.just(orc.Meter.BUS_LOCKS)},
    "static-limits": {"vms": st.dictionaries(NAMES, LIMITS, max_size=2), "host": st.none() | LIMITS},
    "weighted-share": {"limit": st.none() | LIMITS, "interval": st.floats(0.01, 9), "memory": st.integers(1, 9)},
}
ONLY = st.none() | st.builds(orc.Chosen, vms=st.just(("web-*",)), tenants=st.none() | st.just(("a", "b")))
POLICIES = st.one_of(
    *(
        st.builds(orc.PolicySpec, st.just(kind), st.fixed_dictionaries(arguments), ONLY)
        for kind, arguments in ARGUMENTS.items()
    )
)
GUARDS = st.builds(
    orc.Guard,
    floor=st.floats(1, 9),
    max_pause=st.none() | st.floats(1, 9),
    dry_run=st.booleans() | st.just(("ladder",)),
)
FLEETS = st.builds(
    orc.FleetSpec,
    backend=st.sampled_from(["auto", "kvm", "scripted"]),
    limit=st.none() | LIMITS,
    exit_limit=st.none() | LIMITS,
    tenants=st.lists(
        st.builds(orc.Tenant, NAMES, st.floats(0.5, 9), LIMITS), max_size=3, unique_by=lambda one: one.name
    ),
    policies=st.lists(POLICIES, max_size=3, unique_by=lambda one: one.name),
    bus_locks=st.sampled_from(["require", "auto"]),
    strict=st.booleans(),
    guard=st.none() | GUARDS,
    journal=st.none() | st.builds(orc.JournalSpec, st.just("fleet.db"), st.floats(1, 30)),
    journal_interval=st.floats(0.001, 9),
    probe=st.none() | st.booleans(),
    quarantine=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3),
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(encode(value), allow_nan=False))


@settings(deadline=None)
@given(FLEETS)
def test_a_fleet_comes_back_as_it_was(spec):
    assert decode(orc.FleetSpec, through_json(spec)) == spec
    assert from_document(orc.FleetSpec, json.loads(json.dumps(to_document(spec)))) == spec


@given(POLICIES)
def test_a_policy_comes_back_as_it_was_and_makes_one_of_its_class(policy):
    again = decode(orc.PolicySpec, through_json(policy))
    assert again == policy
    made = again.make()
    assert made is not again.make()
    assert type(made.policy if isinstance(made, orc.Only) else made) is policy_kinds()[policy.kind]


PARAMETERS = st.sampled_from(["limit", "steps", "only", "name", "vms", "interval", "meter", "over"])
FIELDS = st.sampled_from([field.alias for field in attrs.fields(orc.FleetSpec)])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(FIELDS | KEYS, JSON, max_size=4))
def test_whatever_comes_for_a_fleet_is_one_or_a_spec_error(data):
    try:
        spec = decode(orc.FleetSpec, data)
    except orc.SpecError:
        return
    assert decode(orc.FleetSpec, through_json(spec)) == spec


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(policy_kinds())), st.dictionaries(PARAMETERS, JSON))
def test_whatever_comes_for_a_policy_is_one_or_a_spec_error(kind, data):
    try:
        spec = decode(orc.PolicySpec, {**data, "kind": kind})
    except orc.SpecError:
        return
    assert decode(orc.PolicySpec, through_json(spec)) == spec


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": 5}, "backend=5: must be a name"),
        ({"backend": "kvn"}, "backend='kvn': must be 'auto', .* or a Backend object; did you mean 'kvm'?"),
        ({"limit": 5}, "limit=5: must be a Limit"),
        ({"tenants": 5}, "tenants=5: must be a mapping by name"),
        ({"tenants": {"a": orc.Tenant("b")}}, "its name is 'b'"),
        ({"policies": [5]}, "policies: 5 must have a name"),
        ({"policies": ["ladder"]}, "policies: 'ladder' must be a policy, such as WeightedShare\\(\\), or PolicySpec"),
        ({"policies": [orc.WeightedShare]}, "policies: <class .*WeightedShare'> must be a policy"),
        ({"tenants": ["acme"]}, "tenants: 'acme': must be a Tenant, or tenants a mapping"),
        ({"policies": "ladder"}, "policies='ladder': must be policies"),
        ({"policies": [orc.PolicySpec("ladder")] * 2}, "two are named 'ladder'"),
        ({"bus_locks": "of"}, 'bus_locks=\'of\': must be "require", "auto" or "off"'),
        ({"bus_locks": "off", "limit": orc.Limit(rate=5)}, "limit limits bus locks, but"),
        ({"strict": 1}, "strict=1: must be True or False"),
        ({"journal": 5}, "journal=5: must be"),
        ({"journal_interval": 0}, "journal_interval=0: must be seconds"),
        ({"probe": "yes"}, "probe='yes'"),
        ({"cgroup": 5}, "cgroup=5: must be a folder"),
        ({"cap_by": "me"}, "cap_by='me': must be"),
        ({"on_evict": 5}, "on_evict=5: must be an async function"),
        ({"open_file": 5}, "open_file=5: must be a function"),
        ({"quarantine": []}, r"quarantine=\(\): must be numbers of CPUs"),
        ({"quarantine": 5}, "quarantine=5"),
    ],
)
def test_what_cant_be_is_refused_where_the_spec_is_made_and_where_a_fleet_is_opened(fields, message):
    for take in (orc.FleetSpec, orc.open_fleet):
        with pytest.raises(orc.SpecError, match=message):
            take(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: orc.PolicySpec("laddr"), "kind='laddr': no such policy; there are: .*; did you mean 'ladder'"),
        (lambda: orc.PolicySpec(["ladder"]), r"kind=.*: no such policy; there are: "),  # type: ignore[arg-type]
        (
            lambda: orc.PolicySpec("ladder", {"ovr": 5}),
            "ovr: no such parameter; there are: steps, over.*; did you mean 'over'",
        ),
        (lambda: orc.PolicySpec("ladder", 3), "arguments=3: must be a mapping"),
        (lambda: orc.PolicySpec("ladder", "over"), "arguments='over': must be a mapping"),  # type: ignore[arg-type]
        (lambda: orc.PolicySpec("ladder", only="web-*"), "only='web-.': must be a Chosen"),  # type: ignore[arg-type]
        (lambda: orc.PolicySpec("ladder", only={"vms": "a"}), "only=.*: must be a Chosen"),
        (lambda: orc.PolicySpec("bus-time", {"share": 7}), "share=7: must be from"),
        (lambda: orc.PolicySpec("ladder", only=orc.Chosen()), "say which"),
        (lambda: orc.Chosen(vms=()), r"vms=\(\): must be a pattern"),
        (lambda: orc.Chosen(vms="web-*"), "vms='web-\\*': must be a pattern .* in a tuple"),
        (lambda: orc.JournalSpec(""), "path='': must be"),
        (lambda: orc.JournalSpec("a", keep_days=0), "keep_days=0"),
        (lambda: orc.JournalSpec("a", keep_days="9"), "keep_days='9': must be a number"),
        (lambda: orc.JournalSpec("a", keep_bytes=1.5), "keep_bytes=1.5: must be a whole number of bytes"),
    ],
)
def test_a_part_that_cant_be_is_refused_where_it_is_made(make, message):
    with pytest.raises(orc.SpecError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": orc.ScriptedBackend()}, "backend: .*object of this process only.*name a backend"),
        ({"policies": [orc.WeightedShare()]}, "policies: .*give a PolicySpec"),
        ({"journal": Journal("fleet.db")}, "journal: .*give a JournalSpec"),
        ({"on_evict": trio.sleep}, "on_evict: .*leave it out"),
        ({"open_file": orc.OpenedFiles({})}, "open_file: .*leave it out"),
    ],
)
def test_a_live_object_opens_a_fleet_and_is_neither_kept_nor_sent(fields, message):
    spec = orc.FleetSpec(**fields)
    with pytest.raises(orc.SpecError, match=message):
        encode(spec)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"limits": {}}, "limits: no such key; there are: backend, limit, .*; did you mean 'limit'"),
        ({"limit": {"rate": -1, "burst": 0}}, r"limit.rate=-1.0: must be more than 0.*limit.burst=0.0: must be from 1"),
        ({"tenants": {"a b": {}}}, "tenants.a b.name='a b': must be 1 to 64"),
        ({"tenants": {"a": {"name": "b"}}}, "its name is 'b'"),
        (
            {"tenants": {"a": {"weight": 0}, "b": {"limit": 7}}},
            "tenants.a.weight=0.0: .*; tenants.b.limit=7: must be",
        ),
        ({"policies": [{"kind": "laddr"}]}, r"policies\[0\].kind='laddr': no such policy; .*'ladder'"),
        ({"policies": [{"interval": 1}]}, r"policies\[0\].kind: is missing: which policy"),
        ({"policies": ["ladder", {"kind": "bus-time", "share": 7}]}, r"policies\[1\].share=7.0: must be from"),
        ({"policies": [{"kind": "ladder", "only": {"vm": ["a"]}}]}, r"policies\[0\].only.vm: no such key"),
        ({"guard": {"floor": -1}}, "guard.floor=-1.0: must be from"),
        ({"journal": {"path": "a", "keep_days": 0}}, "journal.keep_days=0.0: must be more than 0"),
        ({"on_evict": "me"}, "on_evict='me': must be null"),
        ({"backend": ["kvm"]}, "backend: a list: must be a text"),
        ({"quarantine": [0.5]}, r"quarantine\[0\]=0.5: must be a whole number"),
        ({"bus_locks": "of"}, "bus_locks='of': must be one of 'require', 'auto', 'off'; did you mean 'off'"),
    ],
)
def test_all_that_is_wrong_with_data_is_named_with_its_path(data, message):
    with pytest.raises(orc.CodecError, match=message):
        decode(orc.FleetSpec, data)


# ---- opening


async def test_a_spec_opens_a_fleet_as_its_fields_do(autojump_clock):
    fields: dict[str, Any] = {"limit": orc.Limit(rate=50), "tenants": {"acme": orc.Limit(rate=5)}}
    async with orc.open_fleet(orc.FleetSpec(backend="scripted", **fields)) as one:
        async with orc.open_fleet(backend="scripted", **fields) as other:
            assert one.limit == other.limit == orc.Limit(rate=50)
            assert one.tenants == other.tenants


@pytest.mark.parametrize("opened", [orc.open_fleet, aio.open_fleet])
@pytest.mark.parametrize("spec", [(), (orc.FleetSpec(),)])
def test_a_field_that_no_fleet_has_is_answered_with_the_one_that_was_meant(opened, spec):
    with pytest.raises(TypeError, match=r"open_fleet\(\) takes no 'bakend'; see FleetSpec; did you mean 'backend'"):
        opened(*spec, bakend="kvm")


async def test_fields_beside_a_spec_replace_what_it_says(autojump_clock):
    spec = orc.FleetSpec(backend="kvm", limit=orc.Limit(rate=50))
    async with orc.open_fleet(spec, backend="scripted", exit_limit=orc.Limit(rate=9)) as fleet:
        assert (fleet.backend.name, fleet.limit.rate, fleet.exit_limit.rate) == ("scripted", 50, 9)
    with pytest.raises(orc.SpecError, match="must be a FleetSpec"):
        orc.open_fleet({"limit": 5})  # type: ignore[call-overload]


async def test_one_spec_opens_many_fleets_each_with_policies_and_a_guard_of_its_own(autojump_clock):
    guard = orc.Guard(limits_per_minute=1)
    spec = orc.FleetSpec(
        backend="scripted",
        guard=guard,
        policies=[orc.PolicySpec("static-limits", {"host": orc.Limit(rate=7)})],
    )
    for _ in range(2):  # a guard that had seen the first fleet would refuse the limit of the second
        async with orc.open_fleet(spec) as fleet:
            await trio.sleep(1)
            assert fleet.limit is not None
            assert fleet.limit.rate == 7


@pytest.mark.parametrize("asked", [str, lambda path: path, lambda path: orc.JournalSpec(str(path))])
async def test_a_journal_may_be_a_file(tmp_path, asked, autojump_clock):
    path = tmp_path / "fleet.db"
    async with orc.open_fleet(backend="scripted", journal=asked(path)) as fleet:
        await fleet.apply(orc.Reload(reason="hello"))
        assert fleet.statistics().journal is not None
    with read_journal(path) as reader:
        assert [row.reason for row in reader.actions()] == ["hello"]


def test_a_file_in_toml_holds_a_fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        """backend = "scripted"
limit = 100
journal = { path = "fleet.db", keep_days = 7 }
quarantine = [0]
[tenants.acme]
weight = 2
[guard]
max_pause = "none"
[[policies]]
kind = "ladder"
over = 300
only = { vms = "web-*" }
"""
    )
    assert load_fleet(path) == orc.FleetSpec(
        backend="scripted",
        limit=orc.Limit(rate=100),
        journal=orc.JournalSpec("fleet.db", keep_days=7.0),
        quarantine=[0],
        tenants=[orc.Tenant("acme", weight=2.0)],
        guard=orc.Guard(max_pause=None),
        policies=[orc.PolicySpec("ladder", {"over": 300.0}, orc.Chosen(vms=("web-*",)))],
    )
    path.write_text("journal = 'fleet.db'")
    assert load_fleet(path) == orc.FleetSpec(journal="fleet.db")
    path.write_text("journal = 5")
    with pytest.raises(TomlError, match="line 1: journal: 5: must be a table"):
        load_fleet(path)
    path.write_text("limit = -5\nbackend = 5\n[[policies]]\nkind = 'laddr'")
    with pytest.raises(TomlError) as caught:
        load_fleet(path)
    assert [str(one).partition(": must")[0].partition("; there")[0] for one in caught.value.mistakes] == [
        "line 1: limit.rate: -5.0",
        "line 2: backend: 5",
        "line 4: policies[0].kind: 'laddr': no such policy",
    ]


async def test_other_policies_may_come_as_data_while_a_fleet_runs(autojump_clock):
    async with orc.open_fleet(backend="scripted") as fleet:
        await fleet.set_policies([orc.PolicySpec("static-limits", {"host": orc.Limit(rate=7)})])
        await trio.sleep(1)
        assert fleet.limit is not None
        assert fleet.limit.rate == 7
        with pytest.raises(orc.SpecError, match="two are named 'ladder'"):
            await fleet.set_policies([orc.PolicySpec("ladder")] * 2)
