"""A step's passes: sequences are distributed over ranks, and each share is cut into rows.

trainer.py calls `rank_batches` in each step. The loss's weights are global to the step, so neither
the shares nor the cuts change the gradient beyond rounding.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .sequences import Contrast, TrainingSequence

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """One pass of a rank's student, and the teacher's before it.

    rows: the sequences of the pass. idle: they only keep the rank in step with ranks that have more
    passes, and count nothing. taught: those with routed tokens, cut into the teacher's rows.
    contrasts: those with a contrast, once under each of its prompts, cut alike. teacher_passes,
    contrast_passes: the number of rows in `taught` and `contrasts` of the rank that has most.
    """

    rows: list[TrainingSequence]
    idle: bool
    taught: list[list[TrainingSequence]]
    teacher_passes: int
    contrasts: list[list[Contrast]] = field(default_factory=list)
    contrast_passes: int = 0


def rank_batches(
    sequences: Sequence[TrainingSequence],
    index: int,
    count: int,
    max_tokens: int,
    with_teacher: bool,
) -> list[MicroBatch]:
    """The passes of rank `index` of `count`, in rows of at most `max_tokens`.

    Sharded passes are collective, so every rank has the same number of them, and of the teacher's
    within each. Every rank knows all sequences, so it counts them alone.
    """
    cuts = [micro_batches(share, max_tokens) for share in shares(sequences, count, with_teacher)]
    batches = []
    for step in range(max(map(len, cuts))):
        rows = [cut[step] if step < len(cut) else [] for cut in cuts]
        taught = [taught_rows(own, max_tokens) if with_teacher else [] for own in rows]
        contrasts = [contrast_rows(own, max_tokens) if with_teacher else [] for own in rows]
        idle = not rows[index]
        shortest = min(sequences, key=lambda s: (len(s.token_ids), s.rollout_id))
        batches.append(
            MicroBatch(
                [shortest] if idle else rows[index],
                idle,
                taught[index],
                max(map(len, taught)),
                contrasts[index],
                max(map(len, contrasts)),
            )
        )
    return batches


def micro_batches(
    sequences: Sequence[TrainingSequence], max_tokens: int
) -> list[list[TrainingSequence]]:
    """Cut sequences into packed rows of at most `max_tokens`, sequences of one prompt together.

    Makes the fewest rows that this allows, and among those cuts one whose longest row is shortest,
    because the longest row sets a step's peak memory. A longer sequence gets a row of its own. The
    result does not depend on the order of the input.
    """
    ordered = sorted(sequences, key=lambda s: (s.group_id, s.prompt_ids, s.rollout_id))
    return _cut([(s, s.prompt_ids, len(s.token_ids)) for s in ordered], max_tokens)


def taught_rows(rows: Sequence[TrainingSequence], max_tokens: int) -> list[list[TrainingSequence]]:
    """Cut a micro-batch's sequences with routed tokens, in their order, into the teacher's rows.

    Like `micro_batches`, but of the teacher's prompts, which with a context are several times
    longer than the student's.
    """
    routed = [row for row in rows if row.routed_end]
    return _cut([(s, s.teacher_prompt_ids or [], s.routed_end) for s in routed], max_tokens)


def contrast_rows(rows: Sequence[TrainingSequence], max_tokens: int) -> list[list[Contrast]]:
    """Cut a micro-batch's sequences with a contrast, under each of its prompts, into rows.

    Ordered by prompt, so that the sequences of one prompt share it.
    """
    pairs = [
        Contrast(row, number)
        for row in rows
        if row.contrast_end
        for number in range(len(row.contrast_prompt_ids))
    ]
    pairs.sort(key=lambda pair: pair.prompt_ids)
    return _cut([(pair, pair.prompt_ids, pair.sequence.contrast_end) for pair in pairs], max_tokens)


def _cut(items: list[tuple[T, list[int], int]], max_tokens: int) -> list[list[T]]:
    """The fewest rows of consecutive items, and among those the shortest longest row.

    items: each with its prompt, and the number of its response's tokens.
    """
    fewest = len(_rows(items, max_tokens))
    even = bisect_left(range(max_tokens), True, key=lambda n: len(_rows(items, n)) <= fewest)
    return _rows(items, even)


def _rows(items: list[tuple[T, list[int], int]], max_tokens: int) -> list[list[T]]:
    rows: list[list[T]] = []
    tokens, before = 0, None
    for item, prompt, length in items:
        more = length + (0 if rows and before == prompt else len(prompt))
        if not rows or tokens + more > max_tokens:
            rows.append([])
            tokens, more = 0, len(prompt) + length
        rows[-1].append(item)
        tokens += more
        before = prompt
    return rows


# The heaviest rank may have this much more than the mean before groups are split.
_IMBALANCE = 0.02


def shares(
    sequences: Sequence[TrainingSequence], count: int, with_teacher: bool = False
) -> list[list[TrainingSequence]]:
    """Distribute sequences over `count` ranks so that all have about equal work.

    Whole groups go to the lightest rank, the longest first. Then sequences move one by one from the
    heaviest rank to the lightest, while that helps and the heaviest is over 2 % above the mean.
    Work is counted in tokens of forward passes: three for the student's forward and backward pass,
    one for the teacher's and each of its contrasts'; a prompt counts once a rank. The result does
    not depend on the order of the input.
    """
    work = {s.rollout_id: _work(s, with_teacher) for s in sequences}
    groups: dict[str, list[TrainingSequence]] = {}
    for sequence in sorted(sequences, key=lambda s: (-work[s.rollout_id], s.rollout_id)):
        groups.setdefault(sequence.group_id, []).append(sequence)
    prompts = {group: 3 * len(own[0].prompt_ids) for group, own in groups.items()}
    totals = {g: prompts[g] + sum(work[s.rollout_id] for s in own) for g, own in groups.items()}
    ranks: list[list[TrainingSequence]] = [[] for _ in range(count)]
    loads = [0] * count
    for group in sorted(groups, key=lambda g: (-totals[g], g)):
        lightest = loads.index(min(loads))
        ranks[lightest] += groups[group]
        loads[lightest] += totals[group]
    for _ in sequences:  # at most
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        if loads[heavy] <= (1 + _IMBALANCE) * sum(loads) / count:
            break
        left = Counter(s.group_id for s in ranks[heavy])
        there = {s.group_id for s in ranks[light]}
        moves = []
        for at, sequence in enumerate(ranks[heavy]):
            group, own = sequence.group_id, work[sequence.rollout_id]
            less = loads[heavy] - own - (prompts[group] if left[group] == 1 else 0)
            more = loads[light] + own + (0 if group in there else prompts[group])
            moves.append((max(less, more), less, more, at))
        most, less, more, at = min(moves)
        if most >= loads[heavy]:
            break
        ranks[light].append(ranks[heavy].pop(at))
        loads[heavy], loads[light] = less, more
    return ranks


def _work(sequence: TrainingSequence, with_teacher: bool) -> int:
    """A sequence's work without its prompt, in tokens of forward passes."""
    taught = with_teacher and sequence.routed_end
    teacher = len(sequence.teacher_prompt_ids or []) + sequence.routed_end if taught else 0
    if taught and (end := sequence.contrast_end):
        teacher += sum(len(ids) + end for ids in sequence.contrast_prompt_ids)
    return 3 * len(sequence.token_ids) + teacher
