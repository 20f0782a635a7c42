"""Validation on held-out problems during training: which problems, when, and what is kept."""

from contextlib import closing
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.training.validation import Validation, read_validation
from trace_opd.pipelines.verifiers.verdicts import MathVerifier
from trace_opd.schemas.configs import ProblemsConfig, TrainConfig, VerifyConfig
from trace_opd.schemas.configs.train import OnlineConfig, ValidationConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.results import VALIDATIONS
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import PROBLEMS
from trace_opd.tests.kill.ends import untimed_metrics

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
def validated(store) -> Dataset:
    held_out = problems(store, 5, 1)
    return trained(
        store, f"validation.problems={{test: {held_out}}}", "validation.every=2", "validation.k=3"
    )


def test_a_run_validates_before_its_first_step_every_few_steps_and_after_its_last(validated):
    table = VALIDATIONS.table(read_validation(validated).to_pylist())
    rows = pl.DataFrame(table)
    counts = rows.group_by("step", "decoding").agg(pl.len(), pl.col("k").sum()).sort("step")
    expected = {(s, d, 5, k) for s in (0, 2, 3) for d, k in (("sampled", 15), ("greedy", 5))}
    assert set(counts.iter_rows()) == expected
    assert rows["correct"].max() <= 3
    sampled = rows.filter(pl.col("decoding") == "sampled")
    assert (sampled["entropy"] > 0).all()


def test_validation_scores_are_among_the_steps_metrics(validated):
    rows = pl.DataFrame(read_validation(validated))
    lines = {line["step"] + 1: line for line in read_metrics(validated.local_path("metrics.jsonl"))}
    assert "validation_test_sampled" not in lines[1]
    for step in (2, 3):
        for decoding in ("sampled", "greedy"):
            seen = rows.filter((pl.col("step") == step) & (pl.col("decoding") == decoding))
            rate = seen["correct"].sum() / seen["k"].sum()
            assert lines[step][f"validation_test_{decoding}"] == pytest.approx(rate)


def test_validation_does_not_change_the_training(validated, store):
    alone = trained(store)
    assert alone.ref != validated.ref

    def trained_metrics(run: Dataset) -> list[dict]:
        lines = untimed_metrics(Path(run.path()))
        return [{k: v for k, v in line.items() if not k.startswith("validation")} for line in lines]

    assert trained_metrics(alone) == trained_metrics(validated)


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


def test_a_validation_of_which_nothing_was_scored_has_no_pass_rate(tmp_path):
    config = TrainConfig(online=OnlineConfig(steps=1), validation=ValidationConfig(greedy=False))
    golds = {"right": "A", "none": "no letter"}
    splits = {
        name: PROBLEMS.table(
            [{"problem_id": name, "problem": "?", "answer": gold, "answer_kind": "choice",
              "source": "s", "split": "test"}]
        )
        for name, gold in golds.items()
    }  # fmt: skip

    def sample(asked, sampling, k, seed):
        return pa.table(
            {"rollout_id": ["0", "1"], "problem_id": list(golds), "group_id": list(golds),
             "response": ["Answer: A"] * 2, "token_ids": [[1], [1]], "logprobs": [[-1.0], [-1.0]],
             "finish_reason": ["stop"] * 2}
        )  # fmt: skip

    with closing(MathVerifier(VerifyConfig(workers=1))) as verifier:
        validation = Validation(config, splits, sample, verifier, tmp_path)
        assert validation.evaluate(3) == {"validation_right_sampled": 1.0}


def test_a_validation_without_a_sampler_is_refused(store):
    with pytest.raises(InputError, match="validation uses the sampler"):
        config_of(store, "offline.steps=2", "online.steps=0", "validation.every=1")


def test_runs_of_one_base_share_the_validation_before_the_first_step(validated, store, monkeypatch):
    """Another learning rate on the same base reuses the first run's validation file."""
    steps = []
    evaluate = Validation.evaluate

    def counted(self: Validation, step: int) -> dict[str, float]:
        steps.append(step)
        return evaluate(self, step)

    monkeypatch.setattr(Validation, "evaluate", counted)
    (problems,) = validated.manifest["config"]["validation"]["problems"].values()
    same = [f"validation.problems={{test: {problems}}}", "validation.every=2"]
    again = trained(store, *same, "validation.k=3", "optim.lr=1.0e-3")
    assert steps == [2, 3]
    first, second = (
        Path(run.path("validation/step-000000.parquet")).read_bytes() for run in (validated, again)
    )
    assert first == second
    # Another question makes another validation.
    trained(store, *same, "validation.k=2", "optim.lr=1.0e-3")
    assert steps == [2, 3, 0, 2, 3]
    assert len(list(Path(store.files.base, ".looks").iterdir())) == 2
