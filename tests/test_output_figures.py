"""Axes that fit what is drawn on them."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")

from orchestra.output.figures import Figure, fit_scale


def fitted(*series, least=0.0):
    axes = Figure().subplots()
    for one in series:
        axes.plot([math.nan if value is None else value for value in one])
    axes.set_ylim(bottom=0)
    fit_scale(axes, *series, least=least)
    return axes


@pytest.mark.parametrize(
    ("series", "scale"),
    [
        ([[10.0, 20.0, 30.0]], "linear"),
        ([[10.0, 2000.0]], "symlog"),
        ([[10.0, 20.0], [5000.0, 4000.0]], "symlog"),
        ([[0.0, 0.0, None, math.nan, 3.0]], "linear"),
        ([[]], "linear"),
        ([[None]], "linear"),
        ([[0.001, *[100.0] * 40]], "linear"),  # one stray is no range
    ],
)
def test_a_wide_range_gets_a_logarithmic_axis_and_a_narrow_one_does_not(series, scale):
    assert fitted(*series).get_yscale() == scale


def test_the_smallest_and_the_largest_can_be_seen_apart_from_the_edges():
    axes = fitted([10.0, 30_000.0])
    low, smallest, largest, high = (
        axes.transData.transform((0, value))[1] for value in (0.0, 10.0, 30_000.0, axes.get_ylim()[1])
    )
    assert low + 20 < smallest < largest < high - 2


def test_what_makes_no_difference_makes_no_range():
    assert fitted([0.01, 50.0], least=1.0).get_yscale() == "linear"
    assert fitted([0.01, 5000.0], least=1.0).get_yscale() == "symlog"
