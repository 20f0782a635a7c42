"""Human labels as datasets: files laid out as on the hub, what they become, what is refused."""

import json
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators.prompting import PROMPTS, ask, load_prompt
from trace_opd.pipelines.annotators.rows import items
from trace_opd.pipelines.compare.human_labels import import_labels
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.schemas.configs import AnnotateConfig, NoAnnotator, SegmentConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.segment import segment

# Rows of Qwen/ProcessBench, shortened.
SUE = {
    "id": "gsm8k-0",
    "generator": "Qwen2-7B-Instruct",
    "problem": "Sue has 18 pink flamingos. How many more pink than white ones are there?",
    "steps": [
        "To find out how many more there are, let's go day by day. There are 18 pink ones.",
        "On Saturday they take back 1/3 of them. That is $18 \\div 3 = 6$. So 12 are left.",
        "On Sunday they add 18 more. The answer is \\boxed{24}.",
    ],
    "final_answer_correct": False,
    "label": 1,
}
LUCKY = SUE | {
    "id": "gsm8k-1",
    "generator": "Llama-3.1-8B-Instruct",
    "steps": ["It is 12 by a mistake.", "It is \\boxed{30}."],
    "final_answer_correct": True,
    "label": 0,
}
RIGHT = {
    "id": "gsm8k-2",
    "generator": "Qwen2-7B-Instruct",
    "problem": "What is 2 + 2?",
    "steps": ["2 + 2 = 4.", "So the answer is \\boxed{4}."],
    "final_answer_correct": True,
    "label": -1,
}


def step(text: str, rating: int | None, *others: tuple[str, int], chosen: int | None = 0) -> dict:
    """A step of PRM800K's labels: the response's own completion first, then alternatives."""
    completions = [{"text": t, "rating": r, "flagged": None} for t, r in ((text, rating), *others)]
    return {
        "completions": completions,
        "human_completion": None,
        "chosen_completion": chosen,
    }


def prm_row(steps: list[dict], finish: str, generated: list[str] | None, stated: str = "") -> dict:
    question = {"problem": "What is $6 \\cdot 7$?", "ground_truth_answer": "42"}
    if generated is not None:
        question |= {
            "ground_truth_solution": "$6 \\cdot 7 = \\boxed{42}$.",
            "pre_generated_steps": generated,
            "pre_generated_answer": stated,
            "pre_generated_verifier_score": 0.01,
        }
    return {
        "labeler": "340d89bc-f5b7-45e9-b272-909ba68ee363",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": 9 if generated is not None else None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": question,
        "label": {"steps": steps, "total_time": 1, "finish_reason": finish},
    }


FOUND = prm_row(
    [step("I multiply.", 1), step("$6 \\cdot 7 = 41$.", -1, ("It is $42$.", 1), chosen=None)],
    "found_error",
    ["I multiply.", "$6 \\cdot 7 = 41$.", "So it is 41.\n\n# Answer\n\n41"],
    "41",
)
SOLVED = prm_row(
    [step("Let me see.", 0), step("It is 42.\n\n# Answer\n\n42", 1)],
    "solution",
    ["Let me see.", "It is 42.\n\n# Answer\n\n42"],
    "42",
)


def write(path: Path, rows: list, lines: bool = True) -> str:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2)
    path.write_text(text)
    return str(path)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def human(made: dict) -> list[dict]:
    return made["x-human"].read().to_pylist()


# --- ProcessBench --------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [True, False])
def test_processbench_becomes_four_linked_datasets(store, tmp_path, lines):
    file = write(tmp_path / "gsm8k.json", [SUE, LUCKY, RIGHT], lines)
    made = import_labels("processbench", file, store, "x")
    assert list(made) == ["x-problems", "x-rollouts", "x-verdicts", "x-human"]
    assert store.get("x-human").input("verdicts").input("rollouts").input("problems").rows == 2
    rollouts = made["x-rollouts"].read().to_pylist()
    assert rollouts[0]["response"] == "\n\n".join(SUE["steps"])
    assert [row["on_policy"] for row in rollouts] == [False] * 3
    assert {row["source"] for row in made["x-problems"].read().to_pylist()} == {
        "processbench/gsm8k"
    }
    correct = [row["correct"] for row in made["x-verdicts"].read().to_pylist()]
    assert correct == [False, True, True]


