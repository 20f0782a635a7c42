"""`trace-opd study`: train every arm with every seed, write the files, draw the page."""

import os
from pathlib import Path

import polars as pl

from ...data.store import Store
from ...schemas.configs import StudyConfig
from ...schemas.settings import dump_config
from .page import page, plot
from .runs import arms, datasets, results, rows_of, study_runs, train_all, tuned


def run_study(config: StudyConfig, store: Store, folder: Path, page_path: Path) -> pl.DataFrame:
    """Everything, going on from what the store has; the results table."""
    rows = arms(config, *datasets(config, store))
    runs = study_runs(config, rows, tuned(config, rows, store))
    made = train_all(runs, store, config.workers, "study")
    answers = pl.DataFrame(
        [row for run, dataset in zip(runs, made, strict=True) for row in rows_of(run, dataset)],
        infer_schema_length=None,
    )
    table = results(answers)
    folder.mkdir(parents=True, exist_ok=True)
    answers.write_parquet(folder / "answers.parquet")
    table.write_parquet(folder / "results.parquet")
    (folder / "study.yaml").write_text(dump_config(config))
    for ablation in config.ablations:
        plot(config, answers, ablation, folder / f"{ablation}.svg")
    page_path.parent.mkdir(parents=True, exist_ok=True)
    files = os.path.relpath(folder, page_path.parent)
    page_path.write_text(page(config, answers, table, files))
    return table
