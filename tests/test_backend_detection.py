"""`backend="auto"`: the choice on each kind of host for each thing asked for, and that it opens what it says."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

import orchestra as orc
from conftest import blank, bus_lock_problem, emulated_problem, kvm_problem
from orchestra.backend import choose
from orchestra.backend.detection import Asked, Found, look, open_best, pick
from orchestra.model.errors import BackendUnavailable, BusLockUnsupported

KVM, BLIND = Found("kvm"), Found("kvm", bus_locks=False)
NO_KVM = Found.closed("kvm", "/dev/kvm does not exist: load the module: or not")
UNICORN = Found("emulated")
NO_UNICORN = Found.closed("emulated", "backend='emulated': unicorn is broken (a: b): `pip install it`")
ONE_VCPU = Found("emulated", "vcpus=2: one vCPU only")

LIMIT = orc.Limit(rate=10)
NOTHING, LOCKS = Asked(), Asked("limit")
TWO = Asked.by(blank("web", vcpus=2, limit=LIMIT))


def test_what_does_not_open_is_taken_apart_into_problem_and_remedy():
    assert (NO_KVM.problem, NO_KVM.remedy) == ("/dev/kvm does not exist", "load the module: or not")
    assert (NO_UNICORN.problem, NO_UNICORN.remedy) == ("unicorn is broken (a: b)", "`pip install it`")


@pytest.mark.parametrize(
    ("found", "asked", "why"),
    [
        ([KVM, UNICORN], NOTHING, "kvm: /dev/kvm opens, and this host's KVM reports bus locks"),
        ([KVM, UNICORN], LOCKS, "kvm: /dev/kvm opens, and this host's KVM reports bus locks"),
        ([BLIND, UNICORN], NOTHING, "kvm: /dev/kvm opens; this host's KVM reports no bus locks"),
        ([BLIND, NO_UNICORN], NOTHING, "kvm: /dev/kvm opens; this host's KVM reports no bus locks"),
        (
            [BLIND, UNICORN],
            LOCKS,
            "emulated: /dev/kvm opens, but this host's KVM reports no bus locks, and limit needs them",
        ),
        ([NO_KVM, UNICORN], NOTHING, "emulated: /dev/kvm does not exist"),
        ([NO_KVM, UNICORN], LOCKS, "emulated: /dev/kvm does not exist"),
        (
            [attrs.evolve(KVM, problem="vcpus=2: too many"), UNICORN],
            TWO,
            "emulated: /dev/kvm opens, but not for this VM: vcpus=2: too many",
        ),
    ],
)
def test_the_first_that_can_do_what_is_asked_for_is_picked_and_says_why(found, asked, why):
    picked = pick(found, asked)
    assert (picked.name, picked.why) == (why.partition(":")[0], why)


@pytest.mark.parametrize(
    ("found", "asked", "why"),
    [
        (
            [NO_KVM, NO_UNICORN],
            NOTHING,
            "no backend here can run guests: kvm: /dev/kvm does not exist (load the module: or not); "
            "emulated: unicorn is broken (a: b) (`pip install it`)",
        ),
        (
            [BLIND, NO_UNICORN],
            LOCKS,
            "no backend here can do what limit asks for: kvm: this host's KVM reports no bus locks (use an Intel CPU "
            "with bus-lock detection and Linux 5.12, or an AMD one with Bus Lock Threshold and Linux 6.16); "
            "emulated: unicorn is broken (a: b) (`pip install it`)",
        ),
        (
            [BLIND, ONE_VCPU],
            TWO,
            "no backend here can run vm 'web': kvm: this host's KVM reports no bus locks (use an Intel CPU with "
            "bus-lock detection and Linux 5.12, or an AMD one with Bus Lock Threshold and Linux 6.16); "
            "emulated: vcpus=2: one vCPU only",
        ),
    ],
)
def test_where_nothing_fits_each_is_named_with_its_reason_and_remedy(found, asked, why):
    picked = pick(found, asked)
    assert (picked.name, picked.why) == (None, why)


def test_no_more_is_looked_at_than_has_to_be():
    def found():
        yield KVM
        pytest.fail("KVM fits")

    assert pick(found()).name == "kvm"


def test_a_vm_asks_for_what_its_limits_need():
    assert Asked.by(blank()).bus_locks == ""
    assert Asked.by(blank(limit=LIMIT)).bus_locks == "limit"
    assert Asked.by(blank(vcpu_limit=LIMIT)).bus_locks == "vcpu_limit"
    assert Asked.by(blank(exit_limit=LIMIT)).bus_locks == ""


@pytest.mark.parametrize(
    "asked", [NOTHING, LOCKS, TWO, Asked.by(blank(irqchip=True)), Asked.by(blank(limit=LIMIT, irqchip=True))], ids=str
)
def test_what_is_picked_here_is_open_fits_and_says_why(asked, nothing_left):
    try:
        backend = open_best(asked)
    except BackendUnavailable as error:
        refused = error
    else:
        assert backend.why.startswith(f"{backend.name}: ")
        assert not asked.bus_locks or backend.bus_lock_detection() is not None
        if asked.spec is not None:
            backend.check(asked.spec)
        backend.close()  # and whatever else was opened to look is closed: nothing_left
        return
    assert isinstance(refused, BusLockUnsupported) == bool(asked.bus_locks and kvm_problem() is None)
    assert asked.spec is not None or not any(one.bus_locks for one in look())


def test_looking_leaves_nothing_open(nothing_left):
    assert [one.name for one in look()] == ["kvm", "emulated"]


def test_a_backend_that_is_named_is_opened_whatever_is_asked_for():
    backend = orc.ScriptedBackend({}, detection=None)
    assert choose(backend, LOCKS) is backend


# ---- in a fleet

needs_a_blind_kvm = [
    pytest.mark.kvm,
    pytest.mark.emulated,
    pytest.mark.skipif(bus_lock_problem() is None, reason="this host's KVM reports bus locks"),
]


@attrs.frozen
class Locker:
    name: str = "locker"
    interval: float = 1.0
    meter: orc.Meter = orc.Meter.BUS_LOCKS

    def decide(self, facts):
        return ()


@pytest.mark.parametrize(
    ("arguments", "who"),
    [
        pytest.param({"bus_locks": "require"}, "bus_locks='require'", marks=needs_a_blind_kvm),
        pytest.param({"limit": LIMIT}, "limit", marks=needs_a_blind_kvm),
        pytest.param({"tenants": {"acme": LIMIT}}, "tenants['acme']", marks=needs_a_blind_kvm),
        pytest.param({"policies": [Locker()]}, "policy 'locker'", marks=needs_a_blind_kvm),
        pytest.param({}, "", marks=needs_a_blind_kvm),
        pytest.param({"exit_limit": LIMIT}, "", marks=needs_a_blind_kvm),
        pytest.param({"bus_locks": "off"}, "", marks=needs_a_blind_kvm),
    ],
    ids=str,
)
async def test_a_fleet_takes_what_its_arguments_ask_for_and_logs_it(arguments, who, nothing_left, caplog):
    caplog.set_level(logging.INFO, "orchestra")
    async with orc.open_fleet(**arguments) as fleet:
        assert fleet.backend.name == ("emulated" if who else "kvm")
        assert fleet.bus_locks == bool(who)
        assert fleet.statistics().why == fleet.backend.why
        assert f"backend {fleet.backend.why}" in caplog.messages
        if who:
            assert f"and {who} needs them" in fleet.backend.why
            with pytest.raises(orc.SpecError, match=r"vm 'two': vcpus=2: .*; backend='kvm' can"):
                await fleet.launch(blank("two", vcpus=2))
        else:
            with pytest.raises(orc.BusLockUnsupported, match=r"vm 'one': limit: .* backend='emulated'"):
                await fleet.launch(blank("one", limit=LIMIT))


async def test_a_limit_with_bus_locks_off_is_refused_before_anything_is_opened(monkeypatch):
    monkeypatch.setattr("orchestra.fleet.open.choose", lambda *_: pytest.fail("opened"))
    with pytest.raises(orc.SpecError, match="limit limits bus locks, but bus_locks='off'"):
        async with orc.open_fleet(limit=LIMIT, bus_locks="off"):
            pass


# ---- README's own program

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(
    emulated_problem() is not None and bus_lock_problem() is not None, reason="nothing here sees bus locks"
)
def test_readmes_own_program_runs_as_it_stands(tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Halted()\n0 0.0\n"
