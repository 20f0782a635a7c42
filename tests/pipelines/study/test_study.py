"""A small study from end to end: its files, its page, and that the two agree."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from typer.testing import CliRunner

from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.plots.rates import curves
from trace_opd.pipelines.statistics import bootstrap_crossed
from trace_opd.pipelines.study.arms import Arm, Run, arms, chosen, study_runs
from trace_opd.pipelines.study.figures import pass_rate, plot_curves, plot_exposure
from trace_opd.pipelines.study.page import page
from trace_opd.pipelines.study.runs import results
from trace_opd.schemas.configs import StudyConfig, TrainConfig
from trace_opd.schemas.configs.train import OnlineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config, override

CONFIG = Path(__file__).parents[3] / "studies" / "micro.yaml"
SMALL = [
    "name=small",
    "problems.limit=8",
    "splits={test: {source: {kind: arithmetic}, limit: 6, seed: 1},"
    " other: {source: {kind: arithmetic, operation: subtract}, limit: 4, seed: 1}}",
    "seeds=[0, 1]",
    "ablation_seeds=1",
    "tuning={problems: {source: {kind: arithmetic}, limit: 4, seed: 2},"
    " choices: [[optim.lr=1.0e-4], [optim.lr=1.0e-3]]}",
    "train.policy.path=micro",
    "train.online.steps=2",
    "train.online.group_size=4",
    "train.groups_per_step=2",
    "train.validation.every=2",
    "train.validation.k=2",
    "ablations={methods: {grpo: {preset: grpo}, trace-fkl: {preset: trace-fkl}},"
    " alpha: {all: {preset: all-token-fkl, like: trace-fkl, against: half},"
    " half: {preset: trace-fkl, like: trace-fkl, set: [online.routing.alpha=0.5]}}}",
    "exposure=alpha",
    "mean=true",
    "bootstrap=100",
    "workers=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    arguments = [
        "study",
        str(CONFIG),
        *SMALL,
        "--store",
        f"{folder}/store",
        "--output",
        str(folder),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_a_study_has_a_row_per_run_evaluation_split_and_decoding(made):
    table = pl.read_parquet(made / "small" / "results.parquet")
    # Two arms by two seeds, two of the ablation by one; evaluations before and after the steps.
    assert len(table) == (2 * 2 + 2) * 2 * 2 * 2
    assert table["step"].unique().sort().to_list() == [0, 2]
    assert set(table["decoding"]) == {"sampled", "greedy"}
    assert table["pass_rate"].is_between(0, 1).all()
    assert table.filter(pl.col("decoding") == "greedy")["entropy"].null_count() == len(table) // 2
    exposed = table.filter(pl.col("step") == 2).group_by("method").agg(pl.col("kl_exposure").max())
    assert dict(exposed.iter_rows()) == {"grpo": 0.0} | dict.fromkeys(
        ("trace-fkl", "all", "half"), 0.5
    )


def test_the_page_shows_the_figures_of_the_files(made):
    page = (made / "small" / "study.md").read_text()
    table = pl.read_parquet(made / "small" / "results.parquet")
    last = table.filter((pl.col("step") == 2) & (pl.col("decoding") == "sampled"))
    for method in ("grpo", "trace-fkl", "all"):
        (row,) = re.findall(rf"^\| {method} \| (.+)$", page, re.M)[:1]
        rates = last.filter(pl.col("method") == method)
        test = rates.filter(pl.col("split") == "test")["pass_rate"].mean()
        other = rates.filter(pl.col("split") == "other")["pass_rate"].mean()
        coverage = rates["coverage"].mean()
        covered = "–" if coverage is None else f"{100 * coverage:.1f} %"  # GRPO has no KL
        assert re.match(rf"\d+\.\d % \| {100 * test:.1f} % \(", row)
        assert row.endswith(f"{covered} | {100 * other:.1f} % | {50 * (test + other):.1f} % |")
    for picture in re.findall(r"\]\((.+\.svg)\)", page):
        assert (made / "small" / picture).read_text().startswith("<?xml")


def test_the_page_names_what_an_arm_is_compared_with(made):
    page = (made / "small" / "study.md").read_text()
    assert re.search(r"^\| all \| .+ to half \| ", page, re.M)
    assert re.search(r"^\| half \| [^|]+\| [^|]+\| – \| ", page, re.M)  # all are compared with it
    assert re.search(r"^\| grpo \| [^|]+ \| [^|]+ \| – \| ", page, re.M)


def test_the_page_sets_exposure_against_what_other_splits_lost(made):
    page = (made / "small" / "study.md").read_text()
    section = page.split("## exposure")[1].split("##")[0]
    answers = pl.read_parquet(made / "small" / "answers.parquet").filter(
        (pl.col("method") == "half") & (pl.col("decoding") == "sampled")
    )
    assert re.search(rf"^\| half \| {answers['kl_exposure'].max():.2f} \| [+-]", section, re.M)


def test_the_page_shows_one_step_as_its_file_has_it(made):
    page = (made / "small" / "study.md").read_text()
    table = pl.read_parquet(made / "small" / "mechanism.parquet")
    assert table["seed"].unique().sort().to_list() == [0, 1]
    for (objective,), own in table.group_by("objective"):
        assert f"| {objective} | {own['lift'].mean():+.4f} ± " in page
    clipped = dict(table.group_by("objective").agg(pl.col("kl_clipped").mean()).iter_rows())
    assert clipped["grpo"] is None
    assert clipped["trace-fkl, clip none"] == 0.0
    assert f" | {100 * clipped['trace-fkl, clip token']:.1f} % |" in page


def test_coverage_is_the_share_of_tokens_under_the_kl(made):
    table = pl.read_parquet(made / "small" / "results.parquet").filter(pl.col("step") == 2)
    coverage = {method: own["coverage"].to_numpy() for (method,), own in table.group_by("method")}
    assert np.isnan(coverage["grpo"].astype(float)).all()  # none of its steps has a KL
    # All tokens of what has a label: a response without a carry has none.
    assert ((coverage["all"] > 0.5) & (coverage["all"] < 1)).all()
    assert ((coverage["trace-fkl"] > 0) & (coverage["trace-fkl"] <= 0.25)).all()


def test_the_choice_is_the_one_whose_runs_did_best_and_the_page_shows_both(made):
    tuning = pl.read_parquet(made / "small" / "tuning.parquet")
    assert set(tuning["split"]) == {"tuning"}
    assert set(tuning["seed"]) == {1000}
    page = (made / "small" / "study.md").read_text().split("## What tuning chose")[1]
    table = pl.read_parquet(made / "small" / "results.parquet")
    for method in ("grpo", "trace-fkl"):
        choices = ("optim.lr=1.0e-4", "optim.lr=1.0e-3")
        rates = [
            tuning.filter(
                (pl.col("method") == method)
                & (pl.col("choice") == choice)
                & (pl.col("decoding") == "sampled")
            )["pass_rate"].to_numpy().mean()
            for choice in choices
        ]  # fmt: skip
        best = int(np.argmax(rates))
        assert set(table.filter(pl.col("method") == method)["choice"]) == {choices[best]}
        cells = [f"{100 * rate:.1f} %" for rate in rates]
        cells[best] = f"**{cells[best]}**"
        assert f"| {method} | {cells[0]} | {cells[1]} |" in page


def test_an_arm_of_an_ablation_takes_the_choice_of_the_arm_that_it_is_like(made):
    table = pl.read_parquet(made / "small" / "results.parquet")
    choice = dict(table.select("method", "choice").unique().iter_rows())
    assert choice["all"] == choice["trace-fkl"]
    assert choice["grpo"] in ("optim.lr=1.0e-4", "optim.lr=1.0e-3")


def test_a_study_goes_on_from_the_runs_that_its_store_has(made):
    before = {path: path.stat().st_mtime_ns for path in made.glob("store/train/*/manifest.json")}
    page = (made / "small" / "study.md").read_bytes()
    arguments = ["study", str(CONFIG), *SMALL, "--store", f"{made}/store", "--output", str(made)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in made.glob("store/train/*/manifest.json")}
    assert after == before
    assert (made / "small" / "study.md").read_bytes() == page


def test_a_study_leaves_the_names_of_the_users_own_datasets_alone(made):
    names = json.loads((made / "store" / "aliases.json").read_text())
    runs = {name for name in names if name.startswith("small-train-")}
    assert {names.pop(name) for name in runs} == {
        f"train/{path.parent.name}" for path in made.glob("store/train/*/manifest.json")
    }
    assert set(names) == {"small-problems", "small-test", "small-tuning", "small-other"}


def test_processes_that_train_end_with_a_study_that_was_killed():
    program = (
        "import os, time\n"
        "from trace_opd.pipelines.study.runs import open_pool\n"
        "with open_pool(1) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    study = subprocess.Popen([sys.executable, "-Pc", program], stdout=subprocess.PIPE, text=True)
    assert study.stdout is not None
    worker = psutil.Process(int(study.stdout.readline()))
    study.kill()
    study.wait()
    worker.wait(timeout=60)


def test_ctrl_c_ends_a_study_with_a_checkpoint_of_each_training(tmp_path):
    args = ["study", str(CONFIG), *SMALL, "tuning=null", "train.online.steps=500"]
    args += ["--store", str(tmp_path), "--output", str(tmp_path / "out")]
    command = Path(sys.executable).with_name("trace-opd")
    study = subprocess.Popen([command, *args], stderr=subprocess.PIPE, text=True, process_group=0)
    while not any(path.stat().st_size for path in tmp_path.glob("train/*/metrics.jsonl")):
        assert study.poll() is None, study.communicate()
        time.sleep(0.05)
    os.killpg(study.pid, signal.SIGINT)
    _, output = study.communicate(timeout=60)
    assert study.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    sentence = "stopped; finished runs and the others' checkpoints are kept; to continue: trace-opd"
    assert sentence in " ".join(output.split())
    assert len(list(tmp_path.glob("train/*/checkpoints/step-*"))) == 1


def test_curves_and_their_summaries_by_hand():
    rows = [
        {"seed": seed, "step": step, "split": "test", "decoding": "sampled", "problem_id": problem,
         "k": 2, "correct": correct}
        for seed, step, problem, correct in [
            (0, 0, "a", 0), (0, 0, "b", 0), (0, 4, "a", 2), (0, 4, "b", 0),
            (1, 0, "a", 0), (1, 0, "b", 2), (1, 4, "a", 2), (1, 4, "b", 2),
        ]
    ]  # fmt: skip
    drawn = curves(pl.DataFrame(rows), "test", "sampled")
    np.testing.assert_allclose(drawn.mean, [0.25, 0.75])
    np.testing.assert_allclose(drawn.final, [[1, 0], [1, 1]])
    np.testing.assert_allclose(drawn.area, [[0.5, 0], [0.5, 1]])
    assert drawn.first_step(0.7) == 4
    assert drawn.first_step(0.8) is None
    estimate = bootstrap_crossed(drawn.final, 500)
    assert estimate.value == 0.75
    assert estimate.low < 0.75 < estimate.high == 1.0


def test_an_arm_without_a_scored_answer_has_dashes_and_no_zeros(made, tmp_path, recwarn):
    config = load_config(StudyConfig, CONFIG, SMALL)
    silent = pl.when(pl.col("method") == "half").then(0)
    answers = pl.read_parquet(made / "small" / "answers.parquet").with_columns(
        k=silent.otherwise("k"), correct=silent.otherwise("correct")
    )
    table = results(answers)
    assert table.filter(method="half").select("pass_rate", "length").null_count().row(0) == (8, 8)
    text = page(config, answers, table, None, None, None, "files")
    row, exposure = re.findall(r"^\| half \| (.+) \|$", text, re.M)
    assert row.split(" | ")[:6] == ["–", "–", "–", "– to –", "–", "–"]
    assert row.split(" | ")[-2:] == ["–", "–"]
    assert exposure.split(" | ")[1:] == ["–"]
    plot_curves(config, answers, "alpha", tmp_path / "curves.svg")
    plot_exposure(config, answers, "alpha", tmp_path / "exposure.svg")
    assert pass_rate(answers.filter(method="half")) is None
    assert not recwarn.list


def test_a_choice_without_a_scored_answer_is_not_the_best():
    arm = Arm("methods", "grpo", TrainConfig(online=OnlineConfig(steps=1)))
    tries = [Run(arm, 0, (choice,)) for choice in ("silent", "bad", "good")]
    table = pl.DataFrame(
        {"method": "grpo", "choice": ["silent", "bad", "good"], "decoding": "sampled",
         "pass_rate": [None, 0.0, 0.5]}
    )  # fmt: skip
    assert chosen(tries, table) == {"grpo": ("good",)}
    assert chosen(tries[:2], table) == {"grpo": ("bad",)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tuning.seed=0", "one of seeds"),
        ("splits.problems={source: {kind: arithmetic}}", "give it another"),
        ("splits.tuning={source: {kind: arithmetic}}", "give it another"),
        ("train.validation=null", "set it"),
        ("ablations.clip={a: {like: nobody}}", "nobody"),
    ],
)
def test_a_study_with_contradictions_is_refused(change, message):
    config = load_config(StudyConfig, CONFIG)
    with pytest.raises(InputError, match=message):
        override(config, [change])


def test_the_shipped_study_names_presets_and_fields_that_exist():
    config = load_config(StudyConfig, CONFIG)
    for size in (config, override(config, config.quick)):
        runs = study_runs(arms(size), {})
        main = [run for run in runs if run.arm.ablation == "methods"]
        assert len(main) == len(config.ablations["methods"]) * len(size.seeds)
