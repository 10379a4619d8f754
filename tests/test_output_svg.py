"""What the pictures of all commands share: names that cover nothing, round times, files."""

from __future__ import annotations

import itertools
import time
from datetime import datetime

import pytest
from hypothesis import given, strategies as st

pytest.importorskip("matplotlib")

from orchestra.cli.whyplot import draw
from orchestra.model.errors import FileError
from orchestra.output import svg
from orchestra.output.figures import Figure

BEGIN = datetime(2026, 3, 9, 14, 5, 7).timestamp()


@pytest.fixture(params=["UTC", "Europe/Berlin", "Asia/Kolkata"])
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("seconds", "shape"),
    [(3, "%H:%M:%S"), (20, "%H:%M:%S"), (300, "%H:%M"), (3600, "%H:%M"), (86400, "%m-%d %H:%M"), (1e6, "%m-%d")],
)
def test_times_are_labelled_at_round_steps_each_once(zone, seconds, shape):
    axes = Figure().subplots()
    begin = datetime(2026, 3, 9, 14, 5, 7).timestamp()
    axes.plot([begin, begin + seconds], [0, 1])
    svg.time_axis(axes)
    ticks, labels = axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()]
    assert 2 <= len(ticks) <= svg.MOST_LABELS + 1
    assert len(set(labels)) == len(labels)
    for tick, label in zip(ticks, labels, strict=True):
        assert f"{datetime.fromtimestamp(tick):{shape}}" == label  # to the second: nothing was rounded
        assert tick == round(tick)
    assert len({round(b - a) for a, b in itertools.pairwise(ticks)}) == 1
    if seconds >= 3600:
        assert all(
            (datetime.fromtimestamp(tick).minute % 10, datetime.fromtimestamp(tick).second) == (0, 0) for tick in ticks
        )


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.text("abcdefgh ()", min_size=1, max_size=40), st.booleans()), max_size=30
    ).map(sorted)
)
def test_names_of_what_happened_lie_neither_on_each_other_nor_outside(happened):
    rows: dict[int, list[tuple[float, float]]] = {}
    for at, row, text, left in svg._placed((0.0, 100.0), happened):
        wide = (len(text) + 1) * svg.LETTER
        begin = at / 100 - (0 if left else wide)
        assert begin + wide <= 1 + 1e-9
        rows.setdefault(row, []).append((begin, begin + wide))
    assert set(rows) <= set(range(svg.ROWS))
    for places in rows.values():
        for (_, end), (begin, _) in itertools.pairwise(places):
            assert end <= begin + 1e-9


def test_names_stand_in_a_strip_of_their_own_and_their_lines_go_through_all_axes():
    strip, one, other = Figure().subplots(3, 1, sharex=True)
    one.plot([0, 100], [0, 1])
    svg.marks(strip, [one, other], [(10.0, "Pause", True), (10.0, "Warn", False)])
    assert [text.get_text() for text in strip.texts] == ["Pause", "Warn"]
    assert not one.texts
    assert not other.texts
    assert len(other.lines) == 2
    assert [line.get_linestyle() for line in other.lines] == ["-", "--"]


def test_a_long_heading_is_broken_into_lines_that_fit():
    figure = Figure(figsize=(8, 4))
    svg.heading(figure, "why " * 60)
    assert max(map(len, figure.get_suptitle().splitlines())) <= svg.LINE
    assert len(figure.get_suptitle().splitlines()) == 2


def test_a_file_that_can_not_be_written_is_named(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        svg.save(Figure(), tmp_path / "nowhere" / "x.svg")


def test_why_draws_the_wide_range_of_its_bus_locks(tmp_path, monkeypatch):
    from journals import BEGIN, SECOND, Afternoon, vm
    from orchestra.cli import whyplot
    from orchestra.journal import read_journal
    from orchestra.journal.explain import explain
    from orchestra.journal.series import series

    afternoon = Afternoon(tmp_path / "fleet.db")
    afternoon.state("a", "running")
    for second in range(60):
        afternoon.second(vm("a", 20_000 if second > 50 else 12))
    afternoon.close()
    kept = []
    monkeypatch.setattr(whyplot, "save", lambda figure, path: kept.append(figure))
    with read_journal(tmp_path / "fleet.db") as reader:
        draw(explain(reader, "a", None), series(reader, "a", BEGIN, BEGIN + 60 * SECOND, 60), tmp_path / "x.svg")
    assert [axes.get_yscale() for axes in kept[0].axes] == ["linear", "symlog", "linear"]
