"""Sequences to ranks and rows: budgets, equal passes, balance."""

from dataclasses import replace
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.schemas.labels import Route
from trace_opd.trace.batches import contrast_rows, micro_batches, rank_batches, shares, taught_rows
from trace_opd.trace.sequences import TrainingSequence, contrast_row, student_row, teacher_row


def sequence_of(index: int, prompt: int, tokens: int, group: str = "g") -> TrainingSequence:
    return TrainingSequence(
        rollout_id=f"r{index:03}",
        group_id=group,
        prompt_ids=[1] * prompt,
        token_ids=np.arange(tokens),
        logprobs=np.zeros(tokens, np.float32),
        route=np.zeros(tokens, np.uint8),
        advantage=0.0,
        reward=0.0,
        correct=False,
        temperature=1.0,
        truncated=False,
        teacher_prompt_ids=None,
    )


def taught(sequence: TrainingSequence, prompt: int, last: int) -> TrainingSequence:
    """With a teacher's prompt of its own, and one routed token."""
    route = np.zeros_like(sequence.route)
    route[last] = 1
    number = int(sequence.rollout_id[1:])
    return replace(sequence, route=route, teacher_prompt_ids=[number + 2] * prompt)


def ids(batches: list[list[TrainingSequence]]) -> list[list[str]]:
    return [[s.rollout_id for s in batch] for batch in batches]


def load(share: list[TrainingSequence]) -> int:
    """Tokens of a share, each group's prompt once."""
    prompts = {s.group_id: len(s.prompt_ids) for s in share}
    return sum(prompts.values()) + sum(len(s.token_ids) for s in share)


def test_micro_batches_stay_within_the_budget_and_count_a_shared_prompt_once():
    sequences = [sequence_of(i, 4, n) for i, n in enumerate([3, 3, 3, 3])]
    assert ids(micro_batches(sequences, 10)) == [["r000", "r001"], ["r002", "r003"]]
    assert ids(micro_batches(sequences, 9)) == [["r000"], ["r001"], ["r002"], ["r003"]]
    assert len(micro_batches(sequences, 16)) == 1


def test_micro_batches_are_few_and_of_about_the_same_length():
    sequences = [sequence_of(i, 4, n) for i, n in enumerate([3, 3, 3, 3])]
    assert ids(micro_batches(sequences, 14)) == [["r000", "r001"], ["r002", "r003"]]


def test_a_sequence_longer_than_the_budget_has_a_batch_of_its_own():
    sequences = [sequence_of(i, 2, n) for i, n in enumerate([50, 1, 1])]
    assert ids(micro_batches(sequences, 10)) == [["r000"], ["r001", "r002"]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=20), st.integers(1, 99))
def test_every_sequence_is_in_exactly_one_batch_whatever_the_order(sizes, budget):
    sequences = [sequence_of(i, *size) for i, size in enumerate(sizes)]
    batches = micro_batches(sequences, budget)
    assert sorted(chain(*ids(batches))) == [s.rollout_id for s in sequences]
    for batch in batches:
        assert len(batch) == 1 or student_row(batch).input_ids.numel() <= budget
    assert ids(micro_batches(sequences[::-1], budget)) == ids(batches)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 150),
)
def test_the_teachers_rows_stay_within_the_budget_in_the_order_of_the_students(sizes, budget):
    """Its prompts are several times longer than the student's."""
    plain = [sequence_of(100 + i, 2, 10) for i in range(len(sizes))]
    routed = [taught(sequence_of(i, 2, 10), prompt, last) for i, (prompt, last) in enumerate(sizes)]
    rows = list(chain(*zip(routed, plain, strict=True)))
    cut = taught_rows(rows, budget)
    assert list(chain(*ids(cut))) == [s.rollout_id for s in routed]
    for row in cut:
        assert len(row) == 1 or teacher_row(row).input_ids.numel() <= budget


GROUPS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), max_size=20)


def grouped(sizes: list[tuple[int, int]]) -> list[TrainingSequence]:
    return [sequence_of(i, 2, tokens, f"g{group}") for i, (group, tokens) in enumerate(sizes)]


@given(GROUPS, st.integers(1, 4))
def test_shares_hold_every_sequence_once_whatever_the_order(sizes, count):
    sequences = grouped(sizes)
    cut = shares(sequences, count)
    assert len(cut) == count
    assert sorted(chain(*ids(cut))) == [s.rollout_id for s in sequences]
    assert ids(shares(sequences[::-1], count)) == ids(cut)


@given(GROUPS, st.integers(1, 4))
def test_no_move_of_a_sequence_to_the_lightest_rank_would_help(sizes, count):
    cut = shares(grouped(sizes), count)
    heavy, light = max(cut, key=load), min(cut, key=load)
    if load(heavy) > 1.02 * sum(map(load, cut)) / count:
        for sequence in heavy:
            assert load([*light, sequence]) >= load(heavy)


