"""The engine put together: guard, journal, caps, quarantine and eviction in a fleet that runs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import trio

import orchestra as orc
from conftest import Stage, blank, play
from orchestra.backend.kvm.vcpu import KvmVcpu
from orchestra.backend.scripted import bus_lock
from orchestra.journal import Journal, read_journal
from orchestra.native.core import VcpuCore


class Decides:
    """A policy that decides what it was given, once a second."""

    def __init__(self, *actions, name="decides"):
        self.name, self.interval, self.actions, self.told = name, 1.0, actions, []

    def decide(self, facts):
        return self.actions

    def refused(self, action, reason):
        self.told.append((action, reason))


def noisy(seconds=0.1):
    return itertools.repeat(bus_lock(after=seconds))


async def test_a_dry_run_decides_and_journals_and_does_nothing(autojump_clock):
    throttle = orc.Throttle(vm="guest", limit=orc.Limit(rate=2, burst=2), reason="loud")
    async with play(noisy(), policies=[Decides(throttle)], guard=orc.Guard(dry_run=True)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        (applied,) = fleet.actions()
        assert (applied.action, applied.outcome) == (throttle, "dry-run")
        assert vm.statistics().limit is None


async def test_what_the_guard_refuses_is_journaled_with_the_rule_and_told_to_the_policy(autojump_clock):
    policy = Decides(orc.Pause(vm="guest"), orc.Stop(vm="guest"))
    async with play(noisy(), policies=[policy]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        paused, stopped = fleet.actions()
        assert (paused.outcome, stopped.outcome) == ("done", "refused")
        assert "cool-down" in stopped.error
        assert policy.told == [(stopped.action, stopped.error)]
        assert vm.state == "paused"


async def test_what_failed_holds_nothing_else_back_and_is_not_tried_in_each_tick(autojump_clock):
    policy = Decides(orc.Isolate(vm="guest"), orc.Pause(vm="guest"))
    policy.interval = 0.1
    guard = orc.Guard(vm_cool_down=0.05, host_cool_down=0)
    async with play(noisy(), policies=[policy], guard=guard) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(0.15)  # a script has no threads to isolate
        assert [applied.outcome for applied in fleet.actions()] == ["failed", "done"]
        assert vm.state == "paused"
        await trio.sleep(0.1)
        assert fleet.actions()[2].error == "it failed: not tried again for 0.9 s"
        await trio.sleep(6.25)
        tried = [applied for applied in fleet.actions() if isinstance(applied.action, orc.Isolate)]
        assert sum(applied.outcome == "failed" for applied in tried) == 3


async def test_an_eviction_that_fails_is_one_that_was_not_done(autojump_clock):
    async def move(vm, action):
        await trio.sleep(3)
        raise RuntimeError("no room elsewhere")

    policy = Decides(orc.Evict(vm="guest"))
    async with play(noisy(), policies=[policy], on_evict=move) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(4.1)
        assert [applied.outcome for applied in fleet.actions()] == ["refused", "refused", "failed", "refused"]
        assert "cool-down" in fleet.actions()[0].error
        assert "it failed" in fleet.actions()[3].error
        policy.actions = [orc.Pause(vm="guest")]
        await trio.sleep(1)
        assert vm.state == "paused"


async def test_what_is_meant_for_one_vm_does_not_hit_another_of_its_name(autojump_clock):
    async with play(noisy()) as fleet:
        first = await fleet.launch(blank())
        await first.stop()
        second = await fleet.launch(blank())
        old, new = first.generation, second.generation
        for action in (
            orc.Pause(vm="guest", generation=old),
            orc.Stop(vm="guest", generation=old),
            orc.Throttle(vm="guest", generation=old, limit=orc.Limit(rate=1)),
            orc.SetLimit(vm="guest", generation=old, limit=orc.Limit(rate=1)),
            orc.Warn(vm="guest", generation=old),
            orc.Evict(vm="guest", generation=old),
        ):
            applied = await fleet.apply(action, policy="late")
            assert applied.error == f"vm 'guest' is of another generation now: {new}, not {old}"
        assert (second.state, second.statistics().limit) == ("running", None)
        await fleet.apply(orc.Throttle(vm="guest", generation=new, limit=orc.Limit(rate=7)), policy="late")
        for action in (orc.Unthrottle(vm="guest", generation=old), orc.CapCpu(vm="guest", generation=old, share=None)):
            assert (await fleet.apply(action, policy="late")).outcome == "done"  # with that VM went what held it
        assert second.statistics().limit.rate == 7
        await fleet.apply(orc.Pause(vm="guest", generation=new))
        assert second.state == "paused"


async def test_a_policy_s_late_word_about_a_vm_binds_nobody_about_the_next(autojump_clock):
    policy = Decides()
    async with play(noisy(), policies=[policy]) as fleet:
        first = await fleet.launch(blank())
        await first.stop()
        second = await fleet.launch(blank())
        policy.actions = [orc.Pause(vm="guest", generation=vm.generation) for vm in (first, second)]
        await trio.sleep(1.1)
        assert [applied.outcome for applied in fleet.actions() if applied.policy] == ["failed", "done"]
        assert second.state == "paused"


async def test_a_limit_below_the_floor_is_raised_to_it(autojump_clock):
    throttle = orc.Throttle(vm="guest", limit=orc.Limit(rate=0.01, burst=2))
    async with play(noisy(), policies=[Decides(throttle)], guard=orc.Guard(floor=3)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.statistics().limit.rate == 3


async def test_policies_are_replaced_while_it_runs_and_what_the_gone_one_held_is_let_go(autojump_clock):
    first = Decides(orc.Throttle(vm="guest", limit=orc.Limit(rate=5, burst=2)), name="first")
    second = Decides(orc.Throttle(vm="guest", limit=orc.Limit(rate=7, burst=2)), name="second")
    async with play(noisy(), policies=[first]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.statistics().limit.rate == 5
        await fleet.set_policies([second])
        assert vm.statistics().limit is None
        await trio.sleep(1.5)
        assert vm.statistics().limit.rate == 7
        assert [status.name for status in fleet.statistics().policies] == ["second"]
        await fleet.set_policies([])
        assert vm.statistics().limit is None


async def test_a_reload_grants_no_other_minute_s_worth_of_actions(autojump_clock):
    policy = Decides(orc.Warn(vm="guest"))

    def guard() -> orc.Guard:
        return orc.Guard(actions_per_minute=3)

    async with play(noisy(), policies=[policy], guard=guard()) as fleet:
        await fleet.launch(blank())
        for _ in range(100):
            await trio.sleep(1)
            await fleet.set_policies([policy], guard())
        times = [applied.time for applied in fleet.actions() if applied.outcome == "done"]
        assert len(times) == 6
        assert all(times[n + 3] - times[n] >= 60e9 for n in range(3))


async def test_a_reload_ends_no_cool_down(autojump_clock):
    policy = Decides(orc.Pause(vm="guest"))
    async with play(noisy(), policies=[policy], guard=orc.Guard(vm_cool_down=50)) as fleet:
        await fleet.launch(blank())
        await trio.sleep(1.1)
        await fleet.set_policies([policy], orc.Guard(vm_cool_down=20))
        await trio.sleep(21)
        assert [applied.outcome for applied in fleet.actions()] == ["done", *["refused"] * 19, "done", "refused"]


async def test_a_pause_ends_also_if_another_guard_took_over_meanwhile(autojump_clock):
    policy = Decides(orc.Pause(vm="guest"))
    async with play(noisy(), policies=[policy], guard=orc.Guard(max_pause=300)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.1)
        policy.actions = []
        await fleet.set_policies([policy], orc.Guard(max_pause=20))
        await trio.sleep(19)
        assert vm.state == "paused"
        await trio.sleep(2)
        assert vm.state == "running"


async def test_what_policies_said_counts_by_their_new_order_and_not_at_all_when_they_are_gone(autojump_clock):
    holds, frees = Decides(orc.Pause(vm="guest"), name="holds"), Decides(orc.Resume(vm="guest"), name="frees")
    async with play(noisy(), policies=[holds, frees], guard=orc.Guard(host_cool_down=0)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.1)
        assert fleet.actions()[-1].error == "policy holds, which goes first, holds it"
        holds.actions = []
        await fleet.set_policies([frees, holds])
        await trio.sleep(1)
        assert vm.state == "running"
        frees.actions, holds.actions = [], [orc.Pause(vm="guest")]
        await fleet.set_policies([holds], orc.Guard(vm_cool_down=0))
        await trio.sleep(1)
        assert vm.state == "paused"


async def test_what_a_gone_policy_held_stays_so_if_one_that_goes_first_holds_it(autojump_clock):
    first, second = Decides(name="first"), Decides(orc.Pause(vm="guest"), name="second")
    guard = orc.Guard(vm_cool_down=0, host_cool_down=0)
    async with play(noisy(), policies=[first, second], guard=guard) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.1)
        first.actions = second.actions
        await trio.sleep(1)
        first.actions = []
        await fleet.set_policies([first])
        assert vm.state == "paused"
        assert fleet.actions()[-1].error == "policy first, which goes first, holds it"
        await fleet.set_policies([])
        assert vm.state == "running"
        await trio.sleep(400)
        assert fleet.actions()[-1].action.reason == "policy first was taken away"  # nothing is overdue


async def test_a_policy_that_rehearsed_does_not_become_real_with_what_it_believes(autojump_clock):
    policy = Decides(name="ladder")
    async with play(noisy(), policies=[policy], guard=orc.Guard(dry_run="ladder")) as fleet:
        with pytest.raises(orc.SpecError, match="policy 'ladder' only rehearsed so far"):
            await fleet.set_policies([policy], orc.Guard())
        await fleet.set_policies([policy], orc.Guard(dry_run=True))
        await fleet.set_policies([Decides(name="ladder")], orc.Guard())


async def test_a_warning_is_journaled_and_an_eviction_is_done_by_the_hook(autojump_clock):
    moved = []

    async def move(vm, action):
        moved.append((vm.name, action.reason))
        if vm.name == "b":
            raise RuntimeError("no room elsewhere")

    async with play(noisy(), on_evict=move) as fleet:
        await fleet.launch(blank("a"))
        await fleet.launch(blank("b"))
        assert (await fleet.apply(orc.Warn(vm="a", reason="loud"))).outcome == "done"
        assert (await fleet.apply(orc.Evict(vm="a", reason="out"))).outcome == "done"
        failed = await fleet.apply(orc.Evict(vm="b"))
        assert (failed.outcome, moved) == ("failed", [("a", "out"), ("b", "")])
        assert "no room elsewhere" in failed.error


async def test_without_the_hook_an_eviction_says_what_is_missing(autojump_clock):
    async with play(noisy()) as fleet:
        await fleet.launch(blank())
        assert "on_evict" in (await fleet.apply(orc.Evict(vm="guest"))).error


async def test_a_script_has_nothing_to_cap_or_isolate_and_says_so(autojump_clock):
    async with play(noisy()) as fleet:
        await fleet.launch(blank())
        for action in (orc.CapCpu(vm="guest", share=0.5), orc.Isolate(vm="guest")):
            applied = await fleet.apply(action)
            assert applied.outcome == "failed"
            assert "script" in applied.error


@pytest.fixture(
    params=[pytest.param("emulated", marks=pytest.mark.emulated), pytest.param("kvm", marks=pytest.mark.kvm)]
)
def real(request, nothing_left):
    return Stage(request.param)


async def test_a_capped_guest_is_held_and_goes_on_when_the_cap_is_gone(real):
    async with real.open() as fleet:
        vm = await fleet.launch(real.spec("spin"))
        assert (await fleet.apply(orc.CapCpu(vm="guest", share=0.02))).outcome == "done"
        assert vm.desired.cap == 0.02
        core = vm._control.guest.vcpus[0].core
        with trio.fail_after(20):
            while not core.counters(fleet.now()).capped:  # noqa: ASYNC110  # the core tells nobody: a cap is not an event
                await trio.sleep(0.01)
        await fleet.apply(orc.CapCpu(vm="guest", share=0.5), policy="somebody")
        assert vm.desired.cap == 0.02  # the tightest counts
        vm.cap_cpu(None)
        assert vm.desired.cap == 0.5
        await fleet.apply(orc.CapCpu(vm="guest", share=None), policy="somebody")
        assert vm.desired.cap is None
        assert fleet.actions()[-2].action == orc.CapCpu(vm="guest", share=None, reason="cap_cpu()")
        await vm.pause()  # at once, also right after a cap
        await vm.resume()


NO_QUEUE = """
import resource, signal, sys, threading, trio
import orchestra as orc

resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 5})
try:
    signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 5)
except BlockingIOError:
    pass
else:
    sys.exit("a real-time signal could be queued all the same")


async def main():
    async with orc.open_fleet(backend=sys.argv[1], bus_locks="off") as fleet:
        boot = orc.FlatImage(code=b"\\xeb\\xfe")
        vms = [await fleet.launch(orc.VmSpec(name=f"vm{i}", boot=boot)) for i in range(3)]
        for vm in vms:
            await vm.pause()
            await vm.resume()
            assert (await vm.inspect()).rip == 0x1000
        await vms[0].stop()
        await vms[1].pause()
    assert [vm.outcome for vm in vms[1:]] == [orc.Stopped("the fleet was closed")] * 2


trio.run(main)
print("all came out")
"""


@pytest.mark.parametrize(
    "backend", [pytest.param("emulated", marks=pytest.mark.emulated), pytest.param("kvm", marks=pytest.mark.kvm)]
)
def test_busy_guests_come_out_when_no_signal_can_be_queued(backend):
    """RLIMIT_SIGPENDING is the user's: another of his processes may have used it up."""
    command = [sys.executable, "-c", NO_QUEUE, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "all came out\n"), done.stderr


@pytest.mark.kvm
async def test_a_vcpu_is_unmapped_once_the_capper_has_let_go_of_it(monkeypatch, nothing_left):
    """The capper kicks vCPUs on a thread of its own, and writes to what the engine has mapped when it does."""
    done: list[str] = []
    unbind, close = VcpuCore.unbind, KvmVcpu.close

    def let_go(core: VcpuCore) -> None:
        done.append("let go")
        unbind(core)

    def unmap(vcpu: KvmVcpu) -> None:
        if vcpu.fd >= 0:
            done.append("unmap")
        close(vcpu)

    monkeypatch.setattr(VcpuCore, "unbind", let_go)
    monkeypatch.setattr(KvmVcpu, "close", unmap)
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", vcpus=2))
        vm.cap_cpu(0.5)
        await vm.stop()
    assert [what for what in done if what == "unmap"] == ["unmap"] * 2
    assert done[:4] == ["let go", "unmap"] * 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process may run on one CPU only")
