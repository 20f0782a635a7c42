"""The offline source: groups of a routed dataset by step, with their scores if a run takes some.

Stage train opens one `OfflineReader` on every rank; the trainer calls it at every offline step. Of
the scores (trace/scores.py) a part is read with its routed part, and a step's rows are joined.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.parts import part_name
from ...data.store import Dataset
from ...schemas.configs import TrainConfig
from ...schemas.errors import InputError, RowFault
from ...trace.ranks import Ranks
from ...trace.routed import rows_of
from ...trace.schedule import kl_weight
from ...trace.scores import check_scores, joined, k_of
from ..samplers.vocabulary import check_token_ids

logger = logging.getLogger(__name__)


class OfflineReader:
    """Groups of a routed dataset by step: parts in shuffled order, groups shuffled within a part.

    A step has `groups_per_step` different groups, also where it begins the next epoch; all of them
    in a smaller dataset. Stateless in the step, so a resumed run reads the same groups. The first
    rank reads and checks all parts before the first step: a bad row would otherwise end a training
    days later.
    """

    def __init__(
        self,
        routed: Dataset,
        config: TrainConfig,
        vocab_size: int,
        ranks: Ranks | None = None,
        scores: Dataset | None = None,
    ) -> None:
        """vocab_size: token ids that the policy knows. scores: in the teacher's place; their part n
        holds the rollouts of the routed dataset's part n.

        Raises:
            InputError: no rows, or a row that violates the contract, has an unknown token id, or
                routed tokens without scores.
        """
        ranks = ranks or Ranks()
        self._routed, self._scores = routed, scores
        self._seed, self._schedule = config.seed, config.schedule
        groups = _checked_groups(routed, scores, vocab_size) if ranks.first else None
        self._groups = np.array(ranks.broadcast(groups))  # (parts,) groups of each part
        if not self._groups.sum():
            raise InputError(f"dataset {routed.ref} has no rows; make rollouts that can be scored")
        self._size = int(self._groups.sum())
        self._per_step = min(config.groups_per_step, self._size)
        if ranks.first and self._per_step < config.groups_per_step:
            logger.warning(
                "groups_per_step is %d, dataset %s has %d groups: each step trains on all of them",
                config.groups_per_step,
                routed.ref,
                self._size,
            )
        self._order = lru_cache(maxsize=2)(self._epoch)
        self._part = lru_cache(maxsize=2)(routed.read_part)
        if scores is not None:  # parts as large as they are in memory
            self._scored_part = lru_cache(maxsize=2)(scores.read_part)

    def __call__(self, step: int) -> pa.Table:
        by_part: dict[int, list[int]] = {}
        for position in range(step * self._per_step, (step + 1) * self._per_step):
            part, group = self._order(position // self._size)[position % self._size].tolist()
            by_part.setdefault(part, []).append(group)
        taught = kl_weight(step, self._schedule) > 0
        return pa.concat_tables(
            self._rows(part, groups, taught) for part, groups in by_part.items()
        )

    def _rows(self, part: int, groups: list[int], taught: bool) -> pa.Table:
        """The rows of some groups of a part, with their scores while λ > 0."""
        rows = _groups_of(self._part(part), groups)
        if self._scores is None or not taught:
            return rows
        return _joined(rows, self._scored_part(part), self._scores, part)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The epoch's order: (groups, 2) int64, the part of each group and its number in the part.

        Where the epoch before ends within a step, the step's other groups come first.
        """
        first = epoch  # the latest epoch that begins with a step
        while first * self._size % self._per_step:
            first -= 1
        order = self._shuffled(first)
        for following in range(first + 1, epoch + 1):
            begun = order[self._size - following * self._size % self._per_step :]
            order = self._shuffled(following)
            # As many groups as a step has: those of them that it already has come last.
            head = order[: self._per_step]
            has = (head[:, None] == begun).all(axis=2).any(axis=1)
            order[: self._per_step] = np.concatenate([head[~has], head[has]])
        return order

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        parts = rng.permutation(len(self._groups))
        groups = [rng.permutation(self._groups[part]) for part in parts.tolist()]
        return np.stack([np.repeat(parts, self._groups[parts]), np.concatenate(groups)], axis=1)


def _checked_groups(routed: Dataset, scores: Dataset | None, vocab_size: int) -> list[int]:
    """The number of groups of each part."""
    groups = []
    width: set[int] = set()
    for part in range(routed.parts):
        table = routed.read_part(part)
        check_token_ids(table, vocab_size, f"{routed.ref}, part {part}")
        groups.append(pc.count_distinct(table["group_id"]).as_py())
        if scores is not None:
            found = scores.read_part(part)
            with _named(scores, part):
                check_scores(found, vocab_size)
            _joined(table, found, scores, part)
            width |= k_of(found)
            if len(width) > 1:
                raise InputError(
                    f"dataset {scores.ref}: its parts hold {' and '.join(map(str, sorted(width)))} "
                    "tokens a position; score again"
                )
    return groups


def _joined(rows: pa.Table, scores: pa.Table, dataset: Dataset, part: int) -> pa.Table:
    with _named(dataset, part):
        return joined(rows, scores)


@contextmanager
def _named(dataset: Dataset, part: int) -> Iterator[None]:
    """Name the part of a row's fault."""
    try:
        yield
    except RowFault as fault:
        raise InputError(f"{dataset.ref}/{part_name(part)}, {fault}") from None


def _groups_of(table: pa.Table, groups: list[int]) -> pa.Table:
    """The rows of some groups, numbered in the order in which they appear."""
    ids = table["group_id"]
    return rows_of(table, np.flatnonzero(pc.is_in(ids, ids.unique().take(pa.array(groups)))))
