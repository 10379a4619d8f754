"""`orchestra why` and `orchestra journal`: what a journal has is told rightly, and what it has not is not made up."""

from __future__ import annotations

import csv
import json
import random
import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from journals import BEGIN, SECOND, Afternoon, lived, vm
from orchestra.cli import app
from orchestra.cli.app import main
from orchestra.journal import read_journal, schema
from orchestra.journal.explain import explain
from orchestra.journal.export import FILTERS, TABLES
from orchestra.journal.holds import in_force
from orchestra.journal.series import series
from orchestra.output.times import day_and_time, duration, parse_time, time_of_day


@pytest.fixture
def afternoon(tmp_path: Path) -> Iterator[Afternoon]:
    made = Afternoon(tmp_path / "fleet.db")
    yield made
    made.close()


def told(afternoon: Afternoon, capsys: pytest.CaptureFixture[str], name: str, *more: str) -> str:
    """What `why` answers, on one line."""
    afternoon.close()
    assert main(["why", name, "--journal", str(afternoon.path), *more]) == 0
    return " ".join(capsys.readouterr().out.split())


def at(seconds: float) -> int:
    return BEGIN + round(seconds * SECOND)


def noisy_afternoon(afternoon: Afternoon, *policies: orc.Policy) -> None:
    afternoon.state("noisy", "running")
    afternoon.state("web-1", "running")
    wants = {"noisy": lambda s: 5000 if 100 <= s < 250 else 2, "web-1": lambda s: 1}
    lived(afternoon, 300, wants, policies)


LADDER = orc.default_steps(1000)


# ---- why


def test_a_vm_that_is_held_is_told_by_whom_since_when_why_and_what_ends_it(afternoon, capsys):
    noisy_afternoon(afternoon, orc.Ladder(LADDER, interval=1.0))
    text = told(afternoon, capsys, "noisy", "--at", f"{datetime.fromtimestamp(at(200) / SECOND).isoformat()}")
    assert f"noisy of tenant acme was running at {day_and_time(at(200))}" in text
    assert f"For 98 s, since {time_of_day(at(102))}, policy ladder has held it to 500 bus locks/s" in text
    assert "throttle: bus_locks 5000 over 1000, for 1 s" in text
    assert "did 500 bus locks/s" in text
    assert "was throttled 90% of its vCPUs' time" in text
    assert "Before it was held it did up to 5,000 bus locks/s" in text
    assert "501 bus locks/s, 100% of them by noisy" in text
    assert "The throttle ends when it has been in the clear" in text
    assert f"{time_of_day(at(101))} Warn by ladder" in text
    assert "slows it" not in text


def test_before_and_after_nothing_holds_it(afternoon, capsys):
    noisy_afternoon(afternoon, orc.Ladder(LADDER, interval=1.0))
    when = datetime.fromtimestamp(at(50) / SECOND).isoformat()
    assert "Nothing held it, and nothing was done to it." in told(afternoon, capsys, "noisy", "--at", when)
    late = told(afternoon, capsys, "noisy")  # at the journal's end
    assert day_and_time(at(300)) in late
    # In the minute before it was held for 20 s: that nothing held it would be wrong, though nothing does any more.
    assert f"From {time_of_day(at(102))} to {time_of_day(at(260))}, policy ladder held it to 500 bus locks/s" in late
    assert "By then nothing was in force any more." in late
    assert "Nothing held it" not in late
    assert "Unthrottle by ladder, back to warn" in late


def test_a_victim_to_whom_nothing_was_done_hears_its_own_figures_and_who_was_loud(afternoon, capsys):
    noisy_afternoon(afternoon)
    when = datetime.fromtimestamp(at(240) / SECOND).isoformat()
    text = told(afternoon, capsys, "web-1", "--at", when)
    assert "Nothing held it, and nothing was done to it." in text
    assert "had to wait for a CPU 50% of the time that it could have run" in text
    assert "most by noisy (5,000/s)" in text
    assert "4.6 times what it takes in the calm" in text
    assert "gets no CPU for 50% of the time" in text
    assert (
        "Of the ups and downs of its waiting for a CPU, 100% go along with noisy's bus locks "
        "(correlation 1.00 over 120 windows of 2 s: very likely no chance)" in text
    )
    assert "what a locked operation takes the host, 100% go along with noisy's bus locks" in text


