"""Units that are split off an answer, and those that contradict each other."""

import pytest

from trace_opd.pipelines.verifiers.units import split_unit, unit_of


@pytest.mark.parametrize("value", ["12", r"36\pi", r"\frac{1}{2}", r"3\sqrt{2}", "2x", "(x+1)"])
@pytest.mark.parametrize(
    "unit",
    [
        r" \text{ cm}^3",
        r"\,\mathrm{cm}^{3}",
        r" \textnormal{ cubic centimeters}",
        r"\ \mbox{cm$^3$}",
        r" {\rm cm}^3",
        r"~\operatorname{cm}^3",
    ],
)
def test_a_unit_that_is_marked_is_split_off_any_expression(value: str, unit: str):
    assert split_unit(value + unit)[0] == value
    assert unit_of(value + unit) == {("cm", 3)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 cm", "12"),
        (r"12\pi square inches", r"12\pi"),
        ("9.8 m/s^2", "9.8"),
        ("8 a.m.", "8"),
        (r"20^\circ\text{C}", "20"),
        (r"45\,\frac{\text{km}}{\text{h}}", "45"),
        (r"\$15", "15"),
        ("15 €", "15"),
        ("3 red apples", "3"),
        ("5m", "5m"),
        ("2ab", "2ab"),
        (r"n \text{ odd}", r"n \text{ odd}"),
        (r"5 \text{ or } 6", r"5 \text{ or } 6"),
        (r"5 \text{ or more}", r"5 \text{ or more}"),
        (r"\text{Monday}", r"\text{Monday}"),
    ],
)
def test_variables_properties_and_second_guesses_are_no_units(text: str, value: str):
    assert split_unit(text)[0] == value


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (r"5\text{ m/s}", "5 meters per second", True),
        (r"5\,\mathrm{m\,s^{-1}}", r"5\text{ m}/\text{s}", True),
        ("5 mph", r"5\text{ miles per hour}", True),
        (r"5\text{ km/h}", r"5\text{ m/s}", False),
        ("3:30 p.m.", "3:30 AM", False),
        (r"5\text{ ft}^2", r"5\text{ square feet}", True),
    ],
)
def test_known_units_are_compared_by_meaning(first: str, second: str, same: bool):
    assert unit_of(first) is not None
    assert (unit_of(first) == unit_of(second)) is same
