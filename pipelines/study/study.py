"""`trace-opd study`: train every arm with every seed, write the files, draw the page."""

import io
import os
from pathlib import Path

import polars as pl

from ...data.files import write_whole
from ...data.store import Dataset, Store
from ...schemas.configs import StudyConfig
from ...schemas.settings import dump_config
from .mechanism import first_step, one_step
from .page import page
from .plots import plot_curves, plot_exposure
from .runs import (
    Run,
    arms,
    datasets,
    distinct,
    open_pool,
    results,
    rows_of,
    study_runs,
    train_all,
    tuned,
)


def run_study(config: StudyConfig, store: Store, folder: Path, page_path: Path) -> pl.DataFrame:
    """Everything, going on from what the store has; the results table."""
    rows = arms(config, *datasets(config, store))
    with open_pool(config.workers) as pool:
        runs = study_runs(config, rows, tuned(config, rows, store, pool))
        made = train_all(runs, store, pool, "study")
    answers = pl.DataFrame(
        [row for run, dataset in zip(runs, made, strict=True) for row in rows_of(run, dataset)],
        infer_schema_length=None,
    )
    table = results(answers)
    mechanism = _mechanism(config, runs, made)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "answers.parquet", answers)
    _write(folder / "results.parquet", table)
    if mechanism is not None:
        _write(folder / "mechanism.parquet", mechanism)
    write_whole(folder / "study.yaml", dump_config(config).encode())
    for ablation in config.ablations:
        plot_curves(config, answers, ablation, folder / f"{ablation}.svg")
    if config.exposure is not None:
        plot_exposure(config, answers, config.exposure, folder / "exposure.svg")
    page_path.parent.mkdir(parents=True, exist_ok=True)
    files = os.path.relpath(folder, page_path.parent)
    write_whole(page_path, page(config, answers, table, mechanism, files).encode())
    return table


def planned(config: StudyConfig) -> str:
    """What a study would train, in words.

    Raises:
        InputError: an arm's preset or override is wrong.
    """
    rows = arms(config, "", dict.fromkeys(config.splits, ""))
    count = len(distinct(study_runs(config, rows, {})))
    tuning = (
        len(config.tuning.choices) * len(next(iter(config.ablations.values())))
        if config.tuning
        else 0
    )
    steps = config.train.offline.steps + config.train.online.steps
    return f"{count} runs of {steps} steps, after {tuning} that tune; {config.workers} at once"


def _mechanism(config: StudyConfig, runs: list[Run], made: list[Dataset]) -> pl.DataFrame | None:
    if config.mechanism is None:
        return None
    first = runs[0].arm.ablation
    looked = [
        (run, dataset)
        for run, dataset in zip(runs, made, strict=True)
        if (run.arm.ablation, run.arm.name) == (first, config.mechanism)
    ]
    return pl.DataFrame([r for run, d in looked for r in one_step(run.train, first_step(d))])


def _write(path: Path, table: pl.DataFrame) -> None:
    written = io.BytesIO()
    table.write_parquet(written)
    write_whole(path, written.getvalue())
