"""The doctor's report on the terminal; what it finds is tested with the doctor itself."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.console import Console

from isolation import FORBID, HIDE, other_python, run, without_kvm
from orchestra.cli.app import main
from orchestra.cli.doctor import doctor
from orchestra.cli.render import show_report
from orchestra.host.doctor import Finding, Report, examine

FINE = Finding("overcommit", "ok", "6.16", "new enough")
NOTE = Finding("virtualised", "note", "yes", "exits cost more", "measure on bare metal")
SLOW = Finding("kernel.split_lock_mitigate", "problem", "1", "sleeps", "`sysctl kernel.split_lock_mitigate=0`")
NO_KVM = Finding("/dev/kvm", "problem", "missing", "no VM can run on kvm", "load kvm_intel")
NONE = Finding('backend="auto"', "problem", "none", "no guest can run here", "`pip install it`")


def shown(report: Report, capabilities: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    show_report(report, capabilities, Console(file=out, width=width))
    return out.getvalue()


def test_problems_come_first_and_notes_before_what_is_well():
    text = shown(Report((FINE, NOTE, SLOW), {}))
    assert text.index(SLOW.check) < text.index(NOTE.check) < text.index(FINE.check)
    assert "1 problem, 1 note." in text


def test_every_remedy_is_shown_whole_on_80_columns():
    words = " ".join(shown(Report((FINE, NOTE, SLOW), {})).split())
    assert "measure on bare metal" in words
    assert "sysctl kernel.split_lock_mitigate=0" in words


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(len(line) for line in shown(Report((FINE, NOTE, SLOW), {}), width=width).splitlines()) <= width


def test_markup_in_what_was_found_is_taken_literally():
    assert "[bold]x[/nonsense]" in shown(Report((Finding("x", "ok", "[bold]x[/nonsense]", ""),), {}))


def test_capabilities_are_listed_by_name_only_when_asked_for():
    report = Report((FINE,), {"KVM_CAP_B": 0, "KVM_CAP_A": 3})
    assert "KVM_CAP" not in shown(report)
    text = shown(report, capabilities=True)
    assert text.index("KVM_CAP_A") < text.index("KVM_CAP_B")


def test_capabilities_that_could_not_be_asked_for_are_said_to_be_missing():
    assert "could not be asked" in shown(Report((NO_KVM,), {}), capabilities=True)


@pytest.mark.parametrize(
    ("findings", "status"),
    [((FINE, NOTE), 0), ((FINE, SLOW), 0), ((NO_KVM, SLOW), 0), ((NO_KVM, NONE), 1)],
    ids=["well", "slow", "emulated only", "none"],
)
def test_the_status_is_1_only_if_no_guest_can_run(findings, status, capsys):
    assert doctor(as_json=False, capabilities=False, report=Report(findings, {})) == status
    assert doctor(as_json=True, capabilities=False, report=Report(findings, {})) == status


def test_json_is_one_document_with_findings_and_capabilities(capsys):
    doctor(as_json=True, capabilities=False, report=Report((SLOW,), {"KVM_CAP_A": 3}))
    document = json.loads(capsys.readouterr().out)
    assert document["findings"][0]["remedy"] == SLOW.remedy
    assert document["capabilities"] == {"KVM_CAP_A": 3}


def test_the_verdict_comes_first_in_three_lines_and_in_json(capsys):
    verdict = examine().verdict
    assert main(["doctor"]) in (0, 1)
    assert capsys.readouterr().out.splitlines()[:4] == [*verdict.lines, ""]
    assert main(["doctor", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict.as_dict()


def test_this_host_is_examined_when_none_is_made_up(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    assert {finding["check"] for finding in json.loads(capsys.readouterr().out)["findings"]} >= {
        "/dev/kvm",
        "unicorn",
        "kernel",
    }


@pytest.mark.emulated
@pytest.mark.parametrize("how", [HIDE, FORBID], ids=["hidden", "forbidden"])
def test_without_kvm_guests_still_run_and_the_status_is_0(how, tmp_path):
    done = run(without_kvm([sys.executable, "-m", "orchestra", "doctor"], tmp_path, how=how))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^problem +/dev/kvm ", done.stdout, re.MULTILINE)
    assert re.search(r'^ok +backend="auto" +emulated: ', done.stdout, re.MULTILINE)


def test_without_kvm_and_unicorn_the_status_is_1_and_the_remedy_is_shown(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "dev").mkdir()
    python, environment = other_python(tmp_path / "packages", without=["unicorn"])
    done = run(without_kvm([*python, "-m", "orchestra", "doctor"], tmp_path / "dev"), environment)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r'^problem +backend="auto" +none: ', done.stdout, re.MULTILINE)
    assert "`pip install 'orchestra-kvm[emulated]'`" in " ".join(done.stdout.split())
