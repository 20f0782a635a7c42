"""Shared wording of training and evaluation problems: the measure, the command, the stage, the
plan."""

import json
import re
import sys
import unicodedata
from pathlib import Path
from zlib import crc32

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.choice.contamination import overlap
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.planning.pipeline_plan import plan_pipeline
from trace_opd.schemas.configs import PipelineConfig, ProblemsConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
LONG = "A farmer has 17 sheep and buys 5 more on Monday, then sells 9 of them on Friday."
MOVED = "Question: a farmer has 17 sheep, and buys 5 more on Monday! Then sells 9 of them."
OTHER = "A baker has 17 loaves and bakes 5 more on Monday, then sells 9 of them on Friday."


def found(training: list[str], held_out: list[str], words: int = 13) -> set[tuple[int, int]]:
    pairs = overlap(training, held_out, words).pairs
    return set(pairs.select("row", "training_row").iter_rows())


def test_a_run_of_words_counts_whatever_its_case_and_punctuation():
    assert found([LONG], [MOVED]) == {(0, 0)}
    assert found([LONG], [OTHER]) == set()
    assert found([LONG], [OTHER], words=6) == {(0, 0)}  # "5 more on monday then sells"


def test_a_short_problem_counts_whole_and_signs_of_operations_are_words():
    assert found(["What is 3 + 5?"], ["what is 3 + 5"]) == {(0, 0)}
    assert found(["What is 3 + 5?"], ["What is 3 - 5?"]) == set()
    assert found(["What is 3 - 5?"], ["What is 3 − 5?"]) == {(0, 0)}
    assert found(["What is 3 + 5? Say why."], ["What is 3 + 5?"]) == set()


def test_the_share_is_of_the_evaluation_problems_own_runs():
    made = overlap([LONG, "x"], [LONG, "y", LONG + " And how many are left in the end then?"])
    assert (made.problems, made.shared, made.share) == (3, 2, 2 / 3)
    assert made.training_rows == [0]
    # 18 words: 6 runs of 13 words; 27 words: 15 runs.
    assert made.pairs.rows() == [(0, 0, 6, 1.0), (2, 0, 6, 0.4)]


def test_the_wording_of_a_template_is_not_shared_wording():
    frame = "Answer with one number and nothing else, and do not explain your way to it: {}"
    training = [frame.format(n) for n in range(11)]
    made = overlap(training, [frame.format("what is it?")])
    assert (made.shared, len(made.pairs)) == (0, 0)
    assert made.common > 0
    assert overlap(training[:10], [frame.format("what is it?")]).shared == 1


def test_nothing_shares_nothing():
    for training, held_out in (([], []), ([], [LONG]), ([LONG], []), (["", "?!"], ["", "..."])):
        made = overlap(training, held_out)
        assert (made.shared, made.share, made.training_rows) == (0, 0.0, [])