def test_a_wrong_step_is_all_of_its_segments_and_no_other(store, tmp_path):
    made = import_labels("processbench", write(tmp_path / "f.json", [SUE]), store, "x")
    (row,) = human(made)
    (span,) = row["spans"]
    assert span["text"].strip() == SUE["steps"][1]
    assert len(span["segments"]) == 3  # three sentences
    assert span["kind"] == "error"
    cut = [(s["start"], s["end"]) for s in row["segments"]]
    assert cut == segment("\n\n".join(SUE["steps"]), SegmentConfig())


def test_a_formula_that_runs_over_the_end_of_a_step_is_part_of_both(store, tmp_path):
    steps = ["We have \\[x", "= 2\\] here. Then done.", "So 2."]
    rows = [SUE | {"id": f"math-{i}", "steps": steps, "label": i} for i in (0, 1)]
    rows[1]["generator"] = "another"
    made = import_labels("processbench", write(tmp_path / "f.json", rows), store, "x")
    assert [row["spans"][0]["segments"] for row in human(made)] == [[0], [0, 1]]


def test_an_error_before_a_right_answer_is_kept_as_an_error(store, tmp_path):
    made = import_labels("processbench", write(tmp_path / "f.json", [LUCKY]), store, "x")
    (row,) = human(made)
    assert (row["correct"], row["status"], row["spans"][0]["kind"]) == (True, "ok", "error")


def test_people_do_not_label_key_spans(store, tmp_path):
    made = import_labels("processbench", write(tmp_path / "f.json", [RIGHT]), store, "x")
    (row,) = human(made)
    assert (row["correct"], row["status"], row["spans"]) == (True, "abstained", [])


def test_a_hidden_verdict_asks_for_errors_everywhere(store, tmp_path):
    file = write(tmp_path / "f.json", [SUE, LUCKY, RIGHT])
    open_, hidden = (
        import_labels("processbench", file, store, "x", hide_verdict=h) for h in (0, 1)
    )
    assert hidden["x-rollouts"].ref == open_["x-rollouts"].ref
    assert hidden["x-verdicts"].ref != open_["x-verdicts"].ref
    assert [row["correct"] for row in human(hidden)] == [False] * 3
    assert [row["status"] for row in human(hidden)] == ["ok", "ok", "empty"]


def test_repeated_responses_are_left_out_and_counted(store, tmp_path):
    made = import_labels("processbench", write(tmp_path / "f.json", [SUE, SUE, RIGHT]), store, "x")
    assert made["x-rollouts"].rows == 2
    assert made["x-problems"].summary["left_out"] == {"repeated": 1}


def test_the_limit_counts_responses(store, tmp_path):
    file = write(tmp_path / "f.json", [SUE, LUCKY, RIGHT])
    assert import_labels("processbench", file, store, "x", limit=2)["x-rollouts"].rows == 2


def test_the_same_file_is_imported_once(store, tmp_path):
    file = write(tmp_path / "f.json", [SUE, RIGHT])
    first = import_labels("processbench", file, store, "x")
    again = import_labels("processbench", file, store, "y")
    assert [d.ref for d in first.values()] == [d.ref for d in again.values()]
    assert again["y-human"].manifest["finished_at"] == first["x-human"].manifest["finished_at"]


def test_parts_hold_complete_problems(store, tmp_path):
    rows = [SUE | {"id": f"gsm8k-{i}", "problem": f"problem {i % 100}", "generator": f"{i // 100}"}
            for i in range(200)]  # fmt: skip
    made = import_labels("processbench", write(tmp_path / "f.json", rows), store, "x")
    assert {dataset.parts for dataset in made.values()} == {2}
    for part in range(2):
        problems = made["x-problems"].read_part(part)["problem_id"].to_pylist()
        held = made["x-rollouts"].read_part(part)["problem_id"].to_pylist()
        assert set(held) == set(problems)
        assert len(held) == 2 * len(problems)


