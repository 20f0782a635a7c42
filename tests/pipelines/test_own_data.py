"""examples/own-data: every stage on ten problems of one's own, from files to the evaluation."""

from pathlib import Path

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_pipeline, run_stage
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[2]
# Fewer samples and steps than in the example.
SMALL = [
    *("rollout.group_size=4", "train.groups_per_step=2", "train.online.group_size=2"),
    *("train.offline.steps=1", "train.online.steps=1", "evaluate.k=2", "evaluate.bootstrap=100"),
]


def test_the_example_goes_from_files_to_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    store = Store(tmp_path / "store")

    def run(stage, config, alias):
        made = run_stage(stage, config, store, alias)
        return made if isinstance(made, str) else made.ref

    refs = run_pipeline(load_config(PipelineConfig, "examples/own-data/run.yaml", SMALL), run)
    problems, held_out = (store.get(refs[role]) for role in ("problems", "eval_problems"))
    assert (problems.rows, held_out.rows) == (10, 4)
    assert problems.summary["columns"] == {
        "problem": "question",
        "answer": "answer",
        "solution": "solution",
        "id": "id",
    }
    texts = [set(dataset.read()["problem"].to_pylist()) for dataset in (problems, held_out)]
    assert not texts[0] & texts[1]
    assert store.get(refs["annotations"]).summary["status"] == {"ok": 40}
    assert store.get(refs["train"]).summary["steps"] == 2
    assert set(store.get(refs["evaluation"]).summary["policies"]) == {"base", "trained"}
    assert Path(refs["report"]).is_file()