def test_one_that_waits_for_answers_is_not_told_that_it_gets_no_cpu(afternoon, capsys):
    for _ in range(60):  # whenever it could run, which is not for long, it waited for a CPU first
        afternoon.second(vm("a", 0, cpu=0.001, run_delay=0.009, capped=0.0), vm("b", 900))
    text = told(afternoon, capsys, "a")
    assert "had to wait for a CPU 90% of the time that it could have run" in text
    assert "gets no CPU" not in text
    assert "look inside the guest, and at the devices and tasks that answer it" in text
    assert "For 99% of its vCPUs' time it neither ran nor waited for a CPU: it idled, or waited for an answer." in text
    assert "neither ran" not in told(afternoon, capsys, "b")  # of it that is not known


def test_a_victim_of_whoever_is_steadily_loud_hears_that_nobody_can_be_told(afternoon, capsys):
    lived(afternoon, 60, {"noisy": lambda s: 5000, "web-1": lambda s: 1})
    text = told(afternoon, capsys, "web-1")
    assert "had to wait for a CPU 50%" in text
    assert "Who is behind it can't be told: there were no ups and downs to compare." in text


def test_a_victim_of_a_short_time_hears_how_much_more_it_takes(afternoon, capsys):
    lived(afternoon, 10, {"noisy": lambda s: 5000 * (s % 2), "web-1": lambda s: 1})
    text = told(afternoon, capsys, "web-1")
    assert "Who is behind it can't be told from 10 windows of 1 s: that takes 20 at least." in text


def test_a_victim_of_nobody_that_is_known_hears_so(afternoon, capsys):
    chance = random.Random(3)
    for _ in range(200):
        loud, waits = 5000 * chance.random(), chance.random()
        afternoon.second(vm("noisy", loud, cpu=0.5), vm("web-1", 1, cpu=0.5, run_delay=waits))
    text = told(afternoon, capsys, "web-1")
    assert "over 100 windows of 2 s, what 1 other VM did goes along with it no more than chance would have it" in text


def test_its_own_bus_locks_are_told_as_what_slows_the_host(afternoon, capsys):
    chance = random.Random(5)
    lived(afternoon, 200, {"web-1": lambda s: 5000 * chance.random()})
    text = told(afternoon, capsys, "web-1")
    assert re.search(r"a locked operation takes the host, \d+% go along with its own bus locks", text)


def test_what_is_not_known_is_not_made_up(afternoon, capsys):
    afternoon.state("a", "running")
    for _ in range(5):
        afternoon.second(vm("a", None))
    text = told(afternoon, capsys, "a")
    assert "an unknown number of bus locks and 100 exits/s" in text
    assert "Nothing that is known here slows it (its waiting for a CPU and the memory bus are not known here)" in text
    assert "wait for a CPU" not in text


def test_one_that_has_ended_says_so_and_how_it_was(afternoon, capsys):
    afternoon.state("a", "running")
    for _ in range(10):
        afternoon.second(vm("a", 7, cpu=0.5, run_delay=0.0))
    afternoon.applied(orc.Throttle(vm="a", limit=orc.Limit(rate=5)), "p")
    afternoon.state("a", "failed", reason="triple fault")
    for _ in range(100):
        afternoon.second(vm("b", 1))
    text = told(afternoon, capsys, "a")
    assert f"it failed at {time_of_day(at(10))}: triple fault." in text
    assert "did 7 bus locks/s" in text
    assert "held it to" not in text  # with the VM went its limits