def test_what_was_imported_can_be_annotated(store, tmp_path):
    import_labels("processbench", write(tmp_path / "f.json", [SUE, RIGHT]), store, "x")
    config = AnnotateConfig(verdicts="x-verdicts", annotator=NoAnnotator(engine="none"))
    made = ANNOTATE_STAGE.run(config, store)
    ours, theirs = (
        dataset.read()["segments"].to_pylist() for dataset in (made, store.get("x-human"))
    )
    assert ours == theirs


def test_the_prompt_for_hidden_verdicts_reveals_neither_verdict_nor_answer(store, tmp_path):
    made = import_labels("processbench", write(tmp_path / "f.json", [RIGHT]), store, "x")
    tables = (made[f"x-{role}"].read() for role in ("problems", "rollouts", "verdicts"))
    (item,) = items(*tables, SegmentConfig())
    prompt = load_prompt(str(PROMPTS / "first-error-v1.md"))
    user = ask(prompt, item)[-1]["content"]
    assert all(segment in user for segment in ("2 + 2 = 4.", "So the answer is \\boxed{4}."))
    assert "final answer is right" not in user
    assert "final answer is wrong" not in user
    assert "unknown" not in user


# --- PRM800K -------------------------------------------------------------------------------------


def test_prm800k_phase_2_is_the_pre_generated_response(store, tmp_path):
    file = write(tmp_path / "phase2_test.jsonl", [FOUND, SOLVED])
    made = import_labels("prm800k", file, store, "x")
    assert made["x-rollouts"].read()["response"].to_pylist() == [
        "\n".join(row["question"]["pre_generated_steps"]) for row in (FOUND, SOLVED)
    ]
    (problem,) = made["x-problems"].read().to_pylist()
    assert (problem["answer"], problem["source"]) == ("42", "prm800k")
    assert problem["solution"] == FOUND["question"]["ground_truth_solution"]
    wrong, right = human(made)
    assert [span["text"].strip() for span in wrong["spans"]] == ["$6 \\cdot 7 = 41$."]
    assert (right["status"], right["correct"]) == ("abstained", True)


def test_prm800k_answers_are_compared_where_a_step_is_wrong(store, tmp_path):
    lucky = json.loads(json.dumps(FOUND))
    lucky["question"] |= {"pre_generated_answer": "\\frac{84}{2}"}
    lucky["question"]["pre_generated_steps"][2] = "So it is $\\frac{84}{2}$."
    file = write(tmp_path / "f.jsonl", [FOUND, lucky])
    made = import_labels("prm800k", file, store, "x")
    assert [row["correct"] for row in made["x-verdicts"].read().to_pylist()] == [False, True]


def test_prm800k_alternatives_are_not_the_response(store, tmp_path):
    steps = [step("Right.", 1, ("Wrong.", -1)), step("So 42.", 1)]
    row = prm_row(steps, "solution", ["Right.", "So 42."], "42")
    made = import_labels("prm800k", write(tmp_path / "f.jsonl", [row]), store, "x")
    assert human(made)[0]["spans"] == []


def test_prm800k_phase_1_is_the_path_that_the_labeller_took(store, tmp_path):
    written = step("Wrong.", -1, chosen=None) | {"human_completion": {"text": "By hand."}}
    steps = [step("No.", -1, ("Yes.", 1), chosen=1), written, step("So 42.", 1)]
    row = prm_row(steps, "solution", None)
    made = import_labels("prm800k", write(tmp_path / "f.jsonl", [row]), store, "x")
    assert made["x-rollouts"].read()["response"].to_pylist() == ["Yes.\nBy hand.\nSo 42."]
    assert human(made)[0]["correct"] is True


