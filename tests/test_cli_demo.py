"""The demo: its story on scripts in no time, how it is shown, and the whole of it on real guests."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio
from rich.console import Console

from conftest import bus_lock_problem, kvm_problem
from isolation import FORBID, HIDE, other_python, run, without_kvm
from orchestra import Failed, Limit, Meter, ScriptedBackend, SpecError, Throttle
from orchestra.backend.scripted import bus_lock, failed_run, io_write
from orchestra.cli.app import main
from orchestra.cli.demo import _staged
from orchestra.cli.render import LiveTable, Trends
from orchestra.demo import scripts as rehearsal, words
from orchestra.demo.account import Row, Sample, document
from orchestra.demo.plain import Plain, columns, summary
from orchestra.demo.story import MORE, Plan, Story


class Listener:
    """An audience that remembers."""

    def __init__(self) -> None:
        self.told = []

    def opened(self, plan, fleet, meter):
        self.told.append(("opened", meter))

    def act(self, act, time):
        self.told.append(("act", act.number))

    def applied(self, applied, time):
        self.told.append(("applied", applied.action.vm))

    def sample(self, sample):
        self.told.append(("sample", sample.act))


def scripts(spec, _):
    """A noisy VM: 1050 locks a second. A quiet one: one every 2 seconds."""
    return itertools.repeat(bus_lock(after=0.00095 if spec.name.startswith("noisy") else 2.0))


def port_writes(spec, _):
    return itertools.repeat(io_write(0x80, b"\0", after=0.00095 if spec.name.startswith("noisy") else 2.0))


def plan(backend=None, **options) -> Plan:
    return Plan(**{"vms": 3, "noisy": 2, "seconds": 3.0, "backend": backend or ScriptedBackend(scripts), **options})


async def told(plan: Plan, audience=None):
    story = Story(plan, audience or Listener())
    await story.play()
    return story.result


# ---- the story


async def test_the_noisy_are_held_to_their_budget_and_the_quiet_are_not_touched(autojump_clock):
    result = await told(plan())
    assert result.complete
    for vm in result.noisy:
        free, limited, _ = vm.spans
        assert free.rate == pytest.approx(1050, rel=0.01)
        assert limited.limit.rate == 50  # 5 % of it
        assert limited.rate == pytest.approx(50, rel=0.06)
        assert all(span.held for span in vm.spans)
        assert vm.throttled_seconds > 0
    for vm in result.quiet:
        assert vm.throttled_seconds == 0
        assert all(span.limit is None for span in vm.spans)


async def test_in_the_last_act_one_of_the_noisy_gets_more_at_once(autojump_clock):
    first, second = (await told(plan())).noisy
    assert first.spans[2].limit.rate == MORE * first.spans[1].limit.rate
    assert first.spans[2].rate == pytest.approx(200, rel=0.1)
    assert second.spans[2].rate == pytest.approx(50, rel=0.1)


async def test_the_budget_can_be_said(autojump_clock):
    result = await told(plan(limit=7.0))
    assert {vm.spans[1].limit.rate for vm in result.noisy} == {7.0}
    assert all(vm.spans[1].held for vm in result.noisy)


async def test_no_budget_is_so_large_that_waiting_for_it_is_work(autojump_clock):
    fast = ScriptedBackend(lambda spec, _: itertools.repeat(bus_lock(after=1e-5 if "noisy" in spec.name else 2.0)))
    result = await told(plan(fast, seconds=0.2))
    assert {vm.spans[1].limit.rate for vm in result.noisy} == {1000}  # and not 5 % of 100,000


async def test_every_action_has_a_reason_and_its_evidence_and_is_in_the_journal(autojump_clock):
    result = await told(plan())
    assert [applied.action.vm for applied in result.actions] == ["noisy-1", "noisy-2", None, "noisy-1"]
    for applied in result.actions:
        assert isinstance(applied.action, Throttle)
        assert applied.action.reason
        assert applied.action.evidence
        assert applied.error is None
    assert result.actions[0].action.evidence["share"] == pytest.approx(0.5, abs=0.01)


async def test_acts_actions_and_samples_are_told_in_their_order(autojump_clock):
    listener = Listener()
    await told(plan(), listener)
    order = [key for key, _ in itertools.groupby(listener.told, key=lambda item: item)]
    assert order == [
        *(("opened", Meter.BUS_LOCKS), ("act", 1), ("sample", 1)),
        *(("act", 2), ("applied", "noisy-1"), ("applied", "noisy-2"), ("applied", None), ("sample", 2)),
        *(("act", 3), ("applied", "noisy-1"), ("sample", 3)),
    ]


async def test_it_takes_as_long_as_it_was_told_and_looks_at_most_four_times_a_second(autojump_clock):
    begun = trio.current_time()
    result = await told(plan(seconds=3.0))
    assert trio.current_time() - begun == pytest.approx(3, abs=0.1)
    assert len(result.samples) <= 3 * 4 + 3


async def test_where_no_bus_locks_are_seen_exits_tell_the_same_story(autojump_clock):
    result = await told(plan(ScriptedBackend(port_writes, detection=None)))
    assert result.meter is Meter.EXITS
    assert result.detection is None
    assert all(vm.spans[1].held and vm.spans[1].limit.rate == 50 for vm in result.noisy)
    assert all(vm.throttled_seconds == 0 for vm in result.quiet)


async def test_telling_that_takes_its_time_makes_the_looks_rarer_not_the_guests_slower(autojump_clock):
    class Slow(Listener):
        def sample(self, sample):
            super().sample(sample)
            autojump_clock.jump(0.5)

    assert len((await told(plan(seconds=10.0), Slow())).samples) <= 10 / 2.5 + 6  # and not 40


async def test_a_guest_that_fails_is_told_of_and_the_others_play_on(autojump_clock):
    def failing(spec, i):
        return [failed_run(14, after=0.1)] if spec.name == "noisy-1" else scripts(spec, i)

    result = await told(plan(ScriptedBackend(failing)))
    assert result.complete
    assert isinstance(result.noisy[0].outcome, Failed)
    assert "has ended" in result.actions[0].error
    assert any("noisy-1 failed" in line for line in words.verdict(result))


async def test_when_all_have_ended_it_is_over_and_not_complete(autojump_clock):
    begun = trio.current_time()
    result = await told(plan(ScriptedBackend({})))
    assert not result.complete
    assert trio.current_time() - begun < 2


@pytest.mark.parametrize("seconds", [0.1, 1.0, 1.5, 2.5])
async def test_a_cancelled_story_has_a_result_of_what_was_played(seconds, autojump_clock):
    story = Story(plan(), Listener())
    with trio.move_on_after(seconds):
        await story.play()
    result = story.result
    assert not result.complete
    assert result.seconds == pytest.approx(seconds, abs=0.01)
    assert sum(span.seconds for span in result.vms[0].spans) == pytest.approx(seconds, abs=0.01)
    assert "up to here" in "\n".join(summary(result))
    json.dumps(document(result))


@pytest.fixture
def works(monkeypatch):
    """As if each VM did so much of its own work a second, by the act: scripts do none."""
    speed, done, seen = {1: 100, 2: 150, 3: 50}, {}, {}

    def mark(self, vm):
        was = original(self, vm)
        begun = seen.setdefault(vm.name, was.time)
        done[vm.name] = done.get(vm.name, 0.0) + (was.time - begun) * speed[max(len(self._acts), 1)] / 1e9
        seen[vm.name] = was.time
        return attrs.evolve(was, work=round(done[vm.name]))

    original = Story._mark
    monkeypatch.setattr(Story, "_mark", mark)


NO_LIMIT, HELD = "bus locks/s in act 1 without a limit", "bus locks/s in act 2 with a budget of 50/s"
MORE_HELD = "bus locks/s in act 3 with a budget of 200/s"
NEVER = "The quiet VMs never waited for a limit."
RELIEF, BOTH = "they got 50% more done in act 2, compared with", "50% more done in act 2 and 50% less done in act 3"
ALL = {NO_LIMIT, HELD, MORE_HELD, NEVER, RELIEF, BOTH, "BROKE", "It kept to its budget.", "budget in both acts"}


@pytest.mark.parametrize(
    ("seconds", "ending", "said"),
    [
        (1.0, "in act 1, after 1.0 s of it", {NO_LIMIT}),
        (3.2, "in act 2, after 0.2 s of it", {NO_LIMIT, HELD, NEVER, "It kept to its budget."}),  # too short for work
        (5.0, "in act 2, after 2.0 s of it", {NO_LIMIT, HELD, NEVER, "It kept to its budget.", RELIEF}),
        (7.2, "in act 3, after 0.2 s of it", {NO_LIMIT, HELD, MORE_HELD, NEVER, "budget in both acts", RELIEF}),
        (9.0, "in act 3, after 2.0 s of it", {NO_LIMIT, HELD, MORE_HELD, NEVER, "budget in both acts", BOTH}),
        (20.0, "", {NO_LIMIT, HELD, MORE_HELD, NEVER, "budget in both acts", BOTH}),
    ],
)
async def test_the_verdict_speaks_of_what_was_seen_and_of_nothing_else(seconds, ending, said, works, autojump_clock):
    story = Story(plan(seconds=10.0), Listener())
    with trio.move_on_after(seconds):
        await story.play()
    text = "\n".join(words.verdict(story.result))
    assert text.startswith(f"The run ended early, {ending}: it was interrupted.") == bool(ending)
    assert ("ended early" in text) == bool(ending)
    assert {phrase for phrase in ALL if phrase in text} == said


@pytest.mark.parametrize("act", [1, 2, 3])
async def test_interrupted_between_two_acts_it_says_nothing_of_the_next(act, works, autojump_clock):
    class Interrupter(Listener):
        def act(self, told, time):
            super().act(told, time)
            if told.number == act:
                scope.cancel()

    story = Story(plan(seconds=10.0), Interrupter())
    with trio.CancelScope() as scope:
        await story.play()
    text = "\n".join(words.verdict(story.result))
    assert f"budget of {50 if act == 2 else 200}/s" not in text
    assert f"/s in act {act} with" not in text
    assert f"done in act {act}" not in text
    assert text.startswith(f"The run ended early, before act {act} began: it was interrupted.")


async def test_a_budget_that_a_released_wait_went_over_is_not_called_broken(autojump_clock):
    result = await told(plan(limit=0.5, seconds=20.0))
    text = "\n".join(words.verdict(result))
    assert "It went over its budget in act 2, as no wait may be longer than 1 s." in text
    assert "BROKE" not in text


async def test_a_budget_that_was_broken_is_called_so_in_whichever_act_it_was(autojump_clock):
    result = await told(plan())
    first = result.noisy[0]
    spans = (*first.spans[:2], attrs.evolve(first.spans[2], count=10**6))
    result = attrs.evolve(result, vms=(attrs.evolve(first, spans=spans),))
    assert any("It BROKE its budget in act 3." in line for line in words.verdict(result))


async def test_when_every_vm_has_ended_the_verdict_says_so(autojump_clock):
    assert "every VM had ended" in next(iter(words.verdict(await told(plan(ScriptedBackend({}))))))


async def test_only_noisy_ones_are_a_story_too(autojump_clock):
    result = await told(plan(vms=1, noisy=1))
    assert result.relief is None
    assert "\n".join(summary(result))


async def test_many_vms_are_summed_up(autojump_clock):
    result = await told(plan(vms=12, noisy=8))
    assert any("Of 8 noisy VMs, 8 stayed" in line for line in words.verdict(result))


@pytest.mark.parametrize(
    "options",
    [{"vms": 0}, {"vms": 1001}, {"noisy": 0}, {"noisy": 4}, {"seconds": 0.0}, {"seconds": 1e9}, {"limit": 1e9}],
    ids=str,
)
def test_a_plan_that_can_not_be_played_is_refused(options):
    with pytest.raises(SpecError):
        plan(**options)


# ---- what was seen


async def test_relief_is_what_the_quiet_got_done_more(autojump_clock):
    result = await told(plan())
    quiet = result.quiet[0]
    spans = tuple(
        attrs.evolve(span, work=round(span.seconds * rate))
        for span, rate in zip(quiet.spans, (100, 150, 9), strict=True)
    )
    result = attrs.evolve(result, vms=(attrs.evolve(quiet, spans=spans), *result.noisy))
    assert result.relief == pytest.approx(0.5, abs=0.01)
    said = "they got 50% more done in act 2 and 91% less done in act 3, compared with act 1."
    assert any(said in line for line in words.verdict(result))


async def test_what_no_busy_host_can_tell_from_nothing_is_as_much(autojump_clock):
    result = await told(plan())
    quiet = result.quiet[0]
    spans = tuple(
        attrs.evolve(span, work=round(span.seconds * rate))
        for span, rate in zip(quiet.spans, (1000, 1010, 990), strict=True)
    )
    result = attrs.evolve(result, vms=(attrs.evolve(quiet, spans=spans), *result.noisy))
    assert any("as much done in act 2 and as much done in act 3" in line for line in words.verdict(result))


async def test_cpu_time_that_others_took_is_told(autojump_clock):
    result = attrs.evolve(await told(plan(vms=6, noisy=2)), cpus=2)
    shares = [((2.0, 1.9, 1.9), False), ((2.0, 1.0, 2.0), True), ((2.0, 2.0, 1.0), True), ((1.0,), True), ((), False)]
    for used, said in shares:
        lines = words.verdict(attrs.evolve(result, cpus_used=used))
        assert any("took up to 50% of the CPU time" in line for line in lines) == said
    assert attrs.evolve(result, cpus=None, cpus_used=(0.0, 0.0)).taken == 0


async def test_work_is_compared_with_act_1_from_act_2_on(works, autojump_clock):
    result = await told(plan(vms=2, noisy=1, seconds=10.0))
    gains = {act: [sample.gain for sample in result.samples if sample.act == act] for act in (1, 2, 3)}
    assert set(gains[1]) == {None}
    assert gains[2][-1] == pytest.approx(0.5, abs=0.05)
    assert gains[3][-1] == pytest.approx(-0.5, abs=0.05)
    assert result.samples[-1].rows[0].gain == result.samples[-1].gain


async def test_a_budget_that_was_broken_would_be_told(autojump_clock):
    result = await told(plan())
    span = attrs.evolve(result.noisy[0].spans[1], count=10_000)
    assert not span.held
    noisy = attrs.evolve(result.noisy[0], spans=(result.noisy[0].spans[0], span))
    assert any("BROKE" in line for line in words.verdict(attrs.evolve(result, vms=(noisy,))))


async def test_the_document_has_samples_actions_and_summary(autojump_clock):
    made = json.loads(json.dumps(document(await told(plan())), allow_nan=False))
    assert made["complete"] is True
    assert made["meter"] == "bus_locks"
    assert [act["number"] for act in made["acts"]] == [1, 2, 3]
    assert {row["name"] for row in made["samples"][0]["rows"]} == {"quiet-1", "noisy-1", "noisy-2"}
    assert made["actions"][0]["limit"]["rate"] == 50
    assert made["actions"][0]["action"] == "Throttle"
    assert made["summary"]["ceiling"]["rate"] > 250
    noisy = made["summary"]["vms"][1]
    assert noisy["acts"][1]["held"] is True
    assert noisy["count"] >= sum(act["count"] for act in noisy["acts"])


# ---- how it is shown


async def test_plain_lines_name_acts_actions_and_figures(autojump_clock):
    out = io.StringIO()
    plain = Plain(out)
    result = await told(plan(), plain)
    plain.ending(result)
    text = out.getvalue()
    assert [int(number) for number in re.findall(r"^Act (\d)", text, re.MULTILINE)] == [1, 2, 3]
    assert "noisy-1 held to 50 bus locks/s: it made 1,05" in text
    assert "What was done, when and why:" in text
    assert "\x1b" not in text


def test_columns_line_up():
    assert list(columns([("a", "b"), ("long", "1"), ("x", "12")], left=1)) == ["a      b", "long   1", "x     12"]


@contextmanager
def live(width=80, height=24, **options):
    out = io.StringIO()
    table = LiveTable(Console(file=out, force_terminal=True, width=width, height=height, highlight=False, **options))
    with table:
        yield table, out


def lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
async def test_the_live_table_fits_the_terminal(width, autojump_clock):
    with live(width=width) as (table, out):
        table.ending(await told(plan(), table))
    assert max(len(line) for line in lines(out.getvalue())) <= width


async def test_the_live_table_shows_each_vm_with_budget_and_state(autojump_clock):
    with live() as (table, out):
        table.ending(await told(plan(), table))
    shown = lines(out.getvalue())
    row = next(line for line in reversed(shown) if line.startswith("noisy-2") and "initech" in line).split()
    assert (row[1], row[3], row[4]) == ("initech", "50", "waits")
    assert re.fullmatch("9[0-9]%", row[5])
    assert any("What was done, when and why" in line for line in shown)


async def test_trends_show_the_noise_before_and_after_and_where_the_acts_begin(autojump_clock):
    with live() as (table, out):
        await told(plan(seconds=10.0), table)
    *_, noisy, quiet, acts = [line for line in lines(out.getvalue()) if re.match("noisy: |quiet: | +act 1", line)]
    assert re.fullmatch("noisy: bus locks +█{13,15}[▁-▆]{1,2}▁+ *", noisy)
    assert re.fullmatch("quiet: own work *", quiet)  # scripts do none
    assert acts.split() == ["act", "1", "act", "2", "act", "3"]
    assert noisy.index("▁") - acts.index("act 2") in (0, 1, 2)


def test_trends_are_as_high_as_the_mean_of_their_part_and_say_what_was_gained():
    trends = Trends(4.0, "bus locks")
    row = Row("quiet-1", "acme", False, "running", False, 0, 0.0, 0, 0.0, 0.0, 0.0, None)
    for time, work in [(0.5, 40.0), (1.5, 80.0), (1.7, 80.0), (3.0, 20.0)]:
        trends.add(Sample(time, 1, (attrs.evolve(row, work_rate=work),), gain=0.5))
    assert trends.lines(4)[2].plain.split() == [
        "quiet:",
        "own",
        "work",
        "▄█▂▂",
        "+50%",
    ]  # nothing was seen in the third


async def test_trends_are_left_out_where_they_can_not_be_drawn(autojump_clock):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    table = LiveTable(Console(file=out, force_terminal=True, width=80, height=24))
    with table:
        table.ending(await told(plan(), table))
    out.flush()
    assert b"noisy: " not in out.buffer.getvalue()


async def test_the_cursor_comes_back_when_it_is_interrupted(autojump_clock):
    with live() as (table, out), trio.move_on_after(1.0):
        await told(plan(), table)
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


async def test_more_vms_than_lines_are_cut_and_the_noisy_ones_stay(autojump_clock):
    with live(height=16) as (table, out):
        await told(plan(vms=40, noisy=2, seconds=1.0), table)
    shown = lines(out.getvalue())
    assert any("... and 36 more" in line for line in shown)
    assert any(line.startswith("noisy-2") for line in shown)


async def test_without_colours_nothing_is_lost(autojump_clock):
    with live(no_color=True) as (table, out):
        await told(plan(), table)
    assert "\x1b[3" not in out.getvalue()  # no foreground colour
    assert "noisy-1" in out.getvalue()


def test_the_opening_says_how_bus_locks_are_seen():
    @attrs.frozen
    class Fleet:
        bus_lock_detection: str | None
        backend: object

    @attrs.frozen
    class Backend:
        name: str
        why: str = "for a reason"

    def said(detection, meter, name="kvm", **options):
        return " ".join(words.opening(plan(**options), Fleet(detection, Backend(name)), meter))

    assert "Backend for a reason." in said("fault-like", Meter.BUS_LOCKS)
    assert "exit storm" in said(None, Meter.EXITS)
    assert "as all share 1 CPU here" in said(None, Meter.EXITS, cpus=1)
    assert "before" in said("fault-like", Meter.BUS_LOCKS)
    assert "behind" in said("trap-like", Meter.BUS_LOCKS)
    assert "rehearsal" in said("trap-like", Meter.BUS_LOCKS, "scripted")
    emulated = said("fault-like", Meter.BUS_LOCKS, "emulated", cpus=2, advice="Do it.")
    assert "it stalls no other core" in emulated
    assert "CPU time from the others, as all share 2 CPUs here." in emulated
    assert emulated.endswith("Do it.")


# ---- the command


def test_the_rehearsal_runs_anywhere(capsys):
    assert main(["demo", "--backend", "scripted", "--seconds", "0.2"]) == 0
    assert "rehearsal" in capsys.readouterr().out


def test_rehearsed_noise_is_what_the_rehearsal_promises():
    spec = attrs.make_class("Spec", ["name"])
    assert next(rehearsal.scripts(spec("noisy-1"), 0)).after == 0.002
    assert next(rehearsal.scripts(spec("quiet-1"), 0)).after == 2.0


def test_json_leaves_nothing_else_on_standard_output(capsys):
    assert main(["demo", "--backend", "scripted", "--seconds", "0.2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["complete"] is True
    assert "Act 1" in err


def test_the_plot_is_an_svg(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.svg"
    assert main(["demo", "--backend", "scripted", "--seconds", "0.2", "--plot", str(path)]) == 0
    assert "<svg" in path.read_text()
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [("run.png", 2, "must end in .svg"), ("nowhere/run.svg", 1, "No such file or directory")],
)
def test_a_plot_that_can_not_be_written_is_told_before_the_play(path, status, said, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--plot", str(tmp_path / path)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path}: {said}" in err


def test_without_matplotlib_a_plot_is_refused_with_the_command_that_installs_it(monkeypatch, capsys):
    for module in ("orchestra.demo.plot", "orchestra.output.figures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--plot", "x.svg"]) == 1
    assert "pip install 'orchestra-kvm[plot]'" in capsys.readouterr().err


# ---- on real guests


REAL = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)]


@pytest.mark.parametrize("backend", REAL)
def test_real_guests_tell_the_story(backend, capsys):
    command = ["demo", "--backend", backend, "--seconds", "1.5", "--vms", "3", "--noisy", "1", "--json"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["backend"] == backend
    noisy = made["summary"]["vms"][-1]
    assert noisy["acts"][1]["held"]
    assert noisy["acts"][1]["rate"] < noisy["acts"][0]["rate"] / 2
    assert noisy["throttled_seconds"] > 0
    assert made["samples"][-1]["gain"] is not None
    assert made["summary"]["relief"] is not None
    assert len(made["cpus_used"]) == 3
    for vm in made["summary"]["vms"][:-1]:
        assert vm["throttled_seconds"] == 0
        assert vm["work"] > 0


@pytest.mark.emulated
def test_the_emulators_locks_are_the_guests_own_count(capsys):
    assert main(["demo", "--backend", "emulated", "--seconds", "0.5", "--vms", "2", "--noisy", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["meter"] == "bus_locks"
    noisy = made["summary"]["vms"][-1]  # it counts each of its locks as work
    assert noisy["count"] > 1000
    # The guest runs on between the two looks.
    assert noisy["count"] == pytest.approx(noisy["work"], rel=0.02)


@pytest.mark.buslock
def test_where_the_host_reports_bus_locks_kvm_tells_the_story(capsys):
    assert main(["demo", "--seconds", "6", "--vms", "3", "--noisy", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["backend"], made["meter"]) == ("kvm", "bus_locks")
    assert made["why"] == "kvm: /dev/kvm opens, and this host's KVM reports bus locks"
    noisy = made["summary"]["vms"][-1]
    assert noisy["acts"][1]["held"]
    assert noisy["acts"][1]["rate"] < noisy["acts"][0]["rate"] / 2


@pytest.mark.emulated
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to share one of them")
async def test_vms_that_share_a_cpu_run_nowhere_else_and_we_stay_where_we_were():
    class Looker(Listener):
        def act(self, act, time):
            super().act(act, time)
            names = {int(task.name): (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
            guests = {tid: name for tid, name in names.items() if re.fullmatch(r"(quiet|noisy)-1/0", name)}
            self.where = {name: os.sched_getaffinity(tid) for tid, name in guests.items()}

    before, looker = os.sched_getaffinity(0), Looker()
    await told(plan("emulated", vms=2, noisy=1, seconds=0.3, cpus=1), looker)
    assert looker.where == {name: {min(before)} for name in ("quiet-1/0", "noisy-1/0")}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("backend", REAL)
def test_a_limit_given_on_the_command_line_is_the_budget(backend, capsys):
    command = ["demo", "--backend", backend, "--seconds", "0.6", "--vms", "2", "--noisy", "1", "--limit", "0.05K"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["actions"][0]["limit"] == {"rate": 50, "burst": None, "max_delay": 1}


@pytest.mark.parametrize("backend", REAL)
def test_ctrl_c_stops_the_fleet_tells_the_summary_and_is_130(backend):
    command = [sys.executable, "-m", "orchestra", "demo", "--backend", backend, "--seconds", "600"]
    with subprocess.Popen(
        [*command, "--vms", "2", "--noisy", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if re.match(r" +\d+\.\d s", line):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == ""
    assert "What happened, up to here:" in out


# ---- on other hosts and other installations, for real

DEMO = ["-m", "orchestra", "demo", "--seconds", "0.5", "--vms", "2", "--noisy", "1", "--plain"]


def same_story(text: str) -> bool:
    return bool(
        [int(number) for number in re.findall(r"^Act (\d)", text, re.MULTILINE)] == [1, 2, 3]
        and re.search(r"noisy-1 held to \S+ bus locks/s: it made", text)
        and re.search(r"noisy-1: \S+ bus locks/s in act 1 .*; \S+ bus locks/s in act 3 .* It kept to its budget", text)
        and "The quiet VMs never waited for a limit. Of their own work they got" in text
    )


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("how", "why"),
    [
        (HIDE, "/dev/kvm does not exist or has no driver"),
        (FORBID, "no permission to open /dev/kvm for reading and writing"),
    ],
    ids=["hidden", "forbidden"],
)
def test_without_a_kvm_that_opens_the_emulator_tells_the_same_story(how, why, tmp_path):
    done = run(without_kvm([sys.executable, *DEMO], tmp_path, how=how))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Backend emulated: {why}.\n" in done.stdout
    assert same_story(done.stdout)


@pytest.mark.kvm
@pytest.mark.emulated
@pytest.mark.skipif(bus_lock_problem() is None, reason="this host's KVM reports bus locks")
def test_without_bus_locks_the_emulator_tells_the_same_story():
    done = run([sys.executable, *DEMO])
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "Backend emulated: /dev/kvm opens, but this host's KVM reports no bus locks, and the demo needs them.\n"
        in done.stdout
    )
    assert same_story(done.stdout)


@pytest.mark.kvm
@pytest.mark.skipif(bus_lock_problem() is None, reason="this host's KVM reports bus locks")
def test_without_bus_locks_and_unicorn_kvm_tells_it_of_exits_and_says_how_to_get_the_real_thing(tmp_path):
    python, environment = other_python(tmp_path, without=["unicorn"])
    done = run([*python, *DEMO], environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Backend kvm: /dev/kvm opens; this host's KVM reports no bus locks.\n" in done.stdout
    assert "With real split locks: `pip install 'orchestra-kvm[emulated]'`, then once more.\n" in done.stdout
    assert re.search(r"noisy-1: \S+ exits/s in act 1 ", done.stdout)


def test_without_kvm_and_unicorn_one_line_says_which_command_helps(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "dev").mkdir()
    python, environment = other_python(tmp_path / "packages", without=["unicorn"])
    done = run(without_kvm([*python, *DEMO], tmp_path / "dev"), environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"orchestra: no backend here can do what the demo asks for: kvm: /dev/kvm does not exist or has no driver "
        r"\(load the kernel module .*\); emulated: unicorn is not installed \(`pip install .*`\)\n",
        done.stderr,
    )


def test_kvm_that_was_asked_for_and_reports_no_bus_locks_says_who_does(capsys):
    with _staged(Plan(backend="scripted")) as staged:
        assert (staged.advice, staged.cpus) == ("", None)
    if kvm_problem() is None and bus_lock_problem() is not None:
        with _staged(Plan(backend="kvm", vms=3)) as staged:
            assert "--backend emulated" in staged.advice
            assert staged.cpus == 1


def test_limits_are_shown_with_what_went_wrong():
    from orchestra.model.actions import Applied, Pause, Unthrottle

    limit = Throttle(tenant="acme", limit=Limit(rate=5), reason="why")
    assert words.action_line(Applied(time=0, action=limit), 1.0) == "  1.0 s  tenant acme held to 5 bus locks/s: why"
    assert "free again" in words.action_line(Applied(time=0, action=Unthrottle(vm="a")), 1.0)
    assert "a: pause (could not be done: gone)" in words.action_line(
        Applied(time=0, action=Pause(vm="a"), error="gone"), 1
    )
    assert "a policy failed" in words.action_line(Applied(time=0, action=None, error="x"), 1)
