"""The offline source: groups of a routed dataset by step.

Stage train opens one `OfflineReader` on every rank; the trainer calls it at every offline step.
"""

import logging
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.configs import TrainConfig
from ...schemas.errors import InputError
from ...trace.ranks import Ranks
from ...trace.routed import rows_of
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
        self, routed: Dataset, config: TrainConfig, vocab_size: int, ranks: Ranks | None = None
    ) -> None:
        """vocab_size: token ids that the policy knows.

        Raises:
            InputError: no rows, or a row that violates the contract or has an unknown token id.
        """
        ranks = ranks or Ranks()
        self._routed = routed
        self._seed = config.seed
        groups = _checked_groups(routed, vocab_size) if ranks.first else None
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

    def __call__(self, step: int) -> pa.Table:
        by_part: dict[int, list[int]] = {}
        for position in range(step * self._per_step, (step + 1) * self._per_step):
            part, group = self._order(position // self._size)[position % self._size].tolist()
            by_part.setdefault(part, []).append(group)
        return pa.concat_tables(
            _groups_of(self._part(part), groups) for part, groups in by_part.items()
        )

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


def _checked_groups(routed: Dataset, vocab_size: int) -> list[int]:
    """The number of groups of each part."""
    groups = []
    for part in range(routed.parts):
        table = routed.read_part(part)
        check_token_ids(table, vocab_size, f"{routed.ref}, part {part}")
        groups.append(pc.count_distinct(table["group_id"]).as_py())
    return groups


def _groups_of(table: pa.Table, groups: list[int]) -> pa.Table:
    """The rows of some groups, numbered in the order in which they appear."""
    ids = table["group_id"]
    return rows_of(table, np.flatnonzero(pc.is_in(ids, ids.unique().take(pa.array(groups)))))
