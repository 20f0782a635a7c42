"""The plan of a pipeline: what it would make, and every fault before any work."""

import json
import re
import sys
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.planning.pipeline_plan import plan_pipeline
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
SMALL = [
    "problems.limit=4",
    "problems.rows_per_part=2",
    "eval_problems.limit=2",
    "rollout.group_size=2",
    "train.offline.steps=1",
    "train.online.steps=1",
    "train.online.group_size=2",
    "train.groups_per_step=2",
    "evaluate.k=1",
    "evaluate.bootstrap=100",
]
DEAD = "http://127.0.0.1:9/v1"
SOURCE = "problems.source={{kind: files, path: {path}}}"
PAID = "annotate.annotator={{engine: openai, model: m, base_url: '{url}', api_key_env: {key}}}"
PRICES = [
    "annotate.annotator.usd_per_million_prompt_tokens=1.0",
    "annotate.annotator.usd_per_million_completion_tokens=2.0",
]
JUDGE = (
    "verify.rewards=[{{name: judge, model: m, base_url: '{url}', api_key_env: null, "
    "budget_usd: {usd}, usd_per_million_prompt_tokens: 1.0, "
    "usd_per_million_completion_tokens: 2.0}}]"
)


def planned(root: Path, *overrides: str):
    config = load_config(PipelineConfig, CONFIG, [*SMALL, *overrides])
    return plan_pipeline(config, Store(root), download=False)


@pytest.mark.parametrize(
    ("override", "sentences"),
    [
        (
            SOURCE,
            [
                "annotations: problems/[0-9a-f]+, part 0, row 0: steps is empty",
                "train: problems/[0-9a-f]+, part 0, row 0: steps is empty",  # its online steps
            ],
        ),
        (PAID.format(url=DEAD, key="NO_KEY"), ["annotations: environment variable NO_KEY"]),
        (
            PAID.format(url=DEAD, key="null"),
            [f"annotations: annotator.base_url: {DEAD} does not answer"],
        ),
        (
            JUDGE.format(url=DEAD, usd="null"),
            [f"verdicts: judge.base_url: {DEAD} does not answer"],
        ),
        ("eval_problems.seed=0", ["eval_problems: 2 of 2 are training problems too"]),
        ("evaluate.policy.path=./nothing", ["evaluation: policy ./nothing: is not there"]),
        (
            f"rollout.sampler={{engine: openai, base_url: '{DEAD}'}}",
            [
                f"rollouts: sampler.base_url: {DEAD} does not answer",
                "routed: .*: token ids with log-probabilities are missing .* tokenizer of micro",
            ],
        ),
        ("train.checkpoints_kept=1000000000", ["train: checkpoints: 1000000000 of"]),
        ("rollout.sampling.max_new_tokens=2000", ["rollouts: .* do not fit into the context"]),
    ],
    ids=["steps", "key", "endpoint", "judge", "overlap", "model", "token ids", "disk", "context"],
)
def test_each_fault_is_found_before_any_work_and_no_other(tmp_path, override, sentences):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n}+1", "answer": "2"}) + "\n" for n in "12"))
    change = SOURCE.format(path=file) if override is SOURCE else override
    faults = planned(tmp_path / "store", change).faults
    assert len(faults) == len(sentences), faults
    for fault, sentence in zip(faults, sentences, strict=True):
        assert re.match(sentence, fault), fault
    assert not (tmp_path / "store").exists()


def test_datasets_that_depend_on_an_unknown_one_have_no_id_and_no_rows(tmp_path):
    stages = planned(tmp_path, "rollout.policy.path=./nothing").stages
    known = {stage.role for stage in stages if stage.ref is not None}
    assert known == {"problems", "eval_problems"}
    assert {stage.role for stage in stages if stage.rows is not None} == known


def test_a_budget_below_what_the_prompts_cost_is_a_fault_and_one_below_full_answers_a_note(
    tmp_path, paid_server
):
    paid = [PAID.format(url=paid_server.url, key="null"), *PRICES]
    budget = "annotate.annotator.budget_usd="
    low, middle, high = (
        planned(tmp_path, *paid, budget + usd) for usd in ("0.0001", "0.006", "100")
    )
    (fault,) = low.faults
    assert fault.startswith("annotations: annotator.budget_usd is $0.0001")
    assert "and 8 requests take $0.00" in fault
    assert low.notes == []
    assert middle.faults == high.faults == high.notes == []
    (note,) = middle.notes
    assert note.endswith("it may not suffice")
    assert all(body == "GET" for body in paid_server.chats)


def test_a_judges_budget_is_held_against_its_cost_before_any_response_exists(tmp_path, paid_server):
    low, middle, high = (
        planned(tmp_path, JUDGE.format(url=paid_server.url, usd=usd))
        for usd in ("0.0001", "0.012", "100")
    )
    (fault,) = low.faults
    assert fault.startswith("verdicts: judge.budget_usd is $0.0001")
    assert "and 8 requests take $0.00" in fault
    assert middle.faults == high.faults == high.notes == []
    (note,) = middle.notes
    assert note.endswith("it may not suffice")
    assert paid_server.chats == []


def test_all_faults_are_printed_at_once_and_nothing_is_made(tmp_path, monkeypatch, capsys):
    faulty = [
        PAID.format(url=DEAD, key="NO_KEY"),
        "eval_problems.seed=0",
        "evaluate.policy.path=./no",
    ]
    for dry in (["--dry-run"], []):
        words = ["pipeline", str(CONFIG), *SMALL, *faulty, *dry, "--store", str(tmp_path / "store")]
        monkeypatch.setattr(sys, "argv", ["trace-opd", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert [line.split(":")[1].strip() for line in err.splitlines()] == [
            "annotations",
            "evaluation",
            "eval_problems",
        ]
        assert ("reads" in out) is bool(dry)
        assert not (tmp_path / "store").exists()


def test_a_pipeline_makes_what_was_planned_and_ends_with_the_evaluation(
    tmp_path, monkeypatch, capsys
):
    before = planned(tmp_path / "store", "name=mine")
    assert before.faults == []
    assert not (tmp_path / "store").exists()
    store = Store(tmp_path / "store")
    words = ["pipeline", str(CONFIG), *SMALL, "--alias", "mine", "--store", store.root]
    monkeypatch.setattr(sys, "argv", ["trace-opd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    out = capsys.readouterr().out
    table = out[out.index("mine-evaluation, with") :]
    assert table.splitlines()[1].split() == ["figure", "base", "trained", "paired", "difference"]
    assert "avg@1" in table

    assert store.aliases() == {one.alias: one.ref for one in before.stages if one.ref is not None}
    for one in before.stages:
        if one.rows is not None:
            assert store.get(one.alias).rows == one.rows
    after = planned(tmp_path / "store", "name=mine")
    assert [one.state for one in after.stages] == ["done"] * 8 + ["to do"]  # the report is a file
    assert {one.role: one.reads for one in after.stages}["train"] == ["problems", "routed"]
    # A finished run keeps its final model alone.
    assert {path.name for path in tmp_path.glob("store/train/*/checkpoints/*")} == {"final"}
