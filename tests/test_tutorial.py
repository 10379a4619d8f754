"""The tutorial's steps run as they stand, and print what the tutorial shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ROOT / "examples" / "tutorial"
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
INCLUDED = re.findall(r"^```\{literalinclude\} \.\./examples/tutorial/(\w+)\.py$", TUTORIAL, re.MULTILINE)
SHOWN = dict(re.findall(r"^```text\n\$ python (\w+)\.py\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL))
SAME_EACH_TIME = {"first_guest", "test_fair_part"}


def run(name: str, *more: str) -> str:
    command = [sys.executable, *more, f"{name}.py"]
    done = subprocess.run(command, cwd=STEPS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", text)]


def without_figures(text: str) -> list[str]:
    return [re.sub(r" *\d+(\.\d+)?", " N", line) for line in text.splitlines()]


def test_every_step_is_in_the_tutorial():
    assert set(INCLUDED) == {path.stem for path in STEPS.glob("*.py")}
    assert set(SHOWN) == set(INCLUDED) - {"fair_part"}  # the policy, which is no program by itself


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("name", SHOWN)
def test_a_step_prints_what_the_tutorial_shows(name):
    printed = run(name)
    if name in SAME_EACH_TIME:
        assert printed == SHOWN[name]
        return
    assert without_figures(printed) == without_figures(SHOWN[name])
    CHECKS[name](printed.splitlines())


def check_limit_by_hand(lines: list[str]) -> None:
    (free, _), (_, held, waited), (again, _) = map(figures, lines)
    assert free > 10_000 < again
    # 110 in a second, and what a busy machine makes of the second
    assert 50 < held < 200
    assert waited > 0.8


def check_two_tenants(lines: list[str]) -> None:
    (acme, acme_waited), (globex, globex_waited) = (figures(line)[:2] for line in lines)
    assert acme < 30 < 60 < globex  # of the 40 that it asks for
    assert acme_waited > 0.2
    assert globex_waited > 2  # of four VMs together


def check_live(lines: list[str]) -> None:
    (acme, acme_waited), (globex, _) = (figures(line)[:2] for line in lines[:2])
    assert acme_waited < 0.2  # without the policy: 0.6
    assert acme > 10  # 40, where the machine has the time for it
    assert globex < 60
    assert lines[4].startswith("  globex took more than its part")


CHECKS = {"limit_by_hand": check_limit_by_hand, "two_tenants": check_two_tenants, "live": check_live}


@pytest.mark.slow
def test_the_policy_is_tested_by_pytest_as_well():
    assert "4 passed" in run("test_fair_part", "-m", "pytest", "-q", "-p", "no:cacheprovider")