@pytest.mark.parametrize(
    ("action", "policy", "said", "ends"),
    [
        (orc.Pause(vm="a", reason="r"), "p", "policy p has held it paused: r.", "Policy p will end that pause"),
        (orc.CapCpu(vm="a", share=0.5), None, "a caller has let it run for at most 50% of", "That cap stays until som"),
        (orc.Isolate(vm="a"), "p", "policy p has kept it on the quarantine CPUs.", "will end that isolation"),
        (
            orc.SetMemory(vm="a", memory=96 * orc.MiB),
            None,
            "a caller has asked it to keep to 96 MiB of its memory",
            "That request for memory stays until somebody takes it away.",
        ),
        (
            orc.Throttle(tenant="acme", limit=orc.Limit(rate=5), meter="exits"),
            "p",
            "policy p has held its tenant acme to 5 exits/s",
            "that limit when it sees fit",
        ),
        (
            orc.SetLimit(limit=orc.Limit(rate=9)),
            None,
            "a caller has held the whole host to 9 bus locks/s",
            "That limit stays until somebody takes it away",
        ),
        (
            orc.Throttle(vm="a", limit=orc.Limit(rate=5), evidence={"level": 10.0, "start": 99.0}),
            "adaptive",
            "(evidence: level 10, start 99)",
            "That limit rises while it is calm, and ends when the level is back at 99/s.",
        ),
        (
            orc.Throttle(vm="a", limit=orc.Limit(rate=5), evidence={"share": 5.0, "budget": 100.0, "weight": 1.0}),
            "weighted-share",
            "(evidence: share 5, budget 100, weight 1)",
            "ends when the budget has room",
        ),
        (
            orc.Throttle(vm="a", limit=orc.Limit(rate=5), evidence={"balance": 0.0, "baseline": 5.0}),
            "burst-credits",
            "(evidence: balance 0, baseline 5)",
            "when it has saved credits, by doing less than 5/s",
        ),
        (
            orc.Throttle(vm="a", limit=orc.Limit(rate=5), reason="static limit of VMs named a"),
            "static-limits",
            "static limit of VMs named a",
            "goes by name and stays while policy static-limits is in force",
        ),
    ],
)
def test_each_way_of_holding_has_its_words_and_its_end(afternoon, capsys, action, policy, said, ends):
    afternoon.state("a", "running")
    afternoon.second(vm("a"))
    afternoon.applied(action, policy)
    waited = {}
    if isinstance(action, orc.Throttle | orc.SetLimit):
        level = "vm" if action.vm else "tenant" if action.tenant else "host"
        waited = {"throttled": 0.8, "throttled_by": {f"{level}.{action.meter}": 0.8}}
    afternoon.second(vm("a", **waited))
    text = told(afternoon, capsys, "a")
    assert said in text
    assert ends in text


def test_a_dry_run_and_a_refusal_hold_nothing_and_are_told(afternoon, capsys):
    afternoon.state("a", "running")
    afternoon.applied(orc.Pause(vm="a"), "p", outcome="dry-run")
    afternoon.second(vm("a"))
    assert "What was decided about it was a dry run." in told(afternoon, capsys, "a")


def test_a_refusal_is_told_with_its_reason(afternoon, capsys):
    afternoon.state("a", "running")
    afternoon.applied(orc.Pause(vm="a"), "p", outcome="refused", error="cool-down: 1 of 10 s")
    afternoon.second(vm("a"))
    assert "Pause by p (refused) (cool-down: 1 of 10 s)" in told(afternoon, capsys, "a")


def test_of_another_vm_of_that_name_only_the_last_counts(afternoon):
    afternoon.state("a", "running", generation=1)
    afternoon.second(vm("a"))
    afternoon.applied(orc.Throttle(vm="a", limit=orc.Limit(rate=5)), "p")
    afternoon.second()
    afternoon.state("a", "stopped", generation=1)
    afternoon.state("a", "running", generation=2)
    afternoon.second(vm("a", generation=2))
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        now = explain(journal, "a")
        assert (now.holds, now.launched) == ((), at(2))
        assert explain(journal, "a", at(1)).holds[0].rate == 5


def test_little_is_not_told_as_nothing(afternoon, capsys):
    afternoon.state("a", "running")
    afternoon.applied(orc.Throttle(vm="a", limit=orc.Limit(rate=0.04)), "p")
    for second in range(50):
        afternoon.second(vm("a", int(second == 0), exits=0, throttled=0.002, throttled_by={"vm.bus_locks": 0.002}))
    text = told(afternoon, capsys, "a")
    assert "has held it to 0.04 bus locks/s; it waited for that less than 1% of its vCPUs' time" in text
    assert "did 0.02 bus locks/s and 0 exits/s" in text


