"""The scripted afternoon of examples/afternoon.py, on real bus locks, under each kind of policy.

What was done, what the journal has of it, and whether `why` and `guilty` answer rightly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

import orchestra as orc
from orchestra.cli.app import main
from orchestra.journal import JournalReader, read_journal

pytestmark = [
    pytest.mark.buslock,
    pytest.mark.skipif(os.environ.get("KVMHOST") == "intel", reason="its one CPU takes minutes for an afternoon"),
]

NOISE, LENGTH = 2000.0, 3.0
QUIET = ("quiet-1", "quiet-2")
NOISY = ("noisy-1", "noisy-2")


def _load() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "afternoon.py"
    spec = importlib.util.spec_from_file_location("afternoon", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["afternoon"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


afternoon = _load()


class Told:
    """An afternoon as it was, and the questions that can be asked afterwards."""

    def __init__(self, journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.journal = journal
        self.capsys = capsys
        self.lived: Any = None

    def ask(self, *command: str) -> str:
        assert main([*command, "--journal", str(self.journal)]) == 0
        return " ".join(self.capsys.readouterr().out.split())

    def why(self, vm: str, phase: int, part: float = 0.9) -> str:
        found = self.lived.lived[phase]
        at = datetime.fromtimestamp(found.begin + part * (found.end - found.begin))
        return self.ask("why", vm, "--at", at.isoformat())

    def rate(self, vm: str, phase: int) -> float:
        return float(self.lived.lived[phase].rates[vm])

    def locks(self, vm: str, phase: int) -> float:
        found = self.lived.lived[phase]
        return self.rate(vm, phase) * float(found.end - found.begin)

    def held(self, phase: int) -> frozenset[str]:
        return frozenset(self.lived.lived[phase].held)

    def done(self, vm: str) -> list[orc.Action]:
        return [d.action for d in self.lived.done if d.policy is not None and d.action.vm == vm]

    def steps(self, vm: str) -> list[str]:
        return [type(action).__name__ for action in self.done(vm)]


@pytest.fixture(params=["none", "static", "share", "bus-time", "credits", "adaptive", "ladder"])
async def told(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    told = Told(tmp_path / "afternoon.db", capsys)
    noise = NOISE
    if request.param == "adaptive":
        noise *= 3  # somebody has to suffer: more than two CPUs can do
    plan = afternoon.phases(noise, LENGTH)
    if request.param == "adaptive":  # it frees all within 1 s and a doubling each second, in the clear
        plan[-1] = attrs.evolve(plan[-1], seconds=5 * LENGTH)
    told.lived = await afternoon.live(told.journal, afternoon.policies(noise)[request.param], plan, "kvm")
    return told


async def test_an_afternoon(told: Told, request: pytest.FixtureRequest) -> None:
    """One test for all that is asked of it, as an afternoon takes its time."""
    name = request.node.callspec.params["told"]
    the_innocent_are_left_alone(told)
    JUDGED[name](told)
    with read_journal(told.journal) as reader:
        the_journal_has_all_of_it(told, reader)
    why_answers(told, name)
    guilty_names_the_instruction(told)


def the_innocent_are_left_alone(told: Told) -> None:
    assert told.held(0) == frozenset()
    for phase in range(4):
        assert told.held(phase).isdisjoint(QUIET)
        for vm in QUIET:
            assert told.rate(vm, phase) > 0.5 * told.rate(vm, 0)


# ---- what each policy is to do about it


def judge_none(told: Told) -> None:
    assert told.steps("noisy-1") == []
    assert all(told.held(phase) == frozenset() for phase in range(4))
    assert told.locks("noisy-1", 1) > 0.5 * NOISE * LENGTH


def judge_static(told: Told) -> None:
    limit = told.done("noisy-1")[0].limit
    assert told.steps("noisy-1") == ["Throttle"]
    assert told.held(1) == {"noisy-1"}
    assert told.held(2) == set(NOISY)
    for phase, vms in ((1, ["noisy-1"]), (2, NOISY)):
        for vm in vms:
            most = limit.burst + limit.rate * (LENGTH + 0.5)
            assert 0.7 * limit.rate * LENGTH < told.locks(vm, phase) <= most


def judge_share(told: Told) -> None:
    budget = NOISE / 4
    assert told.held(1) == {"noisy-1"}
    assert told.held(2) == set(NOISY)
    # Who comes back from a rest is free for a tick.
    tick = 0.3 * NOISE
    for phase in (1, 2):
        total = sum(told.locks(vm, phase) for vm in (*QUIET, *NOISY))
        assert 0.6 * budget * LENGTH < total < budget * (LENGTH + 0.5) + tick
    ratio = told.locks("noisy-1", 2) / told.locks("noisy-2", 2)
    assert 0.5 < ratio < 1.6
    assert told.steps("noisy-1")[-1] == told.steps("noisy-2")[-1] == "Unthrottle"


def judge_credits(told: Told) -> None:
    baseline, most = NOISE / 8, NOISE
    first = told.done("noisy-1")[0].limit
    assert (first.rate, first.burst) == (baseline, pytest.approx(most, rel=0.05))
    for vm, phases in (("noisy-1", (0, 1, 2)), ("noisy-2", (0, 1, 2))):
        assert sum(told.locks(vm, phase) for phase in phases) <= most + baseline * (3 * LENGTH + 0.5)
    # The storm is paid from what was saved, and once.
    assert told.locks("noisy-1", 1) > most * 0.5
    assert told.locks("noisy-1", 2) < 1.3 * baseline * LENGTH
    assert told.locks("noisy-2", 2) > most * 0.5


def judge_adaptive(told: Told) -> None:
    floor = 2 * afternoon.QUIET
    assert "noisy-1" in told.held(2)
    assert told.steps("noisy-1")[0] == "Throttle"
    for action in told.done("noisy-1"):
        if isinstance(action, orc.Throttle):
            assert action.limit is not None
            assert action.limit.rate >= floor
            assert "cpu_pressure" in action.evidence
    assert told.locks("noisy-1", 2) > 0.5 * floor * LENGTH
    for vm in NOISY:  # when it is over all are free
        assert told.steps(vm)[-1] == "Unthrottle"
    # The innocent keep what they do: those above the floor for a moment are let go with the others.
    assert told.steps("quiet-1")[-1:] in ([], ["Unthrottle"])


def judge_ladder(told: Told) -> None:
    for vm in NOISY:
        assert told.steps(vm) == ["Warn", "Throttle", "Unthrottle"]
    assert told.steps("quiet-1") == []
    assert told.held(1) == {"noisy-1"}
    assert told.held(2) == set(NOISY)


JUDGED = {
    "none": judge_none,
    "static": judge_static,
    "share": judge_share,
    "bus-time": judge_share,
    "credits": judge_credits,
    "adaptive": judge_adaptive,
    "ladder": judge_ladder,
}
POLICIES = {
    "static": "static-limits",
    "share": "weighted-share",
    "bus-time": "bus-time",
    "credits": "burst-credits",
    "adaptive": "adaptive",
    "ladder": "ladder",
}


# ---- what is known of it afterwards


def the_journal_has_all_of_it(told: Told, reader: JournalReader) -> None:
    done = [row for row in reader.actions() if row.given is None]
    rows = [(row.kind, row.vm, row.policy, row.outcome, row.reason) for row in done]
    assert rows == [
        (type(d.action).__name__, d.action.vm, d.policy, d.outcome, d.action.reason) for d in told.lived.done
    ]
    assert all(row.evidence for row in done if row.policy and row.policy != "static-limits")
    for vm, counted in told.lived.counted.items():
        assert sum(row.bus_locks or 0 for row in reader.aggregates(vm=vm)) == counted
        states = [row.state for row in reader.states(vm=vm)]
        assert states[0] == "created"
        assert states[-1] == "stopped"
    span = reader.span()
    assert span is not None
    assert (span[1] - span[0]) / 1e9 > 5 * LENGTH


def why_answers(told: Told, name: str) -> None:
    loud = told.why("noisy-1", 2)
    if name == "none":
        # All that held it was its launch, paused, a moment long.
        assert "a caller held it paused: launch(paused=True)" in loud
        assert "held it to" not in loud
        assert "was throttled" not in loud
    else:
        assert f"policy {POLICIES[name]} has held it to" in loud
        assert "was throttled" in loud
    quiet = told.why("quiet-1", 1)
    assert "most by noisy-1" in quiet
    assert "was throttled" not in quiet
    before = told.why("noisy-1", 0)
    assert "was throttled" not in before
    if name in ("share", "adaptive", "ladder"):
        over = told.why("noisy-1", 3, 1.0)
        assert "By then nothing was in force any more." in over
        assert f"Unthrottle by {POLICIES[name]}" in over


def guilty_names_the_instruction(told: Told) -> None:
    for vm in NOISY:
        found = json.loads(told.ask("guilty", vm, "--json"))
        (only,) = found["instructions"]
        assert only["address"] == afternoon.GUILTY
        assert only["text"] == "lock add dword [0x203E],1"
        assert only["share"] == 1.0
        # Each sample stands for those since the one before.
        assert 0 <= told.lived.counted[vm] - only["weight"] < 40