def test_prm800k_rows_without_a_usable_label_are_left_out_and_counted(store, tmp_path):
    unrated = prm_row([step("a", None), step("b", -1)], "found_error", ["a", "b"], "1")
    flagged = prm_row([step("c", 1), step("d", -1)], "found_error", ["c", "d"], "1")
    flagged["label"]["steps"][0]["completions"][0]["flagged"] = True
    elsewhere = prm_row([step("e", -1)], "found_error", ["f", "g"], "1")
    rows = [
        prm_row([step("a", 1)], "give_up", ["a"]),
        prm_row([], "bad_problem", ["b"]),
        unrated,
        flagged,
        elsewhere,
        SOLVED,
    ]
    made = import_labels("prm800k", write(tmp_path / "f.jsonl", rows), store, "x")
    assert made["x-rollouts"].rows == 1
    assert made["x-problems"].summary["left_out"] == {"give_up": 1, "bad_problem": 1, "unrated": 3}


# --- what is refused -----------------------------------------------------------------------------


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (without(SUE, "label"), ["row 1", "label is missing"]),
        (SUE | {"label": 3}, ["row 1", "label is 3", "0 to 2"]),
        (SUE | {"label": True}, ["row 1", "label is true", "int"]),
        (SUE | {"steps": []}, ["row 1", "steps"]),
        (SUE | {"steps": ["a", 2]}, ["row 1", "steps"]),
        (SUE | {"final_answer_correct": "no"}, ["row 1", "final_answer_correct", "bool"]),
        (FOUND, ["row 1", "steps is missing"]),
        ([SUE], ["row 1", "not a JSON object"]),
    ],
)
def test_processbench_rows_at_fault_are_named(store, tmp_path, row, words):
    with pytest.raises(InputError) as refused:
        import_labels("processbench", write(tmp_path / "f.json", [RIGHT, row]), store, "x")
    assert all(word in str(refused.value) for word in ["f.json", *words])
    assert list(store.datasets()) == []


def test_rows_at_fault_are_skipped_when_asked_and_counted(store, tmp_path):
    file = write(tmp_path / "f.json", [RIGHT, without(SUE, "label"), [SUE], LUCKY])
    made = import_labels("processbench", file, store, "x", on_bad_rows="skip")
    assert made["x-rollouts"].rows == 2
    assert made["x-problems"].summary["skipped"] == {
        "label is missing": {"rows": 1, "first": ["f.json, row 1"]},
        "is not a JSON object": {"rows": 1, "first": ["f.json, row 2"]},
    }


def broken_rating(rating) -> dict:
    return prm_row([step("a", rating)], "solution", ["a"], "1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (SUE, ["row 1", "label is 1", "dict"]),
        (prm_row([{"steps": []}], "solution", ["a"], "1"), ["completions is missing"]),
        (broken_rating(2), ["rating is 2"]),
        (prm_row([step("a", 1, chosen=4)], "solution", None), ["chosen_completion is 4"]),
        (prm_row([], "solution", "text"), ["pre_generated_steps"]),
    ],
)
def test_prm800k_rows_at_fault_are_named(store, tmp_path, row, words):
    with pytest.raises(InputError) as refused:
        import_labels("prm800k", write(tmp_path / "f.jsonl", [SOLVED, row]), store, "x")
    assert all(word in str(refused.value) for word in ["f.jsonl", "row 1", *words])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no response"),
        ("{", "row 0: is not JSON"),
        ("[{]", "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:6b1\n", "git lfs pull"),
    ],
)
def test_files_that_hold_no_labels_are_refused(store, tmp_path, content, words):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(InputError, match=words):
        import_labels("processbench", str(tmp_path / "f.json"), store, "x")


def test_a_file_that_is_not_there_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        import_labels("prm800k", str(tmp_path / "none.jsonl"), store, "x")


def test_an_unknown_layout_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="processbench, prm800k"):
        import_labels("gsm8k", str(tmp_path), store, "x")
