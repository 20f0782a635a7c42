"""The report as a person sees it: lineage, evaluation, what is left out, use in a browser."""

import html
import re
from types import SimpleNamespace
from typing import Any

import pytest

from trace_opd.data.store import Dataset, content_hash
from trace_opd.pipelines.compare import page
from trace_opd.pipelines.compare.compare import compare_annotations
from trace_opd.pipelines.compare.table import comparison_table
from trace_opd.pipelines.stages.evaluate import summarize
from trace_opd.pipelines.viewer import report_page
from trace_opd.pipelines.viewer.overview import ANNOTATED, VERIFIED
from trace_opd.schemas.configs import EvaluateConfig, ReportConfig
from trace_opd.schemas.labels import AnnotationStatus, VerdictStatus
from trace_opd.schemas.tables import ANNOTATIONS, EVALUATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.schemas.tables import ROUTED as ROUTED_TABLE
from trace_opd.tests.pipelines.viewer.test_report import HOSTILE, Run, byte_tokenizer, make_run

TABLE_STAGES = (
    ("problems", "problems", PROBLEMS, ()),
    ("rollouts", "rollout", ROLLOUTS, ("problems",)),
    ("verdicts", "verify", VERDICTS, ("rollouts",)),
    ("annotations", "annotate", ANNOTATIONS, ("verdicts",)),
    ("routed", "convert", ROUTED_TABLE, ("annotations",)),
)
STAGES = [stage for _, stage, _, _ in TABLE_STAGES]
METRICS = """{"step": 0, "phase": "offline", "reward": 0.5, "kl_fkl": 0.1, "kl_rkl": 0.2}
{"step": 1, "phase": "online", "reward": 0.6, "kl_fkl": 0.2, "kl_rkl": 0.1}
"""


def trained(run: Run, offline: int, online: int, evaluated: bool = True) -> Dataset:
    """A train run with so many steps, its online tables, and its evaluation."""
    steps = {"offline": {"steps": offline}, "online": {"steps": online}}
    inputs = {"problems": run.problems} | ({"routed": run.routed} if offline else {})
    draft: Any = run.store.begin("train", steps, inputs, None, steps)
    (draft.local_path() / "metrics.jsonl").write_text(METRICS)
    made: dict[str, Dataset] = {}
    for role, stage, contract, roles in TABLE_STAGES if online else ():
        source = {"problems": run.problems, "annotations": run.annotations, "routed": run.routed}
        rows = source.get(role) or run.annotations.input("verdicts")
        rows = rows.input("rollouts") if role == "rollouts" else rows
        table: Any = run.store.begin(
            stage, {"online": draft.ref}, {name: made[name] for name in roles}, contract
        )
        table.write_part(0, rows.read())
        made[role] = table.finish(1)
    tables = {role: dataset.ref for role, dataset in made.items()}
    done = draft.finish(0, {"tables": tables} if online else {})
    if evaluated:
        evaluation(run, done)
    return done


def evaluation(run: Run, of: Dataset) -> Dataset:
    """20 held-out problems: the base solves 1 of 4 samples of each, the trained policy 3."""
    rows = [
        {
            "evaluation_id": content_hash([role, index]), "problem_id": f"p{index:02}",
            "source": "made up", "policy": role, "policy_name": role, "policy_revision": "r",
            "k": 4, "correct": correct, "majority_correct": 0.5, "mean_tokens": 9.0,
            "truncated": 0, "unscored": 0,
        }
        for role, correct in (("base", 1), ("trained", 3)) for index in range(20)
    ]  # fmt: skip
    table = EVALUATIONS.table(rows)
    inputs = {"problems": run.problems, "trained": of}
    draft: Any = run.store.begin("evaluate", {"of": of.ref}, inputs, EVALUATIONS)
    draft.write_part(0, table)
    plan: Any = SimpleNamespace(config=EvaluateConfig(k=4, bootstrap=100))
    return draft.finish(1, summarize(plan, iter([table])))


def strands(page: str) -> list[tuple[str, str, list[str]]]:
    """Name, note and stages of each row of the lineage."""
    found = re.findall(r'<div class="strand.*?>(.*?)</ol>', page, re.DOTALL)
    head = r"<h2>(.*?) <small>(.*?)</small></h2>"
    names = [re.findall(head, row) or [("", "")] for row in found]
    stages = [re.findall("<strong>(.*?)</strong>", row) for row in found]
    return [(*name, row) for (name,), row in zip(names, stages, strict=True)]


