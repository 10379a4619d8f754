"""The comparison in the docs: made by its script from real runs, and committed as the script writes it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("matplotlib")
    found = importlib.util.spec_from_file_location("comparison", DOCS / "comparison.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["comparison"] = module
    found.loader.exec_module(module)
    return module


def test_a_small_comparison_is_made_from_real_runs(script, tmp_path):
    said: list[str] = []
    results = script.run(["one-splitter", "mild-cpu"], duration=80, say=said.append)
    assert said[0] == "one-splitter: QEMU's window"
    assert len(said) == 12
    worlds = results["one-splitter"]["worlds"]
    slow = {policy: world["figures"]["slowdown"]["mean"] for policy, world in worlds.items()}
    assert slow["max-min"] < slow["ladder"] < slow["nothing"] or slow["ladder"] <= slow["max-min"] < slow["nothing"]
    tail = {policy: world["figures"]["slowdown"]["p99.9"] for policy, world in worlds.items()}
    assert tail["QEMU's window"] > tail["token bucket"]  # a second's locks at once
    script.write(results, tmp_path)
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("\n## one-splitter\n") == 1
    assert len(re.findall(r"^\| ladder \| 1\.\d+x", page, re.MULTILINE)) == 2
    for name in ("comparison-slowdown.svg", "comparison-time.svg"):
        drawn = ElementTree.parse(tmp_path / name).getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_committed_page_is_what_the_script_makes_of_the_committed_results(script):
    results = json.loads((DOCS / "comparison.json").read_text())
    assert list(results) == list(script.NAMES)
    assert all(list(one["worlds"]) == ["nothing", *script.POLICIES] for one in results.values())
    assert (DOCS / "comparison.md").read_text() == script.page(results)
