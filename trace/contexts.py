"""What each response's teacher sees besides the problem: `routing.teacher_context`, for every row.

routed.py calls `teacher_contexts` once per part, for the teacher and for its contrast. A context
that is not the type label is a text that the privileged template shows; an empty text stands for
the student's own prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.contract import list_of
from ..schemas.conversation import shown_row, with_history
from ..schemas.labels import TeacherContext

NO_CONTEXT = ""  # the text of context none: the student's own prompt


@dataclass(frozen=True)
class TeacherContexts:
    """What each response's teacher sees besides the problem.

    exists: (responses,) bool; a response without context has no teacher. labels: diagnostic types,
    or null; texts: null under the type label. contrasts: a list of texts of each response, or null;
    None without `routing.contrast_context`.
    """

    exists: np.ndarray
    labels: Any
    texts: Any
    contrasts: Any = None


@dataclass(frozen=True)
class Known:
    """What contexts are made of, a row per response: its rollout, its problem's row, whether it is
    correct, (responses,) bool, and its annotation's label and reflection, null without.

    all_problems: a row per problem.
    """

    rollouts: pa.Table
    problems: pa.Table
    all_problems: pa.Table
    correct: np.ndarray
    labels: Any
    reflections: Any


def teacher_contexts(known: Known, config: RoutingConfig) -> TeacherContexts:
    """The context of each response under `routing.teacher_context`, with those of its contrast.

    A response that lacks either has no teacher.
    """
    if config.teacher_context == TeacherContext.TYPE:
        texts, exists = pa.nulls(len(known.labels), pa.string()), _filled(known.labels)
    else:
        ((texts, exists),) = _texts(known, config.teacher_context, 1)
    if config.contrast_context is None:
        return TeacherContexts(exists, known.labels, texts)
    contrasts = _texts(known, config.contrast_context, config.contrasts)
    exists &= contrasts[0][1]  # with the second text there is the first
    return TeacherContexts(exists, known.labels, texts, _lists(contrasts))


def peers(
    rollouts: pa.Table, among: np.ndarray, count: int = 1, shortest: bool = False
) -> np.ndarray:
    """The rows of each response's peers, (responses, count) int64; −1 without one.

    Peers are the first other responses of the group by sample index (SDPO, arXiv 2601.20802), so
    that responses share them, and with them a prompt; or the shortest in tokens, ties by sample
    index. among: (responses,) bool, which responses may be peers.
    """
    group = rollouts["group_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    index = rollouts["sample_index"].to_numpy()
    length = pc.list_value_length(rollouts["token_ids"]).to_numpy() if shortest else index
    order = np.lexsort((index, length, group))
    order = order[among[order]]
    place = np.full(len(group), -1)
    place[order] = np.arange(len(order))
    begin, end = (np.searchsorted(group[order], group, side) for side in ("left", "right"))
    at = begin[:, None] + np.arange(count)  # (responses, count)
    at += (place[:, None] >= 0) & (place[:, None] <= at)  # not itself
    rows = order[np.minimum(at, len(order) - 1)] if len(order) else at
    return np.where(at < end[:, None], rows, -1)


def other_solutions(problems: pa.Table) -> dict[str, str]:
    """By problem id the solution of another problem: of the next one by id, the last has the first.

    Problems without a solution, or of the same text, are passed over; a problem that finds none has
    no entry.
    """
    columns = with_history(["problem_id", "problem", "solution"], problems)
    wanted = problems.select(columns).to_pylist()
    wanted.sort(key=lambda row: row["problem_id"])
    text_of = {row["problem_id"]: shown_row(row) for row in wanted}
    by_text = {text_of[row["problem_id"]]: row for row in reversed(wanted) if row["solution"]}
    solved = sorted(by_text.values(), key=lambda row: row["problem_id"])
    ids = [row["problem_id"] for row in solved]
    starts = np.searchsorted(
        np.array(ids, dtype=object), [r["problem_id"] for r in wanted], "right"
    )
    found = {}
    for row, start in zip(wanted, starts.tolist(), strict=True):
        for after in range(min(2, len(solved))):
            other = solved[(start + after) % len(solved)]
            if text_of[other["problem_id"]] != text_of[row["problem_id"]]:
                found[row["problem_id"]] = other["solution"]
                break
    return found


def _texts(known: Known, context: TeacherContext, count: int) -> list[tuple[Any, np.ndarray]]:
    """At most `count` texts of each response, the k-th of all as (array, whether it exists)."""
    if context in (TeacherContext.PEER, TeacherContext.SHORTEST_PEER, TeacherContext.WRONG_PEER):
        among = ~known.correct if context == TeacherContext.WRONG_PEER else known.correct
        shortest = context == TeacherContext.SHORTEST_PEER
        rows = peers(known.rollouts, among, count, shortest)  # (responses, count)
        responses = known.rollouts["response"]
        taken = [responses.take(pa.array(peer, mask=peer < 0)) for peer in rows.T]
    elif context == TeacherContext.OTHER_SOLUTION:
        others = other_solutions(known.all_problems)
        ids = known.rollouts["problem_id"].to_pylist()
        taken = [pa.array([others.get(str(problem)) for problem in ids], pa.string())]
    elif context == TeacherContext.REFLECTION:
        taken = [known.reflections]
    elif context == TeacherContext.NONE:
        everywhere = np.ones(len(known.correct), dtype=bool)
        return [(pa.repeat(pa.scalar(NO_CONTEXT), len(everywhere)), everywhere)]
    else:
        taken = [known.problems[str(context)]]
    return [(texts, _filled(texts)) for texts in taken]


def _lists(texts: list[tuple[Any, np.ndarray]]) -> pa.ListArray:
    """The texts of each response as a list, null without any."""
    exists = np.stack([exists for _, exists in texts], axis=1)  # (responses, count)
    columns = [text.combine_chunks() if hasattr(text, "chunks") else text for text, _ in texts]
    rows, places = np.nonzero(exists)
    every: Any = pa.concat_arrays(columns)  # one text's column after another
    values = every.take(pa.array(places * len(exists) + rows))
    offsets: Any = pa.array(np.cumsum([0, *exists.sum(1)]), pa.int32())
    kind: Any = list_of(pa.string())
    lists: Any = pa.ListArray.from_arrays(offsets, values, type=kind)
    present: Any = pa.array(np.any(exists, axis=1))
    return pc.if_else(present, lists, pa.scalar(None, lists.type))


def _filled(texts: Any) -> np.ndarray:
    """(texts,) bool: neither null nor empty."""
    return np.asarray(pc.binary_length(texts)) > 0  # null is NaN