def text_of(page: str) -> str:
    """What a person reads, without the script's data."""
    markup = re.sub("<(style|script).*?</\\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<.*?>", "", markup)).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    responses = [["right\n", "wrong\n", text] for text in HOSTILE]
    return make_run(tmp_path_factory.mktemp("run"), byte_tokenizer(), responses)


@pytest.mark.parametrize(
    ("offline", "online", "evaluated", "notes"),
    [
        (5, 7, True, ["5 steps on one table", "7 steps, a part each", "before and after"]),
        (5, 0, True, ["5 steps on one table", "none: online.steps is 0", "before and after"]),
        (0, 7, False, ["none: offline.steps is 0", "7 steps, a part each", "not evaluated yet"]),
    ],
)
def test_tables_of_offline_and_online_steps_are_two_rows(run, offline, online, evaluated, notes):
    path = report_page.run(
        ReportConfig(dataset=trained(run, offline, online, evaluated).ref), run.store
    )
    page = path.read_text("utf-8")
    rows = strands(page)
    assert [row[0] for row in rows] == ["offline", "online", "trained"]
    assert [row[1] for row in rows] == notes
    ends = ["evaluate"] if evaluated else []
    problems = [] if offline else ["problems"]  # else in the first row
    assert [row[2] for row in rows] == [
        STAGES if offline else [], STAGES if online else [], [*problems, "train", *ends],
    ]  # fmt: skip
    text = text_of(page)
    assert ("trace-opd report dataset=convert/" in text) == bool(offline and online)
    assert ("had no evaluation of this run" in text) == (not evaluated)


def test_every_status_but_ok_is_explained():
    statuses = {*AnnotationStatus, *VerdictStatus}
    assert {*ANNOTATED, *VERIFIED} == statuses - {AnnotationStatus.OK, VerdictStatus.OK}


def test_figures_before_and_after_have_their_intervals(run):
    done = trained(run, 5, 8)
    text = text_of(report_page.run(ReportConfig(dataset=done.ref), run.store).read_text("utf-8"))
    assert "20 held-out problems (made up), 4 samples each" in text
    before, after, difference = "25.0% 25.0% – 25.0%", "75.0% 75.0% – 75.0%", "+50.0 +50.0 to +50.0"
    assert f"avg@4 mean over samples {before} {after} {difference} points" in text


def test_figures_of_which_nothing_was_scored_are_dashes(run):
    done = trained(run, 4, 7, evaluated=False)
    inputs = {"problems": run.problems, "trained": done}
    draft: Any = run.store.begin("evaluate", {"null": 1}, inputs, EVALUATIONS)
    null, half = {"value": None, "ci95": None}, {"value": 0.5, "ci95": [0.25, 0.75]}
    policies = {
        role: {"problems": 1, "sources": {"s": {}}, "avg@4": estimate}
        for role, estimate in (("base", null), ("trained", half))
    }
    draft.finish(0, {"k": 4, "policies": policies, "paired_difference": {"avg@4": null}})
    text = text_of(report_page.run(ReportConfig(dataset=done.ref), run.store).read_text("utf-8"))
    assert "avg@4 mean over samples – 50.0% 25.0% – 75.0% –" in text


@pytest.mark.parametrize("summary", [{}, {"k": 4, "policies": {"base": {"problems": 1}}}])
def test_an_evaluation_without_figures_is_left_out(run, caplog, summary):
    done = trained(run, 3, len(summary), evaluated=False)
    inputs = {"problems": run.problems, "trained": done}
    draft: Any = run.store.begin("evaluate", {"bad": summary}, inputs, EVALUATIONS)
    draft.finish(0, summary)
    page = report_page.run(ReportConfig(dataset=done.ref), run.store).read_text("utf-8")
    assert 'class="evaluation"' not in page
    assert "is not an evaluation's" in caplog.text


