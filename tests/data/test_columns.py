"""Columns as people name them are recognised, in every format; what is ambiguous is refused."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data import sources
from trace_opd.data.row_files import BadRow
from trace_opd.data.sources.columns import KNOWN, KNOWN_ABOUT
from trace_opd.schemas.configs import Columns, FilesSource, HubSource
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnswerKind

CHAT = [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1+1?"}]
ROLES = ("problem", "answer", "solution", "source_id", "subject", "level")
# Rows as in the sets that people have, and the problem, answer, solution, id, subject and level.
SETS = {
    "plain": ({"problem": "1+1?", "answer": 2}, ("1+1?", "2")),
    "solution": (
        {"problem": "1+1?", "answer": "2", "solution": "Add."},
        ("1+1?", "2", "Add."),
    ),
    "math-500": (
        {
            "problem": "1+1?",
            "solution": "So $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "test/1.json",
        },
        ("1+1?", "2", "So $\\boxed{2}$.", "test/1.json", "Algebra", "3"),
    ),
    "math": (
        {"problem": "1+1?", "level": "Level 5", "type": "Algebra", "solution": "\\boxed{2}"},
        ("1+1?", "2", "\\boxed{2}", None, "Algebra", "Level 5"),
    ),
    "gsm8k": (
        {"question": "1+1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"},
        ("1+1?", "1002", "1 + 1 = <<1+1=2>>2\n#### 1,002"),
    ),
    "gsm8k-with-rationale": (
        {"question": "1+1?", "answer": "#### 2", "rationale": "Add."},
        ("1+1?", "2", "Add."),
    ),
    "aime": (
        {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "Add.", "Answer": 2},
        ("1+1?", "2", "Add.", "2024-I-1"),
    ),
    "spaces": ({"Question Text": "1+1?", "Final-Answer": "2"}, ("1+1?", "2")),
    "expected": (
        {"problem": "1+1?", "expected_answer": "2", "problem_source": "x", "Explanation": "Add."},
        ("1+1?", "2", "Add."),
    ),
    "input-target": ({"idx": 7, "input": "1+1?", "target": "2"}, ("1+1?", "2", None, "7")),
    "verl": (
        {
            "data_source": "x",
            "prompt": CHAT,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 5, "split": "train"},
        },
        ("1+1?", "2", None, "5"),
    ),
    "skywork": (
        {"prompt": CHAT[1:], "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]'}},
        ("1+1?", "\\frac{1}{2}"),
    ),
    "sharegpt": ({"prompt": [{"from": "human", "value": "1+1?"}], "gold": "2"}, ("1+1?", "2")),
}


def written(tmp_path, rows, suffix):
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        path.write_bytes(sink.getvalue())
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **columns):
    source = FilesSource(kind="files", path=str(path), columns=Columns(**columns))
    return list(sources.rows(source, 0)), sources.identity(source)["columns"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SETS)
def test_the_columns_of_common_sets_are_recognised(tmp_path, name, suffix):
    row, expected = SETS[name]
    ((found,), _) = read(written(tmp_path, [row], suffix))
    assert tuple(found.get(role) for role in ROLES) == expected + (None,) * (6 - len(expected))
    assert found["answer_kind"] is AnswerKind.MATH


def test_a_dataset_of_the_hub_is_recognised_as_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    row, expected = SETS["verl"]
    written(tmp_path / "mine", [row], ".parquet")
    source = HubSource(kind="hub", dataset=str(tmp_path / "mine"))
    (found,) = sources.rows(source, 0)
    assert tuple(found.get(role) for role in ROLES[:4]) == expected
    assert sources.identity(source)["columns"]["answer"] == "reward_model.ground_truth"


QUESTION = "Which?\n\n(A) one\n(B) two\n(C) three"
CHOICES = ["one", "two", "three"]


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"choices": CHOICES, "answer": 2}, "C"),
        ({"choices": CHOICES, "answer": "b"}, "B"),
        ({"choices": CHOICES, "answer": "(B)"}, "B"),
        ({"choices": CHOICES, "answer": "two"}, "B"),
        ({"choices": CHOICES, "label": 0}, "A"),
        ({"options": ["A) one", "B) two", "C) three"], "correct": "C"}, "C"),
        ({"choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "3"}, "C"),
        ({"choices": [{"label": k, "text": t} for k, t in zip("ABC", CHOICES, strict=True)],
          "answerKey": "A"}, "A"),
    ],
)  # fmt: skip
def test_a_list_of_choices_is_shown_in_its_order_and_the_answer_is_its_letter(
    tmp_path, row, letter
):
    for suffix in (".jsonl", ".parquet"):
        ((found,), _) = read(written(tmp_path, [{"question": "Which?"} | row], suffix))
        assert (found["problem"], found["answer"]) == (QUESTION, letter)
        assert found["answer_kind"] is AnswerKind.CHOICE


def test_columns_of_wrong_choices_are_recognised(tmp_path):
    row = {"question": "Which?", "correct_answer": "yes", "distractor1": "no", "distractor2": "?"}
    ((found,), columns) = read(written(tmp_path, [row], ".jsonl"))
    assert columns["choices"] == ["distractor1", "distractor2"]
    assert f"({found['answer']}) yes" in found["problem"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"choices": CHOICES, "answer": "four"}, "column 'answer' names none of the choices"),
        ({"choices": ["2", "1", "0"], "answer": 2}, "column 'answer' names several choices"),
        ({"choices": ["one"], "answer": 0}, "column 'choices' is no list of 2 to 26 choices"),
        ({"choices": [[1], "x"], "answer": 0}, "column 'choices' holds a list"),
        ({"answer": ["a", "b"]}, "column 'answer' holds a list"),
        ({"question": [*CHAT, *CHAT], "answer": 1}, "column 'question' is a list, and no chat"),
        ({"solution": "no box"}, r"column 'solution' holds no final answer in \boxed{}"),
    ],
)
def test_a_row_that_does_not_fit_names_its_column(tmp_path, row, what):
    path = written(tmp_path, [{"question": "Which?"} | row], ".jsonl")
    faults: list[BadRow] = []
    assert list(sources.rows(FilesSource(kind="files", path=str(path)), 0, faults.append)) == []
    assert [fault.what.startswith(what) for fault in faults] == [True]
    with pytest.raises(InputError, match="row 0: column"):
        read(path)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("question", "prompt", "answer"), r"question and prompt may both .*columns\.problem"),
        (("problem", "gold", "target"), r"gold and target may both hold the answer; set "
         r"source\.columns\.answer"),
        (("Problem", "PROBLEM", "answer"), r"columns Problem and PROBLEM may both"),
        (("problem", "answer", "rationale", "explanation"), r"source\.columns\.solution"),
        (("text", "answer"), r"no column is known to hold the problem .* to one of text, answer"),
        (("problem", "text"), r"no column is known to hold the answer .* to one of problem, text"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_unknown_names_the_key_that_decides(tmp_path, names, sentence):
    path = written(tmp_path, [dict.fromkeys(names, "1")], ".jsonl")
    with pytest.raises(InputError, match=rf"^p\.jsonl: .*{sentence}"):
        read(path)


def test_the_role_s_own_name_wins_and_a_configured_name_wins_over_it(tmp_path):
    row = {"problem": "p", "question": "q", "answer": "1", "target": "2", "level": "a", "grade": 3}
    path = written(tmp_path, [row], ".jsonl")
    ((found,), _) = read(path)
    assert (found["problem"], found["answer"], found["level"]) == ("p", "1", "a")
    ((found,), columns) = read(path, problem="question", answer="target", level="grade")
    assert (found["problem"], found["answer"], found["level"]) == ("q", "2", "3")
    assert columns["problem"] == "question"


def test_an_empty_name_takes_no_column(tmp_path):
    row = {"problem": "p", "answer": "1", "solution": "s", "choices": ["1", "2"], "id": 1}
    path = written(tmp_path, [row], ".jsonl")
    ((found,), columns) = read(path, solution="", choices="", id="")
    assert (found["problem"], found["solution"]) == ("p", None)
    assert columns == {"problem": "problem", "answer": "answer", "solution": None, "choices": None}


def test_a_column_that_only_a_late_row_has_is_recognised(tmp_path):
    rows = [{"problem": f"{n}", "answer": n} for n in range(1500)]
    path = written(tmp_path, [*rows, {"problem": "x", "answer": 1, "solution": "s"}], ".jsonl")
    found, columns = read(path)
    assert columns["solution"] == "solution"
    assert found[-1]["solution"] == "s"


def test_files_of_different_sets_have_a_map_each(tmp_path):
    written(tmp_path, [SETS["math"][0]], ".jsonl")
    written(tmp_path, [SETS["verl"][0]], ".parquet")
    found, columns = read(tmp_path)
    assert [row["answer"] for row in found] == ["2", "2"]
    assert columns["p.jsonl"]["final"] == "solution"
    assert columns["p.parquet"]["answer"] == "reward_model.ground_truth"


def test_a_heading_is_no_final_answer(tmp_path):
    row = {"problem": "p", "answer": "#### Step 1\nAdd.\n$2$"}
    ((found,), columns) = read(written(tmp_path, [row], ".jsonl"))
    assert found["answer"] == row["answer"]
    assert "final" not in columns


def test_the_documented_names_are_the_recognised_ones():
    page = (Path(__file__).parents[2] / "docs" / "your-own.md").read_text()
    for role, names in (KNOWN | KNOWN_ABOUT).items():
        assert f"\n| {role} | {', '.join(names)} |\n" in page
