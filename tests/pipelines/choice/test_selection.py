"""The criteria of stage select on rows small enough to check by hand."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.pipelines.choice.selection import selection_of
from trace_opd.schemas.configs import SelectConfig
from trace_opd.schemas.errors import InputError


def rows(*groups: str, sources: str = "") -> pl.DataFrame:
    """A row per letter: r right, w wrong, ? no verdict; upper case: truncated."""
    out = [
        {
            "group_id": f"g{number}",
            "source": sources[number] if sources else "s",
            "correct": {"r": True, "w": False, "?": None}[letter.lower()],
            "truncated": letter.isupper(),
            "chars": 10 * (place + 1),
            "duplicate": False,
        }
        for number, group in enumerate(groups)
        for place, letter in enumerate(group)
    ]
    kinds = {"correct": pl.Boolean, "truncated": pl.Boolean}
    return pl.DataFrame(out, schema_overrides=kinds)


def selected(frame: pl.DataFrame, **fields: object) -> str:
    """A letter per row: a annotate, p plain, d drop."""
    made = selection_of(frame, SelectConfig.model_validate(fields))
    return "".join(value[0] for value in made["selection"])


def reasons(frame: pl.DataFrame, **fields: object) -> list[str | None]:
    return selection_of(frame, SelectConfig.model_validate(fields))["left_out"].to_list()


def test_groups_that_are_all_right_or_all_wrong_are_dropped_by_default():
    frame = rows("rr", "rw", "ww", "??")
    assert selected(frame) == "ddaadddd"
    assert reasons(frame) == [
        *["all right"] * 2, None, None, *["all wrong"] * 2, *["unscored"] * 2,
    ]  # fmt: skip


def test_a_pass_rate_counts_responses_with_a_verdict_and_a_band_holds_its_ends():
    frame = rows("rw??", "rwww", "rrrw")
    assert selected(frame, pass_rate=[0.5, 0.75]) == "aappddddaaaa"
    assert reasons(frame, pass_rate=[0.5, 0.75])[4] == "pass rate"


def test_even_groups_stay_on_request():
    assert selected(rows("rr", "ww"), mixed=False) == "aaaa"
    assert selected(rows("rr", "ww"), mixed=False, pass_rate=[0, 0.5]) == "ddaa"


def test_the_unselected_of_a_group_that_stays_train_as_plain_grpo():
    frame = rows("rW", "RW")
    assert selected(frame, keep_truncated=False) == "apdd"
    assert selected(frame, keep_truncated=False, others="plain") == "appp"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"min_chars": 20}, "paa"),
        ({"max_chars": 20}, "aap"),
        ({"min_chars": 20, "max_chars": 20}, "pap"),
        ({"min_chars": 31}, "ddd"),
    ],
)
def test_lengths_are_limits_that_hold_their_ends(fields, expected):
    assert selected(rows("rww"), **fields) == expected


def test_repeated_responses_are_left_out_on_request():
    frame = rows("rww").with_columns(duplicate=pl.Series([False, False, True]))
    assert selected(frame) == "aaa"
    assert selected(frame, keep_duplicates=False) == "aap"
    assert reasons(frame, keep_duplicates=False) == [None, None, "duplicate"]


def test_a_budget_takes_the_most_informative_responses_and_cuts_the_last_group():
    # p(1 - p): 3/16, 1/4, 3/16; g0 and g2 tie, and g0 is first.
    frame = rows("rwww", "rrww", "rrrw")
    assert selected(frame, budget=4) == "ddddaaaadddd"
    assert selected(frame, budget=6) == "aappaaaadddd"
    assert selected(frame, budget=6, others="plain") == "aappaaaapppp"
    assert reasons(frame, budget=6)[2:4] == ["budget", "budget"]


def test_a_source_keeps_its_most_informative_groups():
    frame = rows("rwww", "rw", "rw", "rw", sources="aaab")
    assert selected(frame, per_source=1) == "ddddaaddaa"
    assert reasons(frame, per_source=1)[0] == "source"
    assert selected(frame, per_source=2) == "ddddaaaaaa"


def test_a_share_of_a_source_is_a_share_of_what_stays():
    # Of 4 groups of a and 1 of b, at most half may be of a: one of each.
    frame = rows("rw", "rw", "rw", "rw", "rw", sources="aaaab")
    assert selected(frame, per_source=0.5) == "aaddddddaa"
    assert selected(frame, per_source=0.8) == "aaaaaaaaaa"


def test_a_share_that_no_choice_keeps_is_refused():
    with pytest.raises(InputError, match=r"per_source: is 0.3, and the 2 sources .* 0.5 or more"):
        selected(rows("rw", "rw", sources="ab"), per_source=0.3)


def test_no_rows_are_no_selection():
    assert selected(rows("rw").clear(), budget=1, per_source=0.5) == ""


GROUPS = st.lists(st.text("rw?RW", min_size=1, max_size=5), min_size=1, max_size=8)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 20), st.integers(1, 3), st.randoms())
def test_a_selection_depends_on_the_groups_and_not_on_their_order(
    groups, budget, per_source, chance
):
    frame = rows(*groups).with_columns(source=pl.col("group_id").str.slice(-1, 1))
    config = SelectConfig(budget=budget, per_source=per_source, keep_truncated=False)
    made = frame.hstack(selection_of(frame, config))
    assert (made["selection"] == "annotate").sum() <= budget
    order = frame["group_id"].unique().sort().to_list()
    chance.shuffle(order)
    moved = pl.concat([frame.filter(pl.col("group_id") == name) for name in order])
    again = moved.hstack(selection_of(moved, config))
    assert again.sort("group_id", maintain_order=True).equals(made)
