"""The examples run as they stand and print what the documentation shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "hello": ["Hello from a guest!", "Halted()"],
    "two_vms": ["bad ended: Shutdown(reason='triple fault'", "good is running", "good counted: some"],
    "bus_lock_budget": ["limit 200/s: ", "limit 50/s: ", "throttled: True"],
    "own_policy": ["strict: more than 500 exits a second", "held: True"],
    "async_port": ["the guest says 42", "Halted()"],
}


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.kvm
@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_prints_what_it_promises(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in EXPECTED[name]:
        assert line in done.stdout


def test_the_example_test_suite_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "testing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed in " in done.stdout
