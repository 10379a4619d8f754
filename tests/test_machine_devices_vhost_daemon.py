"""A process that serves a device: how it ended, what it said, and that nothing of it is left."""

from __future__ import annotations

import select
import subprocess
import sys
from pathlib import Path

import pytest

import orchestra as orc
from orchestra.machine.devices.vhost.daemon import WORDS, Daemon
from vhost_kit import children, descriptors


def sh(script: str) -> Daemon:
    return Daemon(["/bin/sh", "-c", script], [])


def test_process_that_ends_by_itself_says_how_and_why():
    before = descriptors()
    daemon = sh("echo said on output; echo said on error >&2; exit 3")
    assert daemon.has_ended(within=60)
    daemon.end()
    assert daemon.how == "exit status 3"
    assert daemon.words == "said on output\nsaid on error"
    daemon.end()  # a second call does nothing
    assert descriptors() <= before
    assert not Path(f"/proc/{daemon.pid}").exists()


def test_process_ends_orderly_if_it_can():
    daemon = sh("trap 'echo orderly; exit 0' TERM; echo ready; while :; do sleep 0.01; done")
    while not daemon.words:
        select.select([daemon.output], [], [])
        daemon.read()
    assert not daemon.has_ended(within=0)
    daemon.end()
    assert (daemon.how, daemon.words) == ("exit status 0", "ready\norderly")


def test_process_that_does_not_end_is_ended_by_force():
    daemon = sh("trap '' TERM; echo ready; while :; do sleep 0.01; done")
    while not daemon.words:
        select.select([daemon.output], [], [])
        daemon.read()
    daemon.end(patience=0.05)
    assert daemon.how == "signal 9"


def test_process_that_prints_for_ever_is_not_kept_waiting_and_not_kept_whole():
    daemon = sh("yes nonsense | head -c 1000000; echo last words; exit 1")
    assert daemon.has_ended(within=60)
    daemon.end()
    assert len(daemon.words) <= WORDS
    assert daemon.words.endswith("last words")


def test_program_that_is_not_there_is_an_error_that_names_it():
    before = descriptors()
    with pytest.raises(orc.VhostUserError, match="/nothing/here: can't be started: No such file"):
        Daemon(["/nothing/here"], [])
    assert descriptors() <= before


KILLED = """
import sys, threading
from orchestra.machine.devices.vhost.daemon import Daemon

def begin():
    print(Daemon(["/bin/sh", "-c", "exec sleep 1000"], []).pid, flush=True)
    threading.Event().wait()

threading.Thread(target=begin).start()
"""


def test_process_ends_when_ours_is_killed():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        pid = int(ours.stdout.readline())
        assert children(ours.pid) == [pid]
        status = Path(f"/proc/{pid}/status")
        assert status.exists()
        ours.kill()
    for _ in range(60_000):
        if not status.exists() or "\nState:\tZ" in status.read_text():
            break
        select.select([], [], [], 0.001)
    else:
        raise AssertionError("it goes on")
