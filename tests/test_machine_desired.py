"""The record of what is desired of a VM: caps by asker, and what the next run is made from."""

from __future__ import annotations

import orchestra as orc
from conftest import blank
from orchestra.machine.desired import Desired


def test_the_tightest_cap_counts_and_each_asker_has_one():
    desired = Desired()
    assert desired.cap is None
    desired.caps = desired.caps_with("a", 0.5)
    desired.caps = desired.caps_with(None, 0.8)
    assert desired.cap == 0.5
    desired.caps = desired.caps_with("a", 0.9)
    assert (desired.cap, desired.caps) == (0.8, {"a": 0.9, None: 0.8})
    desired.caps = desired.caps_with("nobody", None)
    desired.caps = desired.caps_with("a", None)
    assert desired.caps == {None: 0.8}


def test_asking_changes_nothing_before_it_is_put():
    desired = Desired()
    desired.caps_with("a", 0.5)
    assert desired.caps == {}


def test_the_next_run_logs_what_the_spec_says_until_somebody_says_otherwise():
    spec = blank(regions=[orc.MemoryRegion(0x200000, 0x1000, log_dirty=True)])
    desired = Desired()
    assert desired.spec(spec) is spec
    assert desired.logs_dirty(spec)
    desired.log_dirty = False
    assert not desired.logs_dirty(spec)
    assert [region.log_dirty for region in desired.spec(spec).regions] == [False]
    desired.log_dirty = True
    assert desired.spec(spec).log_dirty
