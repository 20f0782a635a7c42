"""Rows and tables of step.py."""

import statistics
from collections.abc import Iterator

from results import Row, number, ratio
from rich.table import Table
from step_measure import Batch, Samples
from step_turns import Measured

BASES = ("trl_grpo", "plain", "ours_grpo")  # the first that was measured


def seconds_of(measured: list[Measured]) -> float:
    return statistics.median(one.seconds for one in measured)


def rows_of(
    name: str, samples: Samples, batches: list[Batch], shape: str, device: str
) -> list[Row]:
    """One row for each batch, and with generation where it was measured. TRACE's have the teacher's
    forward passes alone as `teacher_seconds`.
    """
    rows = []
    for index, batch in enumerate(batches):
        about: Row = {
            "implementation": name,
            "shape": shape,
            "lengths": batch.lengths,
            "with_generation": False,
            "device": device,
            "dtype": "bfloat16" if device == "cuda" else "float32",
        }
        if index in samples.notes:
            rows.append(about | {"seconds": None, "note": samples.notes[index]})
            continue
        for mode in ("training", "generation"):
            measured = samples.measured.get((index, mode))
            if not measured:
                continue
            seconds = seconds_of(measured)
            tokens = statistics.mean(one.tokens for one in measured)
            row = about | {
                "with_generation": mode == "generation",
                "seconds": seconds,
                "peak_mib": round(max(one.peak_mib for one in measured), 1),
                "resident_mib": round(max(one.resident_mib for one in measured), 1),
                "tokens": round(tokens),
                "tokens_per_second": round(tokens / seconds, 1),
            }
            first = measured[0]
            if first.predicted_mib is not None:
                row["predicted_mib"] = round(first.predicted_mib, 1)
            if first.flops is not None:
                row["flops"] = first.flops
            if mode == "training" and (alone := samples.measured.get((index, "teacher"))):
                row["teacher_seconds"] = seconds_of(alone)
            rows.append(row)
    return rows


def mfu(row: Row, rows: list[Row], peak: float | None) -> float | None:
    """Model FLOPs utilisation. The FLOPs of a batch are those of one of our rows on it.

    peak: FLOP/s of the card; None: unknown.
    """
    same = ("shape", "lengths", "with_generation")
    known = (
        other["flops"]
        for other in rows
        if "flops" in other and all(other[name] == row[name] for name in same)
    )
    flops = row.get("flops") or next(known, None)
    if peak is None or flops is None or not row["seconds"] or row["with_generation"]:
        return None
    return flops / row["seconds"] / peak


def table_of(rows: list[Row], title: str, peak: float | None) -> Table:
    table = Table(title=title)
    for column in ("lengths", "generation"):
        table.add_column(column, no_wrap=True)
    table.add_column("", overflow="fold")
    base = _base(rows)
    times = f"× {base.partition(':')[0]}"
    numbers = (
        "tokens",
        "seconds",
        times,
        "tokens/s",
        "MFU",
        "extra MiB",
        times,
        "peak MiB",
        "plan's",
    )
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["with_generation"]):
        of = {
            other["implementation"]: other
            for other in rows
            if (other["lengths"], other["with_generation"])
            == (row["lengths"], row["with_generation"])
        }.get(base, {})
        peak_mib = row.get("peak_mib")
        table.add_row(
            row["lengths"],
            "included" if row["with_generation"] else "excluded",
            row["implementation"],
            number(row.get("tokens")),
            number(row["seconds"], ".2f"),
            ratio(row["seconds"], of.get("seconds")),
            number(row.get("tokens_per_second")),
            number(mfu(row, rows, peak), ".1%"),
            number(peak_mib),
            ratio(peak_mib, of.get("peak_mib")),
            number(peak_mib and peak_mib + row["resident_mib"]),
            number(row.get("predicted_mib")),
        )
    return table


def _base(rows: list[Row]) -> str:
    """The implementation that others are compared with, with its overrides."""
    names = [row["implementation"] for row in rows if row["seconds"]]
    found = (name for base in BASES for name in names if name.partition(":")[0] == base)
    return next(found, "")


def teachers_share(rows: list[Row]) -> Iterator[str]:
    """A sentence for each size where our GRPO and TRACE were measured alike."""
    for row in rows:
        if row["with_generation"] or not row.get("teacher_seconds"):
            continue
        grpo = grpo_of(row, rows)
        if grpo is None:
            continue
        trace, alone = row["seconds"] / grpo, row["teacher_seconds"] / grpo
        yield (
            f"{row['lengths']}: {row['implementation']} takes {trace:.2f} × our GRPO's time. The "
            f"teacher's forward passes alone are {alone:.2f} of it, so {1 + alone:.2f} × is the "
            f"bound, which it exceeds by {trace / (1 + alone) - 1:.0%}."
        )


def contrasts_share(rows: list[Row]) -> Iterator[str]:
    """A sentence for each size where the step with a contrast and the one without were measured."""
    for row in rows:
        if row["with_generation"] or not row.get("teacher_seconds"):
            continue
        plain = _like(row, rows, "ours_rlcsd", "ours_rlsd")
        if row["implementation"].startswith("ours_rlcsd") and plain:
            more = row["seconds"] - plain["seconds"]
            passes = row["teacher_seconds"] - plain["teacher_seconds"]
            yield (
                f"{row['lengths']}: the contrast of {row['implementation']} adds {more:.2f} s to "
                f"{plain['seconds']:.2f} s; its forward passes alone take {passes:.2f} s."
            )


def grpo_of(row: Row, rows: list[Row]) -> float | None:
    """Seconds of our GRPO with the settings of a row of ours with a teacher."""
    base = row["implementation"].partition(":")[0]
    other = _like(row, rows, base, "ours_grpo")
    return other and other["seconds"]


def _like(row: Row, rows: list[Row], base: str, wanted: str) -> Row | None:
    """The row of another implementation with the settings of a row of `base`."""
    name = row["implementation"].replace(base, wanted)
    for other in rows:
        same = all(other[name] == row[name] for name in ("shape", "lengths", "with_generation"))
        if same and other["implementation"] == name and other["seconds"]:
            return other
    return None