def grams(text: str, words: int) -> set[tuple[str, ...]]:
    """The obvious way, in Python."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("−", "-")
    kept = re.findall(r"[^\W_]+|[-+*/=<>^%]", plain)
    if len(kept) < words:
        return {tuple(kept)} if kept else set()
    return {tuple(kept[at : at + words]) for at in range(len(kept) - words + 1)}


TEXTS = st.lists(st.text("ab1 +-.\n", max_size=24), max_size=6)


@given(TEXTS, TEXTS, st.integers(2, 5))
def test_the_pairs_are_those_of_the_obvious_way(training, held_out, words):
    expected = {
        (row, own): len(shared)
        for row, asked in enumerate(held_out)
        for own, known in enumerate(training)
        if (shared := grams(asked, words) & grams(known, words))
    }
    made = overlap(training, held_out, words)
    assert {(row, own): n for row, own, n, _ in made.pairs.iter_rows()} == expected
    assert made.shared == len({row for row, _ in expected})
    assert made.training_rows == sorted({own for _, own in expected})


# --- the stage, the command and the plan ---


def problems(store: Store, alias: str, texts: list[str], *overrides: str) -> Dataset:
    """The same texts have the same ids, whatever the alias."""
    file = Path(store.root).parent / f"{crc32(repr(texts).encode())}.jsonl"
    file.write_text("".join(json.dumps({"problem": t, "answer": "13"}) + "\n" for t in texts))
    given = [f"source={{kind: files, path: '{file}'}}", *overrides]
    made = run_stage("problems", load_config(ProblemsConfig, None, given), store, alias)
    assert isinstance(made, Dataset)
    return made


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["trace-opd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out, said.err  # pyright: ignore[reportReturnType]


def test_shared_problems_are_counted_and_left_out_only_on_request(store, caplog):
    eval_ = problems(store, "held", [MOVED, "How many days has May?"])
    plain = problems(store, "plain", [LONG, OTHER])
    kept = problems(store, "kept", [LONG, OTHER], "against=[held]")
    assert "1 of 2 share 13 words in a row" in caplog.text
    assert kept.read() == plain.read()
    assert kept.ref != plain.ref
    assert kept.manifest["inputs"] == {"against_0": eval_.ref}
    ids = eval_.read()["problem_id"].to_pylist(), plain.read()["problem_id"].to_pylist()
    shared = kept.summary["overlap"][eval_.ref]
    assert (shared["problems"], shared["shared"]) == (2, 1)
    assert [pair[:2] for pair in shared["first"]] == [[ids[0][0], ids[1][0]]]
    left = problems(store, "left", [LONG, OTHER], "against=[held, held]", "drop_overlap=true")
    assert left.read()["problem"].to_pylist() == [OTHER]
    assert left.summary["overlapping"] == 1
    more = problems(
        store, "more", [LONG, "One?"], "against=[held]", "drop_overlap=true", "overlap_words=40"
    )
    assert more.rows == 2


def test_the_command_prints_the_share_and_the_pairs_and_writes_all(store, monkeypatch, capsys):
    problems(store, "train", [LONG, OTHER])
    held = problems(store, "held", [MOVED, "How many days has May?"])
    clean = problems(store, "clean", ["What is 3 + 5?"])
    output = Path(store.root).parent / "pairs.csv"
    args = ["contamination", "train", "held", "clean", "--store", store.root]
    code, out, _ = run(monkeypatch, capsys, *args, "--output", str(output))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [held.ref, "2", "1", "50.0%"] in lines
    assert [clean.ref, "1", "0", "0.0%"] in lines
    assert held.read()["problem_id"][0].as_py() in out
    table = pl.read_csv(output)
    assert table["training_problem"].to_list() == [LONG]
    assert table["shared_runs"].to_list() == [4]
    code, out, _ = run(monkeypatch, capsys, *args, "--words", "6")
    assert [held.ref, "2", "1", "50.0%"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["contamination", "nothing", "held"], "dataset 'nothing' is not in store"),
        (["contamination", "held", "nothing"], "dataset 'nothing' is not in store"),
        (["contamination", "held", "held", "--output", "a.txt"], "give .csv or .parquet"),
        (["contamination", "held", "held", "--words", "1"], "--words"),
        (["problems", str(CONFIG), "against=[nothing]"], "dataset 'nothing' is not in store"),
        (["problems", str(CONFIG), "drop_overlap=true"], "against names no dataset"),
        (["problems", str(CONFIG), "against=[held]", "overlap_words=1"], "overlap_words"),
        (["problems", str(CONFIG), "against=held"], "against"),
    ],
)
def test_bad_input_is_one_sentence(store, monkeypatch, capsys, words, sentence):
    problems(store, "held", [MOVED])
    code, _, err = run(monkeypatch, capsys, *words, "--store", store.root)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_all_problems_shared_is_refused(store):
    problems(store, "held", [MOVED])
    with pytest.raises(InputError, match="all of its 1 problems share wording with problems/"):
        problems(store, "own", [LONG], "against=[held]", "drop_overlap=true")


def test_a_table_of_another_kind_is_refused(store):
    problems(store, "held", [MOVED])
    store.set_alias("empty", store.begin("train", {}, {}, None).finish(0))  # pyright: ignore
    with pytest.raises(InputError, match="this stage needs table problems"):
        problems(store, "own", [LONG], "against=[empty]")


def test_the_plan_warns_of_shared_wording_and_goes_on(store, monkeypatch, capsys):
    files = {}
    for name, text in (("problems", LONG), ("eval_problems", MOVED)):
        files[name] = Path(store.root).parent / f"{name}.jsonl"
        files[name].write_text(json.dumps({"problem": text, "answer": "13"}) + "\n")
    small = [f"{name}.source={{kind: files, path: '{path}'}}" for name, path in files.items()]
    small += ["train.offline.steps=0", "train.online.annotator.engine=self"]
    config = load_config(PipelineConfig, CONFIG, small)
    (warning,) = plan_pipeline(config, store, download=False).warnings
    assert warning.startswith("eval_problems: 1 of 1 (100.0%) share 13 words in a row with")
    assert "`trace-opd contamination demo-problems demo-eval_problems` lists them" in warning
    words = ["pipeline", str(CONFIG), *small, "--dry-run", "--store", store.root]
    assert f"trace-opd: {warning}" in run(monkeypatch, capsys, *words)[2]
