"""Which responses are worth an annotator's money, and which groups are worth training on.

Stage select calls `selection_of`. A row is a response; the rows of a group share its problem.
"""

from collections import Counter
from typing import Any

import polars as pl

from ...schemas.configs import SelectConfig
from ...schemas.errors import InputError
from ...schemas.labels import LeftOut, Selection

# p(1 - p) of the pass rate p, from whole numbers: p and 1 - p get the same value, so that ties are
# ties.
_SPREAD = pl.col("right") * (pl.col("scored") - pl.col("right")) / pl.col("scored") ** 2


def selection_of(rows: pl.DataFrame, config: SelectConfig) -> pl.DataFrame:
    """Columns `selection` and `left_out` of the rows, in their order.

    rows: group_id, source, correct (null: no verdict), truncated, chars, duplicate (repeats the
    text of an earlier response of its group). Deterministic: equal groups are ordered by id, the
    responses of a group by their row.

    Raises:
        InputError: per_source is a share that no choice of these sources' groups can keep.
    """
    right, scored = pl.col("correct").sum(), pl.col("correct").count()
    rows = rows.with_row_index("row").with_columns(
        right=right.over("group_id").cast(pl.Int64), scored=scored.over("group_id").cast(pl.Int64)
    )
    rows = rows.with_columns(left_out=_by_criteria(config), spread=_SPREAD)
    if config.per_source is not None:
        rows = _marked(rows, _beyond_sources(rows, config.per_source), LeftOut.SOURCE)
    if config.budget is not None:
        order = ["spread", "group_id", "row"]
        ranked = _candidates(rows).sort(order, descending=[True, False, False])
        rows = _marked(rows, ranked[config.budget :].select("row"), LeftOut.BUDGET)
    chosen = pl.col("left_out").is_null()
    others = Selection.DROP if config.others == "drop" else Selection.PLAIN
    selection = (
        pl.when(chosen)
        .then(pl.lit(str(Selection.ANNOTATE)))
        .when(chosen.any().over("group_id"))
        .then(pl.lit(str(Selection.PLAIN)))
        .otherwise(pl.lit(str(others)))
    )
    return rows.sort("row").select(selection.alias("selection"), "left_out")


def _by_criteria(config: SelectConfig) -> pl.Expr:
    """The first criterion that leaves a row out by its own group alone; null: none."""
    low, high = config.pass_rate
    rate = pl.col("right") / pl.col("scored")
    faults: list[tuple[LeftOut, pl.Expr]] = [(LeftOut.UNSCORED, pl.col("correct").is_null())]
    if config.mixed:
        faults.append((LeftOut.ALL_RIGHT, pl.col("right") == pl.col("scored")))
        faults.append((LeftOut.ALL_WRONG, pl.col("right") == 0))
    faults.append((LeftOut.PASS_RATE, ~rate.is_between(low, high)))
    if not config.keep_truncated:
        faults.append((LeftOut.TRUNCATED, pl.col("truncated")))
    if config.min_chars is not None:
        faults.append((LeftOut.LENGTH, pl.col("chars") < config.min_chars))
    if config.max_chars is not None:
        faults.append((LeftOut.LENGTH, pl.col("chars") > config.max_chars))
    if not config.keep_duplicates:
        faults.append((LeftOut.DUPLICATE, pl.col("duplicate")))
    return pl.coalesce(
        [pl.when(fault).then(pl.lit(str(reason))) for reason, fault in faults]
        + [pl.lit(None, pl.String)]
    )


def _candidates(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("left_out").is_null())


def _marked(rows: pl.DataFrame, chosen: pl.DataFrame, reason: LeftOut) -> pl.DataFrame:
    """rows with a reason for the rows in `chosen`, which has column `row`."""
    hit = pl.col("row").is_in(chosen["row"].implode())
    return rows.with_columns(
        left_out=pl.when(hit).then(pl.lit(str(reason))).otherwise(pl.col("left_out"))
    )


def _beyond_sources(rows: pl.DataFrame, limit: float) -> pl.DataFrame:
    """The candidate rows of groups beyond their source's limit."""
    groups = _candidates(rows).unique("group_id", maintain_order=True)
    most = limit if isinstance(limit, int) else _share_limit(groups, limit)
    order = ["spread", "group_id"]
    ranked = groups.sort(order, descending=[True, False]).with_columns(
        place=pl.int_range(pl.len()).over("source")
    )
    beyond = ranked.filter(pl.col("place") >= most)
    return _candidates(rows).join(beyond.select("group_id"), on="group_id", how="semi")


def _share_limit(groups: pl.DataFrame, share: float) -> int:
    """The most groups of one source that are at most this share of all that stay."""
    counts: list[int] = groups.group_by("source").len()["len"].to_list()
    largest = max(counts, default=0)
    while largest and largest > share * sum(min(count, largest) for count in counts):
        largest -= 1
    if counts and not largest:
        raise InputError(
            f"per_source: is {share:g}, and the {len(counts)} sources with groups to select cannot "
            f"all keep it; set it to {1 / len(counts):.2g} or more, or to a number of groups"
        )
    return largest


def counts_of(rows: pl.DataFrame) -> dict[str, Any]:
    """The figures of a part: rows and groups selected, and what was left out by reason."""
    chosen = rows.filter(pl.col("selection") == str(Selection.ANNOTATE))
    reasons = rows.drop_nulls("left_out").group_by("left_out").len()
    return {
        "rows": len(rows),
        "selected": len(chosen),
        "groups": rows["group_id"].n_unique(),
        "selected_groups": chosen["group_id"].n_unique(),
        "right": int(chosen["correct"].sum() or 0),
        "selection": Counter(dict(rows.group_by("selection").len().iter_rows())),
        "left_out": Counter(dict(reasons.iter_rows())),
    }
