"""The report: a page that needs nothing else, a document that says the same, and the command that makes them."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from orchestra.cli.app import main
from orchestra.cli.simulate import _Lines
from orchestra.simulate import Result, load_scenario, simulate
from orchestra.simulate.report import document, summary

SCENARIO = """
name = "a <small> one"
about = "Two noisy & one that learns."
duration = 90
[[hosts]]
count = 4
cpu = "zen-2"
[[vms]]
name = "quiet"
count = 40
[[vms]]
name = "noisy"
count = 2
behaviour = { kind = "steady", rate = 40_000, start = 10, stop = 60 }
[[vms]]
name = "evader"
count = 1
behaviour = { kind = "adversarial", rate = 40_000 }
"""
POLICY = """
[[policies]]
kind = "ladder"
over = { bus_share = 0.05 }
interval = 1.0
"""
VOID = {"meta", "br", "path", "use", "line", "rect"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(load_scenario(SCENARIO + POLICY))


@pytest.fixture(scope="module")
def text(result: Result) -> str:
    pytest.importorskip("matplotlib")
    from orchestra.simulate.html import page

    return page(result)


def test_the_page_is_well_formed_and_shows_all_plots(text):
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 9
    said = " ".join(page.text)
    for title in ("Victims' slow-down", "Who gets the bus", "Throttled time", "Fairness", "Actions", "Jain's index"):
        assert title in said
    assert "a <small> one: a rehearsal" in said
    assert "Two noisy & one that learns." in said


def test_the_page_refers_to_nothing_outside_of_itself(text):
    page = Page(text)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert "src" not in attrs
        for name, value in attrs.items():
            if name in {"href", "xlink:href"}:
                assert value is not None
                assert value.startswith("#")
                assert value[1:] in ids
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for target in re.findall(r"url\(#([^)]+)\)", text):
        assert target in ids
    assert len(ids) == len([1 for _, attrs in page.tags if "id" in attrs]), "ids of different plots clash"


def test_plots_take_their_colours_from_the_page_in_light_and_in_dark(text):
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#0[1-4]0[1-4]0\d", svg)
    assert {"var(--ink)", "var(--muted)", "var(--grid)", "var(--with)", "var(--without)", "var(--group-1)"} <= set(
        re.findall(r"var\(--[\w-]+\)", svg)
    )
    assert "#000000" not in svg
    assert "prefers-color-scheme: dark" in text


def test_the_page_of_a_scenario_without_policies_has_one_world(tmp_path):
    pytest.importorskip("matplotlib")
    from orchestra.simulate.html import page

    alone = simulate(load_scenario(SCENARIO))
    assert alone.with_policies is None
    said = " ".join(Page(page(alone)).text)
    assert "no policy" in said
    assert "with policies" not in said


def test_the_document_is_json_and_says_what_the_worlds_were(result):
    whole = json.loads(json.dumps(document(result), allow_nan=False))
    assert set(whole["worlds"]) == {"with", "without"}
    ruled, free = whole["worlds"]["with"], whole["worlds"]["without"]
    assert ruled["figures"]["slowdown"]["mean"] < free["figures"]["slowdown"]["mean"]
    assert len(ruled["series"]["time"]) == len(ruled["series"]["jain"]) == 90
    assert len(ruled["series"]["done"]) == 3
    first = ruled["actions"][0]
    assert first["action"] == "Warn"
    assert first["reason"]
    assert first["evidence"]
    assert whole["scenario"]["vms"][1]["behaviour"]["kind"] == "steady"
    assert whole["scenario"]["vms"][2]["behaviour"]["stop"] == "inf"


def test_the_summary_is_a_table_of_both_worlds(result):
    lines = list(summary(result))
    assert lines[1] == "policies: ladder"
    assert any(re.match(r"victims' slow-down, mean +1\.\d+x +1\.\d+x$", line) for line in lines)


# ---- the command


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO + POLICY)
    return path


def test_the_command_writes_page_and_json(file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    assert main(["simulate", str(file), "--json", "--html", str(page), "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["seed"] == 7
    assert "with policies: 100 %" in err
    assert f"wrote {page}" in err
    assert Page(page.read_text()).tags


def test_the_command_prints_a_summary(file, capsys):
    assert main(["simulate", str(file)]) == 0
    assert "victims' slow-down, p99" in capsys.readouterr().out


def test_mistakes_in_the_file_are_all_told(file, capsys):
    file.write_text(SCENARIO.replace("count = 4\n", "count = 0\n").replace('"steady"', '"stedy"'))
    assert main(["simulate", str(file)]) == 1
    err = capsys.readouterr().err
    assert err.endswith(f"orchestra: 2 mistakes in {file}\n")
    assert f"{file}:5: hosts[0]" in err or f"{file}:6: hosts[0]" in err
    assert "'stedy': must be one of adversarial" in err


def test_a_policy_that_raised_makes_the_command_fail(file, capsys, monkeypatch):
    from orchestra.policy import Ladder

    monkeypatch.setattr(Ladder, "decide", lambda self, facts: 1 / 0)
    assert main(["simulate", str(file)]) == 1
    assert "switched off on 2 hosts: ladder: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--seed", "-1"], 2, "--seed -1: must be 0 or more"),
        (["--html", "x.png"], 2, "--html x.png: must end in .html or .htm"),
        (["--html", "/nowhere/x.html"], 1, "/nowhere/x.html: No such file or directory"),
    ],
)
def test_options_that_can_not_be_are_refused_before_it_starts(file, arguments, status, said, capsys):
    assert main(["simulate", str(file), *arguments]) == status
    assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    assert main(["simulate", str(tmp_path / "none.toml")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("library", "modules", "options", "command"),
    [
        ("numpy", "orchestra.simulate", [], "pip install 'orchestra-kvm[simulate]'"),
        ("matplotlib", "orchestra.output.figures", ["--html", "x.html"], "pip install 'orchestra-kvm[plot]'"),
    ],
)
def test_without_a_library_the_command_that_installs_it_is_told(
    file, monkeypatch, capsys, library, modules, options, command
):
    for name in [name for name in sys.modules if name.startswith(("orchestra.simulate", modules))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(file.parent)
    assert main(["simulate", str(file), *options]) == 1
    assert command in capsys.readouterr().err


def test_progress_on_a_terminal_is_a_bar_for_each_world():
    import io

    from rich.console import Console

    from orchestra.cli.render import Progress

    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=80)) as bars:
        for label in ("with policies", "without policies"):
            bars.show(label, 0, 10)
            bars.show(label, 10, 10)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"without policies\s+\S+\s+100 %", shown)


def test_progress_elsewhere_is_a_line_for_each_quarter(capsys):
    with _Lines() as lines:
        for done in range(101):
            lines.show("world", done, 100)
    assert capsys.readouterr().err.splitlines() == [f"world: {part} %" for part in (0, 25, 50, 75, 100)]
