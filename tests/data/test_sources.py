"""Sources of problems: foreign tables, hub layouts, generators."""

import csv
import json
import re
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config

from trace_opd.data import sources
from trace_opd.data.sources.arithmetic import steps
from trace_opd.data.sources.champ import gold_answer
from trace_opd.data.sources.problem_rows import after_hashes, boxed_or_empty, multiple_choice
from trace_opd.pipelines.annotators.equations import equations
from trace_opd.schemas.configs import (
    ArithmeticSource,
    ChampSource,
    Columns,
    FilesSource,
    GymSource,
    HubSource,
    WordProblemsSource,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnswerKind, DiagnosticType, Operation

ROW_KEYS = {"problem", "answer", "answer_kind", "solution", "steps", "source"}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def files(path, **fields):
    return FilesSource(kind="files", path=str(path), **fields)


def read(source, seed=0, limit=None):
    return list(islice(sources.rows(source, seed), limit))


# --- files ---


def test_parquet_and_jsonl_files_of_the_same_rows_give_the_same_problems(tmp_path):
    rows = [{"q": "1+1?", "a": "2", "s": "Add."}, {"q": " 2+2? ", "a": " 4 ", "s": None}]
    columns = Columns(problem="q", answer="a", solution="s")
    parquet = read(files(write_parquet(tmp_path / "p.parquet", rows), columns=columns))
    jsonl = read(files(write_jsonl(tmp_path / "p.jsonl", rows), columns=columns))
    assert [{**row, "source": ""} for row in parquet] == [{**row, "source": ""} for row in jsonl]
    assert [(row["problem"], row["answer"], row["solution"]) for row in jsonl] == [
        ("1+1?", "2", "Add."),
        ("2+2?", "4", None),
    ]
    assert parquet[0]["source"] == "p.parquet"


def test_a_glob_reads_its_files_in_order_and_names_them_below_their_common_folder(tmp_path):
    write_jsonl(tmp_path / "b" / "x.jsonl", [{"problem": "second", "answer": 2}])
    write_jsonl(tmp_path / "a" / "x.jsonl", [{"problem": "first", "answer": 1}])
    rows = read(files(tmp_path / "*" / "x.jsonl"))
    assert [(row["problem"], row["source"]) for row in rows] == [
        ("first", "a/x.jsonl"),
        ("second", "b/x.jsonl"),
    ]


def test_answers_may_be_numbers_and_text_in_one_jsonl_column(tmp_path):
    answers = [3, 3.0, 2.5, "x^2", -7]
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": f"p{a}", "answer": a} for a in answers])
    assert [row["answer"] for row in read(files(path))] == ["3", "3", "2.5", "x^2", "-7"]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_missing_column_is_named_with_the_columns_that_are_there(tmp_path, write):
    suffix = "jsonl" if write is write_jsonl else "parquet"
    path = write(tmp_path / f"p.{suffix}", [{"q": "1+1?", "answer": "2"}])
    known = rf"p\.{suffix}: no column .*problem.*source\.columns\.problem to one of q, answer$"
    with pytest.raises(InputError, match=known):
        read(files(path))
    named = rf"p\.{suffix}: column 'a' is missing; set source\.columns to names out of q, answer$"
    with pytest.raises(InputError, match=named):
        read(files(path, columns=Columns(problem="q", answer="a")))


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_empty_answer_names_file_row_and_column(tmp_path, empty):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": empty}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError, match=r"p\.jsonl, row 1: column 'answer' is empty"):
        read(files(path))


def test_an_answer_that_is_a_list_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": ["2"]}])
    with pytest.raises(InputError, match=r"row 0: column 'answer' holds a list"):
        read(files(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no rows"),
        ("p.jsonl", '{"problem": "a", "answer": 1}\n{"problem"', "row 1: is not JSON"),
        ("p.jsonl", "[1]\n", "row 0: is not a JSON object"),
        ("p.jsonl", "{}\n", "p.jsonl, row 0: has no columns"),
        ("p.json", "[{}]", "p.json, row 0: has no columns"),
        ("p.parquet", "no parquet", "is no complete Parquet file"),
        ("p.csv", "problem,answer\n", "holds no rows"),
        ("p.txt", "problem,answer\n", "ends in '.txt'; give a file that ends in .parquet, .json"),
    ],
)
def test_unreadable_files_are_input_errors(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(files(tmp_path / name))


def test_a_path_without_files_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        sources.identity(files(tmp_path / "*.jsonl"))


def test_the_identity_of_files_follows_their_content_and_not_their_folder(tmp_path):
    rows = [{"problem": "1+1?", "answer": "2"}]
    one = write_jsonl(tmp_path / "one" / "p.jsonl", rows)
    two = write_jsonl(tmp_path / "two" / "p.jsonl", rows)
    before = sources.identity(files(one))
    assert sources.identity(files(two)) == before
    write_jsonl(one, [{"problem": "1+1?", "answer": "3"}])
    assert sources.identity(files(one)) != before
    assert str(tmp_path) not in json.dumps(before)


# --- multiple choice ---


def test_the_letter_points_at_the_right_choice_and_all_letters_occur():
    letters = set()
    for number in range(40):
        problem, letter = multiple_choice(f"p{number}", "right", ["w1", "w2", "w3"])
        assert f"({letter}) right" in problem.splitlines()
        assert re.findall(r"^\((.)\)", problem, re.M) == ["A", "B", "C", "D"]
        assert (problem, letter) == multiple_choice(f"p{number}", "right", ["w1", "w2", "w3"])
        letters.add(letter)
    assert letters == set("ABCD")


def test_a_right_choice_that_equals_a_wrong_one_keeps_its_own_letter():
    problem, letter = multiple_choice("p", "same", ["same", "other"])
    assert f"({letter}) same" in problem


# --- hub ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"$x = \boxed{1}$ and $x = \boxed{2}$.", "1, 2"),
        (r"\boxed{1} or \boxed{2}", r"1 \text{ or } 2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        ("no box", ""),
        (r"cut \boxed{4\\", ""),
    ],
)
def test_the_last_balanced_box_is_the_answer_with_those_joined_to_it(text, expected):
    assert boxed_or_empty(text) == expected


def test_gsm8k_answers_lose_their_commas():
    assert after_hashes("3 + 4 = 7\n#### 1,234") == "1234"
    assert after_hashes("no answer") == ""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which dataset ids are folders: `load_dataset` reads those first."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configs_card(folder, **files):
    """The card that gives a dataset its named subsets, as on the hub."""
    lines = ["---", "configs:"]
    for subset, (split, path) in files.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_openthoughts_keeps_maths_and_reads_the_boxed_answer(hub):
    folder = hub / "open-thoughts" / "OpenThoughts-114k"
    rows = [
        {"problem": "code", "ground_truth_solution": "print(1)", "domain": "code"},
        {"problem": "half?", "ground_truth_solution": r"So $\boxed{\frac12}$", "domain": "math"},
        {"problem": "prove", "ground_truth_solution": "Proof.", "domain": "math"},
    ]
    rows = [row | {"deepseek_solution": "", "source": "numina_math"} for row in rows]
    write_parquet(folder / "metadata" / "train-00000-of-00001.parquet", rows)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [{"system": "x"}])
    configs_card(folder, default=("train", "data/train-*"), metadata=("train", "metadata/train-*"))
    found = read(HubSource(kind="hub", preset="openthoughts-math"))
    assert [(row["problem"], row["answer"], row["row"]) for row in found] == [
        ("half?", r"\frac12", 1),
        ("prove", "", 2),
    ]
    assert found[0]["solution"] == r"So $\boxed{\frac12}$"
    assert found[0]["source"] == "openthoughts-math"


