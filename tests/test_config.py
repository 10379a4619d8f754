"""Files of rules: what they say, that all mistakes are told at once with their places, and what a reload changes."""

from __future__ import annotations

import json
import tomllib
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import example, given, settings, strategies as st

import orchestra as orc
from orchestra.cli.app import main
from orchestra.config import Mistake, Rules, TomlError, compare, load_rules, parse_rules, reload, watch_rules
from orchestra.model.mistakes import shown
from orchestra.policy import policy_kinds as kinds
from orchestra.toml import _lines

EXAMPLE = Path(__file__).parent.parent / "examples" / "rules.toml"


def mistakes(text: str | bytes) -> list[str]:
    with pytest.raises(TomlError) as caught:
        parse_rules(text)
    return [str(mistake) for mistake in caught.value.mistakes]


# ---- what a file says


def test_the_example_says_what_a_fleet_is_opened_with():
    rules = load_rules(EXAMPLE)
    assert [entry.name for entry in rules.entries] == ["bus-time", "burst-credits[web-*]", "adaptive", "ladder"]
    bus, credits, adaptive, ladder = rules.policies
    assert isinstance(bus, orc.BusTime)
    assert bus.limit.rate == pytest.approx(0.05 * 3e9 / 70_000)
    assert isinstance(credits, orc.Only)
    assert isinstance(credits.policy, orc.BurstCredits)
    assert isinstance(adaptive, orc.Adaptive)
    assert isinstance(ladder, orc.Ladder)
    assert [step.rung for step in ladder.steps] == [orc.Rung.WARN, orc.Rung.THROTTLE, orc.Rung.CAP_CPU]
    assert ladder.steps[1].limit == orc.Limit(rate=400, max_delay=1)
    assert [condition.signal for condition in ladder.steps[2].when] == ["bus_locks", "lock_slowdown"]
    assert rules.limit == orc.Limit(rate=20_000)
    assert rules.tenants["gold"].weight == 2
    assert rules.guard is not None
    assert (rules.guard.floor, rules.guard.is_dry("ladder"), rules.guard.is_dry("adaptive")) == (5, True, False)


async def test_a_fleet_takes_its_policies_limits_and_tenants():
    rules = parse_rules("limit = 50\n[tenants.acme]\nexit_limit = 7\n[[policies]]\nkind = 'weighted-share'\n")
    async with orc.open_fleet(
        backend="scripted", limit=rules.limit, tenants=rules.tenants, policies=rules.policies
    ) as fleet:
        assert fleet.limit == orc.Limit(rate=50)
        assert fleet.tenants["acme"].exit_limit == orc.Limit(rate=7)
        assert [policy.name for policy in fleet.statistics().policies] == ["weighted-share"]


def test_an_empty_file_asks_for_nothing():
    assert parse_rules("") == Rules(file="rules")


def test_every_kind_of_policy_can_be_made():
    needed = {
        "burst-credits": "baseline = 5\nmost = 50",
        "bus-time": "share = 0.05",
    }
    for kind, made in kinds().items():
        (policy,) = parse_rules(f"[[policies]]\nkind = '{kind}'\n{needed.get(kind, '')}").policies
        assert type(policy) is made


def test_a_ladder_can_ask_for_memory_when_the_host_has_too_little():
    [ladder] = parse_rules("""
[[policies]]
kind = "ladder"
only = { vms = "batch-*" }
steps = [
  { rung = "warn", when = { signal = "memory_pressure", over = 0.1 } },
  { rung = "set_memory", when = { signal = "memory_pressure", over = 0.1 }, dwell = 5, memory = 268_435_456 },
]
""").policies
    assert isinstance(ladder.policy, orc.Ladder)
    assert ladder.policy.steps[1] == orc.Step(
        rung="set_memory", when=orc.Condition("memory_pressure", 0.1), dwell=5, memory=256 * orc.MiB
    )
    [wrong] = mistakes(
        '[[policies]]\nkind="ladder"\nsteps=[{rung="set_memory", memory=5, when={signal="cpu", over=1}}]\n'
    )
    assert "memory" in wrong
    assert "5" in wrong


def test_a_ladder_can_have_the_default_steps_for_a_threshold():
    text = "[[policies]]\nkind = 'ladder'\nover = 300\nhighest = 'throttle'\nmeter = 'exits'"
    (ladder,) = parse_rules(text).policies
    assert isinstance(ladder, orc.Ladder)
    assert ladder.steps == orc.default_steps(300, meter="exits", highest="throttle")


