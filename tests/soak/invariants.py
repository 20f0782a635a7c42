"""The soak's invariants, checked after each run and at the end of a round; each function raises
`Broken`. Used by trial.py and pipeline.py.
"""

import json
import os
import queue
import re
import shutil
import signal
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trace_opd.data.store import MANIFEST, Dataset, Store
from trace_opd.schemas.errors import InputError
from trace_opd.tests.kill.ends import (
    assert_no_leftovers,
    assert_same_datasets,
    assert_same_run,
    files,
    untimed,
)
from trace_opd.tests.kill.harness import Run
from trace_opd.tests.soak.answers import ID, Asked

END_S = 120  # a run that takes longer counts as hung
CODES = {0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGKILL}
TIMES = ("seconds", "latency_s")  # columns that differ from run to run
# What an interpreter prints for an unhandled exception in any thread or task.
_UNHANDLED = re.compile(
    r"Traceback|Exception ignored|exception was never retrieved|Fatal Python error|panicked at"
)


class Broken(AssertionError):
    """An invariant is broken; the text names it and the finding."""


def as_a_shell_says(code: int | None) -> int | None:
    """128 + n if signal n ended a process after a request to stop."""
    return 128 - code if code in (-signal.SIGINT, -signal.SIGTERM) else code


def ended_well(run: Run, command: Sequence[str]) -> None:
    """A run ended by itself or by a signal, without a traceback; a failure has one sentence."""
    try:
        code = as_a_shell_says(run.wait(END_S))
    except queue.Empty:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        raise Broken(f"{command[0]}: no end within {END_S} s:\n{run.err[-2000:]}") from None
    name = command[0]
    out = Path(run.output[0]).read_text(errors="replace")
    for text in (out, run.err):
        if _UNHANDLED.search(text):
            raise Broken(f"{name}: a traceback (exit code {run.code}):\n{text[-1500:]}")
    if code not in CODES:
        raise Broken(f"{name}: exit code {run.code}:\n{run.err[-2000:]}")
    lines = run.err.strip().splitlines()
    failed = code == 2 or (code == 1 and name != "verify-store" and "Aborted" not in run.err + out)
    if failed and not (lines and lines[-1].startswith("trace-opd: ")):
        raise Broken(
            f"{name}: exit code {code} without a sentence:\n{out[-1000:]}{run.err[-2000:]}"
        )


def ended_with(run: Run, command: Sequence[str], codes: Collection[int]) -> None:
    """A run ended well and with one of the given exit codes."""
    ended_well(run, command)
    if as_a_shell_says(run.code) not in codes:
        raise Broken(f"{command[0]}: exit code {run.code}, not in {codes}:\n{run.err[-2000:]}")


