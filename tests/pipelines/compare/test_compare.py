"""Command compare: what it joins and writes, and that capped figures are what training sees."""

import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.compare import page as comparison_report
from trace_opd.pipelines.compare.compare import SCOPES, compare_annotations
from trace_opd.pipelines.compare.table import comparison_table
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.results import COMPARISONS
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.routed import routed_table

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")


def run(*args: object) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trace-opd", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Store:
    """Real rollouts with token ids, annotated by both rules and with other segments."""
    root = tmp_path_factory.mktemp("sampled") / "store"
    for command in (
        ["problems", CONFIG, "limit=6", "rows_per_part=2"],
        ["rollout", CONFIG, "group_size=4"],
        ["verify", CONFIG],
        ["annotate", CONFIG, "--alias", "line"],
        ["annotate", CONFIG, "annotator.match=value", "--alias", "value"],
        ["annotate", CONFIG, "segment.min_chars=30", "annotator.match=value", "--alias", "coarse"],
    ):
        assert run(*command, "--store", root) == 0
    return Store(root)


# --- made by hand --------------------------------------------------------------------------------


def dataset(store: Store, stage: str, contract, rows: list[dict], inputs, tag="", parts=1):
    draft = store.begin(stage, {"tag": tag}, inputs, contract)
    assert not isinstance(draft, Dataset)
    for part, chosen in enumerate(np.array_split(np.arange(len(rows)), parts)):
        draft.write_part(part, contract.table(rows[i] for i in chosen))
    return draft.finish(parts)