def test_none_is_said_as_a_word():
    rules = parse_rules("[guard]\nmax_pause = 'none'\n[[policies]]\nkind = 'adaptive'\nmax_delay = 'none'")
    assert rules.guard is not None
    assert rules.guard.max_pause is None


# ---- what is wrong with it

BAD = """limit = -5
exit_limit = { rate = 0, bursts = 4 }
lmit = 4

[tenants.acme]
weight = -2
limit = "x"

[guard]
floor = -5
cpu_floor = 7
dry_run = 4

[[policies]]
kind = "bus-time"
share = 5
frequency = 3
model = "zen-6"
tenants = { batch = 2.0, ok = 0.1, c = 7.0 }

[[policies]]
kind = "laddr"

[[policies]]
kind = "burst-credits"
most = 1
interval = 99999
only = { vm = "web-*" }

[[policies]]
kind = "adaptive"
floor = -3
[policies.signals]
lock_slowdwn = 1.5
run_delay = -1.0

[[policies]]
kind = "static-limits"
vms = { "web-*" = "q", x = { rat = 3, bus_share = 1 } }

[[policies]]
kind = "ladder"
steps = [
  { rung = "wrn", when = { signal = "exit", over = 5 } },
  { rung = "throttle", limit = 400, dwell = -2, clear = 0 },
]
"""


def test_every_mistake_is_told_at_once_with_its_line_key_and_remedy():
    found = mistakes(BAD)
    expected = [
        "line 1: limit.rate: -5.0: must be more than 0",
        "line 2: exit_limit.bursts: no such key; there are: rate, burst, max_delay; did you mean 'burst'?",
        "line 2: exit_limit.rate: 0.0: must be more than 0",
        "line 3: lmit: no such key; there are: limit, exit_limit, answer_limit, tenants, guard, policies; did you mean "
        "'limit'?",
        "line 6: tenants.acme.weight: -2.0: must be more than 0",
        "line 7: tenants.acme.limit: 'x': must be events a second, or a table such as",
        "line 10: guard.floor: -5.0: must be from",
        "line 11: guard.cpu_floor: 7.0: must be from 0.01 to 1",
        "line 12: guard.dry_run: 4: must be true, false, or names",
        "line 16: policies[0].share: 5.0: must be from 1e-09 to 1",
        "line 17: policies[0].frequency: 3.0: must be from 1e+06",
        "line 18: policies[0].model: 'zen-6': must be a CpuModel or one of default",
        "line 19: policies[0].tenants.batch: 2.0: must be",
        "line 19: policies[0].tenants.c: 7.0: must be",
        "line 22: policies[1].kind: 'laddr': no such policy; there are: adaptive",
        "line 24: policies[2].baseline: is missing",
        "line 26: policies[2].most: 1.0: must be from 2",
        "line 27: policies[2].interval: 99999.0: must be",
        "line 28: policies[2].only.vm: no such key; there are: vms, tenants; did you mean 'vms'?",
        "line 32: policies[3].floor: -3.0: must be more than 0",
        "line 34: policies[3].signals.lock_slowdwn: 'lock_slowdwn': must be one of lock_ns",
        "line 35: policies[3].signals.run_delay: -1.0: must be more than 0",
        "line 39: policies[4].vms.\"web-*\": 'q': must be events a second",
        "line 39: policies[4].vms.x.rat: no such key; there are: rate, burst, max_delay; did you mean 'rate'?",
        "line 39: policies[4].vms.x.bus_share: no such key; for a part of the bus' time take a policy of kind",
        "line 39: policies[4].vms.x.rate: is missing",
        "line 44: policies[5].steps[0].rung: 'wrn': must be one of observe, warn",
        "line 44: policies[5].steps[0].when[0].signal: 'exit': must be one of bus_locks, exits",
        "line 45: policies[5].steps[1].dwell: -2.0: must be from 0",
        "line 45: policies[5].steps[1].clear: 0.0: must be from 0.01",
    ]
    for one in expected:
        assert [said for said in found if said.startswith(one)], (one, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "line 1: Invalid value"),
        ("\n\na = [1,", "line 3: "),
        (b"a = 1\nb = '\xff'", "line 2: is not UTF-8"),
        ("\nlimit = " + "9" * 5000, "line 2: a number beyond 64 bits"),
        ("limit = 0x" + "f" * 6000, "line 1: limit.rate: a number beyond 64 bits"),
        ("limit = 9999999999999999999", "line 1: limit.rate: a number beyond 64 bits"),
        ("\n\npolicies = " + "[" * 3000 + "]" * 3000, "line 3: nested too deeply"),
        ("policies = 5", "line 1: policies: 5: must be [[policies]] tables"),
        ("[[tenants]]\nname = 'a'", "line 1: tenants: an array: must be [tenants.NAME] tables"),
        ("limit = nan", "line 1: limit.rate: nan: must be finite"),
        ("limit = true", "line 1: limit: true: must be events a second"),
        ("[[policies]]\nlimit = 4", "line 1: policies[0].kind: is missing: which policy"),
        (
            "[[policies]]\nkind = 'static-limits'\ninterval = 1e-9",
            "line 3: policies[0].interval: 1e-09: must be from 1e-06",
        ),
        ("policies = [5]", "line 1: policies[0]: 5: must be a table"),
        ("[tenants.'a b']", "line 1: tenants.\"a b\".name: 'a b': must be 1 to 64"),
        ("[guard]\ndry_run = 'laddr'\n[[policies]]\nkind = 'ladder'", "line 2: guard.dry_run: 'laddr': no policy has"),
        ("policies = ['ladder', 'adaptive', 'ladder']", "line 1: policies[2]: 'ladder': another policy has that name"),
        ("[[policies]]\nkind = 'ladder'\nover = 5\nsteps = []", "line 3: policies[0].over: 5.0: give either that or"),
        (
            "[[policies]]\nkind = 'ladder'\nsteps = [\n {rung = 'warn'},\n]",
            "line 4: policies[0].steps[0]: warn: when=()",
        ),
        ("[[policies]]\nkind = 'weighted-share'\nonly = {}", "line 3: policies[0].only: say which"),
        ("[[policies]]\nkind = 'bus-time'\nshare = 0.1\nmodel = {name = 'x', cycles = 0}", "line 4: policies[0].model"),
    ],
)
def test_a_mistake_is_told_with_its_place(text, said):
    found = mistakes(text)
    assert [one for one in found if one.startswith(said)], found


VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(10**25), 10**25),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["none", "bus_locks", "warn", "zen-5", "web-*"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["rate", "burst", "signal", "over", "rung", "when", "limit"]), st.text(max_size=4)
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
PARAMETERS = sorted(
    {"limit", "over", "steps", "vms", "tenants", "host", "interval", "meter", "name", "share", "model", "signals"}
    | {"floor", "most", "baseline", "max_delay", "only", "dry_run", "max_pause", "frequency", "memory", "highest"}
)
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "limit": VALUES,
        "exit_limit": VALUES,
        "tenants": st.one_of(VALUES, st.dictionaries(st.text(max_size=5), VALUES, max_size=2)),
        "guard": st.one_of(VALUES, st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=4)),
        "policies": st.lists(
            st.one_of(
                VALUES,
                st.builds(
                    lambda kind, rest: {"kind": kind, **rest},
                    st.sampled_from(sorted(kinds())),
                    st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=5),
                ),
            ),
            max_size=3,
        ),
        "else": VALUES,
    },
)


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # nan and inf as TOML has them
    return json.dumps(value)


def is_told_with_its_place(text: str | bytes) -> None:
    mistakes: tuple[Mistake, ...] = ()
    try:
        parse_rules(text)
    except TomlError as error:
        mistakes = error.mistakes or (Mistake("", None, ""),)
    for mistake in mistakes:
        assert mistake.line is not None, mistake
        assert mistake.text, mistake


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
@example(b"")
@example("a.b = 1\na.b.c = 2")
@example('"" = 1')
def test_whatever_is_in_the_file_it_is_read_or_told_what_is_wrong_and_where(text):
    is_told_with_its_place(text)


@settings(max_examples=200)
@given(TABLES)
def test_whatever_the_keys_have_for_values_it_is_read_or_told_what_is_wrong_and_where(table):
    text = "\n".join(f"{key} = {as_toml(value)}" for key, value in table.items())
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # JSON's escapes of surrogate pairs
        return
    is_told_with_its_place(text)


@settings(max_examples=150)
@given(TABLES)
def test_every_key_has_a_line_and_it_is_the_one_where_it_is_written(table):
    text = "".join(f"\n# next\n{key} = {as_toml(value)}" for key, value in table.items())
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines, written = _lines(text), text.split("\n")

    def look(value: object, at: tuple[str | int, ...]) -> None:
        if at:
            assert at in lines
        if at and isinstance(at[-1], str):
            assert f"{json.dumps(at[-1])} = " in written[lines[at] - 1] or f"{at[-1]} = " in written[lines[at] - 1]
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in items:
            look(one, (*at, key))

    look(read, ())