def test_bars_count_the_rollouts_of_the_list_only(tmp_path):
    """The other tables have rows of rollouts that the routed one leaves out."""
    made = make_run(tmp_path, byte_tokenizer(), [["a\n", "b\n"] for _ in range(4)])
    draft: Any = made.store.begin(
        "convert", {"half": True}, {"annotations": made.annotations}, ROUTED_TABLE,
        made.routed.manifest["config"],
    )  # fmt: skip
    draft.write_part(0, made.routed.read().slice(0, 4))
    half = draft.finish(1)
    page = report_page.run(ReportConfig(dataset=half.ref), made.store).read_text("utf-8")
    bars = re.findall(r'data-facet="(\w+)" data-value="(\w+)".*?<b>(\d+)</b>', page)
    assert ("verdict", "ok", "4") in bars
    assert ("status", "ok", "4") in bars
    assert "4 sampled rollouts that table" in text_of(page)


# --- in a browser --------------------------------------------------------------------------------

COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def address(run) -> str:
    done = trained(run, 5, 9)
    return report_page.run(ReportConfig(dataset=done.ref), run.store).as_uri()


def test_browser_draws_rollouts_and_curves_and_runs_no_planted_script(browser, address):
    browser.open(f"{address}#id={content_hash([1, 2])}")
    assert browser.js("document.title").endswith(" · trace-opd")
    assert browser.js("document.querySelectorAll('img').length") == 0
    drawn = browser.js("document.querySelector('#detail .response').textContent")
    assert "<img src=x onerror=" in drawn
    lines = browser.js(
        "[...document.querySelectorAll('.chart > svg path')].map((line) => {"
        " const { stroke, strokeDasharray } = getComputedStyle(line);"
        " return [stroke, strokeDasharray] })"
    )
    assert len(lines) == 5  # coverage of two routes, and two types
    assert not [line for line in lines if line[0] == "none"]
    assert lines[1] != lines[2]  # two routes in one chart


def test_browser_brings_the_list_of_a_bar_into_view(browser, address):
    browser.open(f"{address}#theme=dark&correct=yes")
    bars = browser.js(
        "[...document.querySelectorAll('.bars a')].map((bar) =>"
        " [bar.dataset.facet, bar.dataset.value, Number(bar.querySelector('b').textContent)])"
    )
    assert {name for name, _, _ in bars} == {"type", "status", "verdict"}
    for name, value, count in bars:
        bar = f".bars a[data-facet={name}][data-value={value}]"
        browser.js(f"scrollTo(0, 0); document.querySelector('{bar}').click()")
        browser.until(f"document.querySelector('{bar}').ariaCurrent === 'true'")
        browser.until("document.activeElement.id === 'list'")
        assert browser.js("total") == count
        top = browser.js("document.getElementById('browser').getBoundingClientRect().top")
        assert -1 < top < 450
        assert browser.js("location.hash") == f"#theme=dark&{name}={value}"
        assert browser.js("document.querySelectorAll('.bars a[aria-current]').length") == 1


def test_browser_says_that_the_page_is_a_sample(browser, run, tmp_path):
    config = ReportConfig(dataset=run.routed.ref, limit=6)
    browser.open(report_page.run(config, run.store, tmp_path / "sample.html").as_uri())
    assert browser.js(COUNT) == "6 rollouts, sampled from 15"
    hint = browser.js("document.querySelector('.hint').textContent")
    assert hint.startswith("Bars count all 15 rollouts. A click lists those among the 6 on this")
    browser.js("document.querySelector('.bars a[data-value=arithmetic]').click()")
    browser.until(f"{COUNT} === '2 of 6, sampled from 15'")


def test_browser_fits_every_page_into_a_phone(browser, run, address, tmp_path):
    other: Any = run.store.begin(
        "annotate", {"by": "another"}, {"verdicts": run.annotations.input("verdicts")}, ANNOTATIONS
    )
    other.write_part(0, run.annotations.read())
    second = other.finish(1)
    pair = ReportConfig(dataset=run.annotations.ref, against=second.ref)
    compared = compare_annotations([run.annotations.ref, second.ref], run.store, None, 0.25)
    table = comparison_table(compared, 100, 0)
    page.write(compared, table, run.store, tmp_path)
    for url, ready in (
        (address, "#detail .response"),
        (report_page.run(pair, run.store, tmp_path / "pair.html").as_uri(), "#detail .response"),
        ((tmp_path / "compare.html").as_uri(), ".figures"),
    ):
        browser.open(url, ready)
        browser.js("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert {width: browser.too_wide(width) for width in (360, 420, 1280)} == {
            360: [], 420: [], 1280: [],
        }  # fmt: skip
