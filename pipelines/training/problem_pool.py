"""The problems of online steps by difficulty: `online.pool`.

Difficulties are pass rates that an earlier dataset measured, or the problems' levels. A draw
depends on the seed, the step and the difficulties alone, so a resumed run asks the same problems.
online_tables.py draws; stage train checks the pool before any work.
"""

import logging
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ...data.store import Dataset, Store
from ...schemas.configs import PoolBand, PoolConfig, TrainConfig
from ...schemas.errors import InputError
from ...schemas.results import EVALUATIONS
from ...schemas.tables import VERDICTS

logger = logging.getLogger(__name__)

RATES = "pool_rates"  # role of the dataset of pass rates among a run's inputs
_NUMBER = r"(\d+(?:\.\d+)?)"
_KEPT, _OTHERS = 3, 4  # streams of the seed; online_tables.py has 1 and 2


def pool_inputs(config: TrainConfig, store: Store, problems: Dataset) -> dict[str, Dataset]:
    """The pool's dataset of pass rates by its role, if it has one.

    Raises:
        InputError: no such dataset, one of another kind, or a band without problems.
    """
    pool = config.online.pool
    if pool is None:
        return {}
    inputs = {}
    if pool.rates is not None:
        inputs[RATES] = rates = store.get(pool.rates)
        if rates.contract not in (VERDICTS, EVALUATIONS):
            raise InputError(
                f"online.pool.rates: dataset {rates.ref} holds "
                f"{rates.manifest['table'] or 'no table'}; give verdicts or evaluations of the "
                "training problems"
            )
    table = problems.read()
    if len(table):  # else a plan that does not know them yet
        _difficulties(table, pool, inputs.get(RATES), problems.ref)
    return inputs


class ProblemPool:
    """Draws the problems of a step: rows of a problems table."""

    def __init__(
        self, config: TrainConfig, problems: pa.Table, inputs: dict[str, Dataset], ref: str
    ) -> None:
        """problems: the table of dataset `ref`. Raises InputError: a band without problems."""
        assert config.online.pool is not None, "there is a pool"
        self._config, self._pool = config, config.online.pool
        self._eligible = _difficulties(problems, self._pool, inputs.get(RATES), ref)
        for band, rows in zip(self._pool.bands, self._eligible, strict=True):
            if len(rows) < config.groups_per_step:
                logger.warning(
                    "groups_per_step is %d, %s has %d problems: each step samples all of them",
                    config.groups_per_step,
                    _shown(band),
                    len(rows),
                )

    def figures(self) -> list[dict[str, Any]]:
        """Of each band its first step, its ends and its number of problems; for the summary."""
        return [
            {"from_step": one.from_step, "band": list(one.band), "problems": len(rows)}
            for one, rows in zip(self._pool.bands, self._eligible, strict=True)
        ]

    def draw(self, step: int, refill: int) -> np.ndarray:
        """Rows, (problems,) int64, of a step.

        Round 0: the next `groups_per_step` problems of a shuffled pass over the band, which never
        splits a step. Later rounds: as many others of the band, drawn for this step alone.
        """
        bands, seed = self._pool.bands, self._config.seed
        number = max(n for n, band in enumerate(bands) if band.from_step <= step)
        rows = self._eligible[number]
        count = min(self._config.groups_per_step, len(rows))
        begun = max(bands[number].from_step, self._config.offline.steps)
        epoch, at = divmod(step - begun, len(rows) // count)
        order = np.random.default_rng([seed, _KEPT, number, epoch]).permutation(rows)
        chosen = order[at * count : (at + 1) * count]
        if not refill:
            return chosen
        others = np.setdiff1d(rows, chosen)
        shuffled = np.random.default_rng([seed, _OTHERS, step]).permutation(others)
        return shuffled[(refill - 1) * count : refill * count]


def _difficulties(
    problems: pa.Table, pool: PoolConfig, rates: Dataset | None, ref: str
) -> list[np.ndarray]:
    """The rows of each band's problems, ascending.

    Raises:
        InputError: no problem has a difficulty, or a band has no problem.
    """
    known = _levels(problems) if rates is None else _rates(problems, rates)  # NaN: unknown
    if np.isnan(known).all():
        what = f"pass rate in {rates.ref}" if rates else "number in column level"
        raise InputError(
            f"online.pool: no problem of {ref} has a {what}; name a dataset in online.pool.rates "
            "that measured them"
        )
    unknown = np.isnan(known) & (pool.unmeasured == "keep")
    out = []
    for band in pool.bands:
        low, high = band.band
        rows = np.flatnonzero(unknown | ((known >= low) & (known <= high)))
        if not len(rows):
            raise InputError(
                f"online.pool: {_shown(band)} has none of the {len(problems)} problems of {ref} "
                f"(they are {np.nanmin(known):g} to {np.nanmax(known):g}); widen it"
            )
        out.append(rows)
    return out


def _shown(band: PoolBand) -> str:
    return f"the band [{band.band[0]:g}, {band.band[1]:g}] from step {band.from_step}"


def _rates(problems: pa.Table, rates: Dataset) -> np.ndarray:
    """(problems,) float64: the share of right ones among the responses with a verdict."""
    if rates.contract is EVALUATIONS:
        table: Any = pl.from_arrow(rates.read(["problem_id", "policy", "k", "correct"]))
        trained = table.filter(pl.col("policy") == "trained")
        found = trained if len(trained) else table
        right, scored = pl.col("correct").sum(), pl.col("k").sum()
    else:
        found: Any = pl.from_arrow(rates.read(["problem_id", "correct"]))
        right, scored = pl.col("correct").sum(), pl.col("correct").count()
    each = found.group_by("problem_id").agg(rate=pl.when(scored > 0).then(right / scored))
    own: Any = pl.from_arrow(problems.select(["problem_id"]))
    joined = own.join(each, on="problem_id", how="left", maintain_order="left")
    return joined["rate"].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _levels(problems: pa.Table) -> np.ndarray:
    """(problems,) float64: the first number of each level, as in "Level 5"."""
    if "level" not in problems.column_names:
        return np.full(len(problems), np.nan)
    levels = pl.Series(problems["level"])
    numbers = levels.str.extract(_NUMBER).cast(pl.Float64)
    return numbers.fill_null(float("nan")).to_numpy()
