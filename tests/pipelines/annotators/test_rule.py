"""The exact rule annotator and its stage, on worked examples."""

from pathlib import Path

import pytest

from trace_opd.data.sources.arithmetic import steps
from trace_opd.data.store import Store
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.annotators.equations import equations
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.schemas.configs import AnnotateConfig, RuleAnnotator, SegmentConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS

STEPS_4821_3977 = [
    {"text": step.text, "value": step.value, "type": step.type, "key": step.key}
    for step in steps(4821, 3977)
]
CLIPS = [  # 48 clips in April, half as many in May: how many in total?
    {"text": "48/2=24", "value": "24", "type": "setup", "key": True},
    {"text": "48+24=72", "value": "72", "type": "arithmetic", "key": True},
]


def tables(steps: list[dict] | None, responses: list[tuple[str, bool | None]], part: int = 0):
    """A problem with those steps, and its rollouts with their verdicts."""
    problems = PROBLEMS.table(
        [
            {
                "problem_id": f"p{part}",
                "problem": "a problem",
                "answer": "1",
                "answer_kind": "math",
                "solution": None,
                "steps": steps,
                "source": "test",
                "split": "train",
            }
        ]
    )
    ids = [
        {"rollout_id": f"r{part}-{i}", "problem_id": f"p{part}", "group_id": "g"}
        for i in range(len(responses))
    ]
    rollouts = ROLLOUTS.table(
        row
        | {
            "sample_index": index,
            "prompt_token_ids": [],
            "token_ids": [],
            "logprobs": [],
            "response": response,
            "finish_reason": "stop",
            "policy_name": "test",
            "policy_revision": "0",
            "policy_step": 0,
            "vocab_fingerprint": "",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": 64,
            "seed": index,
            "on_policy": False,
        }
        for index, (row, (response, _)) in enumerate(zip(ids, responses, strict=True))
    )
    verdicts = VERDICTS.table(
        row
        | {
            "reward": None if correct is None else float(correct),
            "correct": correct,
            "parsed_answer": None,
            "status": "timeout" if correct is None else "ok",
            "verifier": "test",
            "seconds": 0.0,
        }
        for row, (_, correct) in zip(ids, responses, strict=True)
    )
    return problems, rollouts, verdicts


def annotate(match: str, steps: list[dict] | None, response: str, correct: bool | None) -> dict:
    annotator = open_annotator(
        RuleAnnotator.model_validate({"engine": "rule", "match": match}), SegmentConfig()
    )
    table = annotator.annotate(*tables(steps, [(response, correct)]))
    (row,) = validate(table, ANNOTATIONS).to_pylist()
    return row


def marked(row: dict) -> list[tuple[str, str]]:
    assert [span["rank"] for span in row["spans"]] == list(range(len(row["spans"])))
    return [(span["kind"], span["text"].strip()) for span in row["spans"]]


def test_the_carry_line_of_a_right_addition_is_key():
    row = annotate(
        "line",
        STEPS_4821_3977,
        "1+7+0=8 c0\n2+7+0=9 c0\n8+9+0=17 c1\n4+3+1=8 c0\n\\boxed{8798}",
        True,
    )
    assert marked(row) == [("key", "8+9+0=17 c1")]
    assert (row["status"], row["diagnostic_type"]) == ("ok", "case_analysis")
    assert row["spans"][0]["segments"] == [2]
    assert (row["cost_usd"], row["raw_answer"], row["prompt_version"]) == (0.0, None, "")


def test_the_first_line_that_is_not_the_known_step_is_the_error():
    row = annotate(
        "line",
        STEPS_4821_3977,
        "1+7+0=8 c0\n2+7+0=9 c0\n8+9+0=17 c0\n4+3+0=7 c0\n\\boxed{7798}",
        False,
    )
    assert marked(row) == [("error", "8+9+0=17 c0")]
    assert row["diagnostic_type"] == "case_analysis"


def test_a_line_too_many_is_an_error_of_the_last_steps_type():
    right = "\n".join(step["text"] for step in STEPS_4821_3977)
    row = annotate("line", STEPS_4821_3977, right + "\n\\boxed{1}", False)
    assert marked(row) == [("error", "\\boxed{1}")]
    assert row["diagnostic_type"] == "final_answer"


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("1+7+0=8 c0\n\n2+7+0=9 c0\n", False),  # truncated: every line in it is correct
        ("so the sum is 8798", True),
        ("", False),
    ],
)
def test_nothing_to_mark_is_an_empty_annotation_without_a_type(response, correct):
    row = annotate("line", STEPS_4821_3977, response, correct)
    assert (row["status"], row["spans"], row["diagnostic_type"]) == ("empty", [], None)


def test_a_rollout_without_a_verdict_is_skipped_but_keeps_its_row():
    row = annotate("line", STEPS_4821_3977, "1+7+0=8 c0", None)
    assert (row["status"], row["spans"], row["correct"]) == ("skipped", [], None)
    assert row["segments"] == [{"start": 0, "end": 10}]


def test_a_right_word_problem_has_its_key_values_marked_where_they_are_first_stated():
    row = annotate(
        "value",
        CLIPS,
        "In May she sold 48 / 2 = 24 clips. Altogether 48 + 24 = 72. Check: 48+24=72. Answer: 72",
        True,
    )
    assert marked(row) == [
        ("key", "In May she sold 48 / 2 = 24 clips."),
        ("key", "Altogether 48 + 24 = 72."),
    ]
    assert row["diagnostic_type"] == "setup"


