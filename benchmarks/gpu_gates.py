"""The targets of a run on a GPU, and whether its rows reach them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from machine import peak_of
from results import Row
from rich.table import Table
from step_table import grpo_of, mfu

FINISHED, UNFINISHED = "finished", "unfinished"  # parts of rows about commands
LARGE, SMALL, CUT = "qwen3-8b", "qwen3-1.7b", "qwen3-8b-12-layers"
# Largest multiple of the loss's floor on the large shape, by a word of the card's name.
FLOORS = {"H200": 1.15, "H100": 1.2}
OTHER_FLOOR, SMALL_FLOOR = 1.2, 1.25
FROM_TOKENS = 2048
RECOMPUTED = "ours_grpo:gradient_checkpointing=true"
SELECTIVE = "ours_grpo:gradient_checkpointing=auto"
PEERS = ("naive", "trl_span", "trl_all", "liger")
MOST_LAUNCHES = 60  # a chunk of the loss
LOSS_MIB = 2048
MAX_OVER_BOUND = 1.05
WAKE_SECONDS = 3.0


@dataclass(frozen=True)
class Gate:
    """measured: None if it was not. passed: None if nothing can be said."""

    name: str
    target: str
    measured: str | None
    passed: bool | None


def gates(rows: list[Row]) -> list[Gate]:
    """Every target, in the order of the parts. rows: of a log; of equal ones the last counts."""
    return [*_kernels(rows), *_loss(rows), *_profile(rows), *_step(rows), *_rollout(rows)]


def _latest(rows: list[Row], part: str, **fields: object) -> Row | None:
    """The last row of a part with these fields that has a measurement."""
    found = [
        row
        for row in rows
        if row["part"] == part
        and "note" not in row
        and all(row.get(name) == value for name, value in fields.items())
    ]
    return found[-1] if found else None


def _most(name: str, value: float | None, most: float, form: str, unit: str = "") -> Gate:
    measured = None if value is None else f"{value:{form}}{unit}"
    return Gate(name, f"≤ {most:{form}}{unit}", measured, None if value is None else value <= most)


def _least(name: str, value: float | None, least: float, form: str, unit: str = "") -> Gate:
    measured = None if value is None else f"{value:{form}}{unit}"
    passed = None if value is None else value >= least
    return Gate(name, f"≥ {least:{form}}", measured, passed)


def _loss(rows: list[Row]) -> Iterator[Gate]:
    card = next((row["card"] for row in rows if "card" in row), "")
    large = next((most for word, most in FLOORS.items() if word in card), OTHER_FLOOR)
    for shape, most in ((LARGE, large), (SMALL, SMALL_FLOOR)):
        sizes = {r["lengths"] for r in rows if r["part"] == "loss" and r["tokens"] >= FROM_TOKENS}
        ratios = []
        for lengths in sizes:
            ours, floor = (
                _latest(rows, "loss", shape=shape, lengths=lengths, implementation=name)
                for name in ("ours", "floor")
            )
            if ours and floor:
                ratios.append(ours["seconds"] / floor["seconds"])
        name = f"loss, {shape}, from {FROM_TOKENS:,} tokens: worst × floor"
        yield _most(name, max(ratios, default=None), most, ".2f")
        yield _ahead(rows, shape, "seconds", "faster")
        yield _ahead(rows, shape, "peak_mib", "smaller")
    at = [
        row
        for row in rows
        if row["part"] == "loss"
        and (row["tokens"], row["implementation"]) == (FROM_TOKENS, "ours")
        and (row["shape"], "note" in row) == (LARGE, False)
    ]
    peak = at[-1]["peak_mib"] if at else None
    yield _most(f"loss, {LARGE}, {FROM_TOKENS:,} tokens: memory", peak, LOSS_MIB, ",.0f", " MiB")


def _ahead(rows: list[Row], shape: str, field: str, word: str) -> Gate:
    """Whether ours has less than each peer at each size that both were measured at."""
    worst: tuple[float, str] | None = None
    for lengths in sorted({row["lengths"] for row in rows if row["part"] == "loss"}):
        ours = _latest(rows, "loss", shape=shape, lengths=lengths, implementation="ours")
        for peer in PEERS:
            other = _latest(rows, "loss", shape=shape, lengths=lengths, implementation=peer)
            if ours and other:
                share = ours[field] / other[field]
                worst = max(worst or (0.0, ""), (share, f"{peer} at {lengths}"))
    measured = worst and f"{worst[0]:.2f} × {worst[1]}"
    name = f"loss, {shape}: {word} than every peer"
    return Gate(name, "< 1.00", measured, worst and worst[0] < 1)


def _kernels(rows: list[Row]) -> Iterator[Gate]:
    ends = {FINISHED: "they agree", UNFINISHED: "see its output"}
    asked = [
        row
        for row in rows
        if row["part"] in ends
        and row["command"].startswith("cases.py")
        and not row.get("ended", "").startswith(("no time", "left out", "stopped"))
    ]
    ended = asked[-1]["part"] if asked else ""
    passed = ended == FINISHED if ended else None
    yield Gate("loss: kernels against float64", "agree", ends.get(ended), passed)


def _profile(rows: list[Row]) -> Iterator[Gate]:
    row = _latest(rows, "profile", shape=LARGE, implementation="ours")
    launches = row["launches"] / max(row["chunks"], 1) if row else None
    yield _most(f"loss, {LARGE}: launches a chunk", launches, MOST_LAUNCHES, ".0f")


def _step(rows: list[Row]) -> Iterator[Gate]:
    steps = [row for row in rows if row["part"] == "step" and "note" not in row]
    peak = next((p for row in steps if (p := peak_of(row["card"]))), None)

    def fastest(shape: str, *settings: str) -> Row:
        """Of our GRPO's rows on 16,384 tokens with one of these settings, and any others."""
        found = {
            row["implementation"]: row  # the last of each
            for row in steps
            if (row["shape"], row["lengths"]) == (shape, "1x16384")
            and row["implementation"].startswith(settings)
        }
        return min(found.values(), key=lambda row: row["seconds"], default={})

    full = fastest(SMALL, RECOMPUTED)
    for name, row, least in (
        (f"{SMALL}, 16,384 tokens", full, 0.36),
        (f"{SMALL}, 16,384 tokens, selective recompute", fastest(SMALL, SELECTIVE), 0.45),
        (f"{CUT}, 16,384 tokens", fastest(CUT, RECOMPUTED, SELECTIVE), 0.42),
    ):
        if row is full:
            speed = row.get("tokens_per_second")
            yield _least(f"step, {name}", speed, 22_000, ",.0f", " tokens/s")
        share = mfu(row, steps, peak) if row else None
        *_, how = row.get("implementation", "").split(":")
        yield _least(f"step, {name}: MFU", share, least, ".1%", f" {how}".rstrip())
    over = []
    own = (row for row in steps if row["implementation"].startswith("ours_trace"))
    for trace in (row for row in own if row.get("teacher_seconds") and row["shape"] == SMALL):
        grpo = grpo_of(trace, steps[::-1])
        if grpo is not None:
            bound = 1 + trace["teacher_seconds"] / grpo
            over.append(trace["seconds"] / grpo / bound)
    name = "step: TRACE over GRPO, as a multiple of 1 + the teacher's forward passes"
    yield _most(name, max(over, default=None), MAX_OVER_BOUND, ".2f")


def _rollout(rows: list[Row]) -> Iterator[Gate]:
    row = _latest(rows, "phases", shape=SMALL)
    phases = ("seconds_wake", "seconds_hand_over")
    known = row is not None and any(name in row for name in phases)
    seconds = sum(row.get(name, 0.0) for name in phases) if row and known else None
    yield _most(f"sampling, {SMALL}: wake and hand-over", seconds, WAKE_SECONDS, ".2f", " s")


def table_of(found: list[Gate], log: Path) -> Table:
    table = Table(title=f"Targets, by {log.name}")
    for column in ("", "target", "measured", ""):
        table.add_column(column)
    for gate in found:
        verdict = {None: "not measured", True: "reached", False: "missed"}[gate.passed]
        table.add_row(gate.name, gate.target, gate.measured or "–", verdict)
    return table