def test_a_value_is_named_however_large_it_is():
    assert shown(16**6000) == "a number beyond 64 bits"
    assert len(shown("x" * 1000)) <= 60


# ---- reload

BEFORE = """limit = 100
[tenants.a]
limit = 10
weight = 1
[[policies]]
kind = "weighted-share"
[[policies]]
kind = "adaptive"
[[policies]]
kind = "ladder"
"""
AFTER = """limit = 200
[guard]
floor = 3
[tenants.a]
weight = 3
exit_limit = 4
[tenants.b]
[[policies]]
kind = "adaptive"
floor = 20
[[policies]]
kind = "weighted-share"
[[policies]]
kind = "bus-time"
share = 0.1
"""


class Asked:
    """What a fleet is asked for, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.policies: tuple[orc.Policy, ...] = ()
        self.guard: orc.Guard | None = None
        self.reloads: list[orc.Reload] = []
        self._send, self._receive = trio.open_memory_channel[orc.Reload](10)

    async def set_policies(self, policies, guard=None):
        self.lines.append("policies")
        self.policies, self.guard = tuple(policies), guard

    def check_limit(self, limit, *, meter=orc.Meter.BUS_LOCKS, tenant=None):
        """It refuses nothing."""

    async def set_limit(self, limit, *, meter=orc.Meter.BUS_LOCKS, tenant=None):
        self.lines.append(f"{meter} {tenant} {None if limit is None else limit.rate}")

    async def apply(self, action):
        self.reloads.append(action)
        self._send.send_nowait(action)

    async def applied(self) -> orc.Reload:
        return await self._receive.receive()


def test_a_comparison_says_what_is_different():
    change = compare(parse_rules(BEFORE), parse_rules(AFTER))
    assert change.policies == {"adaptive": "changed", "weighted-share": "kept", "bus-time": "new", "ladder": "gone"}
    assert change.order
    assert change.guard
    assert change.limits == (
        (orc.Meter.BUS_LOCKS, None, orc.Limit(rate=200)),
        (orc.Meter.BUS_LOCKS, "a", None),
        (orc.Meter.EXITS, "a", orc.Limit(rate=4)),
    )
    assert change.later == ("tenant b", "weight of tenant a")
    assert str(change) == (
        "new: bus-time; changed: adaptive; gone: ladder; kept: weighted-share; in another order; another guard; "
        "limit of the host on bus locks: 200/s; limit of tenant a on bus locks: none; limit of tenant a on exits: 4/s; "
        "not before the fleet is opened anew: tenant b, weight of tenant a"
    )
    assert not compare(parse_rules(BEFORE), parse_rules(BEFORE + "# a comment\n"))


async def test_a_reload_keeps_the_policies_that_did_not_change_and_is_journaled():
    fleet, old = Asked(), parse_rules(BEFORE)
    rules = await reload(fleet, old, parse_rules(AFTER, "rules.toml"))
    assert fleet.lines == ["policies", "bus_locks None 200.0", "bus_locks a None", "exits a 4.0"]
    assert fleet.policies == rules.policies
    assert rules.policies[1] is old.policies[0]  # with all that it remembers
    assert rules.policies[0] is not old.policies[1]
    assert fleet.guard is rules.guard
    (told,) = fleet.reloads
    assert told.policies["ladder"] == "gone"
    assert told.reason.startswith("rules.toml: new: bus-time; changed: adaptive")


async def test_a_reload_of_the_same_rules_does_nothing_at_all():
    fleet, old = Asked(), parse_rules(BEFORE)
    rules = await reload(fleet, old, parse_rules(BEFORE))
    assert (fleet.lines, fleet.reloads) == ([], [])
    assert rules.policies == old.policies


async def test_a_reload_without_a_guard_goes_back_to_the_default_one():
    fleet = Asked()
    await reload(fleet, parse_rules("[guard]\nfloor = 7"), parse_rules(""))
    assert fleet.guard is not None
    assert fleet.guard.floor == orc.Guard().floor


async def test_a_policy_that_rehearsed_is_made_anew_when_it_becomes_real_and_when_it_is_no_more():
    both = "[[policies]]\nkind = 'ladder'\n[[policies]]\nkind = 'adaptive'\n"
    real, dry = parse_rules(both), parse_rules("[guard]\ndry_run = 'ladder'\n" + both)
    for old, new in ((real, dry), (dry, real)):
        assert compare(old, new).policies == {"ladder": "changed", "adaptive": "kept"}
        rules = await reload(Asked(), old, new)
        assert rules.policies[0] is new.policies[0]
        assert rules.policies[1] is old.policies[1]


async def test_a_file_is_reloaded_when_it_changes_and_not_taken_when_it_is_wrong(tmp_path, autojump_clock):
    path = tmp_path / "rules.toml"
    path.write_text("limit = 100")
    fleet = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_rules, fleet, load_rules(path))
        await trio.sleep(5)
        assert fleet.lines == []
        path.write_text("limit = 2_000")
        await fleet.applied()
        assert fleet.lines == ["bus_locks None 2000.0"]
        path.write_text("limits = 20\nlimit = 'x'")
        refused = await fleet.applied()
        path.unlink()
        await trio.sleep(2)
        path.write_text("limit = 30_000")
        await fleet.applied()
        nursery.cancel_scope.cancel()
    assert fleet.lines == ["bus_locks None 2000.0", "bus_locks None 30000.0"]
    assert refused.reason == f"{path}: not taken: 2 mistakes"
    assert len(refused.evidence["mistakes"]) == 2


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("", "limit = 1000", orc.BusLockUnsupported),
        ("", "exit_limit = 7\nlimit = 1000", orc.BusLockUnsupported),
        ("[tenants.nobody]", "[tenants.nobody]\nexit_limit = 3", orc.UnknownTenant),
        ("", "exit_limit = 7\npolicies = ['ladder']", orc.BusLockUnsupported),
    ],
)
async def test_rules_that_a_fleet_refuses_change_nothing_at_all(autojump_clock, before, after, error):
    held = "[[policies]]\nkind = 'static-limits'\nmeter = 'exits'\ntenants = { default = %d }\n"
    if "policies" in after:
        one, other = parse_rules(held % 500), parse_rules(after)
    else:
        one, other = parse_rules(f"{before}\n{held % 500}"), parse_rules(f"{after}\n{held % 200}")
    backend = orc.ScriptedBackend(detection=None)
    async with orc.open_fleet(backend=backend, policies=one.policies) as fleet:
        await trio.sleep(1)
        there, done = fleet.statistics(), fleet.actions()
        with pytest.raises(error):
            await reload(fleet, one, other)
        await trio.sleep(1)
        now = fleet.statistics()
        assert now.tenants["default"].exit_limit.rate == 500
        assert (now.policies, now.exit_limit, fleet.actions()) == (there.policies, None, done)


async def test_a_cancelled_reload_is_done_or_not_begun(autojump_clock):
    one, other = (parse_rules(f"exit_limit = {n}\n[tenants.a]\nexit_limit = {n}\n{BODY % n}") for n in (1, 2))
    for after in range(8):
        async with orc.open_fleet(backend="scripted", policies=one.policies, tenants=one.tenants) as fleet:
            await fleet.set_limit(one.exit_limit, meter="exits")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reload, fleet, one, other)
                for _ in range(after):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            told = [applied for applied in fleet.actions() if isinstance(applied.action, orc.Reload)]
            rates = {fleet.exit_limit.rate, fleet.tenants["a"].exit_limit.rate}
            assert rates == ({2} if told else {1})
            assert [policy.name for policy in fleet.statistics().policies] == [f"p{2 if told else 1}"]


BODY = "[[policies]]\nkind = 'weighted-share'\nname = 'p%d'\n"


async def test_tenants_that_wait_for_another_fleet_stand_in_no_later_reload_s_way(autojump_clock):
    now = parse_rules("[tenants.a]\nexit_limit = 1\n[tenants.b]\nexit_limit = 1\n")
    async with orc.open_fleet(backend="scripted", tenants=now.tenants) as fleet:
        for text, a in (
            ("[tenants.a]\nexit_limit = 2\n[tenants.c]\nexit_limit = 1\n", 2),
            ("[tenants.a]\nexit_limit = 3\n[tenants.c]\nexit_limit = 2\n", 3),  # the fleet has no c
            ("[tenants.a]\nexit_limit = 3\n[tenants.b]\nexit_limit = 9\n", 3),
        ):
            now = await reload(fleet, now, parse_rules(text))
            assert fleet.tenants["a"].exit_limit.rate == a
        assert fleet.tenants["b"].exit_limit.rate == 9
        assert not compare(now, parse_rules(text))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fleet": 3}, "fleet=3: must be a fleet"),
        ({"rules": "rules.toml"}, "rules='rules.toml': must be the rules"),
        ({"path": 3}, "path=3: must be the name"),
        ({"every": 0}, "every=0: must be seconds, more than 0"),
        ({"every": "1"}, "every='1': must be a number"),
    ],
)
async def test_a_watch_of_what_cant_be_watched_is_refused(wrong, message):
    with trio.fail_after(5), pytest.raises(orc.SpecError, match=message):
        await watch_rules(**{"fleet": Asked(), "rules": parse_rules(""), **wrong})


async def test_a_change_before_the_watch_begins_is_not_missed(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("limit = 100")
    fleet, rules = Asked(), load_rules(path)
    path.write_text("limit = 2_000")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(watch_rules, every=0.001), fleet, rules)
        with trio.fail_after(5):
            await fleet.applied()
        nursery.cancel_scope.cancel()
    assert fleet.lines == ["bus_locks None 2000.0"]


async def test_rules_that_a_fleet_refuses_are_journaled_and_the_watch_goes_on(tmp_path, autojump_clock):
    path = tmp_path / "rules.toml"
    path.write_text("")

    class Blind(Asked):
        async def set_policies(self, policies, guard=None):
            raise orc.BusLockUnsupported("not seen here")

    fleet = Blind()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_rules, fleet, load_rules(path))
        await trio.sleep(2)
        path.write_text("policies = ['ladder']")
        assert (await fleet.applied()).reason == f"{path}: not taken: not seen here"
        path.write_text("limit = 7")
        assert (await fleet.applied()).reason == f"{path}: limit of the host on bus locks: 7/s"
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(not hasattr(orc.Fleet, "set_policies"), reason="Fleet.set_policies is not there yet")
async def test_a_running_fleet_lets_go_what_a_policy_held_that_is_gone_or_changed(autojump_clock):
    def rules(tenant: int | None) -> Rules:
        static = f"[[policies]]\nkind = 'static-limits'\ntenants = {{ default = {tenant} }}\n" if tenant else ""
        return parse_rules(f"{static}[[policies]]\nkind = 'weighted-share'\n")

    now = rules(50)
    async with orc.open_fleet(backend="scripted", policies=now.policies) as fleet:

        async def limit_after(new: Rules) -> float | None:
            nonlocal now
            now = await reload(fleet, now, new)
            await trio.sleep(1)
            found = fleet.statistics().tenants["default"].limit
            return None if found is None else found.rate

        assert await limit_after(rules(50)) == 50
        assert await limit_after(rules(20)) == 20
        assert await limit_after(rules(70)) == 70  # not the tightest of all that there ever was
        kept = now.policies[1]
        assert await limit_after(rules(None)) is None
        assert now.policies == (kept,)
        assert [policy.name for policy in fleet.statistics().policies] == ["weighted-share"]
        assert await limit_after(rules(30)) == 30
        reloads = [applied.action for applied in fleet.actions() if isinstance(applied.action, orc.Reload)]
        assert [told.policies["static-limits"] for told in reloads] == ["changed", "changed", "gone", "new"]


async def test_a_reload_lands_in_the_journal_of_a_fleet():
    async with orc.open_fleet(backend="scripted") as fleet:
        applied = await fleet.apply(orc.Reload(policies={"ladder": "new"}, reason="rules.toml: new: ladder"))
        assert fleet.actions()[-1] is applied
        assert (applied.outcome, applied.error) == ("done", None)


# ---- the command


def test_policy_check_says_what_a_file_asks_for(capsys):
    assert main(["policy", "check", str(EXAMPLE)]) == 0
    out = capsys.readouterr().out
    assert "policy 4: ladder (ladder), every 0.1 s, a dry run" in out
    assert main(["policy", "check", str(EXAMPLE), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], len(told["policies"]), told["limit"]["rate"]) == (True, 4, 20_000)


def test_policy_check_names_file_line_and_key_of_every_mistake(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(BAD)
    assert main(["policy", "check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert lines[0].startswith(f"{path}:1: limit.rate: -5.0: must be")
    assert len(lines) == 30
    assert last == f"orchestra: 30 mistakes in {path}"
    assert main(["policy", "check", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["mistakes"][0]["line"] == 1
    assert main(["policy", "check", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err
