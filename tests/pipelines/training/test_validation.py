"""Held-out problems on the way of a training: what is asked, when, and what is kept."""

from pathlib import Path

import polars as pl
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.training.validation import Validation, read_validation
from trace_opd.schemas.configs import ProblemsConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.results import VALIDATIONS
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("validation"))


def problems(store: Store, limit: int, seed: int) -> str:
    overrides = [f"limit={limit}", f"seed={seed}"]
    config = load_config(ProblemsConfig, CONFIG, overrides, "problems")
    return run_stage("problems", config, store).ref


def config_of(store: Store, *overrides: str) -> TrainConfig:
    fixed = ["offline.steps=0", "online.steps=3", "online.group_size=4", "groups_per_step=2"]
    fixed += [f"online.problems={problems(store, 8, 0)}"]
    return load_config(TrainConfig, CONFIG, [*fixed, *overrides], "train")


def trained(store: Store, *overrides: str) -> Dataset:
    made = run_stage("train", config_of(store, *overrides), store)
    assert isinstance(made, Dataset)
    return made


@pytest.fixture(scope="module")
def looked(store) -> Dataset:
    held_out = problems(store, 5, 1)
    return trained(
        store, f"validation.problems={{test: {held_out}}}", "validation.every=2", "validation.k=3"
    )


def test_a_run_looks_before_its_first_step_every_few_steps_and_after_its_last(looked):
    table = VALIDATIONS.table(read_validation(looked).to_pylist())
    rows = pl.DataFrame(table)
    counts = rows.group_by("step", "decoding").agg(pl.len(), pl.col("k").sum()).sort("step")
    expected = {(s, d, 5, k) for s in (0, 2, 3) for d, k in (("sampled", 15), ("greedy", 5))}
    assert set(counts.iter_rows()) == expected
    assert rows["correct"].max() <= 3
    sampled = rows.filter(pl.col("decoding") == "sampled")
    assert (sampled["entropy"] > 0).all()


def test_what_was_seen_stands_among_the_steps_metrics(looked):
    rows = pl.DataFrame(read_validation(looked))
    lines = {line["step"] + 1: line for line in read_metrics(looked.local_path("metrics.jsonl"))}
    assert "validation_test_sampled" not in lines[1]
    for step in (2, 3):
        for decoding in ("sampled", "greedy"):
            seen = rows.filter((pl.col("step") == step) & (pl.col("decoding") == decoding))
            rate = seen["correct"].sum() / seen["k"].sum()
            assert lines[step][f"validation_test_{decoding}"] == pytest.approx(rate)


def test_looking_changes_nothing_of_the_training(looked, store):
    alone = trained(store)
    assert alone.ref != looked.ref

    def told(run: Dataset) -> list[dict]:
        lines = read_metrics(run.local_path("metrics.jsonl"))
        left_out = ("seconds", "tokens_per_second", "validation")
        return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]

    assert told(alone) == told(looked)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.every=1"], "name a dataset"),
        (["validation.problems={test: nowhere}"], "nowhere"),
    ],
)
def test_a_validation_without_problems_is_refused(store, overrides, message):
    with pytest.raises(InputError, match=message):
        trained(store, *overrides)


def test_a_validation_without_a_sampler_is_refused(store):
    with pytest.raises(InputError, match="validation uses the sampler"):
        config_of(store, "offline.steps=2", "online.steps=0", "validation.every=1")


def test_runs_of_one_base_share_the_look_before_the_first_step(looked, store, monkeypatch):
    """Another learning rate, the same base: its first look is the first run's file."""
    steps = []
    evaluate = Validation.evaluate

    def counted(self: Validation, step: int) -> dict[str, float]:
        steps.append(step)
        return evaluate(self, step)

    monkeypatch.setattr(Validation, "evaluate", counted)
    (problems,) = looked.manifest["config"]["validation"]["problems"].values()
    same = [f"validation.problems={{test: {problems}}}", "validation.every=2"]
    again = trained(store, *same, "validation.k=3", "optim.lr=1.0e-3")
    assert steps == [2, 3]
    first, second = (
        Path(run.path("validation/step-000000.parquet")).read_bytes() for run in (looked, again)
    )
    assert first == second
    # Asked otherwise, it is another look.
    trained(store, *same, "validation.k=2", "optim.lr=1.0e-3")
    assert steps == [2, 3, 0, 2, 3]
    assert len(list(Path(store.base, ".looks").iterdir())) == 2