def test_holds_stack_the_tightest_first_and_go_by_policy(afternoon):
    for action, policy, outcome in [
        (orc.Throttle(vm="a", limit=orc.Limit(rate=50)), "p", "done"),
        (orc.Throttle(vm="a", limit=orc.Limit(rate=20)), "q", "done"),
        (orc.Throttle(vm="a", limit=orc.Limit(rate=1)), "r", "dry-run"),
        (orc.Throttle(vm="a", limit=orc.Limit(rate=70), meter="exits"), "p", "done"),
        (orc.Pause(vm="a"), "p", "done"),
        (orc.CapCpu(vm="a", share=0.5), "p", "done"),
        (orc.Throttle(vm="a", limit=orc.Limit(rate=40)), "p", "done"),
        (orc.CapCpu(vm="a", share=None), "p", "done"),
        (orc.SetMemory(vm="a", memory=4096), "p", "done"),
        (orc.SetMemory(vm="a", memory=None), "p", "done"),
        (orc.Resume(vm="a"), None, "done"),
        (orc.Warn(vm="a"), "p", "done"),
    ]:
        afternoon.seconds += 1
        afternoon.applied(action, policy, outcome=outcome)
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        holds = in_force(journal.actions())
    assert [hold.rate for hold in holds] == [20, 40, 70]
    assert holds[1].since < holds[1].action.time


def test_a_series_tells_idle_from_unknown(afternoon):
    afternoon.state("a", "running")
    for second in range(60):
        afternoon.second(*([vm("a", 10)] if second < 30 else []), lock_ns=15.0)
    afternoon.seconds += 60  # nobody wrote
    afternoon.applied(orc.Throttle(vm="a", limit=orc.Limit(rate=3)), "p")
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        bins = series(journal, "a", at(0), at(120), 6)
    assert [one.bus_locks for one in bins] == [10, pytest.approx(5), 0, None, None, None]
    assert [one.lock_ns for one in bins] == [15, 15, 15, None, None, None]
    assert [one.limit for one in bins] == [None] * 5 + [3]


def test_a_series_has_all_waits_as_parts_of_the_same_time(afternoon):
    """They share an axis: of one that hardly wants any CPU, waiting for it is little, of an idle one nothing."""
    afternoon.state("a", "running")
    for second in range(30):
        afternoon.second(*([vm("a", cpu=0.001, run_delay=0.009, throttled=0.9)] if second < 10 else []), lock_ns=15.0)
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        bins = series(journal, "a", at(0), at(30), 3)
    assert [one.throttled for one in bins] == [pytest.approx(0.9), 0, 0]
    assert [one.queued for one in bins] == [pytest.approx(0.009), 0, 0]


def test_a_series_finer_than_the_journals_intervals_has_no_gaps(afternoon):
    afternoon.state("a", "running")
    for second in range(4):
        afternoon.second(*([vm("a", 10 * second)] if second else []), lock_ns=15.0)
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        bins = series(journal, "a", at(0), at(4), 8)
    assert [one.bus_locks for one in bins] == [0, 0, 10, 10, 20, 20, 30, 30]