@pytest.mark.parametrize(
    ("response", "error", "diagnostic_type"),
    [
        ("She sold 48 / 2 = 24. Then 48 + 24 = 62. So 62.", "Then 48 + 24 = 62.", "arithmetic"),
        ("Twice: 48 * 2 = 96. Then 48 + 24 = 62.", "Then 48 + 24 = 62.", "arithmetic"),
        ("She sold 48 * 2 = 96. Then 48 + 96 = 144.", "She sold 48 * 2 = 96.", "setup"),
        ("48/2 = 24. 48+24 = 72. The answer is 24. Bye!", "The answer is 24.", "final_answer"),
        ("I would guess. It is 50.", "It is 50.", "final_answer"),
    ],
)
def test_the_error_of_a_word_problem_is_found_by_its_equations(response, error, diagnostic_type):
    row = annotate("value", CLIPS, response, False)
    assert marked(row) == [("error", error)]
    assert row["diagnostic_type"] == diagnostic_type


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$5 x 3 = $15", [(15, True)]),
        ("1,200 - 200 - 1 = 1,000", [(1000, False)]),
        ("2 + 3 * 4 = 14", [(14, True)]),
        ("20% * 50 = 10", [(10, True)]),
        ("$12 \\times 3 = 36$", [(36, True)]),
        ("10 / 3 = 3.33 and 10 / 3 = 3.5", [(3.33, True), (3.5, False)]),
        ("5 - 8 = -3", [(-3, True)]),
        ("5 / 0 = 0", [(0, False)]),
        ("1/2 + 1/3 = 5/6", [(5 / 6, True)]),
        # Nothing can be concluded from these.
        ("2y + 3 + 4 = 10", []),
        ("2^3 + 1 = 9", []),
        ("3 + 4 = 7 + 2", []),
        ("7 / 2 = 3 remainder 1", []),
        ("3x = 12", []),
        ("(1 + 2) * 3 = 9", []),
    ],
)
def test_equations_are_read_exactly_or_not_at_all(text, expected):
    found = [(float(equation.result), equation.holds) for equation in equations(text)]
    assert found == [(pytest.approx(result), holds) for result, holds in expected]


def make_verdicts(store: Store, parts: int, steps: list[dict] | None) -> None:
    """Datasets problems → rollouts → verdicts of `parts` parts; verdicts gets its alias."""
    right = "\n".join(step["text"] for step in STEPS_4821_3977)
    wrong = right.replace("17 c1", "16 c1")
    made = [
        tables(steps, [(right, True), (wrong, False), (right, None)], part) for part in range(parts)
    ]
    inputs = {}
    for place, contract in enumerate((PROBLEMS, ROLLOUTS, VERDICTS)):
        draft = store.begin(contract.name, {}, inputs, contract)
        for part in range(parts):
            draft.write_part(part, made[part][place])
        inputs = {contract.name: draft.finish(parts)}
    store.set_alias("verdicts", inputs["verdicts"])


def test_the_stage_annotates_part_by_part_and_sums_up(tmp_path: Path):
    store = Store(tmp_path)
    make_verdicts(store, 2, STEPS_4821_3977)
    config = AnnotateConfig(annotator=RuleAnnotator(engine="rule"))
    dataset = ANNOTATE_STAGE.run(config, store)
    assert (dataset.parts, dataset.rows) == (2, 6)
    assert dataset.summary["status"] == {"ok": 4, "skipped": 2}
    assert dataset.summary["types"] == {"case_analysis": 4}
    # One of five lines, 12 of 57 characters (its newline belongs to the segment).
    assert dataset.summary["marked_share"] == pytest.approx(12 / 57, abs=1e-3)
    assert dataset.summary["cost_usd"] == 0.0
    assert dataset.input("verdicts").stage == "verdicts"
    assert ANNOTATE_STAGE.run(config, store).id == dataset.id
    other = AnnotateConfig(annotator=RuleAnnotator(engine="rule", match="value"))
    assert ANNOTATE_STAGE.run(other, store).id != dataset.id


def test_problems_without_steps_stop_the_stage_before_it_begins(tmp_path: Path):
    store = Store(tmp_path)
    make_verdicts(store, 1, None)
    with pytest.raises(InputError, match="steps is empty"):
        ANNOTATE_STAGE.begin(AnnotateConfig(annotator=RuleAnnotator(engine="rule")), store)
    assert not (tmp_path / "annotate").exists()


RIGHT = "1+7+0=8 c0\n2+7+0=9 c0\n8+9+0=17 c1\n4+3+1=8 c0\n\\boxed{8798}"


def annotate_many(**mistakes: float) -> list[dict]:
    config = RuleAnnotator.model_validate({"engine": "rule"} | mistakes)
    annotator = open_annotator(config, SegmentConfig())
    return annotator.annotate(*tables(STEPS_4821_3977, [(RIGHT, True)] * 200)).to_pylist()


def test_an_annotator_with_errors_moves_that_share_of_its_marks_and_repeats_itself():
    rows = annotate_many(wrong_spans=0.25)
    wrong = [row for row in rows if row["spans"][0]["segments"] != [2]]
    assert 30 < len(wrong) < 70
    assert {row["spans"][0]["segments"][0] for row in wrong} == {0, 1, 3, 4}
    assert {row["diagnostic_type"] for row in rows} == {"case_analysis"}
    spans = [row["spans"] for row in rows]
    assert [row["spans"] for row in annotate_many(wrong_spans=0.25)] == spans


def test_an_annotator_with_errors_takes_the_type_of_another_step():
    rows = annotate_many(wrong_types=1.0)
    assert {row["diagnostic_type"] for row in rows} == {"arithmetic", "final_answer"}
    assert {tuple(row["spans"][0]["segments"]) for row in rows} == {(2,)}
