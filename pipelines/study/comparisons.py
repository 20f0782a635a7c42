"""A claim's comparisons: paired differences of two arms at each point, with 95 % intervals.

study.py writes them as comparisons.parquet. The page and the pictures show them from there.
Intervals are `statistics.bootstrap_crossed`: over seeds and problems for pass rates and tokens,
over seeds for entropy and lift, which are not of single problems.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from ...schemas.configs import ComparisonConfig, StudyConfig
from ...schemas.configs.claims import ENTROPY, GRPO, LIFT, PASS_RATE, TOKENS
from ..plots.estimates import Unit
from ..statistics import Estimate, bootstrap_crossed
from ..training.validation import SAMPLED
from .claims import points_of

OVER_SEEDS = (ENTROPY, LIFT)
_COLUMNS = {"claim": pl.String, "point": pl.String, "higher": pl.String, "lower": pl.String}
_COLUMNS |= {"of": pl.String, "seeds": pl.Int64, "problems": pl.Int64}
_COLUMNS |= dict.fromkeys(("value", "low", "high"), pl.Float64)


def comparisons_table(
    config: StudyConfig, answers: pl.DataFrame, first_steps: pl.DataFrame | None
) -> pl.DataFrame | None:
    """A row per claim, point and comparison; None without claims.

    value, low, high: of pass rates as shares of one, of tokens per response, of entropy and lift in
    nats; null where an arm has no figure. A single figure, such as the lift of one seed, has no
    interval. seeds, problems: what they are over; problems 1: over seeds alone.
    """
    if not config.claims:
        return None
    rows = []
    for name, claim in config.claims.items():
        own = answers.filter(ablation=name, decoding=SAMPLED)
        last = own.filter(pl.col("step") == pl.col("step").max().over("point", "method"))
        for point in points_of(name, claim):
            here = last.filter(point=point.name)
            for comparison in claim.comparisons:
                if comparison.of == LIFT:
                    assert first_steps is not None, "lift needs one_step"
                    steps = first_steps.filter(ablation=name, point=point.name)
                    paired = _lift(comparison.higher, steps) - _lift(comparison.lower, steps)
                else:
                    high, low = (
                        _values(here.filter(method=arm), comparison.of, next(iter(config.splits)))
                        for arm in (comparison.higher, comparison.lower)
                    )
                    paired = high - low
                paired = paired[:, np.isfinite(paired).all(axis=0)]
                estimate = _estimate(paired, config.bootstrap)
                rows.append(
                    {"claim": name, "point": point.name}
                    | comparison.model_dump()
                    | {"seeds": paired.shape[0], "problems": paired.shape[1]}
                    | {"value": estimate.value, "low": estimate.low, "high": estimate.high}
                )
    table = pl.DataFrame(rows, schema=_COLUMNS)
    return table.with_columns(pl.col("value", "low", "high").fill_nan(None))


def difference(comparison: ComparisonConfig) -> str:
    """A comparison's name, with its measure if that is not the main split's pass rate."""
    arms = f"{comparison.higher} − {comparison.lower}"
    return arms if comparison.of == PASS_RATE else f"{comparison.of}, {arms}"


def unit_of(of: str) -> Unit:
    """The unit of a comparison."""
    return "tokens" if of == TOKENS else "nats" if of in OVER_SEEDS else "points"


def estimate_of(row: Mapping[str, Any]) -> Estimate:
    """The estimate of a row of the table; NaN where it has none."""
    value, low, high = (np.nan if row[n] is None else row[n] for n in ("value", "low", "high"))
    return Estimate(value, low, high)


def _estimate(paired: np.ndarray, resamples: int) -> Estimate:
    if paired.size == 1:  # all its resamples are equal
        return Estimate(float(paired[0, 0]), np.nan, np.nan)
    return bootstrap_crossed(paired, resamples)


def _values(rows: pl.DataFrame, of: str, main: str) -> np.ndarray:
    """(seeds, problems) of an arm's rows after its last step, or (seeds, 1); NaN: not known."""
    split = main if of in (PASS_RATE, TOKENS, ENTROPY) else of
    own = rows.filter(split=split).sort("seed", "problem_id")
    shape = (own["seed"].n_unique(), own["problem_id"].n_unique())
    if of == ENTROPY:
        spent = pl.col("tokens").filter(pl.col("entropy").is_not_null()).sum()
        weighted = (pl.col("entropy") * pl.col("tokens")).sum() / spent
        means = own.group_by("seed", maintain_order=True).agg(entropy=weighted)
        return means["entropy"].to_numpy().reshape(-1, 1)
    counted = own["tokens"] if of == TOKENS else own["correct"]
    scored = own.select(pl.when(pl.col("k") > 0).then("k"))["k"]
    return (counted / scored).to_numpy().astype(float).reshape(shape)


def _lift(arm: str, steps: pl.DataFrame) -> np.ndarray:
    """(seeds, 1): the lift of GRPO's step, or of the analysed arm's."""
    own = pl.col("objective") == pl.lit("trace-fkl, clip ") + pl.col("kl_clip")
    rows = steps.filter(pl.col("objective") == GRPO if arm == GRPO else own).sort("seed")
    return rows.drop_nulls("lift")["lift"].to_numpy().reshape(-1, 1)
