"""What docs/policies.md says: its examples run, and its figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import orchestra as orc

TEXT = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()


def test_its_examples_run():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    assert all(isinstance(policy, orc.Policy) for policy in names["policies"])  # type: ignore[union-attr]  # a list
    assert names["guard"].is_dry("ladder")  # type: ignore[attr-defined]  # a Guard


def test_its_table_of_models_is_that_of_the_code():
    rows = re.findall(r"^\| (`[^|]+`) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+)/s", TEXT, re.MULTILINE)
    models = {name: row for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    assert set(models) == set(orc.CPU_MODELS)
    for name, (_, cycles, damage, rate) in models.items():
        model = orc.CPU_MODELS[name]
        assert (float(cycles.replace(",", "")), float(damage)) == (model.cycles, model.damage)
        budget = orc.BusTime(0.05, frequency=3e9, model=name).limit.rate
        assert float(rate.replace(",", "")) == pytest.approx(budget, abs=0.5)


def test_every_policy_and_signal_is_in_it():
    from orchestra.policy.harm import HARM, OWN

    for name in (*HARM, *OWN, "StaticLimits", "WeightedShare", "BusTime", "BurstCredits", "Adaptive", "Ladder", "only"):
        assert f"`{name}" in TEXT, name
