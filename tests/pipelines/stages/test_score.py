"""Stage score on the micro policy, and what is made of its table: training, rules, a pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.pipeline import run_pipeline, run_stage
from trace_opd.pipelines.planning.pipeline_plan import plan_pipeline
from trace_opd.pipelines.stages import REGISTRY, train
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import SCORES

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
PROMPT = 'prompt={student: "{problem}", teacher: "{problem}\\nhint: {diagnostic_type}"}'
TRAIN = ["offline.steps=2", "online.steps=0", "groups_per_step=3", "policy.device=cpu"]


def config_of(stage: str, *overrides: str) -> Any:
    return load_config(REGISTRY[stage].config_type, CONFIG, list(overrides), stage)


def make(stage: str, root: Path, *overrides: str, alias: str | None = None) -> Dataset:
    made = run_stage(stage, config_of(stage, *overrides), Store(root), alias)
    assert isinstance(made, Dataset)
    return made


def score(root: Path, *overrides: str, alias: str | None = None) -> Dataset:
    return make("score", root, PROMPT, *overrides, alias=alias)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store with routed tables: `routed` (spans to fkl), `every` (all tokens), and scores of
    both."""
    root = tmp_path_factory.mktemp("store")
    make("problems", root, "limit=6", "rows_per_part=2")
    make("rollout", root, "group_size=4")
    for stage in ("verify", "annotate"):
        make(stage, root)
    make("convert", root, "routing.rule=all", "routing.error=fkl", alias="every")
    make("convert", root)
    score(root, "routed=every", "student.path=micro", alias="every-scores")
    score(root)
    return root


@pytest.fixture
def own(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "store"))


def test_there_is_a_row_per_routed_row_and_scores_at_its_routed_tokens(root):
    scores, routed = Store(root).get("scores"), Store(root).get("routed")
    assert scores.part_rows == routed.part_rows
    table = scores.read()
    assert table["rollout_id"].to_pylist() == routed.read()["rollout_id"].to_pylist()
    empty = 0
    for one, row in zip(table.to_pylist(), routed.read().to_pylist(), strict=True):
        assert one["positions"] == np.flatnonzero(row["route"]).tolist()
        assert len(one["top_token_ids"]) == 64 * len(one["positions"])
        empty += not one["positions"]
    assert 0 < empty < len(table)
    assert scores.summary["k"] == 64
    assert scores.summary["scored_tokens"] == sum(
        len(row["positions"]) for row in table.to_pylist()
    )
    assert "divergence" not in table.column_names


def test_an_interrupted_run_goes_on_from_its_parts_to_the_same_bytes(root, own):
    whole = Store(root).get("scores")
    shutil.rmtree(own / whole.ref)
    stage, config = REGISTRY["score"].load(), config_of("score", PROMPT)
    plan, draft = stage.begin(config, Store(own))
    assert isinstance(draft, Draft)
    assert draft.ref == whole.ref
    stage.make_part(plan, draft, 1)
    close_engine()
    part = own / draft.ref / "part-00001.parquet"
    before = part.stat().st_mtime_ns
    again = score(own)
    assert part.stat().st_mtime_ns == before
    assert [one["sha256"] for one in again.listed] == [one["sha256"] for one in whole.listed]
    assert again.summary == whole.summary


def test_the_id_follows_from_what_changes_the_scores(own):
    def id_of(*overrides: str) -> str:
        return REGISTRY["score"].load().begin(config_of("score", *overrides), Store(own))[1].id

    plain = id_of(PROMPT)
    assert plain == Store(own).get("scores").id
    assert id_of(PROMPT, "micro_batch_tokens=200", "teacher.policy.precision=float32") == plain
    other = own / "other"
    shutil.copytree(Path(__file__).parents[3] / "data" / "micro", other)
    file = other / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 7}))
    changed = [
        id_of(),  # another prompt
        id_of(PROMPT, "k=8"),
        id_of(PROMPT, "temperature=0.5"),
        id_of(PROMPT, "student.path=micro"),
        id_of(PROMPT, f"teacher.policy.path={other}"),
        id_of(PROMPT, "routed=every"),
    ]
    assert len({plain, *changed}) == 7


