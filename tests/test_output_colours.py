"""One colour means one thing in a report."""

from __future__ import annotations

import itertools
import re

import pytest

from orchestra.output import colours
from orchestra.output.colours import GROUPS, INK, PAGE, POLICIES, WITH, WITHOUT, css, variables


@pytest.mark.parametrize(
    "together", [(WITH, WITHOUT, *GROUPS), tuple(POLICIES.values())], ids=["simulation", "comparison"]
)
def test_what_is_drawn_in_one_report_differs_in_light_and_in_dark(together):
    for shade in ("light", "dark"):
        assert len({getattr(colour, shade) for colour in together}) == len(together)


def test_each_colour_has_a_name_and_a_stand_in_of_its_own_that_nothing_else_is_drawn_in():
    for what in ("name", "stand_in"):
        assert len({getattr(colour, what) for colour in colours.ALL}) == len(colours.ALL)
    stand_ins = {colour.stand_in for colour in colours.ALL}
    assert all(re.fullmatch("#[0-9a-f]{6}", stand_in) for stand_in in stand_ins)
    real = {shade for colour in colours.ALL for shade in (colour.light, colour.dark)}
    assert not stand_ins & {*real, *colours.NOISY, "#000000", "#ffffff"}


def test_the_variables_that_a_drawing_uses_are_those_that_the_page_defines():
    text = css(PAGE, light="--page: white;", dark="--page: black;")
    day, night = text.split("@media")
    for colour in PAGE:
        assert f"--{colour.name}: {colour.light};" in day
        assert f"--{colour.name}: {colour.dark};" in night
    assert "--page: white;" in day
    assert "--page: black;" in night
    assert variables([INK]) == {INK.stand_in: "var(--ink)"}


def test_noisy_vms_have_colours_of_their_own_and_none_is_the_quiet_ones():
    assert all(one != other for one, other in itertools.combinations([*colours.NOISY, colours.QUIET], 2))