def lines(root: Path) -> set[bytes]:
    """All complete lines of all journals."""
    found: set[bytes] = set()
    for path in root.glob("annotate/*/journal/*.jsonl"):
        found.update(line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
    return found


def questions(lines: Iterable[bytes]) -> set[str]:
    """The server's keys of the questions that are answered in lines of valid JSON."""
    return {key.decode() for line in lines if _is_json(line) for key in ID.findall(line)[:1]}


def journalled(root: Path) -> set[str]:
    """Questions whose answers are in a journal on disk."""
    return questions(lines(root))


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def not_paid_again(known: Collection[str], asked: Sequence[Asked], most: int = 0) -> None:
    """No question is asked again whose answer was on disk before or arrived in the run.

    known: questions journalled before the run. asked: the run's requests. most: how many answers
    may be lost in a kill and asked for again by another run.
    """
    again: list[Asked] = []
    arrived: set[str] = set()
    for request in asked:
        if request.key in known:
            raise Broken(f"question {request.key} was asked again; its answer was on the disk")
        if request.key in arrived:
            again.append(request)
        if request.clean:
            arrived.add(request.key)
    if len(again) > most:
        raise Broken(
            f"{len(again)} questions were asked again after an answer that could be used had been "
            f"sent, {most} may be: {again}"
        )


def not_lost(root: Path, asked: Sequence[Asked], most: int = 0) -> None:
    """All answers that arrived are journalled, except at most `most` that a kill lost in flight."""
    lost = {request.key for request in asked if request.clean} - journalled(root)
    if len(lost) > most:
        raise Broken(
            f"{len(lost)} answers that were paid for are not in the journal, {most} may be lost: "
            f"{[request for request in asked if request.key in lost]}"
        )


def within_budget(before: Sequence[Asked], asked: Sequence[Asked], budget_usd: float) -> None:
    """before, asked: all requests for the dataset before a run with a budget, and in the run."""
    spent, billed = (sum(request.usd for request in some) for some in (before, asked))
    if billed and spent + billed > budget_usd * (1 + 1e-9):
        raise Broken(f"${spent:.6f} + ${billed:.6f} were billed, the budget is ${budget_usd:.6f}")


def as_undisturbed(root: Path, expected: Path) -> None:
    """The store holds the same datasets with the same rows as an undisturbed run, and no more.

    Where rows were asked again, datasets made from the new attempt have other ids but equal rows.
    """
    try:
        if _remove_superseded(root):
            for dataset in Store(expected).datasets():  # ids without any dataset
                if not (root / dataset.ref / MANIFEST).exists():
                    shutil.rmtree(root / dataset.ref, ignore_errors=True)
            assert_no_leftovers(root)
            _assert_same_rows(root, expected)
        else:
            assert_no_leftovers(root)
            assert_same_datasets(root, expected)
    except (AssertionError, InputError) as error:
        raise Broken(
            f"differs from the undisturbed run: {error}\n{_differences(root, expected)}"
        ) from error


def _remove_superseded(root: Path) -> list[str]:
    """Remove annotations with unanswered rows and everything made from them; return their refs."""
    store, removed = Store(root), list[str]()
    datasets = {dataset.ref: dataset for dataset in store.datasets()}
    lineages = {ref: [n for _, _, n in made.lineage()] for ref, made in datasets.items()}

    def is_old(node: Dataset) -> bool:
        tables_of = node.manifest["config"].get("online")  # the training of an online table
        return "unanswered" in node.summary or node.ref in removed or tables_of in removed

    while old := [ref for ref, nodes in lineages.items() if any(map(is_old, nodes))]:
        for ref in old:
            shutil.rmtree(datasets[ref].path())
            del lineages[ref]
        removed += old
    return removed


def _assert_same_rows(root: Path, expected: Path) -> None:
    """Both stores have the same names for datasets with equal rows, and no other datasets."""
    ours, theirs = Store(root), Store(expected)
    assert ours.aliases().keys() == theirs.aliases().keys()
    assert len(list(ours.datasets())) == len(list(theirs.datasets()))
    for name in ours.aliases():
        made, same = ours.get(name), theirs.get(name)
        if made.stage == "train":
            assert_same_run(made, same)
        else:
            assert untimed(made.read()) == untimed(same.read()), name


def _differences(root: Path, expected: Path) -> str:
    """The differences: aliases, datasets, rows and columns, files."""
    out, (one, other) = [], (Store(root), Store(expected))
    if one.aliases() != other.aliases():
        out.append(f"aliases {one.aliases()} and {other.aliases()}")
    ours, theirs = ({d.ref: d for d in store.datasets()} for store in (one, other))
    for ref in sorted(ours.keys() ^ theirs.keys()):
        out.append(f"{ref}: only in the {'disturbed' if ref in ours else 'undisturbed'} store")
    for ref in sorted(ours.keys() & theirs.keys()):
        timed = False
        if _readable(ours[ref]):
            left, right = (store[ref].read().to_pylist() for store in (ours, theirs))
            rows = [n for n, pair in enumerate(zip(left, right, strict=False)) if _differ(*pair)]
            columns = {name for n in rows for name in left[n] if left[n][name] != right[n][name]}
            if rows or len(left) != len(right):
                shown = [{c: (left[n][c], right[n][c]) for c in sorted(columns)} for n in rows[:2]]
                out.append(f"{ref}: {len(left)} and {len(right)} rows, {rows} differ: {shown}")
            timed = any(name in row for row in left[:1] for name in TIMES)
        for file in ours[ref].listed:
            if file not in theirs[ref].listed and not timed:  # times make other bytes
                out.append(f"{ref}/{file['name']}: {file['bytes']} other bytes")
    for name in sorted(files(root) ^ files(expected)):
        if "journal/" not in name and "events.out" not in name:
            out.append(f"{name}: only in one of the two")
    return "\n".join(out)[:4000]


def _readable(dataset: Dataset) -> bool:
    return dataset.parts > 0 and all(
        Path(dataset.path(part["name"])).exists() for part in dataset.manifest["parts"]
    )


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(one[name] != other[name] for name in one if name not in TIMES)
