"""Groups of a routed dataset, step by step: what offline training reads."""

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.store import Dataset
from ..schemas.configs import TrainConfig


class OfflineReader:
    """Groups of a routed dataset by step: parts in shuffled order, groups shuffled within a part.

    Stateless in the step, so a resumed run reads what an undisturbed one would.
    """

    def __init__(self, routed: Dataset, config: TrainConfig) -> None:
        self._routed = routed
        self._per_step = config.groups_per_step
        self._seed = config.seed
        self._groups = [
            list(dict.fromkeys(routed.read_part(part, ["group_id"])["group_id"].to_pylist()))
            for part in range(routed.parts)
        ]
        self._part = lru_cache(maxsize=2)(routed.read_part)

    def __call__(self, step: int) -> pa.Table:
        size = sum(map(len, self._groups))
        wanted = range(step * self._per_step, (step + 1) * self._per_step)
        by_part: dict[int, list[str]] = {}
        for position in wanted:
            part, group = self._order(position // size)[position % size]
            by_part.setdefault(part, []).append(group)
        return pa.concat_tables(
            table.filter(pc.is_in(table["group_id"], pa.array(groups)))
            for part, groups in by_part.items()
            if (table := self._part(part)) is not None
        )

    def _order(self, epoch: int) -> list[tuple[int, str]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = []
        for part in rng.permutation(len(self._groups)).tolist():
            groups = self._groups[part]
            order += [(part, groups[i]) for i in rng.permutation(len(groups)).tolist()]
        return order
