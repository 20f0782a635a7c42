"""`trace-opd study`: train every arm with every seed, write tables, plots and the page."""

import io
import os
from pathlib import Path

import polars as pl

from ...data.atomic import write_atomic
from ...data.store import Store
from ...schemas.configs import StudyConfig
from ...schemas.errors import InputError
from ...schemas.extras import require
from ...schemas.settings import dump_config
from .arms import arms, asked_of, chosen, study_runs, tuning_runs, unmade_bases, worlds_of
from .bases import world_bases, worlds_table
from .comparisons import comparisons_table
from .figures import CONFIG, draw
from .first_steps import first_steps
from .page import page
from .problem_sets import problem_sets
from .runs import answers, open_pool, results, train_all


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
        all_arms = arms(config, bases, sets)
        runs = study_runs(all_arms, choices)
        made = train_all(runs, store, pool, "study", config.name)
        worlds = worlds_table(config, all_arms, bases, sets, store, pool)
        mechanism = first_steps(config, runs, made, store, pool)
    per_problem = answers(runs, made)
    table = results(per_problem)
    comparisons = comparisons_table(config, per_problem, mechanism)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "answers": per_problem, "results": table, "tuning": tuning, "mechanism": mechanism,
        "worlds": worlds, "comparisons": comparisons,
    }  # fmt: skip
    for name, one in tables.items():
        if one is not None:
            written = io.BytesIO()
            one.write_parquet(written)
            write_atomic(folder / f"{name}.parquet", written.getvalue())
    write_atomic(folder / CONFIG, dump_config(config).encode())
    draw(config, per_problem, comparisons, folder)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    files = os.path.relpath(folder, page_path.parent)
    text = page(config, per_problem, table, mechanism, tuning, worlds, files, comparisons)
    write_atomic(page_path, text.encode())
    return table


def study_of(config: StudyConfig, claim: str) -> StudyConfig:
    """The study of one claim alone, under a name of its own; its runs are those of the whole.

    Raises:
        InputError: no such claim.
    """
    if claim not in config.claims:
        raise InputError(
            f"--only {claim}: study {config.name} has no such claim; "
            + (f"give one of {', '.join(config.claims)}" if config.claims else "it has none")
        )
    alone = {"claims": {claim: config.claims[claim]}, "ablations": {}, "worlds": {}}
    dropped = {"tuning": None, "mechanism": None, "exposure": None, "reported": None}
    return config.model_copy(update=alone | dropped | {"name": f"{config.name}-{claim}"})


def planned(config: StudyConfig) -> str:
    """One line on what a study would train.

    Raises:
        InputError: an arm's preset or override is wrong.
    """
    all_arms = arms(config)
    count = str(len({run.key for run in study_runs(all_arms, {})}))
    tuning = len(tuning_runs(config, all_arms))
    if tuning:  # which arms share a run depends on the choices
        count = f"about {count}"
    steps = config.train.offline.steps + config.train.online.steps
    bases = len(set(unmade_bases(config).values()))
    on = f" on {bases} bases of worlds" if bases else ""
    return f"{count} runs of {steps} steps{on}, after {tuning} that tune; {config.workers} at once"
