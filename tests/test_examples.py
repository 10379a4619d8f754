"""The examples run as they stand and print what the documentation shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import emulated_problem, kvm_problem

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "hello": ["Hello from a guest!", "Halted()"],
    "two_vms": ["bad ended: Shutdown(reason='triple fault'", "good is running", "good counted: some"],
    "bus_lock_budget": ["limit 200/s: ", " bus locks in a second", "limit 50/s: ", "throttled: True"],
    "guilty": ["bus locks, ", "%  refcount_get   lock add dword [0x203E],1", "%  spin_lock ", "web-1;no paging;"],
    "own_policy": ["strict: more than 500 exits a second", "held: True"],
    "async_port": ["the guest says 42", "Halted()"],
    "afternoon": [
        "quiet-1    quiet-2    noisy-1    noisy-2",
        "* ",
        "Throttle   noisy-1   throttle: bus_locks ",
        "orchestra why noisy-1 --journal ",
    ],
    "asyncio_script": ["one counted 100 times, in steps of {1}", "one is running", "two ended: Stopped("],
    "asyncio_service": ["again: 409", "limited: 200", "all: {'noisy': 'running'}", "gone: 404"],
}
ARGUMENTS = {
    "asyncio_service": ["--visit"],  # it would serve for ever
    "afternoon": ["--length", "0.8", "--journal"],
}


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.fixture(params=["here", "kvm-hidden"])
def before(request: pytest.FixtureRequest) -> list[str]:
    """What a command begins with, to be run as this machine is, or where /dev/kvm does not open."""
    no_kvm, no_unicorn = kvm_problem(), emulated_problem()
    if request.param == "here":
        if no_kvm and no_unicorn:
            pytest.skip(f"{no_kvm}; {no_unicorn}")
        return []
    if no_unicorn:
        pytest.skip(no_unicorn)
    if not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm to hide")
    hide = 'mount --bind /dev/null /dev/kvm && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", hide, "sh"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        pytest.skip(f"/dev/kvm can't be hidden: {error}")
    if done.returncode:
        pytest.skip(f"/dev/kvm can't be hidden: {done.stderr}")
    return command


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_prints_what_it_promises(name, before, tmp_path):
    command = [*before, sys.executable, str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])]
    if command[-1] == "--journal":
        command.append(str(tmp_path / "afternoon.db"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for line in EXPECTED[name]:
        assert line in done.stdout


def test_the_example_test_suite_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "testing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed in " in done.stdout
