"""Labels at lines' ends keep apart, and the colours differ for people who see few colours."""

import re
from itertools import combinations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trace_opd.pipelines.plots.style import COLOURS, DASHES, spread, style_of, text_width, wrapped

# On a loaded machine examples take seconds.
_LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
_PLACES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@_LOADED
@given(_PLACES)
def test_labels_are_apart_within_bounds_and_in_order(wanted):
    gap = 0.08
    places = spread(wanted, gap, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.array(places)[order]) >= gap - 1e-9)
    assert min(places) >= -1e-9
    assert max(places) <= 1 + 1e-9


@_LOADED
@given(_PLACES)
def test_labels_that_have_room_stay_where_they_are(wanted):
    apart = sorted({round(value, 1) for value in wanted})
    np.testing.assert_allclose(spread(apart, 0.09, 0.0, 1.0), apart, atol=1e-9)


def test_labels_of_one_place_lie_around_it():
    np.testing.assert_allclose(spread([0.5, 0.5, 0.5], 0.1, 0, 1), [0.4, 0.5, 0.6])


def test_no_two_of_21_lines_look_the_same():
    assert len({str(style_of(index)) for index in range(len(COLOURS) * len(DASHES))}) == 21


# Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113), severity 1, linear RGB.
_VISION = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of linear RGB: (colours, 3)."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.clip(linear, 0, 1) @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def test_colours_differ_for_people_without_red_or_green_cones():
    coded = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS])
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    for vision, matrix in _VISION.items():
        seen = _lab(linear @ np.array(matrix).T)
        for (i, one), (j, other) in combinations(enumerate(seen), 2):
            # 2.3 is just noticeable.
            assert np.linalg.norm(one - other) > 9, (vision, COLOURS[i], COLOURS[j])


_PARTS = st.lists(st.text("abWi", min_size=1, max_size=6), min_size=1, max_size=3)
_WORDS = st.lists(_PARTS.map("-".join), max_size=6)


@_LOADED
@given(_WORDS, st.floats(0.2, 2))
def test_wrapped_text_keeps_its_words_and_its_width(words, width):
    text = " ".join(words)
    lines = wrapped(text, width, 8.5).splitlines()
    assert "".join("".join(lines).split()) == "".join(words)
    for line in lines:
        if text_width(line, 8.5) > width:  # one part of a word, which cannot be cut
            assert re.fullmatch(r"\w+-?", line), line