def metrics(run: Dataset) -> list[dict[str, Any]]:
    lines = (Path(run.path()) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_from_scores_is_training_with_a_frozen_teacher(own):
    live = make("train", own, *TRAIN, "teacher.sync=frozen")
    scored = make("train", own, *TRAIN, "teacher.scores=scores")
    assert scored.manifest["inputs"].keys() == {"routed", "scores"}
    assert scored.ref != live.ref
    for one, other in zip(metrics(scored), metrics(live), strict=True):
        assert one["kl_fkl"] == pytest.approx(other["kl_fkl"], rel=1e-3)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    again = make("train", own, *TRAIN, f"teacher.scores={Store(own).get('scores').ref}")
    assert again.ref == scored.ref


def test_scores_of_all_tokens_serve_any_rule_and_the_rules_that_read_them(own):
    make("convert", own, "routing.rule=importance", "routing.error=fkl", "scores=every-scores",
         alias="important")  # fmt: skip
    important = Store(own).get("important")
    assert important.manifest["inputs"]["scores"] == Store(own).get("every-scores").ref
    assert 0 < important.summary["mean_coverage"] <= 0.25
    for routed in ("routed", "important"):
        make("train", own, *TRAIN, f"offline.routed={routed}", "teacher.scores=every-scores")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.sync=ema"], "teacher.sync: has no effect with teacher.scores"),
        (["teacher.sync_steps=3"], "teacher.sync_steps: has no effect with teacher.scores"),
        (["teacher.temperature=0.5"], r"teacher.temperature: .*score.temperature sets it"),
        (["schedule.w0=0"], "λ is 0 in every step"),
        (["loss.top_k=5"], "loss.top_k does not go with teacher.scores"),
        (["online.steps=1"], r"online step 2 has λ = 0.5 > 0; let λ reach 0"),
        (["offline.steps=0", "online.steps=1"], "offline.steps is 0; give offline steps"),
        (["prompt={}"], "its teacher's prompts were made by other templates"),
        (["offline.routed=every"], "its routed token [0-9]+ has no scores"),
        (["teacher.scores=routed"], "holds routed, this stage needs table scores"),
    ],
)
def test_what_scores_cannot_serve_is_one_sentence(own, overrides, message):
    with pytest.raises(InputError, match=message) as raised:
        make("train", own, *TRAIN, "teacher.scores=scores", *overrides)
    assert "\n" not in str(raised.value)


def test_a_fading_schedule_may_be_followed_by_online_steps(own):
    fading = ["schedule={w0: 0.5, hold_steps: 1, decay_steps: 1}", "online.steps=1"]
    make("train", own, *TRAIN, *fading, "online.group_size=2", "teacher.scores=scores")


@pytest.mark.parametrize("action", ["rkl", "jsd"])
def test_a_truncated_teacher_gives_no_other_divergence(own, action):
    make("convert", own, f"routing.key={action}", alias="other")
    score(own, "routed=other", alias="other-scores")
    with pytest.raises(InputError, match=f"routes tokens to {action}, .* truncated KL is no KL"):
        make("train", own, *TRAIN, "offline.routed=other", "teacher.scores=other-scores")


def test_a_contrast_has_no_scores(own):
    routing = "routing={rule: all, key: reweight, error: reweight, teacher_context: solution, "
    make("convert", own, routing + "contrast_context: other_solution}", alias="other")
    score(own, "routed=other", alias="other-scores")
    with pytest.raises(InputError, match="has a contrast context, under which the scores have no"):
        make("train", own, *TRAIN, "offline.routed=other", "teacher.scores=other-scores")


def test_scores_under_another_context_are_refused(own):
    make("convert", own, "routing.teacher_context=answer", alias="other")
    score(own, "routed=other", alias="other-scores")
    with pytest.raises(InputError, match="its teacher saw another teacher_context than"):
        make("train", own, *TRAIN, "teacher.scores=other-scores")


