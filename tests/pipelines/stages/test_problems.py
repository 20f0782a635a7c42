"""Stage problems: limits, repeats, gold answers, and ids that follow the content."""

import json
from pathlib import Path

import pytest

from trace_opd.data.store import Store, content_hash
from trace_opd.pipelines.stages.problems import STAGE as PROBLEMS_STAGE
from trace_opd.schemas.configs import ProblemsConfig, VerifyConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS

WORDS = {"kind": "word-problems", "steps": 2}
ROWS = [{"problem": f"{n}+1?", "answer": n + 1} for n in range(10)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def problems_file(tmp_path):
    def write(rows, folder="in"):
        path = tmp_path / folder / "p.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"kind": "files", "path": str(path)}

    return write


def make(store, source, **fields):
    return PROBLEMS_STAGE.run(ProblemsConfig(source=source, **fields), store)


def texts(dataset):
    return dataset.read().column("problem").to_pylist()


def test_problems_are_cut_into_parts_and_carry_id_and_split(store):
    dataset = make(store, WORDS, limit=7, rows_per_part=3, split="validation")
    assert [dataset.read_part(part).num_rows for part in range(dataset.parts)] == [3, 3, 1]
    rows = dataset.read().to_pylist()
    assert {row["split"] for row in rows} == {"validation"}
    for row in rows:
        assert row["problem_id"] == content_hash([row["source"], row["problem"], row["answer"]])
    assert dataset.summary == {
        "problems": 7,
        "with_solution": 7,
        "with_steps": 7,
        "duplicates": 0,
        "unparsable": 0,
    }


@pytest.mark.parametrize(
    "source", [WORDS, {"kind": "arithmetic"}, {"kind": "reasoning-gym", "task": "chain_sum"}]
)
def test_endless_sources_need_a_limit(store, source):
    with pytest.raises(InputError, match="never ends; set limit"):
        make(store, source)
    assert make(store, source, limit=5).rows == 5


def test_a_source_that_runs_dry_says_how_many_problems_there_are(store):
    source = {
        "kind": "reasoning-gym",
        "task": "chain_sum",
        "settings": {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1},
    }
    with pytest.raises(InputError, match=r"after (9|10) problems .* lower limit"):
        make(store, source, limit=11)


def test_the_seed_makes_other_problems_of_a_generator(store):
    first, second = (make(store, WORDS, limit=20, seed=seed) for seed in (0, 1))
    assert first.id != second.id
    assert texts(first) != texts(second)


def test_limit_and_shuffle_of_a_file(store, problems_file):
    source = problems_file(ROWS)
    assert texts(make(store, source, limit=3)) == ["0+1?", "1+1?", "2+1?"]
    shuffled = texts(make(store, source, shuffle=True))
    assert shuffled != texts(make(store, source))
    assert sorted(shuffled) == sorted(texts(make(store, source)))
    assert texts(make(store, source, shuffle=True, limit=4)) == shuffled[:4]
    assert texts(make(store, source, shuffle=True, seed=1)) != shuffled


def test_repeated_problems_are_dropped_and_counted(store, problems_file):
    dataset = make(store, problems_file([*ROWS, *ROWS[:4]]))
    assert dataset.rows == 10
    assert dataset.summary["duplicates"] == 4


def test_an_unparsable_gold_answer_stops_before_work_and_names_row_and_answer(store, problems_file):
    source = problems_file([*ROWS[:2], {"problem": "why?", "answer": "???"}])
    with pytest.raises(InputError, match=r"p\.jsonl, row 2: gold answer '\?\?\?' does not parse"):
        make(store, source, shuffle=True)
    assert list(store.datasets()) == []


def test_unparsable_gold_answers_are_dropped_and_counted_when_asked(store, problems_file):
    source = problems_file([{"problem": "why?", "answer": "???"}, *ROWS])
    dataset = make(store, source, drop_unparsable=True, limit=10)
    assert dataset.rows == 10
    assert dataset.summary["unparsable"] == 1
    with pytest.raises(InputError, match="none of its 1 rows can be used"):
        make(store, problems_file([{"problem": "why?", "answer": "???"}]), drop_unparsable=True)


def test_the_same_content_is_the_same_dataset_wherever_the_file_lies(store, problems_file):
    first = make(store, problems_file(ROWS, "one"))
    again = make(store, problems_file(ROWS, "two"))
    assert again.id == first.id
    assert again.manifest["finished_at"] == first.manifest["finished_at"]


def test_a_changed_file_under_the_same_path_makes_another_dataset(store, problems_file):
    before = make(store, problems_file(ROWS))
    after = make(store, problems_file(ROWS[:5]))
    assert after.id != before.id
    assert (before.rows, after.rows) == (10, 5)


def test_a_stage_goes_on_from_its_finished_parts(store):
    config = ProblemsConfig(source=WORDS, limit=6, rows_per_part=2)
    undisturbed = texts(PROBLEMS_STAGE.run(config, Store(store.root + "-undisturbed")))
    plan, draft = PROBLEMS_STAGE.begin(config, store)
    PROBLEMS_STAGE.make_part(plan, draft, 1)
    finished = store.files.local_root() / draft.ref / "part-00001.parquet"
    written = finished.stat().st_mtime_ns
    assert texts(PROBLEMS_STAGE.run(config, store)) == undisturbed
    assert finished.stat().st_mtime_ns == written


def test_champ_keeps_what_parses(store):
    dataset = make(store, {"kind": "champ"}, limit=60, drop_unparsable=True)
    assert dataset.rows == dataset.summary["with_solution"] == 60


def test_a_gold_answer_that_never_ends_is_dropped_at_the_deadline(
    store, problems_file, monkeypatch
):
    limits = VerifyConfig(timeout_s=1.0)
    monkeypatch.setattr("trace_opd.pipelines.stages.problems.VerifyConfig", lambda: limits)
    endless = {"problem": "how many?", "answer": r"\binom{1000000000}{500000000}"}
    source = problems_file([endless, {"problem": "2+2", "answer": r"\sqrt{16}"}])
    dataset = make(store, source, drop_unparsable=True, limit=10)
    assert dataset.summary["unparsable"] == 1
    assert dataset.read()["answer"].to_pylist() == [r"\sqrt{16}"]


def test_bad_rows_are_skipped_when_asked_and_listed_with_their_places(store, problems_file):
    source = problems_file([*ROWS[:2], {"problem": "why?", "answer": "???"}, {"problem": "empty"}])
    path = Path(source["path"])
    path.write_text(path.read_text() + "nope\n" + json.dumps(ROWS[2]) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl, row 3: column 'answer' is empty"):
        make(store, source)
    dataset = make(store, source, on_bad_rows="skip")
    assert texts(dataset) == ["0+1?", "1+1?", "2+1?"]
    assert dataset.summary["columns"] == {"problem": "problem", "answer": "answer"}
    assert dataset.summary["skipped"] == {
        "gold answer does not parse as math": {"rows": 1, "first": ["p.jsonl, row 2"]},
        "column 'answer' is empty": {"rows": 1, "first": ["p.jsonl, row 3"]},
        "is not JSON": {"rows": 1, "first": ["p.jsonl, row 4"]},
    }
    assert dataset.manifest["config"]["on_bad_rows"] == "skip"


def test_a_source_of_bad_rows_alone_is_refused_with_their_faults(store, problems_file):
    source = problems_file([{"problem": "", "answer": 1}] * 9)
    with pytest.raises(
        InputError, match=r"none of its 9 rows .*'problem' is empty \(p\.jsonl, row"
    ):
        make(store, source, on_bad_rows="skip")


def test_the_row_s_own_id_subject_and_level_stay_with_the_problem(store, problems_file):
    about = {"unique_id": "a/1", "subject": "Algebra", "level": 3}
    dataset = make(store, problems_file([row | about for row in ROWS]), rows_per_part=4)
    table = dataset.read()
    assert table["source_id"].to_pylist() == ["a/1"] * 10
    assert (table["subject"][0].as_py(), table["level"][0].as_py()) == ("Algebra", "3")
    assert make(store, problems_file(ROWS)).read().schema == PROBLEMS.schema_of(())


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"problem": "1+1?", "answer": 2}, {}, "f3331827d8dacc33"),
        ({"q": "1+1?", "a": 2}, {"columns": {"problem": "q", "answer": "a"}}, "5cc6b475062bf663"),
        ({"problem": "1+1?", "answer": 2, "solution": "Add."},
         {"columns": {"solution": "solution"}}, "504999fd7b23cf05"),
        ({"problem": "1+1?", "answer": 2, "solution": "Add."}, {}, "504999fd7b23cf05"),
    ],
)  # fmt: skip
def test_ids_are_those_of_the_first_release(store, problems_file, row, fields, expected):
    config = ProblemsConfig(source=problems_file([row]) | fields)
    assert PROBLEMS_STAGE.begin(config, store)[1].id == expected