def written(store: Store, texts: list[tuple[str, bool]], problem: str = "a problem") -> Dataset:
    """Verdicts of responses without token ids, two to a problem."""
    count = -(-len(texts) // 2)
    problems = [
        {"problem_id": f"p{i}", "problem": f"{problem} {i}", "answer": "1", "answer_kind": "math",
         "solution": None, "steps": None, "source": "test", "split": "test"}
        for i in range(count)
    ]  # fmt: skip
    ids = [{"rollout_id": f"r{i}", "problem_id": f"p{i // 2}", "group_id": f"p{i // 2}"}
           for i in range(len(texts))]  # fmt: skip
    rollouts = [
        row | {"sample_index": i % 2, "prompt_token_ids": [], "token_ids": [], "logprobs": [],
               "response": text, "finish_reason": "stop", "policy_name": "test",
               "policy_revision": "", "policy_step": 0, "vocab_fingerprint": "", "temperature": 1.0,
               "top_p": 1.0, "top_k": 0, "max_new_tokens": 9, "seed": i, "on_policy": False}
        for i, (row, (text, _)) in enumerate(zip(ids, texts, strict=True))
    ]  # fmt: skip
    verdicts = [
        row | {"reward": float(correct), "correct": correct, "parsed_answer": None, "status": "ok",
               "verifier": "test", "seconds": 0.0}
        for row, (_, correct) in zip(ids, texts, strict=True)
    ]  # fmt: skip
    made = dataset(store, "problems", PROBLEMS, problems, {})
    made = dataset(store, "rollout", ROLLOUTS, rollouts, {"problems": made})
    return dataset(store, "verify", VERDICTS, verdicts, {"rollouts": made})


def annotated(
    store: Store, verdicts: Dataset, name: str, marks: dict[str, list[list[int]]], parts=1, **more
) -> Dataset:
    """Annotations of the rollouts named in `marks`, one character to a segment."""
    texts = {r["rollout_id"]: r["response"] for r in verdicts.input("rollouts").read().to_pylist()}
    judged = {row["rollout_id"]: row for row in verdicts.read().to_pylist()}
    rows = [
        {name: judged[rollout_id][name] for name in ("problem_id", "group_id", "correct")}
        | {"rollout_id": rollout_id, "diagnostic_type": "setup" if spans else None,
           "segments": [{"start": i, "end": i + 1} for i in range(len(texts[rollout_id]))],
           "spans": [{"segments": span, "kind": "key" if judged[rollout_id]["correct"] else "error",
                      "rank": rank, "start": span[0], "end": span[-1] + 1, "text": "x"}
                     for rank, span in enumerate(spans)],
           "status": "ok" if spans else "empty", "annotator_name": name, "annotator_model": name,
           "prompt_version": "", "raw_answer": None, "error": None, "prompt_tokens": 10,
           "completion_tokens": 5, "cost_usd": 0.5, "latency_s": 1.0} | more
        for rollout_id, spans in marks.items()
    ]  # fmt: skip
    inputs = {"verdicts": verdicts, "rollouts": verdicts.input("rollouts")}
    inputs["problems"] = inputs["rollouts"].input("problems")
    made = dataset(store, "annotate", ANNOTATIONS, rows, inputs, name, parts)
    store.set_alias(name, made)
    return made


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def texts(store) -> Dataset:
    return written(store, [("abcdefgh", True), ("abcdefgh", False)] * 2)


FIRST = {"r0": [[0, 1]], "r1": [[2]], "r2": [[3]], "r3": []}
SECOND = {"r0": [[1, 2]], "r1": [[2]], "r2": [], "r3": []}


def overall(table: pa.Table, kind: str = "all", other: str = "b") -> dict:
    rows = table.to_pylist()
    (row,) = (
        r for r in rows if r["problem_id"] is None and r["kind"] == kind and r["other"] == other
    )
    return row


def compared(store: Store, *names: str, **options) -> pa.Table:
    return comparison_table(compare_annotations(names, store, **options), resamples=100)


# --- figures -------------------------------------------------------------------------------------


def test_the_table_keeps_its_contract_and_sums_up_its_problems(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", SECOND)
    table = compared(store, "a", "b")
    validate(table, COMPARISONS)
    row = overall(table)
    assert (row["rollouts"], row["judged"], row["both_empty"], row["units"]) == (4, 4, 1, 32)
    assert row["iou"] == pytest.approx(2 / 5)
    assert (row["segment_precision"], row["segment_recall"]) == (2 / 3, 2 / 4)
    rows = table.to_pylist()
    for kind in SCOPES:
        of_kind = [r for r in rows if r["kind"] == kind and r["problem_id"] is not None]
        assert len(of_kind) == overall(table, kind)["problems"] == 2
        for name in ("rollouts", "units", "both_marked", "reference_ok", "wrong"):
            assert sum(r[name] for r in of_kind) == overall(table, kind)[name]
    assert overall(table, "key")["judged"] == overall(table, "error")["judged"] == 2
    assert overall(table, "error")["iou"] == 1
    assert overall(table, "key")["iou"] == pytest.approx(1 / 4)


def test_an_undefined_figure_is_null(store, texts):
    annotated(store, texts, "a", {"r3": []})
    annotated(store, texts, "b", {"r3": []})
    row = overall(compared(store, "a", "b"))
    assert (row["kappa"], row["iou"], row["type_agreement"]) == (None, None, None)
    assert row["both_empty"] == 1


def test_capped_figures_are_over_the_tokens_that_convert_routes(sampled):
    alpha = 0.1
    table = comparison_table(
        compare_annotations(("line", "value"), sampled, alpha=alpha), resamples=100
    )
    tokenizer = load_tokenizer(str(Path(__file__).parents[3] / "data" / "micro"))
    routed = []
    for name in ("line", "value"):
        annotations = sampled.get(name)
        verdicts = annotations.input("verdicts")
        rollouts = verdicts.input("rollouts")
        made = routed_table(
            rollouts.input("problems").read(),
            rollouts.read(),
            verdicts.read(),
            annotations.read(),
            byte_table(tokenizer),
            RoutingConfig(alpha=alpha),
        )
        routed.append(made["span_id"].combine_chunks().flatten().to_numpy() >= 0)
    row = overall(table, other="value")
    assert row["unit"] == "tokens"
    assert row["judged"] == 24
    assert row["units"] == len(routed[0])
    assert row["reference_kept"] == routed[0].sum()
    assert row["other_kept"] == routed[1].sum()
    assert row["capped_iou"] == (routed[0] & routed[1]).sum() / (routed[0] | routed[1]).sum()
    assert row["reference_cap_hits"] > 0


def test_annotators_that_cut_differently_are_compared_token_by_token(sampled):
    row = overall(
        comparison_table(compare_annotations(("value", "coarse"), sampled)), other="coarse"
    )
    assert row["unit"] == "tokens"
    assert 0 < row["iou"] < 1
    assert row["same_segments"] < row["judged"]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_tokenizer_with_code_counts_tokens_only_where_the_code_may_run(
    sampled, tmp_path, monkeypatch, allowed
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    if allowed:
        monkeypatch.setenv("TRACE_OPD_TRUST_REMOTE_CODE", "1")
    model = tmp_path / "model"
    shutil.copytree(MICRO, model)
    (model / "own_tokenizer.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((model / "tokenizer_config.json").read_text())
    classes = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": classes}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "config.json").write_text("{}")  # no model type whose own tokenizer would do
    line = sampled.get("line")
    store = Store(tmp_path / "store")
    config = {"policy": {"path": str(model), "trust_remote_code": True}}

    def copied(stage: str, source: Dataset, contract, inputs, tag="") -> Dataset:
        draft = store.begin(stage, {"tag": tag}, inputs, contract, config)
        draft.write_part(0, source.read())
        return draft.finish(1)

    verdicts = line.input("verdicts")
    rollouts = verdicts.input("rollouts")
    made = copied("problems", rollouts.input("problems"), PROBLEMS, {})
    made = copied("rollout", rollouts, ROLLOUTS, {"problems": made})
    made = copied("verify", verdicts, VERDICTS, {"rollouts": made})
    names = [
        copied("annotate", sampled.get(name), ANNOTATIONS, {"verdicts": made}, name).ref
        for name in ("line", "value")
    ]
    assert compare_annotations(names, store).unit == ("tokens" if allowed else "characters")


def test_an_annotator_agrees_with_itself(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", FIRST)
    row = overall(compared(store, "a", "b"))
    for name in ("kappa", "iou", "capped_iou", "segment_f1", "type_agreement", "first_error_f1"):
        assert row[name] == row[f"{name}_low"] == row[f"{name}_high"] == 1


def test_a_rule_annotator_measures_the_first_wrong_step(sampled):
    row = overall(comparison_table(compare_annotations(("line", "value"), sampled)), other="value")
    line, value = (sampled.get(name).read().to_pylist() for name in ("line", "value"))
    wrong = [
        (a["spans"][0]["start"], b["spans"] and min(s["start"] for s in b["spans"]))
        for a, b in zip(line, value, strict=True)
        if not a["correct"] and a["spans"]
    ]
    assert row["wrong"] == len(wrong)
    assert row["wrong_hit"] == sum(a == b for a, b in wrong)
    assert row["right_accuracy"] == 1


# --- joining -------------------------------------------------------------------------------------


def test_rows_are_joined_by_id_whatever_their_order_and_parts(store, texts):
    annotated(store, texts, "a", FIRST, parts=2)
    annotated(store, texts, "b", dict(reversed(SECOND.items())), parts=3)
    shuffled = overall(compared(store, "a", "b"))
    annotated(store, texts, "c", SECOND)
    plain = overall(compared(store, "a", "c"), other="c")
    names = {"comparison_id", "other", "other_dataset"}
    assert {k: v for k, v in shuffled.items() if k not in names} == {
        k: v for k, v in plain.items() if k not in names
    }


def test_only_rollouts_in_common_count(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", {"r1": [[2]], "r2": [[3]]})
    made = compare_annotations(("a", "b"), store)
    assert made.common == 2
    assert "2 rollouts of 2 problems in common (a 4, b 2)" in comparison_report.summary_line(made)


def test_no_rollout_in_common_is_refused(store, texts):
    annotated(store, texts, "a", {"r0": []})
    annotated(store, texts, "b", {"r1": []})
    with pytest.raises(InputError, match="a, b: have no rollout in common"):
        compare_annotations(("a", "b"), store)


def test_annotations_of_other_texts_are_refused(store, texts):
    annotated(store, texts, "a", {"r0": []})
    annotated(store, texts, "b", {"r0": []}, segments=[{"start": 0, "end": 3}])
    with pytest.raises(InputError, match="rollout r0"):
        compare_annotations(("a", "b"), store)


@pytest.mark.parametrize("names", [("a",), ("a", "a")])
def test_two_different_datasets_are_needed(store, texts, names):
    annotated(store, texts, "a", FIRST)
    with pytest.raises(InputError, match="two or more"):
        compare_annotations(names, store)


def test_the_reference_is_one_of_them(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", FIRST)
    with pytest.raises(InputError, match="--reference c: is none of a, b"):
        compare_annotations(("a", "b"), store, reference="c")


def test_three_annotators_make_three_pairs_led_by_the_reference(store, texts):
    for name in ("a", "b", "c"):
        annotated(store, texts, name, FIRST)
    made = compare_annotations(("a", "b", "c"), store, reference="b")
    pairs = [(pair.reference, pair.other) for pair in made.pairs]
    assert pairs == [("b", "a"), ("b", "c"), ("a", "c")]


def test_units_are_characters_without_token_ids(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", SECOND)
    made = compare_annotations(("a", "b"), store)
    assert (made.unit, made.unit_reason) == ("characters", "some responses have no token ids")


# --- what it says --------------------------------------------------------------------------------


def test_an_unknown_cost_stays_unknown(store, texts):
    annotated(store, texts, "a", FIRST)
    annotated(store, texts, "b", SECOND, cost_usd=None)
    made = compare_annotations(("a", "b"), store)
    table = comparison_table(made, resamples=100)
    row = overall(table)
    assert (row["reference_cost_usd"], row["other_cost_usd"]) == (2.0, None)
    assert row["reference_prompt_tokens"] == 40
    facts = comparison_report.annotators(made, table)
    assert dict(facts["a"])["cost"] == "$2.0000"
    assert dict(facts["b"])["cost"] == "unknown"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_loads_and_runs_nothing_whatever_a_problem_says(store, tmp_path):
    hostile = "</p><script>alert(1)</script><img src=x onerror=alert(1)> \u202e"
    verdicts = written(store, [("abcdefgh", True), ("abcdefgh", False)] * 2, hostile)
    annotated(store, verdicts, "a", FIRST)
    annotated(store, verdicts, "b", SECOND)
    made = compare_annotations(("a", "b"), store)
    table = comparison_table(made, resamples=100)
    paths = comparison_report.write(made, table, store, tmp_path / "out")
    assert pq.read_table(paths[0]).equals(table)
    html = paths[1].read_text()
    parser = Tags()
    parser.feed(html)
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "img", "link", "iframe"}
    assert not any(name.startswith("on") or name in ("src", "style")
                   for _, attributes in parser.seen for name in attributes)  # fmt: skip
    policy = next(a["content"] for tag, a in parser.seen if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert "&lt;script&gt;alert(1)" in html
    assert "\u202e" not in html


def test_the_command_prints_figures_and_where_they_are(sampled, tmp_path, capsys):
    out = tmp_path / "compared"
    assert run("compare", "line", "value", "--store", sampled.root, "--output", out) == 0
    printed = capsys.readouterr().out
    for words in ("24 rollouts of 6 problems in common", "counted in tokens", "value against line"):
        assert words in printed
    assert (out / "compare.html").exists()
    assert pq.read_table(out / "comparisons.parquet").num_rows == overall_rows(sampled)


def overall_rows(store: Store) -> int:
    return comparison_table(compare_annotations(("line", "value"), store), resamples=100).num_rows


def test_labels_are_imported_and_compared_from_the_command_line(tmp_path, capsys):
    row = {"id": "gsm8k-0", "generator": "g", "problem": "1 + 1?", "steps": ["1 + 1 = 3.", "So 3."],
           "final_answer_correct": False, "label": 0}  # fmt: skip
    file, root = tmp_path / "gsm8k.json", tmp_path / "store"
    file.write_text(json.dumps([row, row | {"generator": "h"}]))
    for alias, hidden in (("x", []), ("y", ["--hide-verdict"])):
        command = ["import", "processbench", file, "--alias", alias, "--store", root, *hidden]
        assert run(*command) == 0
    assert "x-human: annotate/" in capsys.readouterr().out
    assert run("compare", "x-human", "y-human", "--store", root) == 0
    printed = capsys.readouterr().out
    assert "2 rollouts of 1 problem" in printed
    assert "counted in characters" in printed


def test_a_figure_that_rounds_to_zero_has_no_sign():
    row = {"kappa": -0.0001, "kappa_low": -0.0004, "kappa_high": 0.2}
    assert comparison_report.estimate(row, "kappa") == "0.000 (0.000 – 0.200)"