def test_scores_of_other_rollouts_are_refused(own):
    before = Store(own).get("routed").ref
    make("rollout", own, "group_size=4", "seed=5")
    for stage in ("verify", "annotate", "convert"):
        make(stage, own)
    score(own, alias="other-scores")
    with pytest.raises(InputError, match=r"scores rollouts .* and convert/.* routes"):
        make("train", own, *TRAIN, f"offline.routed={before}", "teacher.scores=other-scores")
    reads = ["routing.rule=entropy", "scores=every-scores"]
    with pytest.raises(InputError, match="and these annotations are of"):
        make("convert", own, *reads)


def test_a_rule_that_reads_no_scores_is_given_none(own):
    with pytest.raises(InputError, match="rule spans reads none; leave scores out"):
        make("convert", own, "scores=scores")
    with pytest.raises(InputError, match="the scores have no student_entropy"):
        make("convert", own, "scores=scores", "routing.rule=entropy")


def damaged(own: Path, change) -> None:
    """Rewrite part 1 of the scores, like a foreign program."""
    scores = Store(own).get("scores")
    rows = scores.read_part(1).to_pylist()
    change(rows)
    files = Store(own).files
    draft = Draft(files, "score", scores.id, scores.manifest, None)
    draft.write_part(1, SCORES.table(rows), replace=True)


def _without_a_row(rows: list[dict]) -> None:
    del rows[next(at for at, row in enumerate(rows) if row["positions"])]


def _unknown_token(rows: list[dict]) -> None:
    next(row for row in rows if row["positions"])["top_token_ids"][3] = 100


def _no_mass(rows: list[dict]) -> None:
    row = next(row for row in rows if row["positions"])
    row["top_logprobs"] = [value - 3 for value in row["top_logprobs"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_a_row, "part-00001.parquet, rollout [0-9a-f]+: has no scores"),
        (_unknown_token, "part-00001.parquet, rollout .* token id outside the policy's 0 … 99"),
        (_no_mass, "part-00001.parquet, rollout .* has probabilities that do not sum to 1"),
    ],
)
def test_a_damaged_part_is_one_sentence_before_the_first_step(own, change, message):
    damaged(own, change)
    with pytest.raises(InputError, match=message):
        make("train", own, *TRAIN, "teacher.scores=scores")
    assert not list(own.glob("train/*/metrics.jsonl"))


SMALL = [
    "problems.limit=4", "problems.rows_per_part=2", "eval_problems.limit=2",
    "rollout.group_size=2", "train.offline.steps=2", "train.online.steps=0",
    "train.groups_per_step=2", "evaluate.k=1", "evaluate.bootstrap=100",
    "score={" + PROMPT.replace("=", ": ", 1) + ", k: 8}",
]  # fmt: skip


def test_a_pipeline_with_the_stage_trains_from_its_scores(tmp_path):
    config, store = load_config(PipelineConfig, CONFIG, SMALL), Store(tmp_path)
    plan = plan_pipeline(config, store, download=False)
    assert plan.faults == []
    planned = {stage.role: stage for stage in plan.stages}
    assert planned["scores"].reads == ["routed"]
    assert planned["train"].reads == ["problems", "routed", "scores"]

    def run(stage: str, stage_config: Any, alias: str) -> str:
        if stage in ("evaluate", "report"):
            return ""
        made = run_stage(stage, stage_config, store, alias)
        return made.ref if isinstance(made, Dataset) else made

    made = run_pipeline(config, run)
    assert made["scores"] == planned["scores"].ref
    assert made["train"] == planned["train"].ref
    assert store.get(made["train"]).manifest["inputs"]["scores"] == made["scores"]
    assert store.get(made["scores"]).summary["k"] == 8


def test_a_pipeline_without_offline_steps_has_nothing_to_score():
    with pytest.raises(InputError, match="score has no routed dataset while"):
        load_config(
            PipelineConfig, CONFIG, [*SMALL, "train.offline.steps=0", "train.online.steps=1"]
        )


def test_a_dry_run_begins_training_without_a_model(own):
    inputs, target = train.begin(config_of("train", *TRAIN, "teacher.scores=scores"), Store(own))
    assert isinstance(inputs["scores"].read_part(0), pa.Table)
    assert isinstance(target, Draft)
