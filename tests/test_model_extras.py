"""Whatever tells a person to install orchestra says its name on the package index and an extra that exists."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.model.extras import DISTRIBUTION, install

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
SKIPPED = {"__pycache__", "_build", "build", "dist"}
TEXT = {".cfg", ".md", ".py", ".rst", ".sh", ".toml", ".yaml", ".yml", ""}

# A requirement with extras, wherever it stands. In a string pattern a bracket may be written [[] or \[.
WITH_EXTRAS = re.compile(r"(?<![\w.])(orchestra(?:-[\w-]+)?)(?:\[\[\]|\\?\[)([a-z][\w, -]*)\\?\]")
# What follows `pip install`, as far as it is the command: up to a quotation mark, the end of the code or of the line.
INSTALLS = re.compile(r"pip install ([^`\"\n#]*)")
NAMED = re.compile(r"(?<![\w./-])orchestra(?![\w./-])")


def walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in SKIPPED or path.name.endswith(".egg-info") or (path.name[0] == "." and path.name != ".ci"):
            continue
        if path.is_dir():
            yield from walk(path)
        elif path.suffix in TEXT:
            yield path


FILES = [path for path in walk(ROOT) if path != Path(__file__)]
SOURCES = [path for path in FILES if path.suffix == ".py"]


def wrong(text: str) -> list[str]:
    """What a text tells a person to install that is not this project, or has no such extra."""
    found = [
        f"{name}[{extras}]"
        for name, extras in WITH_EXTRAS.findall(text)
        if name != DISTRIBUTION or not {extra.strip() for extra in extras.split(",")} <= EXTRAS
    ]
    return found + [f"pip install {rest}" for rest in INSTALLS.findall(text) if NAMED.search(rest)]


def test_the_name_is_that_of_the_project():
    assert PROJECT["name"] == DISTRIBUTION


def test_the_command_quotes_the_brackets_which_shells_would_take_for_a_pattern():
    assert install("cli") == f"pip install '{DISTRIBUTION}[cli]'"
    assert install("cli", "plot") == f"pip install '{DISTRIBUTION}[cli,plot]'"


def test_every_file_names_the_project_and_extras_that_there_are():
    found = {str(path.relative_to(ROOT)): wrong(path.read_text()) for path in FILES}
    assert {path: mistakes for path, mistakes in found.items() if mistakes} == {}


@pytest.mark.parametrize(
    "text",
    [
        "pip install 'orchestra[cli]'",
        "pip install orchestra",
        "pip install --upgrade orchestra",
        "by `pip install orchestra[simulate]`, and `orchestra[plot]`",
        "orchestra-kvm[no-such]",
        "orchestra-kvm[cli,nosuch]",
        "*pip install 'orchestra[[]testing]'*",
    ],
)
def test_a_wrong_one_is_found(text):
    assert wrong(text)


@pytest.mark.parametrize(
    "text", ["pip install '.[cli,emulated]'", "pip install 'orchestra-kvm[cli,plot]'", "orchestra run"]
)
def test_a_right_one_passes(text):
    assert wrong(text) == []


def texts(path: Path, *names: str) -> set[str]:
    """The texts that a module calls these functions with."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", None)) in names]
    return {a.value for call in named for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}


def test_code_asks_for_extras_that_there_are():
    asked = {path.name: texts(path, "install") for path in SOURCES if "extras import" in path.read_text()}
    assert "emulated" in asked["library.py"]
    assert set().union(*asked.values()) <= EXTRAS


def test_code_asks_for_its_own_metadata_by_the_constant():
    functions = ("version", "installed_version", "distribution", "metadata")
    asked = {str(path.relative_to(ROOT)): texts(path, *functions) & {"orchestra", DISTRIBUTION} for path in SOURCES}
    assert {path: names for path, names in asked.items() if names} == {}
