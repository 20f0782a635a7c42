"""Differences over one axis: points and intervals at their values, those that hold 0 hollow."""

import math
from itertools import pairwise
from typing import Any

import pytest

from trace_opd.pipelines.plots.differences import DifferencePanel, draw_differences
from trace_opd.pipelines.plots.style import encoded, styled
from trace_opd.pipelines.statistics import Estimate

POINTS = ["0 %", "25 %", "50 %", "75 %"]
LONG = ["none", "every fifth annotation is wrong", "40 %", "all", "unannotated-demonstrations"]
ESTIMATES = [
    Estimate(-0.1, -0.2, -0.01),
    Estimate(0.05, -0.04, 0.17),
    None,
    Estimate(0.35, 0.27, 0.45),
]


def draw(*panels: DifferencePanel, over: str = "") -> Any:
    with styled():
        figure = draw_differences(panels, "share of dropped carries", over)
        figure.draw_without_rendering()
    return figure


def dots(axes: Any) -> list[Any]:
    return [line for line in axes.lines if line.get_marker() == "o"]


def bars(axes: Any) -> list[tuple[float, list[float]]]:
    """Place and ends of each interval."""
    found = [line for line in axes.lines if line.get_linewidth() == 1.6 and line not in dots(axes)]
    return [(line.get_xdata()[0], list(line.get_ydata())) for line in found]


def test_points_and_intervals_are_in_percentage_points():
    (axes,) = draw(DifferencePanel("a − b", POINTS, ESTIMATES)).axes
    places = [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots(axes)]
    assert places == [(0, -10), (1, 5), (3, 35)]
    assert bars(axes) == [(0, [-20, -1]), (1, [-4, 17]), (3, [27, 45])]
    assert [text.get_text() for text in axes.texts] == ["−10.0", "+5.0", "–", "+35.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == POINTS
    assert axes.get_ylabel() == "percentage points"
    assert axes.get_xlabel() == "share of dropped carries"


def test_points_whose_interval_holds_0_are_hollow():
    figure = draw(DifferencePanel("a − b", POINTS, ESTIMATES), over="3 seeds and 64 problems")
    (axes,) = figure.axes
    hollow = [dot.get_markerfacecolor() == "white" for dot in dots(axes)]
    assert hollow == [False, True, False]
    assert len({dot.get_color() for dot in dots(axes)}) == 3  # below, open, above
    said = figure.get_supxlabel().replace("\n", " ")
    assert "95 % intervals over 3 seeds and 64 problems" in said
    assert "hollow: it holds 0" in said
    assert "–: not measured" in said


def test_panels_of_one_unit_have_one_axis():
    small = [Estimate(0.01, -0.01, 0.03)] * 4
    tokens = [Estimate(-12.0, -20.0, -3.0)] * 4
    figure = draw(
        DifferencePanel("a − b", POINTS, ESTIMATES),
        DifferencePanel("c − b", POINTS, small),
        DifferencePanel("tokens", POINTS, tokens, "tokens"),
        DifferencePanel("entropy", POINTS, small, "nats"),
    )
    limits = [axes.get_ylim() for axes in figure.axes]
    assert limits[0] == limits[1]
    assert limits[2][0] < -20 < 0 < limits[2][1] < 20
    assert limits[3][0] < -0.01 < 0.03 < limits[3][1] < 0.06
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["percentage points", "", "tokens", "nats"]
    assert [text.get_text() for text in figure.axes[3].texts] == ["+0.010"] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("points", [POINTS, LONG])
def test_names_and_values_have_room(count, points):
    """Neighbours do not overlap, and values stay within the axes."""
    estimates = [Estimate(x, x - 0.05, x + 0.05) for x in (-0.3, -0.28, 0.4, 0.41, 0.42)]
    panel = DifferencePanel("trace-rkl − all-token-fkl", points, estimates[: len(points)])
    figure = draw(*[panel] * count)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == count
    for axes in shown:
        frame = axes.get_window_extent()
        for texts in (axes.get_xticklabels(), axes.texts):
            boxes = [text.get_window_extent() for text in texts]
            for left, right in pairwise(boxes):
                apart = right.x0 >= left.x1 or right.y0 >= left.y1 or left.y0 >= right.y1
                assert apart, (left, right)
        for text in axes.texts:
            box = text.get_window_extent()
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_equal_figures_make_equal_bytes(suffix):
    files = []
    for _ in range(2):
        with styled():
            figure = draw_differences([DifferencePanel("a − b", POINTS, ESTIMATES)], "x")
            files.append(encoded(figure, suffix))
    assert files[0] == files[1]


def test_values_without_intervals_and_no_values_at_all_are_drawn():
    bare = Estimate(0.2, math.nan, math.nan)
    (axes,) = draw(DifferencePanel("a − b", POINTS, [bare] * 4)).axes
    assert [text.get_text() for text in axes.texts] == ["+20.0"] * 4
    assert {dot.get_markerfacecolor() for dot in dots(axes)} == {"white"}
    (axes,) = draw(DifferencePanel("a − b", POINTS, [None] * 4)).axes
    assert [text.get_text() for text in axes.texts] == ["–"] * 4
