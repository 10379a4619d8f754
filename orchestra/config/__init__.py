"""Policies as an operator writes them: a TOML file that is checked as a whole, and that a running fleet reloads.

rules = load_rules("rules.toml")
async with orchestra.open_fleet(policies=rules.policies, limit=rules.limit, tenants=rules.tenants) as fleet:
    nursery.start_soon(watch_rules, fleet, rules)

It may import a fleet (for `reload`) and the words.
The one to copy: `reload.py`.
"""

from __future__ import annotations

from ..toml import Mistake, TomlError
from .file import PolicyRule, Rules, load_fleet, load_rules, parse_rules
from .reload import Change, Reloadable, compare, reload, watch_rules

__all__ = [
    "Change",
    "Mistake",
    "PolicyRule",
    "Reloadable",
    "Rules",
    "TomlError",
    "compare",
    "load_fleet",
    "load_rules",
    "parse_rules",
    "reload",
    "watch_rules",
]
