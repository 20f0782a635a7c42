"""Which responses end in a loop: the bounds of the clip study (arXiv 2609.38995)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.trace.repetition import ends_in_loop

BLOCK = [7, 1, 9, 4, 4]  # 5 tokens: 3 periods are too few tokens, 6 are 30


def looping(*responses: list[int]) -> list[bool]:
    return ends_in_loop([np.array(ids, np.int64) for ids in responses]).tolist()


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        (BLOCK * 6, True),
        (BLOCK * 5 + BLOCK[:4], False),  # 29 tokens
        ([1, 2, 3] + BLOCK * 6, True),
        (BLOCK * 6 + [0], False),  # left the loop, or ended with a token of its own
        ([8] * 30, True),  # one token: period 2 as well
        ([8] * 29, False),
        (list(range(50)) * 3, True),
        (list(range(50)) * 2 + list(range(49)), False),  # 2 periods and a part of the third
        (list(range(51)) * 4, False),  # a longer block than the study looks for
        (list(range(200)), False),
        ([], False),
    ],
)
def test_a_loop_has_3_periods_and_30_tokens_and_reaches_the_end(ids, loops):
    assert looping(ids) == [loops]


def test_responses_of_one_step_do_not_change_each_other():
    assert looping(BLOCK * 6, [], [1] * 400, BLOCK, list(range(40))) == [
        True, False, True, False, False,
    ]  # fmt: skip


def by_definition(ids: list[int]) -> bool:
    """The longest repeated end of each period, token by token."""
    for period in range(2, 51):
        repeated = period
        while repeated < len(ids) and ids[-repeated - 1] == ids[-repeated - 1 + period]:
            repeated += 1
        if len(ids) >= period and repeated >= max(3 * period, 30):
            return True
    return False


@given(
    start=st.lists(st.integers(0, 2), max_size=20),
    block=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    times=st.integers(0, 40),
    part=st.integers(0, 59),
)
def test_any_response_is_judged_as_by_definition(start, block, times, part):
    ids = start + block * times + block[:part]
    assert looping(ids) == [by_definition(ids)]