@pytest.mark.parametrize(
    ("preset", "path", "row"),
    [
        (
            "math-500",
            "HuggingFaceH4/MATH-500/test.jsonl",
            {"problem": "p", "solution": "s", "answer": "7", "subject": "Algebra", "level": 1},
        ),
        (
            "aime-2024",
            "HuggingFaceH4/aime_2024/data/train-00000-of-00001.jsonl",
            {"id": 60, "problem": "p", "solution": "s", "answer": "7", "url": "", "year": "2024"},
        ),
        ("aime-2025", "math-ai/aime25/test.jsonl", {"problem": "p", "answer": "7", "id": "0"}),
        (
            "amc-2023",
            "math-ai/amc23/test-00000-of-00001.jsonl",
            {"id": 0, "question": "p", "answer": "7", "url": ""},
        ),
    ],
)
def test_competition_presets_read_their_columns_and_split(hub, preset, path, row):
    write_jsonl(hub / path, [row])
    (found,) = read(HubSource(kind="hub", preset=preset))
    assert (found["problem"], found["answer"], found["source"]) == ("p", "7", preset)
    assert found["solution"] == row.get("solution")
    assert found["answer_kind"] is AnswerKind.MATH


def test_gpqa_becomes_multiple_choice(hub):
    folder = hub / "Idavidrein" / "gpqa"
    folder.mkdir(parents=True)
    row = {
        "Question": "Which?",
        "Correct Answer": "right\n",
        "Incorrect Answer 1": "w1",
        "Incorrect Answer 2": "w2",
        "Incorrect Answer 3": "w3",
        "Explanation": "Because.",
    }
    with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    configs_card(folder, gpqa_diamond=("train", "gpqa_diamond.csv"))
    (found,) = read(HubSource(kind="hub", preset="gpqa-diamond"))
    assert f"({found['answer']}) right" in found["problem"].splitlines()
    assert found["problem"].startswith("Which?\n\n(A) ")
    assert found["answer_kind"] is AnswerKind.CHOICE
    assert found["solution"] == "Because."


