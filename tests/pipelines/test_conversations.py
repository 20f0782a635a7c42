"""Problems that are conversations, through every stage with the micro policy, and every view."""

from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators.prompting import ask, load_prompt
from trace_opd.pipelines.annotators.rows import items
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.pipeline import run_pipeline, run_stage
from trace_opd.pipelines.planning.faults import shared_problems
from trace_opd.pipelines.verifiers.own import reward_job
from trace_opd.schemas.configs import PipelineConfig, SegmentConfig
from trace_opd.schemas.settings import load_config
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.sequences import training_sequences

ROOT = Path(__file__).parents[2]
SOURCE = "{kind: files, path: examples/own-data/conversations.jsonl, columns: {messages: messages}}"
SMALL = [
    *("rollout.group_size=4", "train.groups_per_step=2", "train.online.group_size=2"),
    *("convert.routing.error=rkl", "train.online.routing.error=rkl"),
    *("train.offline.steps=2", "train.online.steps=1", "evaluate.k=2", "evaluate.bootstrap=100"),
]
SYSTEM, EARLIER = "Add the numbers.", "31+4"


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory) -> tuple[Store, dict[str, str]]:
    """The store and refs of the example's pipeline on its conversations."""
    store = Store(tmp_path_factory.mktemp("conversations") / "store")

    def run(stage, config, alias):
        made = run_stage(stage, config, store, alias)
        return made if isinstance(made, str) else made.ref

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        overrides = [f"problems.source={SOURCE}", *SMALL]
        config = load_config(PipelineConfig, "examples/own-data/run.yaml", overrides)
        return store, run_pipeline(config, run)


def decoded(ids: list[list[int]]) -> set[str]:
    tokenizer = load_tokenizer(resolve_policy("micro"))
    return {tokenizer.decode(one) for one in ids}


PROMPTS = {
    "<|user|>31+4<|assistant|>\\boxed{35}<|end|><|user|>235+140<|assistant|>",
    "<|system|>Add the numbers.<|user|>612+309<|assistant|>",
    "<|user|>448+177<|assistant|>",
}


def test_every_stage_runs_on_conversations_and_the_student_reads_all_turns(made):
    store, refs = made
    assert store.get(refs["problems"]).read()["history"].null_count == 1
    rollouts = store.get(refs["rollouts"]).read()
    assert decoded(rollouts["prompt_token_ids"].to_pylist()) == PROMPTS
    assert store.get(refs["verdicts"]).rows == store.get(refs["annotations"]).rows == 12
    assert store.get(refs["train"]).summary["steps"] == 3
    tables = store.get(refs["train"]).summary["tables"]
    online = store.get(tables["rollouts"]).read()
    assert decoded(online["prompt_token_ids"].to_pylist()) <= PROMPTS
    assert set(store.get(refs["evaluation"]).summary["policies"]) == {"base", "trained"}


def test_the_teacher_reads_the_turns_and_its_label(made):
    store, refs = made
    routed = store.get(refs["routed"]).read()
    assert "history" in routed.column_names
    tokenizer = load_tokenizer(resolve_policy("micro"))
    config = load_config(PipelineConfig, ROOT / "examples/own-data/run.yaml").train
    taught = [s for s in training_sequences(routed, tokenizer, config.prompt) if s.routed_end]
    assert taught
    texts = {tokenizer.decode(s.teacher_prompt_ids or []) for s in taught}
    student = {text.removesuffix("<|assistant|>") for text in PROMPTS}
    assert all(text.partition("\nhint: ")[0] in student for text in texts)
    assert all("\nhint: " in text for text in texts)


def test_the_annotator_reads_the_conversation_behind_its_fence(made):
    store, refs = made
    tables = [store.get(refs[role]).read() for role in ("problems", "rollouts", "verdicts")]
    asked = {
        item.problem["problem"]: ask(load_prompt(), item)[1]["content"]
        for item in items(*tables, SegmentConfig())
    }
    fence, _, shown = asked["235+140"].partition("\n")
    assert fence.startswith("<problem-")
    assert shown.startswith(
        "A conversation, whose last turn is to be answered:\n[user] 31+4\n"
        "[assistant] \\boxed{35}\n[user] 235+140\n</problem-"
    )
    assert "[system] Add the numbers.\n[user] 612+309\n" in asked["612+309"]
    assert "\n448+177\n</problem-" in asked["448+177"]


def test_people_see_the_conversation(made, tmp_path, capsys):
    store, refs = made
    where = ["--store", str(store.root)]
    page = tmp_path / "report.html"
    command = ["report", f"dataset={refs['annotations']}", "--output", str(page)]
    app([*command, *where], standalone_mode=False)
    assert f"[system] {SYSTEM}" in page.read_text()
    assert f"[user] {EARLIER}" in page.read_text()
    row = next(
        row for row in store.get(refs["rollouts"]).read().to_pylist() if row["sample_index"] == 0
    )
    app(["show", row["rollout_id"], *where], standalone_mode=False)
    out = capsys.readouterr().out
    assert "[user] 31+4" in out
    assert "[user] 235+140" in out


def test_a_reward_of_ones_own_finds_the_turns_in_its_metadata(made):
    store, refs = made
    rows = store.get(refs["problems"]).read().to_pylist()
    rollout = {"response": "", "finish_reason": "stop", "rollout_id": "r", "group_id": "g"}
    rollout |= {"problem_id": "p"}
    jobs = [reward_job(rollout, row) for row in rows]
    assert [EARLIER in str(job) for job in jobs] == [True, False, False]


def test_problems_are_compared_by_all_that_was_said(made):
    """The same last turn in another conversation is another problem."""
    store, refs = made
    problems = store.get(refs["problems"]).read()
    bare = problems.drop_columns(["history"])
    assert len(shared_problems(problems, problems)) == 1
    (found,) = shared_problems(bare, problems)
    assert found.startswith("eval_problems: 2 of 3 ")  # all but the one with an earlier turn
