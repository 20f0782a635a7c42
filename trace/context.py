"""What a response's teacher is told besides the problem (`routing.teacher_context`).

TRACE's teacher is told the type label and nothing else. The other contexts are the baselines':
there the teacher reads an answer, a reference solution or another response.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from .ragged import one_chunk, to_numpy


@dataclass(frozen=True)
class TeacherContexts:
    """Of each response. exists: (responses,) bool, whether there is anything to tell: without it
    there is no teacher. labels: of DiagnosticType, or null; texts: null where the label is all."""

    exists: np.ndarray
    labels: Any
    texts: Any


def teacher_contexts(
    rollouts: pa.Table,
    problems: pa.Table,
    correct: np.ndarray,
    labels: Any,
    config: RoutingConfig,
) -> TeacherContexts:
    """The context of each response.

    rollouts, problems: a response and its problem per row; correct: (responses,) bool;
    labels: diagnostic types of the responses.
    """
    if config.teacher_context == "type":
        return TeacherContexts(_filled(labels), labels, pa.nulls(len(labels), pa.string()))
    if config.teacher_context == "peer":
        peer = peers(rollouts, correct)
        texts = one_chunk(rollouts["response"]).take(pa.array(peer, mask=peer < 0))
    else:
        texts = one_chunk(problems[config.teacher_context])
    return TeacherContexts(_filled(texts), labels, texts)


def peers(rollouts: pa.Table, correct: np.ndarray) -> np.ndarray:
    """For each response the row of the first other correct one of its group, by sample index (SDPO,
    arXiv 2601.20802); −1 where there is no other. (responses,) int64."""
    groups: Any = one_chunk(rollouts["group_id"].dictionary_encode())
    group = groups.indices.to_numpy()
    rows = np.arange(len(group))
    by_index = np.lexsort((rollouts["sample_index"].to_numpy(), group))
    in_order = by_index[correct[by_index]]
    starts = np.flatnonzero(np.diff(group[in_order], prepend=-1))
    first, second = (np.full(len(groups.dictionary), -1) for _ in range(2))
    first[group[in_order[starts]]] = in_order[starts]
    after = starts[np.diff(starts, append=len(in_order)) > 1] + 1
    second[group[in_order[after]]] = in_order[after]
    return np.where(first[group] == rows, second[group], first[group])


def _filled(texts: Any) -> np.ndarray:
    """(texts,) bool: neither null nor empty."""
    return to_numpy(pc.binary_length(texts)) > 0