def test_balanced_groups_stay_whole():
    sequences = [sequence_of(i, 9, 20 + i // 4, f"g{i // 4}") for i in range(32)]
    for share in shares(sequences, 4):
        assert len(share) == 8
        assert len({s.group_id for s in share}) == 2


def test_a_long_group_is_split_over_ranks():
    long = [sequence_of(i, 5, 100, "long") for i in range(8)]
    short = [sequence_of(10 + i, 5, 10, f"g{i}") for i in range(4)]
    cut = shares([*long, *short], 4)
    assert [sum(s.group_id == "long" for s in share) for share in cut] == [2] * 4
    assert max(map(load, cut)) < 1.02 * sum(map(load, cut)) / 4


def test_the_teachers_work_counts_while_there_is_one():
    sequences = [sequence_of(i, 1, 10, f"g{i}") for i in range(4)]
    sequences[0] = taught(sequences[0], 95, 4)
    assert sorted(map(len, shares(sequences, 2))) == [2, 2]
    assert sorted(map(len, shares(sequences, 2, with_teacher=True))) == [1, 3]


@given(GROUPS, st.integers(1, 4), st.integers(1, 80), st.booleans())
def test_ranks_have_the_same_passes_and_every_sequence_counts_once(sizes, count, budget, teach):
    sequences = [
        taught(s, 3 * len(s.token_ids), 0) if i % 3 else s for i, s in enumerate(grouped(sizes))
    ]
    ranks = [rank_batches(sequences, rank, count, budget, teach) for rank in range(count)]
    passes = [[batch.teacher_passes for batch in batches] for batches in ranks]
    assert passes == passes[:1] * count
    counted = [s.rollout_id for b in chain(*ranks) if not b.idle for s in b.rows]
    assert sorted(counted) == [s.rollout_id for s in sequences]
    for step in zip(*ranks, strict=True):
        assert max(len(batch.taught) for batch in step) == step[0].teacher_passes
        for batch in step:
            assert batch.rows
            routed = [s.rollout_id for s in batch.rows if s.routed_end]
            assert list(chain(*ids(batch.taught))) == (routed if teach and not batch.idle else [])


# --- contrasts ---


def with_contrasts(sequence: TrainingSequence, *prompts: list[int]) -> TrainingSequence:
    route = np.zeros_like(sequence.route)
    route[1] = int(Route.REWEIGHT)
    return replace(sequence, route=route, teacher_prompt_ids=[9], contrast_prompt_ids=prompts)


def test_contrasts_of_one_prompt_come_together_and_count_it_once():
    one, two = [5] * 6, [7] * 6
    rows = [
        with_contrasts(sequence_of(0, 4, 3), one, two),
        with_contrasts(sequence_of(1, 4, 3), two),
        with_contrasts(sequence_of(2, 4, 3), one, two),
        sequence_of(3, 4, 3),
    ]
    # A response is read up to its last reweighted token: 6 + 2 · 2, and 6 + 3 · 2 tokens.
    cut = contrast_rows(rows, 12)
    assert [[(c.sequence.rollout_id, c.number) for c in row] for row in cut] == [
        [("r000", 0), ("r002", 0)], [("r000", 1), ("r001", 0), ("r002", 1)],
    ]  # fmt: skip
    assert [contrast_row(row).input_ids.shape[1] for row in cut] == [10, 12]
    assert len(contrast_rows(rows, 22)) == 1
    assert len(contrast_rows(rows, 10)) == 3
    assert contrast_rows(rows[3:], 10) == []


def test_every_rank_makes_the_contrast_passes_of_the_one_with_most():
    sequences = [
        with_contrasts(sequence_of(0, 2, 9, "a"), [5] * 9, [6] * 9),
        with_contrasts(sequence_of(1, 2, 9, "b"), [5] * 9),
    ]
    ranks = [rank_batches(sequences, rank, 2, 12, True) for rank in range(2)]
    for batches in zip(*ranks, strict=True):
        assert sorted(len(batch.contrasts) for batch in batches) == [1, 2]
        assert {batch.contrast_passes for batch in batches} == {2}
        assert {batch.teacher_passes for batch in batches} == {1}
    without = rank_batches(sequences, 0, 2, 12, False)
    assert [(batch.contrasts, batch.contrast_passes) for batch in without] == [([], 0)]


def test_a_contrast_counts_in_the_balance_of_ranks():
    """Three sequences of equal length; one also has two long contrasts."""
    heavy = with_contrasts(sequence_of(0, 2, 10, "a"), [5] * 40, [6] * 40)
    sequences = [heavy, sequence_of(1, 2, 10, "b"), sequence_of(2, 2, 10, "c")]
    assert sorted(map(len, shares(sequences, 2, with_teacher=True))) == [1, 2]
    (alone,) = [share for share in shares(sequences, 2, with_teacher=True) if len(share) == 1]
    assert alone == [heavy]