def test_a_split_beside_a_preset_wins(hub):
    folder = hub / "openai" / "gsm8k"
    for split in ("train", "test"):
        row = {"question": f"{split}?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}
        write_parquet(folder / "main" / f"{split}-00000-of-00001.parquet", [row])
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: main/{split}-*\n" for split in ("train", "test")
    )
    (folder / "README.md").write_text(card + "---\n")
    (train,) = read(HubSource(kind="hub", preset="gsm8k"))
    (test,) = read(HubSource(kind="hub", preset="gsm8k", split="test"))
    assert (train["problem"], train["answer"]) == ("train?", "1200")
    assert test["problem"] == "test?"


def test_a_local_folder_is_a_dataset_and_its_path_stays_out_of_the_data(hub):
    folder = hub / "mine"
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [{"q": "1+1?", "answer": 2}])
    source = HubSource(kind="hub", dataset=str(folder), columns=Columns(problem="q"))
    (found,) = read(source)
    assert (found["problem"], found["answer"], found["source"]) == ("1+1?", "2", "mine")
    before = sources.identity(source)
    assert str(hub) not in json.dumps(before)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [{"q": "1+1?", "answer": 3}])
    assert sources.identity(source) != before


def test_hub_mistakes_are_input_errors(hub):
    with pytest.raises(InputError, match=r"'gsm9k' is unknown; take one of .*gsm8k"):
        read(HubSource(kind="hub", preset="gsm9k"))
    folder = hub / "mine"
    write_jsonl(folder / "train.jsonl", [{"q": "p", "answer": "1"}])
    with pytest.raises(InputError, match=r"no column .* hold the problem .* one of q, answer"):
        read(HubSource(kind="hub", dataset="mine"))
    with pytest.raises(InputError, match=r"'mine'.*does not load.*test"):
        read(HubSource(kind="hub", dataset="mine", split="test"))
    with pytest.raises(InputError, match="does not load"):
        read(HubSource(kind="hub", dataset=str(hub / "nothing")))


# --- generators ---


def test_gym_follows_task_settings_and_seed():
    source = GymSource(kind="reasoning-gym", task="chain_sum", settings={"max_terms": 2})
    rows = read(source, seed=1, limit=20)
    assert rows == read(source, seed=1, limit=20)
    assert all(set(row) == ROW_KEYS for row in rows)
    for row in rows:
        numbers = re.findall(r"[+-]? ?\d+", row["problem"].partition(":")[2])
        assert sum(int(number.replace(" ", "")) for number in numbers) == int(row["answer"])
        assert row["problem"].endswith("\\boxed{}.")
    plain = read(source.model_copy(update={"instructions": False}), seed=1, limit=1)
    assert "boxed" not in plain[0]["problem"]


def test_gym_streams_of_neighbouring_seeds_share_no_problems():
    source = GymSource(kind="reasoning-gym", task="chain_sum", settings={"min_terms": 5})
    first, second = (
        {row["problem"] for row in read(source, seed=seed, limit=300)} for seed in (0, 1)
    )
    assert len(first) == 300
    assert not first & second


def test_gym_mistakes_are_input_errors():
    with pytest.raises(InputError, match=r"'chainsum' is not a reasoning-gym task.*chain_sum"):
        read(GymSource(kind="reasoning-gym", task="chainsum"), limit=1)
    for settings in ({"nonsense": 1}, {"min_terms": 5, "max_terms": 2}):
        with pytest.raises(InputError, match="settings of reasoning-gym task 'chain_sum'"):
            read(GymSource(kind="reasoning-gym", task="chain_sum", settings=settings), limit=1)
    with pytest.raises(InputError, match="set limit instead"):
        read(GymSource(kind="reasoning-gym", task="chain_sum", settings={"size": 3}), limit=1)