async def test_an_isolated_guest_runs_on_the_quarantine_cpus(real):
    cpus = os.sched_getaffinity(0)
    async with real.open(quarantine=[min(cpus)]) as fleet:
        vm = await fleet.launch(real.spec("spin"))
        thread = vm._control.guest.vcpus[0].tid
        assert (await fleet.apply(orc.Isolate(vm="guest"))).outcome == "done"
        assert (vm.desired.isolated, os.sched_getaffinity(thread)) == (True, {min(cpus)})
        assert (await fleet.apply(orc.Rejoin(vm="guest"))).outcome == "done"
        assert (vm.desired.isolated, os.sched_getaffinity(thread)) == (False, cpus)


async def test_the_journal_has_actions_states_and_what_was_done_each_second(autojump_clock, tmp_path):
    journal = Journal(tmp_path / "fleet.db")
    async with play(noisy(), journal=journal, limit=orc.Limit(rate=100)) as fleet:
        await fleet.launch(blank())
        await trio.sleep(3.5)
        await fleet.apply(orc.Throttle(vm="guest", limit=orc.Limit(rate=2, burst=2), reason="by hand"))
        await fleet.vm("guest").stop("enough")
    with read_journal(tmp_path / "fleet.db") as read:
        given, default, action, stop = read.actions()
        assert default.given == "default"  # what Python may answer for it
        assert (given.kind, given.given, given.details["limit"]["rate"]) == ("SetLimit", "open_fleet", 100)
        assert (stop.kind, stop.reason, stop.policy) == ("Stop", "enough", None)
        assert (action.kind, action.vm, action.reason, action.outcome) == ("Throttle", "guest", "by hand", "done")
        assert [row.state for row in read.states()] == ["created", "running", "stopped"]
        rows = list(read.aggregates(vm="guest"))
        assert len(rows) == 4  # the last of half a second
        assert sum(row.bus_locks for row in rows) == pytest.approx(35, abs=1)
        assert {row.rate for row in read.hosts()} == {100}


@pytest.mark.emulated
async def test_a_profile_of_the_guilty_instruction_is_in_the_journal(tmp_path):
    from conftest import lock_spec

    async with orc.open_fleet(backend="emulated", journal=Journal(tmp_path / "fleet.db")) as fleet:
        vm = await fleet.launch(lock_spec("add", 32), paused=True)
        vm.write_memory(0x8004, (500).to_bytes(4, "little"))
        await vm.resume()
        await vm.wait()
    with read_journal(tmp_path / "fleet.db") as read:
        rows = list(read.profiles(vm="guest"))
    assert len({row.rip for row in rows}) == 1
    assert sum(row.samples for row in rows) >= 1
