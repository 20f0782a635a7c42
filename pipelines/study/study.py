"""`trace-opd study`: train every arm with every seed, write tables, plots and the page."""

import io
import os
from pathlib import Path

import polars as pl

from ...data.atomic import write_atomic
from ...data.store import Dataset, Store
from ...schemas.configs import StudyConfig, WorldConfig
from ...schemas.extras import require
from ...schemas.settings import dump_config
from ...trace.policy import load_policy
from .arms import Run, arms, asked_of, chosen, study_runs, tuning_runs, worlds_of
from .base_figures import base_figures
from .figures import CONFIG, draw
from .mechanism import first_step, one_step
from .page import page
from .problem_sets import ProblemSets, problem_sets
from .runs import answers, open_pool, results, train_all, world_bases

_MEASURED = 32  # problems on which a base is measured


def run_study(config: StudyConfig, store: Store, folder: Path, page_path: Path) -> pl.DataFrame:
    """Run a study, or continue it from the store's finished runs; returns the results table.

    Raises:
        InputError: matplotlib is not installed; a fault of the config.
    """
    require("matplotlib")
    arms(config)  # every fault of the config is found before any work
    sets = problem_sets(config, store, asked_of(config))
    with open_pool(config.workers) as pool:
        bases = world_bases(worlds_of(config), pool)
        tries = tuning_runs(config, arms(config, bases, sets, tuning=True))
        tuning, choices = None, {}
        if tries:
            tuning = results(answers(tries, train_all(tries, store, pool, "tuning", config.name)))
            choices = chosen(tries, tuning)
        runs = study_runs(config, arms(config, bases, sets), choices)
        made = train_all(runs, store, pool, "study", config.name)
    per_problem = answers(runs, made)
    table = results(per_problem)
    mechanism = _mechanism(config, runs, made)
    worlds = _worlds(config, bases, sets, store)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "answers": per_problem, "results": table, "tuning": tuning, "mechanism": mechanism,
        "worlds": worlds,
    }  # fmt: skip
    for name, one in tables.items():
        if one is not None:
            written = io.BytesIO()
            one.write_parquet(written)
            write_atomic(folder / f"{name}.parquet", written.getvalue())
    write_atomic(folder / CONFIG, dump_config(config).encode())
    draw(config, per_problem, folder)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    files = os.path.relpath(folder, page_path.parent)
    text = page(config, per_problem, table, mechanism, tuning, worlds, files)
    write_atomic(page_path, text.encode())
    return table


def planned(config: StudyConfig) -> str:
    """One line on what a study would train.

    Raises:
        InputError: an arm's preset or override is wrong.
    """
    all_arms = arms(config)
    count = str(len({run.key for run in study_runs(config, all_arms, {})}))
    tuning = len(tuning_runs(config, all_arms))
    if tuning:  # which arms share a run depends on the choices
        count = f"about {count}"
    steps = config.train.offline.steps + config.train.online.steps
    return f"{count} runs of {steps} steps, after {tuning} that tune; {config.workers} at once"


def _mechanism(config: StudyConfig, runs: list[Run], made: list[Dataset]) -> pl.DataFrame | None:
    if config.mechanism is None:
        return None
    named = (runs[0].arm.ablation, config.mechanism)
    return pl.DataFrame(
        [
            row
            for run, dataset in zip(runs, made, strict=True)
            if (run.arm.ablation, run.arm.name) == named
            for row in one_step(run.train, first_step(dataset))
        ]
    )


def _worlds(
    config: StudyConfig,
    bases: dict[WorldConfig, str],
    sets: dict[int | None, ProblemSets],
    store: Store,
) -> pl.DataFrame | None:
    """A row per world: what it did to its base."""
    online = config.train.online
    rows = [
        {"world": name}
        | base_figures(
            load_policy(bases[world]),
            store.get(sets[world.asked_digits].problems).read().slice(0, _MEASURED),
            online.sampling.max_new_tokens,
            world.seed,
        )
        for name, world in config.worlds.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None) if rows else None