def test_json_has_the_text_and_the_figures(afternoon, capsys):
    noisy_afternoon(afternoon, orc.Ladder(LADDER, interval=1.0))
    afternoon.close()
    when = datetime.fromtimestamp(at(200) / SECOND).isoformat()
    assert main(["why", "noisy", "--journal", str(afternoon.path), "--at", when, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["holds"][0]["action"]["policy"] == "ladder"
    assert document["fared"]["throttled"] == pytest.approx(0.9)
    assert "policy ladder has held it" in document["text"]
    assert len(document["series"]) == 72
    assert document["suspicion"]["asked"] == 1
    named = {(one["vm"], one["signal"]): one for one in document["suspicion"]["suspects"] if one["named"]}
    assert named["noisy", "lock_ns"]["correlation"] == pytest.approx(1)
    assert named["noisy", "lock_ns"]["share"] == pytest.approx(1)
    assert named["noisy", "lock_ns"]["chance"] < 0.05


def test_a_plot_is_drawn(afternoon, capsys, tmp_path):
    noisy_afternoon(afternoon, orc.Ladder(LADDER, interval=1.0))
    told(afternoon, capsys, "noisy", "--plot", str(tmp_path / "why.svg"))
    ids = {one.get("id") for one in ElementTree.parse(tmp_path / "why.svg").iter()}
    assert {"axes_1", "axes_2", "axes_3"} <= ids


def test_a_plot_that_cant_be_written_is_one_line(afternoon, capsys, tmp_path):
    noisy_afternoon(afternoon)
    afternoon.close()
    assert main(["why", "noisy", "--journal", str(afternoon.path), "--plot", str(tmp_path / "no" / "x.svg")]) == 1
    assert capsys.readouterr().err == f"orchestra: {tmp_path / 'no' / 'x.svg'}: No such file or directory\n"


def test_a_terminal_without_blocks_gets_plain_characters(afternoon, capsys, monkeypatch):
    from orchestra.cli import why

    noisy_afternoon(afternoon)
    with_blocks = told(afternoon, capsys, "noisy")
    assert "█" in with_blocks
    monkeypatch.setattr(why, "BARS", why.PLAIN)
    assert told(afternoon, capsys, "noisy").isascii()


def test_a_vm_that_nobody_knows_is_an_error_with_those_that_are(afternoon, capsys):
    noisy_afternoon(afternoon)
    afternoon.close()
    assert main(["why", "nix", "--journal", str(afternoon.path)]) != 0
    assert "there are: noisy, web-1" in capsys.readouterr().err
    assert main(["why", "a", "--journal", "/nowhere.db"]) == 1
    assert "no such journal" in capsys.readouterr().err


HOSTILE = "a\nroot: \x1b[2Jgone\u202e"


@pytest.mark.parametrize(
    "arguments",
    [
        ["why", HOSTILE, "--journal"],
        ["why", "b", "--journal"],
        ["why", "nix", "--journal"],
        ["guilty", "nix", "--journal"],
        ["guilty", HOSTILE, "--journal"],
        *(["journal", "--table", table] for table in TABLES),
    ],
)
def test_names_and_reasons_of_a_journal_cant_steer_the_terminal(afternoon, capsys, arguments):
    afternoon.state(HOSTILE, "running", tenant=HOSTILE, reason=HOSTILE)
    afternoon.state("b", "running", tenant=HOSTILE)
    for name in (HOSTILE, "b"):
        afternoon.applied(orc.Pause(vm=name, reason=HOSTILE, evidence={HOSTILE: HOSTILE}), HOSTILE)
        afternoon.applied(orc.Warn(vm=name, reason=HOSTILE), HOSTILE, outcome="failed", error=HOSTILE)
    afternoon.second(vm(HOSTILE, 900, tenant=HOSTILE), vm("b", 1))
    afternoon.journal.profile(afternoon.now, HOSTILE, 1, [(0x1000, 64, 0, 0x1000, 3, 300, b"\xf0\x01")])
    afternoon.close()
    main([*arguments, str(afternoon.path)])
    out, err = capsys.readouterr()
    assert out + err
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert "\nroot" not in out + err


# ---- journal


def listed(afternoon: Afternoon, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    afternoon.close()
    assert main(["journal", str(afternoon.path), *more]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def busy(afternoon: Afternoon) -> Afternoon:
    afternoon.state("a", "running")
    afternoon.state("b", "running", tenant="lab", reason="launched")
    afternoon.applied(orc.Throttle(vm="a", limit=orc.Limit(rate=5), reason="too many"), "p")
    parts = (orc.VcpuFacts(0, 1, 60, 0.0), orc.VcpuFacts(1, 2, 40, 0.5))
    several = attrs.evolve(vm("a", 3), vcpus=2, by_reason={"io": 97, "x86_bus_lock": 3}, by_vcpu=parts)
    afternoon.second(several, vm("b", 4, tenant="lab"), lock_ns=15.0)
    afternoon.applied(orc.Throttle(tenant="lab", limit=orc.Limit(rate=5)), "q", outcome="dry-run")
    afternoon.second(vm("a", 3))
    afternoon.applied(orc.Pause(vm="b"), "q", outcome="refused", error="cool-down")
    afternoon.applied(None, "q", error="ZeroDivisionError")
    afternoon.applied(orc.Reload(reason="rules.toml: gone: q"))
    afternoon.journal.profile(afternoon.now, "a", 1, [(0xFFFF_FFFF_8100_0000, 64, 0, 0x1000, 3, 300, b"\xf0\x01")])
    return afternoon


def test_each_action_is_a_line_with_who_what_why_and_what_came_of_it(busy, capsys):
    assert listed(busy, capsys) == [
        f"{day_and_time(at(0))}  a: Throttle 5 bus_locks/s by p: too many",
        f"{day_and_time(at(1))}  tenant lab: Throttle 5 bus_locks/s by q [dry-run]",
        f"{day_and_time(at(2))}  b: Pause by q [refused: cool-down]",
        f"{day_and_time(at(2))}  host: PolicyError by q [failed: ZeroDivisionError]",
        f"{day_and_time(at(2))}  host: Reload: rules.toml: gone: q",
    ]


def test_a_limit_is_a_line_with_its_vcpu_and_that_there_is_none_any_more(afternoon, capsys):
    afternoon.applied(orc.SetLimit(vm="a", vcpu=1, limit=orc.Limit(rate=5), meter="exits", reason="set_limit()"))
    afternoon.applied(orc.SetLimit(limit=None, reason="set_limit()"))
    assert [line.split("  ")[1] for line in listed(afternoon, capsys)] == [
        "a vCPU 1: SetLimit 5 exits/s: set_limit()",
        "host: SetLimit none on bus_locks: set_limit()",
    ]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--vm", "a"], [0]),
        (["--tenant", "lab"], [1]),
        (["--policy", "q"], [1, 2, 3]),
        (["--kind", "throttle"], [0, 1]),
        (["--kind", "POLICYERROR"], [3]),
        (["--outcome", "refused"], [2]),
        (["--since", datetime.fromtimestamp(BEGIN / SECOND + 0.5).isoformat()], [1, 2, 3, 4]),
        (["--until", datetime.fromtimestamp(BEGIN / SECOND + 1.5).isoformat()], [0, 1]),
        (["--last", "2"], [3, 4]),
        (["--policy", "q", "--kind", "Pause", "--last", "1"], [2]),
        (["--vm", "nobody"], []),
    ],
)
def test_filters_leave_what_fits(busy, capsys, filters, found):
    everything = listed(busy, capsys)
    assert listed(busy, capsys, *filters) == [everything[i] for i in found]


def test_the_other_tables_are_lines_too(busy, capsys):
    assert listed(busy, capsys, "--table", "states")[1].endswith("b (lab): running: launched")
    assert re.search(r"b:  tenant=lab  vcpus=1  bus_locks=4", "\n".join(listed(busy, capsys, "--table", "aggregates")))
    assert "lock_ns=15" in listed(busy, capsys, "--table", "hosts")[0]
    assert "code=f001" in listed(busy, capsys, "--table", "profiles")[0]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_json_csv_and_parquet_alike(busy, capsys, tmp_path, table):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = json.loads("\n".join(listed(busy, capsys, "--table", table, "--json")))
    assert found["table"] == table
    files = [str(tmp_path / "rows.csv"), str(tmp_path / "rows.parquet")]
    listed(busy, capsys, "--table", table, "--csv", files[0], "--parquet", files[1])
    with open(files[0], newline="") as file:
        texts = list(csv.DictReader(file))
    columns = parquet.read_table(files[1]).to_pylist()
    assert len(found["rows"]) == len(texts) == len(columns) > 0
    for row, text, column in zip(found["rows"], texts, columns, strict=True):
        assert list(row) == list(text) == list(column)
        assert abs(column["time"].timestamp() - datetime.fromisoformat(row["time"]).timestamp()) < 1e-5
        for name, value in row.items():
            if isinstance(value, dict):
                assert json.loads(text[name]) == json.loads(column[name]) == value
            elif name == "code":
                assert text[name] == column[name].hex() == value
            elif name != "time":
                assert column[name] == value
                assert text[name] == ("" if value is None else str(value))


def test_an_empty_table_is_an_empty_document_and_a_line_of_names(afternoon, capsys, tmp_path):
    afternoon.state("a", "running")
    assert json.loads("".join(listed(afternoon, capsys, "--json"))) == {"table": "actions", "rows": []}
    listed(afternoon, capsys, "--csv", str(tmp_path / "x.csv"))
    assert (tmp_path / "x.csv").read_text().startswith("session,time,kind,vm")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "hosts", "--vm", "a"], "the table hosts can be filtered by time only"),
        (["--table", "states", "--policy", "p"], "the table states can be filtered by vm"),
        (["--kind", "thrttle"], "kind='thrttle': must be one of Pause, Resume"),
        (["--outcome", "well"], "must be one of done, dry-run, refused, failed"),
        (["--since", "sometime"], "is not a time such as 14:05"),
        (["--last", "0"], "--last 0: must be 1 or more"),
        (["--json", "--csv", "x"], "--json can't be combined"),
    ],
)
def test_what_cant_be_asked_is_one_line(busy, capsys, arguments, said):
    busy.close()
    assert main(["journal", str(busy.path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_every_filter_is_one_of_the_readers():
    assert set(FILTERS) == set(TABLES)


def test_without_pyarrow_one_line_says_which_command_installs_it(busy, capsys, monkeypatch, tmp_path):
    import sys

    busy.close()
    monkeypatch.delitem(sys.modules, "orchestra.journal.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["journal", str(busy.path), "--parquet", str(tmp_path / "x")]) == 1
    assert "pip install 'orchestra-kvm[parquet]'" in capsys.readouterr().err


def test_upgrade_brings_an_older_journal_to_this_version(busy, capsys, monkeypatch):
    assert listed(busy, capsys, "--upgrade") == [f"{busy.path}: of version {schema.VERSION}"]
    steps = (*schema._MIGRATIONS, lambda connection: connection.execute("ALTER TABLE states ADD COLUMN more TEXT"))
    monkeypatch.setattr(schema, "_MIGRATIONS", steps)
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    assert main(["journal", str(busy.path)]) == 1
    assert "--upgrade" in capsys.readouterr().err
    assert listed(busy, capsys, "--upgrade") == [
        f"{busy.path}: of version {schema.VERSION}, and was of {schema.VERSION - 1}"
    ]
    with sqlite3.connect(busy.path) as connection:
        assert "more" in [row[1] for row in connection.execute("PRAGMA table_info(states)")]
    connection.close()


def test_upgrade_makes_no_journal_where_there_is_none(tmp_path, capsys):
    assert main(["journal", str(tmp_path / "none.db"), "--upgrade"]) == 1
    assert "no such journal" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- times

NOW = datetime(2026, 10, 14, 15, 30, 0).astimezone()  # a Wednesday


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", datetime(2026, 10, 14, 15, 30)),
        ("14:05", datetime(2026, 10, 14, 14, 5)),
        ("9:05", datetime(2026, 10, 14, 9, 5)),
        ("14:05:06", datetime(2026, 10, 14, 14, 5, 6)),
        ("16:00", datetime(2026, 10, 13, 16, 0)),  # that of yesterday: it is not 16:00 yet
        ("today", datetime(2026, 10, 14)),
        ("yesterday 14:05", datetime(2026, 10, 13, 14, 5)),
        ("Tuesday 14:05", datetime(2026, 10, 13, 14, 5)),
        ("wednesday", datetime(2026, 10, 7)),
        ("2026-10-13", datetime(2026, 10, 13)),
        ("2026-10-13 14:05", datetime(2026, 10, 13, 14, 5)),
        ("2026-10-13T14:05:06.5", datetime(2026, 10, 13, 14, 5, 6, 500_000)),
        ("90s", datetime(2026, 10, 14, 15, 28, 30)),
        ("-2h", datetime(2026, 10, 14, 13, 30)),
        ("2h30m", datetime(2026, 10, 14, 13, 0)),
        ("1.5 h ago", datetime(2026, 10, 14, 14, 0)),
        ("1 d 2 h", datetime(2026, 10, 13, 13, 30)),
    ],
)
def test_times_are_read_as_people_write_them(text, meant):
    assert parse_time(text, NOW) == round(meant.timestamp() * SECOND)


def test_a_time_with_its_zone_is_that_one():
    assert parse_time("2026-10-13T14:05:00Z", NOW) == 1_791_900_300 * SECOND
    assert parse_time("2026-10-13 14:05:00+02:00", NOW) == 1_791_893_100 * SECOND


@given(st.text(max_size=30))
def test_any_text_is_a_time_or_a_value_error(text):
    try:
        parse_time(text, NOW)
    except ValueError as error:
        assert "is not a time such as" in str(error)  # noqa: PT017  # any text, most are none


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (3, "3 s"),
        (98.4, "98 s"),
        (300, "5 min"),
        (7500, "2 h 5 min"),
        (7200, "2 h"),
        (280_000, "3 d 5 h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_commands_are_there():
    assert {"why", "journal", "policy"} <= set(app.app)
