"""Heat maps show each cell's value and interval, and which intervals hold 0 without colour."""

import math
from itertools import combinations
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from trace_opd.pipelines.plots.heat import Axis, HeatPanel, draw_heat
from trace_opd.pipelines.plots.style import encoded, styled
from trace_opd.pipelines.statistics import Estimate

X = Axis("share of dropped carries", ["0 %", "25 %", "50 %", "75 %"])
Y = Axis("rollouts a step", ["3 × 4", "6 × 4", "8 × 6"])
LONG_X = Axis(
    "share of demonstrations that answer at once under the hint",
    ["none of them", "a half of them", "nearly all of the demonstrations"],
)
LONG_Y = Axis(
    "share of wrong labels among the annotations of a step",
    ["none", "10 %", "every fifth annotation is wrong", "40 %", "all-of-them-unannotated"],
)
AHEAD, BEHIND = Estimate(0.123, 0.04, 0.201), Estimate(-0.3, -0.42, -0.151)
OPEN = Estimate(0.05, -0.02, 0.12)
NONE = Estimate(math.nan, math.nan, math.nan)


def draw(*panels: HeatPanel, x: Axis = X, y: Axis = Y, over: str = "") -> Any:
    with styled():
        figure = draw_heat(panels, x, y, over)
        figure.draw_without_rendering()
    return figure


def filled(cell: Estimate | None, x: Axis = X, y: Axis = Y) -> list[list[Estimate | None]]:
    return [[cell] * len(x.points) for _ in y.points]


def face(axes: Any, column: int, row: int) -> Any:
    """The rectangle of a cell; None without one."""
    here = (column - 0.5, row - 0.5)
    return next((one for one in axes.patches if one.get_xy() == here), None)


def written(axes: Any, column: int, row: int) -> list[str]:
    return [
        text.get_text()
        for text in axes.texts
        if text.get_position()[0] == column and abs(text.get_position()[1] - row) < 0.5
    ]


def test_cells_have_values_and_intervals_in_percentage_points():
    cells = filled(AHEAD)
    cells[0][1], cells[2][3] = BEHIND, OPEN
    (axes,) = draw(HeatPanel("a − b", cells)).axes
    assert written(axes, 0, 0) == ["+12.3", "+4.0 to +20.1"]
    assert written(axes, 1, 0) == ["−30.0", "−42.0 to −15.1"]
    assert written(axes, 3, 2) == ["+5.0", "−2.0 to +12.0"]
    heights = [label.get_window_extent().y0 for label in axes.get_yticklabels()]
    assert heights == sorted(heights, reverse=True)  # the first row is on top


def test_tokens_and_nats_are_shown_as_they_are():
    one = Axis("x", ["a"])
    panels = [
        HeatPanel("tokens", [[Estimate(-12.34, -20, -3)]], "tokens"),
        HeatPanel("entropy", [[Estimate(0.0312, 0.01, 0.05)]], "nats"),
    ]
    figure = draw(*panels, x=one, y=one)
    assert written(figure.axes[0], 0, 0) == ["−12.3", "−20.0 to −3.0"]
    assert written(figure.axes[1], 0, 0) == ["+0.031", "+0.010 to +0.050"]
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["tokens", "nats"]


def test_cells_whose_interval_holds_0_are_hatched_and_those_of_no_figure_empty():
    cells = filled(AHEAD)
    cells[0] = [OPEN, None, NONE, Estimate(0.1, 0.0, 0.2)]
    figure = draw(HeatPanel("a − b", cells), over="3 seeds and 64 problems")
    (axes,) = figure.axes
    hatches = [face(axes, 0, 0).get_hatch(), face(axes, 3, 0).get_hatch()]
    assert all(hatches)
    assert not face(axes, 0, 1).get_hatch()
    for column in (1, 2):
        assert face(axes, column, 0) is None
        assert written(axes, column, 0) == ["–"]
    weights = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert (weights["+5.0"], weights["+12.3"]) == ("normal", "bold")
    said = figure.get_supxlabel().replace("\n", " ")
    assert "95 % interval over 3 seeds and 64 problems" in said
    assert "hatched: the interval holds 0" in said
    assert "–: not measured" in said


def test_the_caption_speaks_of_missing_figures_only_where_there_are_some():
    assert "not measured" not in draw(HeatPanel("a − b", filled(AHEAD))).get_supxlabel()


def test_panels_of_one_unit_have_one_scale_of_colours():
    small, large = Estimate(0.1, 0.05, 0.15), Estimate(0.4, 0.3, 0.5)
    mixed = [[small, large, Estimate(-0.1, -0.2, -0.05), OPEN] for _ in Y.points]
    figure = draw(
        HeatPanel("a", filled(small)),
        HeatPanel("b", mixed),
        HeatPanel("c", filled(Estimate(10, 5, 15)), "tokens"),
    )
    shown = [axes for axes in figure.axes if axes.get_visible()]
    colours = [[to_rgb(face(axes, n, 0).get_facecolor()) for n in range(4)] for axes in shown]
    assert colours[0][0] == colours[1][0]
    assert colours[1][1] == colours[2][0]  # the largest of its unit
    red, _, blue = zip(*colours[1], strict=True)
    assert blue[1] - red[1] > blue[0] - red[0] > 0 > blue[2] - red[2]
    assert abs(blue[3] - red[3]) < 0.02  # grey


WIDE = Estimate(-0.273, -0.428, 0.276)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("x", "y"), [(X, Y), (LONG_X, LONG_Y)])
def test_no_text_leaves_its_cell_or_hides_another(count, x, y):
    cells = filled(WIDE, x, y)
    cells[0][0] = Estimate(0.298, 0.227, 0.388)
    title = "trace-rkl − all-token-fkl"
    figure = draw(*[HeatPanel(title, cells) for _ in range(count)], x=x, y=y, over="5 seeds")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == count
    texts = [figure._supxlabel]  # what get_supxlabel reads
    for axes in shown:
        width = axes.get_window_extent().width / len(x.points)
        assert all(text.get_window_extent().width <= width for text in axes.texts)
        texts += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
        texts += [axes.yaxis.label, axes._left_title]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    canvas = figure.bbox
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= canvas.width + 1
        assert box.y1 <= canvas.height + 1
    for one, other in combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        up = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(across, up) < 1.5, (one, other)  # pixels, of 100 an inch


def test_two_panels_of_three_by_four_cells_stand_next_to_each_other():
    figure = draw(HeatPanel("a", filled(WIDE)), HeatPanel("b", filled(WIDE)))
    left, right = (axes.get_window_extent() for axes in figure.axes)
    assert left.x1 < right.x0
    assert left.y0 == pytest.approx(right.y0)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_equal_figures_make_equal_bytes(suffix):
    cells = filled(AHEAD)
    cells[1][1], cells[1][2] = OPEN, None
    files = []
    for _ in range(2):
        with styled():
            files.append(encoded(draw_heat([HeatPanel("a − b", cells)], X, Y), suffix))
    assert files[0] == files[1]


def test_a_map_without_any_figure_is_drawn():
    (axes,) = draw(HeatPanel("a − b", filled(None))).axes
    assert {text.get_text() for text in axes.texts} == {"–"}


def test_a_value_without_an_interval_is_unresolved():
    bare = Estimate(0.2, math.nan, math.nan)
    (axes,) = draw(HeatPanel("a − b", filled(bare))).axes
    assert written(axes, 0, 0) == ["+20.0"]
    assert face(axes, 0, 0).get_hatch()