def test_champ_has_a_solution_in_steps_for_each_of_its_problems():
    rows = read(ChampSource(kind="champ"))
    assert len(rows) == 270
    assert all(row["problem"] and row["answer"] and row["solution"] for row in rows)
    assert any("\n" in row["solution"] for row in rows)


def test_champ_answers_are_cut_to_one_form():
    assert gold_answer("C(10, 5), or equivalently 252") == "252"
    assert gold_answer("5/14, or approximately 35.7%") == "5/14"
    assert gold_answer("100 (i.e., all values)") == "100"
    assert gold_answer("(4^n+2^n)/2") == "(4^n+2^n)/2"


@pytest.mark.parametrize("steps", [2, 3])
def test_word_problem_steps_are_right_and_lead_to_the_answer(steps):
    for row in read(WordProblemsSource(kind="word-problems", steps=steps), limit=300):
        assert set(row) == ROW_KEYS
        assert "{" not in row["problem"]
        assert len(row["steps"]) == steps
        known = {int(number) for number in re.findall(r"\d+", row["problem"])} | {2, 12}
        for step in row["steps"]:
            equation = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", step["text"])
            assert equation
            left, sign, right, result = equation.groups()
            left, right, result = int(left), int(right), int(result)
            assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[
                sign
            ] == result
            assert {left, right} <= known
            assert step["value"] == str(result)
            assert step["type"] in DiagnosticType
            assert step["text"] in row["solution"]
            known.add(result)
        assert row["steps"][-1]["value"] == row["answer"]
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}")
        assert sum(step["key"] for step in row["steps"]) == 1
        assert len({step["value"] for step in row["steps"]}) == steps


@pytest.mark.parametrize("operation", list(Operation))
def test_arithmetic_has_a_line_per_digit_that_holds_and_the_key_ones_carry_or_borrow(operation):
    source = ArithmeticSource(kind="arithmetic", operation=operation, min_digits=2, max_digits=4)
    for row in read(source, seed=3, limit=200):
        left, right = map(int, row["problem"].split(operation.sign))
        result = left + right if operation is Operation.ADD else left - right
        assert row["answer"] == str(result)
        assert result >= 0
        *lines, last = row["solution"].split("\n")
        assert last == f"\\boxed{{{result}}}"
        assert len(lines) == len(str(left))
        digits = ""
        for line, step in zip(lines, row["steps"], strict=False):
            (equation,) = equations(line.split(" ")[0])
            assert equation.holds
            assert str(equation.result) == step["value"]
            assert step["key"] == line.endswith("1")
            digits = step["value"][-1] + digits
        assert int(digits) == result % 10 ** len(lines)


def test_a_subtraction_by_hand():
    text = [step.text for step in steps(4821, 3977, Operation.SUBTRACT)]
    assert text == ["11-7-0=4 b1", "12-7-1=4 b1", "18-9-1=8 b1", "4-3-1=0 b0", "\\boxed{844}"]


def test_word_problems_vary_and_follow_the_seed():
    source = WordProblemsSource(kind="word-problems", steps=3)
    rows = read(source, seed=4, limit=300)
    assert rows == read(source, seed=4, limit=300)
    assert rows != read(source, seed=5, limit=300)
    stories = {re.sub(r"\d+", "#", row["solution"]) for row in rows}
    assert len(stories) > 40
    assert len({row["problem"] for row in rows}) > 290


def test_only_generators_are_endless():
    assert sources.is_endless(ArithmeticSource(kind="arithmetic"))
    assert sources.is_endless(GymSource(kind="reasoning-gym", task="chain_sum"))
    assert not sources.is_endless(ChampSource(kind="champ"))
    assert not sources.is_endless(HubSource(kind="hub", preset="gsm8k"))


def test_identities_of_generators_tell_their_settings_apart():
    identities = [
        sources.identity(source)
        for source in (
            ArithmeticSource(kind="arithmetic"),
            ArithmeticSource(kind="arithmetic", max_digits=4),
            ArithmeticSource(kind="arithmetic", operation=Operation.SUBTRACT),
            WordProblemsSource(kind="word-problems"),
            GymSource(kind="reasoning-gym", task="chain_sum"),
            ChampSource(kind="champ"),
        )
    ]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 6
