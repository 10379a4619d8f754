"""The examples run as they stand, print what the documentation shows, and leave no file where they are."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import emulated_problem, kvm_problem

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "hello": ["Hello from a guest!", "Halted()"],
    "two_vms": ["bad ended: Shutdown(reason='triple fault'", "good is running", "good counted: some"],
    "bus_lock_budget": ["limit 200/s: ", " bus locks in a second", "limit 50/s: ", "throttled: True"],
    "two_processes": ["1000/s for both: ", " here, ", " there", "200/s for both: ", "200/s for what is left: "],
    "guilty": ["bus locks, ", "%  refcount_get   lock add dword [0x203E],1", "%  spin_lock ", "web-1;no paging;"],
    "own_policy": [
        "held: True",
        "strict: Throttle, more than 500 exits a second",
        "strict: Unthrottle, quiet for 0.5 seconds",
    ],
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
    "afternoon": ["--length", "0.8"],
}


def test_every_example_is_run_here():
    elsewhere = {"linux"}  # tests/test_linux.py, as it needs kernels
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*EXPECTED, *elsewhere}


HIDDEN = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh"]
"""What a command begins with that is to be run where /dev/kvm does not open."""


@functools.cache
def problem(where: str) -> str | None:
    """Why nothing can be run there."""
    no_kvm, no_unicorn = kvm_problem(), emulated_problem()
    if where == "here":
        return f"{no_kvm}; {no_unicorn}" if no_kvm and no_unicorn else None
    if no_unicorn:
        return no_unicorn
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm to hide"
    try:
        done = subprocess.run([*HIDDEN, "true"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"/dev/kvm can't be hidden: {error}"
    return f"/dev/kvm can't be hidden: {done.stderr}" if done.returncode else None


def run(name: str, where: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it in a copy of the folder, which must be as it was afterwards."""
    here = folder / f"{name}-{where}" / "examples"
    shutil.copytree(EXAMPLES, here, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    before = files(here.parent)
    command = [*([] if where == "here" else HIDDEN), sys.executable, str(here / f"{name}.py"), *ARGUMENTS.get(name, [])]
    environment = clean(here.parent.with_name(f"{name}-{where}-tmp"))
    done = subprocess.run(
        command, cwd=here.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert files(here.parent) == before
    return done


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def clean(temporary: Path) -> dict[str, str]:
    """An environment in which what a program leaves in the temporary folder goes there, and bytecode nowhere."""
    temporary.mkdir()
    return {**os.environ, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]]:
    """The examples that were asked for, side by side: most of their time they sleep."""
    asked = [
        (item.callspec.params["name"], item.callspec.params["where"])  # type: ignore[attr-defined]
        for item in request.session.items
        if getattr(item, "originalname", None) == test_an_example_prints_what_it_promises.__name__
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield {one: pool.submit(run, *one, tmp_path_factory.getbasetemp()) for one in asked if problem(one[1]) is None}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("where", ["here", "kvm-hidden"])
@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_prints_what_it_promises(name, where, runs):
    if problem(where) is not None:
        pytest.skip(problem(where))
    done = runs[name, where].result()
    assert done.returncode == 0, done.stderr
    for line in EXPECTED[name]:
        assert line in done.stdout


def test_the_example_test_suite_passes_and_leaves_no_file(tmp_path):
    here = tmp_path / "examples" / "testing"
    shutil.copytree(EXAMPLES / "testing", here, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    before = files(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", str(here)]
    environment = clean(tmp_path.with_name(f"{tmp_path.name}-tmp"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed in " in done.stdout
    assert files(tmp_path) == before
