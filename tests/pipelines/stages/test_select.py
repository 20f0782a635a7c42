"""Stage select between verify and annotate: its dataset, the stages after it, and bad input."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.planning.pipeline_plan import plan_pipeline
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.viewer.report_page import run as write_report
from trace_opd.schemas.configs import PipelineConfig, ReportConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.tests.pipelines.conftest import PaidServer

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
PROBLEM = {
    "problem": "3 boxes of 4 pens?", "answer": "12", "answer_kind": "math", "solution": None,
    "steps": None, "split": "train",
}  # fmt: skip
ROLLOUT = {
    "prompt_token_ids": [1], "token_ids": [], "logprobs": [], "policy_name": "test",
    "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "", "temperature": 1.0,
    "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
}  # fmt: skip
VERDICT = {"parsed_answer": "7", "status": "ok", "verifier": "test", "seconds": 0.0}
# By part, the responses of each group: r right, w wrong, ? no verdict; capital: truncated.
PARTS = [["rw", "rrww"], ["ww", "rrr"], ["RwW", "r?"]]


def store_of(root: Path, parts: list[list[str]], texts: Callable[[int, int], str]) -> Store:
    """texts: the response of a group and place."""
    store, drafts, inputs, number = Store(root), {}, {}, 0
    tables: dict[str, list[Any]] = {name: [] for name in ("problems", "rollouts", "verdicts")}
    for groups in parts:
        made: dict[str, list[Any]] = {name: [] for name in tables}
        for letters in groups:
            ids = {"problem_id": f"p{number}", "group_id": f"g{number}"}
            own = {"problem_id": f"p{number}", "source": f"s{number % 2}"}
            made["problems"].append(PROBLEM | own)
            for place, letter in enumerate(letters):
                correct = {"r": True, "w": False, "?": None}[letter.lower()]
                ids["rollout_id"] = f"r{number}-{place}"
                more = {
                    "sample_index": place, "seed": place, "response": texts(number, place),
                    "finish_reason": "length" if letter.isupper() else "stop",
                }  # fmt: skip
                made["rollouts"].append(ROLLOUT | ids | more)
                reward = None if correct is None else float(correct)
                made["verdicts"].append(VERDICT | ids | {"correct": correct, "reward": reward})
            number += 1
        for name, rows in made.items():
            tables[name].append(rows)
    for contract, stage in ((PROBLEMS, "problems"), (ROLLOUTS, "rollout"), (VERDICTS, "verify")):
        draft = store.begin(stage, {"made": "here"}, inputs, contract)
        for part, rows in enumerate(tables[contract.name]):
            draft.write_part(part, contract.table(rows))
        drafts[contract.name] = draft.finish(len(parts))
        inputs = {contract.name: drafts[contract.name]}
        store.set_alias(contract.name, drafts[contract.name])
    return store


def text_of(group: int, place: int) -> str:
    return f"Boxes: {group}.\nPens: {place}.\nSo 3 + 4 = 7."


@pytest.fixture
def store(tmp_path) -> Store:
    return store_of(tmp_path / "store", PARTS, text_of)


def run(store: Store, stage: str, *overrides: str, config: Path | None = None) -> Dataset:
    loaded = load_config(REGISTRY[stage].config_type, config, list(overrides), stage)
    made = run_stage(stage, loaded, store)
    assert isinstance(made, Dataset)
    return made


def letters(made: Dataset) -> str:
    return "".join(value[0] for value in made.read()["selection"].to_pylist())


def test_no_row_leaves_and_the_verdicts_are_as_they_were(store):
    made, verdicts = run(store, "select"), store.get("verdicts")
    assert letters(made) == "aaaaaadddddaaadd"
    assert made.contract is VERDICTS
    assert made.part_rows == verdicts.part_rows
    assert made.read(VERDICTS.schema.names[:9]) == verdicts.read(VERDICTS.schema.names[:9])
    assert made.input("rollouts").ref == store.get("rollouts").ref
    assert store.aliases()["selection"] == made.ref
    assert made.summary == {
        "selected": 9, "selected_groups": 3, "groups": 6, "pass_rate": 4 / 9, "plain": 0,
        "dropped": 7,
        "left_out": {"unscored": 1, "all right": 4, "all wrong": 2},
    }  # fmt: skip


def test_a_budget_is_over_all_parts_and_the_id_depends_on_every_criterion(store):
    made = run(store, "select", "budget=3")
    assert letters(made) == "aaapppdddddddddd"
    refs = {
        run(store, "select", change).ref
        for change in ("budget=3", "budget=4", "mixed=false", "others=plain", "per_source=1")
    }
    assert len(refs) == 5
    assert made.ref in refs
    assert run(store, "select", "budget=3").ref == made.ref


def test_repeated_responses_of_a_group_are_found_by_their_text(tmp_path):
    store = store_of(tmp_path, [["rrw", "rw"]], lambda group, place: f"same {place // 2}")
    assert letters(run(store, "select")) == "aaaaa"
    made = run(store, "select", "keep_duplicates=false")
    assert letters(made) == "apaap"
    assert made.summary["left_out"] == {"duplicate": 2}


def test_truncated_ones_and_lengths_in_code_points(tmp_path):
    store = store_of(tmp_path, [["rWw"]], lambda group, place: "é🙂" * (place + 1))
    assert letters(run(store, "select", "keep_truncated=false")) == "apa"
    assert letters(run(store, "select", "max_chars=4")) == "aap"


def test_an_annotator_is_asked_and_paid_for_selected_rows_alone(store, paid_server: PaidServer):
    run(store, "select", "keep_truncated=false", "budget=4")
    paid = [
        "annotator.engine=openai", "annotator.model=m", "annotator.api_key_env=null",
        f"annotator.base_url={paid_server.url}",
    ]  # fmt: skip
    made = run(store, "annotate", "verdicts=selection", *paid)
    assert len(paid_server.answered) == 4
    rows = made.read(["rollout_id", "correct", "status"]).to_pylist()
    assert [row["rollout_id"] for row in rows if row["status"] == "ok"] == [
        *("r0-0", "r0-1", "r1-0", "r1-1"),
    ]
    # The verdict is there all the same.
    assert [row["correct"] for row in rows] == store.get("verdicts").read()["correct"].to_pylist()


def test_the_plan_counts_the_money_of_selected_rows(store, paid_server: PaidServer, tmp_path):
    def requests(*overrides: str) -> str:
        given = [
            "annotate.annotator={engine: openai, model: m, api_key_env: null, base_url: "
            f"'{paid_server.url}', usd_per_million_prompt_tokens: 1.0, "
            "usd_per_million_completion_tokens: 2.0, budget_usd: 0.0000001}",
            *("problems.limit=4", "eval_problems.limit=2", "rollout.group_size=2"),
        ]
        config = load_config(PipelineConfig, CONFIG, [*given, *overrides])
        plan = plan_pipeline(config, Store(tmp_path / "empty"), download=False)
        assert [one.stage for one in plan.stages].count("select") == bool(overrides)
        (fault,) = plan.faults
        return fault

    assert "and 8 requests take" in requests()
    assert "and 8 requests take" in requests("select={}")
    assert "and 3 requests take" in requests("select.budget=3")


def test_a_pipeline_with_a_selection_trains_on_what_it_keeps(tmp_path):
    store = Store(tmp_path / "store")
    run(store, "problems", "limit=6", "rows_per_part=3", config=CONFIG)
    for stage in ("rollout", "verify"):
        run(store, stage, *(["group_size=4"] if stage == "rollout" else []), config=CONFIG)
    made = run(store, "select", "budget=5")
    annotations = run(store, "annotate", "verdicts=selection", config=CONFIG)
    routed = run(store, "convert", config=CONFIG)
    chosen = made.read(["group_id", "selection"])
    kept = {
        group
        for group, what in zip(*(c.to_pylist() for c in chosen), strict=True)
        if what != "drop"
    }
    assert set(routed.read()["group_id"].to_pylist()) == kept
    assert routed.summary["left_out"] == {"not selected": made.summary["dropped"]}
    assert annotations.summary["status"]["skipped"] == annotations.rows - 5
    assert [node.stage for _, _, node in routed.lineage()] == [
        *("convert", "annotate", "select", "verify", "rollout", "problems"),
    ]
    page = write_report(ReportConfig(dataset=annotations.ref), store).read_text()
    assert "<dt>selected</dt><dd>5</dd>" in page
    assert f"{made.summary['left_out']['budget']} budget" in page


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["verdicts=nothing"], "dataset 'nothing' is not in store"),
        (["verdicts=problems"], "holds problems, this stage needs table verdicts"),
        (["verdicts=selection"], "is a selection already; give the verdicts that it was made from"),
        (["pass_rate=[0.6, 0.5]"], "pass_rate: 0.6 is above 0.5"),
        (["pass_rate=[0, 2]"], "pass_rate"),
        (["pass_rate=0.5"], "pass_rate"),
        (["pass_rate=[0.1]"], "pass_rate"),
        (["min_chars=9", "max_chars=8"], "min_chars 9 is above max_chars 8"),
        (["min_chars=-1"], "min_chars"),
        (["per_source=0"], "per_source"),
        (["per_source=1.5"], "per_source"),
        (["per_source=-2"], "per_source"),
        (["per_source=.nan"], "per_source"),
        (["budget=0"], "budget"),
        (["budget=1.5"], "budget"),
        (["others=keep"], "others"),
        (["per_source=0.2"], "per_source: is 0.2, and the 2 sources with groups to select"),
        (["min_chars=1000"], "none of its 16 responses is selected (1 unscored, 4 all right"),
    ],
)
def test_bad_input_is_one_sentence(store, monkeypatch, capsys, overrides, sentence):
    run(store, "select")
    words = ["select", *overrides, "--store", store.root]
    monkeypatch.setattr(sys, "argv", ["trace-opd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert said.err.startswith("trace-opd: ")
    assert said.err.count("\n") == 1


def test_verdicts_of_other_rollouts_are_refused(store):
    verdicts, rollouts = store.get("verdicts"), store.get("rollouts")
    draft = store.begin("verify", {"made": "badly"}, {"rollouts": rollouts}, VERDICTS)
    for part in range(3):
        draft.write_part(part, verdicts.read_part(part).slice(0, 1))
    store.set_alias("bad", draft.finish(3))
    with pytest.raises(InputError, match="part 0: holds other rollouts than rollout/"):
        run(store, "select", "verdicts=bad")
    few = store.begin("verify", {"made": "short"}, {"rollouts": rollouts}, VERDICTS)
    few.write_part(0, verdicts.read_part(0))
    store.set_alias("few", few.finish(1))
    with pytest.raises(InputError, match=r"has 1 parts, its rollouts rollout/\S+ have 3; make it"):
        run(store, "select", "verdicts=few")
