"""What the report shows of a selection, a reward's parts, a teacher's scores and a pool."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.viewer import report_page
from trace_opd.pipelines.viewer.overview import LEFT_OUT, SELECTED, overview
from trace_opd.pipelines.viewer.pool_view import pool_view
from trace_opd.pipelines.viewer.rollout_tables import Tables, find_tables
from trace_opd.pipelines.viewer.view import Viewer
from trace_opd.schemas.configs import ReportConfig
from trace_opd.schemas.labels import LeftOut, Selection
from trace_opd.schemas.tables import SCORES, VERDICTS
from trace_opd.tests.pipelines.stages.test_select import PARTS, run, store_of, text_of
from trace_opd.tests.pipelines.viewer.test_report import byte_tokenizer, make_run, page_data
from trace_opd.tests.pipelines.viewer.test_report_page import text_of as words

BAR = r'data-facet="(\w+)" data-value="([^"]+)".*?<b>([\d,]+)</b>'
FIGURE = r"<figcaption>([^<]*)<small>.*?</small></figcaption>\s*<ul>(.*?)</ul>"
BIN = r"<li><span>(.*?)</span>.*?<b>([\d,]+)</b></li>"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Six groups with verdicts, a selection of them, and verdicts of two parts."""
    store = store_of(tmp_path_factory.mktemp("figures") / "store", PARTS, text_of)
    run(store, "select", "keep_truncated=false", "budget=4")
    verdicts = store.get("verdicts")
    parts = "[{name: regex, pattern: 'Pens: [01]'}, {name: length, limit: 20, slack: 20}]"
    run(store, "verify", f"rewards={parts}", "workers=1")
    store.set_alias("judged", store.get("verdicts"))
    store.set_alias("verdicts", verdicts)
    return store


def page_of(store: Store, ref: str, folder: Path) -> str:
    return report_page.run(ReportConfig(dataset=ref), store, folder / "page.html").read_text()


def tiles_of(page: str) -> dict[str, tuple[str, str]]:
    """Value and note of each tile."""
    found = re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd><dd class="note">(.*?)</dd>', page)
    return {html.unescape(label): (value, html.unescape(note)) for label, value, note in found}


def bins_of(page: str) -> dict[str, list[tuple[str, int]]]:
    found = re.findall(FIGURE, page, re.DOTALL)
    return {
        html.unescape(title).strip(): [
            (html.unescape(label), int(n.replace(",", ""))) for label, n in re.findall(BIN, rows)
        ]
        for title, rows in found
    }


# --- select ---


def test_a_selection_shows_what_was_left_out_and_why(store, tmp_path):
    selection = store.get("selection")
    page = page_of(store, "selection", tmp_path)
    assert "<h1>Selection <code>" in page
    bars = {(facet, value): int(count) for facet, value, count in re.findall(BAR, page)}
    assert {v: n for (f, v), n in bars.items() if f == "left_out"} == selection.summary["left_out"]
    kinds = {"annotate": 4, "plain": selection.summary["plain"]}
    kinds["drop"] = selection.summary["dropped"]
    assert {v: n for (f, v), n in bars.items() if f == "selection"} == kinds
    value, note = tiles_of(page)["selected"]
    assert (value, note[:20]) == ("4", "of 16; left out: 1 u")
    text = words(page)
    assert "budget: beyond select.budget" in text
    assert "drop: the group leaves training" in text


def test_each_response_says_what_becomes_of_it(store, tmp_path):
    rollouts = page_data(page_of(store, "selection", tmp_path))["rollouts"]
    table = store.get("selection").read(["rollout_id", "selection", "left_out"]).to_pylist()
    expected = {
        row["rollout_id"]: row["selection"] + (f" ({row['left_out']})" if row["left_out"] else "")
        for row in table
    }
    assert {rollout["id"]: rollout["selection"] for rollout in rollouts} == expected


def test_a_click_on_a_reason_lists_its_responses(store):
    viewer = Viewer(store, "selection")
    table = store.get("selection").read(["left_out"])["left_out"].to_pylist()
    for reason in {*table} - {None}:
        assert viewer.rows({"left_out": reason})["total"] == table.count(reason)
    assert viewer.rows({"left_out": "selected"})["total"] == table.count(None)
    assert "span by importance" not in viewer.page  # nothing is annotated


def test_every_selection_and_reason_is_explained():
    assert {*SELECTED} == {*Selection}
    assert {*LEFT_OUT} == {*LeftOut}


# --- verify.rewards ---


def test_parts_of_a_reward_have_their_means_and_distributions(store, tmp_path):
    judged = store.get("judged")
    page = page_of(store, "judged", tmp_path)
    assert "<h1>Verdicts <code>" in page
    figures = judged.summary["parts"]
    tiles = tiles_of(page)
    for name, figure in figures.items():
        mean = f"{figure['mean']:.3f}"
        assert tiles[f"reward: {name}"] == (mean, "mean value; 0 without")
    bins = bins_of(page)
    assert list(bins) == [f"reward: {name}" for name in figures]
    rows = [row for row in judged.read(["parts"])["parts"].to_pylist() if row]
    for place, name in enumerate(figures):
        values = [row[place]["value"] for row in rows]
        assert sum(count for _, count in bins[f"reward: {name}"]) == len(values)
        assert len(values) == 14  # two of the sixteen are truncated and shown to no part
    assert dict(bins["reward: regex"]) == {
        "0": sum(row[0]["value"] == 0 for row in rows),
        "1": sum(row[0]["value"] == 1 for row in rows),
    }


def test_a_part_without_a_value_is_counted_by_its_reason(store, tmp_path):
    draft: Any = store.begin(
        "verify", {"made": "odd"}, {"rollouts": store.get("rollouts")}, VERDICTS
    )
    statuses = ["ok", "timeout", "oom", "timeout"]
    for part in range(3):
        rows = store.get("judged").read_part(part).to_pylist()
        for number, row in enumerate(rows):
            status = statuses[number % 4]
            value = number / 40 if status == "ok" else None
            row["parts"] = [{"name": "<b>f</b>", "value": value, "status": status, "seconds": 0}]
        draft.write_part(part, VERDICTS.table(rows))
    made = draft.finish(3)
    page = page_of(store, made.ref, tmp_path)
    (bins,) = bins_of(page).values()
    assert "<b>f</b>" not in page
    counts = dict(bins)
    assert counts["none: timeout"] == 7
    assert counts["none: oom"] == 3
    assert sum(counts.values()) == 16
    assert tiles_of(page)["reward: <b>f</b>"][1] == "mean value; 10 without"


def test_each_response_shows_its_parts_and_feedback(store):
    viewer = Viewer(store, "judged")
    row = store.get("judged").read_part(0).to_pylist()[0]
    shown = viewer.rollout({"id": row["rollout_id"]})
    assert [(part["name"], part["value"]) for part in shown["parts"]] == [
        (part["name"], part["value"]) for part in row["parts"]
    ]
    assert shown["selection"] is None
    assert shown["feedback"] is None


# --- scores ---


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[Store, Dataset]:
    """A routed table of two groups and scores of it: of n tokens, 10 ** −n nats the n-th."""
    made = make_run(tmp_path_factory.mktemp("scored"), byte_tokenizer(), [["a\nb\n", "c\nd\n"]] * 2)
    rows = []
    for number, row in enumerate(made.routed.read(["rollout_id", "route"]).to_pylist()):
        positions = np.flatnonzero(row["route"]).tolist() if number else []
        surprise = [10.0**-n for n in range(len(positions))]
        rows.append(
            {
                "rollout_id": row["rollout_id"],
                "positions": positions,
                "top_token_ids": [1] * len(positions),
                "top_logprobs": [-0.1] * len(positions),
                "tail_logprobs": [float(np.log(0.2))] * len(positions),
                "logprobs": [-value for value in surprise],
                "teacher_entropy": [3.0] * len(positions),
                "temperature": 1.0,
                "teacher_name": "t",
                "teacher_revision": "r",
            }
        )
    draft: Any = made.store.begin("score", {"made": "here"}, {"routed": made.routed}, SCORES)
    draft.write_part(0, SCORES.table(rows))
    tokens = sum(len(row["positions"]) for row in rows)
    summary = {"sequences": len(rows), "scored_tokens": tokens, "k": 1}
    return made.store, draft.finish(1, summary)


def test_scores_show_their_distributions_over_the_routed_tokens(scored, tmp_path):
    store, scores = scored
    page = page_of(store, scores.ref, tmp_path)
    assert "<h1>Teacher&#39;s scores <code>" in page
    bins, tokens = bins_of(page), scores.summary["scored_tokens"]
    assert list(bins) == [
        "Surprise of the response's token",
        "Probability outside the k likeliest",
        "Teacher's entropy",
    ]
    assert tokens > 0
    assert dict(bins["Probability outside the k likeliest"])["0.1 – 0.5"] == tokens
    assert dict(bins["Teacher's entropy"])["2 – 5"] == tokens
    surprise = -np.concatenate([np.array(one) for one in scores.read()["logprobs"].to_pylist()])
    found = dict(bins["Surprise of the response's token"])
    assert found["1 – 2"] == np.count_nonzero(surprise == 1)
    assert sum(found.values()) == tokens
    assert tiles_of(page)["scored tokens"] == (str(tokens), "of 4 sequences, 1 likeliest each")


def test_a_table_made_with_scores_shows_them_too(scored, tmp_path):
    store, scores = scored
    routed = scores.input("routed")
    draft: Any = store.begin(
        "convert", {"with": "scores"}, routed_inputs(routed) | {"scores": scores}, routed.contract,
        routed.manifest["config"],
    )  # fmt: skip
    draft.write_part(0, routed.read())
    assert "Teacher's entropy" in bins_of(page_of(store, draft.finish(1).ref, tmp_path))
    assert "Teacher's entropy" not in bins_of(page_of(store, routed.ref, tmp_path))


def routed_inputs(routed: Dataset) -> dict[str, Dataset]:
    return {role: routed.input(role) for role in routed.manifest["inputs"]}


# --- pool ---


def trained(store: Store, pool: Any, parts: list[list[tuple[str, bool | None]]]) -> Any:
    """A train run with this pool in its summary, and its verdicts: a part per online step."""
    rates = store.get("verdicts")
    config = {"offline": {"steps": 2}, "online": {"steps": len(parts)}}
    draft: Any = store.begin("train", {"pool": pool}, {"pool_rates": rates}, None, config)
    made = draft.finish(0, {"pool": pool})
    table: Any = store.begin("verify", {"online": made.ref}, {}, VERDICTS)
    blank = {"parsed_answer": None, "status": "ok", "verifier": "test", "seconds": 0.0}
    for part, judged in enumerate(parts):
        rows = [
            blank
            | {"rollout_id": f"r{part}-{n}", "problem_id": problem, "group_id": problem}
            | {"correct": correct, "reward": None if correct is None else float(correct)}
            for n, (problem, correct) in enumerate(judged)
        ]
        table.write_part(part, VERDICTS.table(rows))
    return made, Tables({"verdicts": table.finish(len(parts))})


def test_a_pool_counts_what_each_band_gave(store):
    pool = [
        {"from_step": 0, "band": [0.0, 0.5], "problems": 9},
        {"from_step": 3, "band": [0.5, 1.0], "problems": 4},
        {"from_step": 9, "band": [1.0, 1.0], "problems": 1},
    ]
    parts = [[("a", True), ("a", None)], [("b", False), ("c", True)], [("b", True), ("b", True)]]
    view = pool_view(*trained(store, pool, parts))
    assert view is not None
    assert view.measure == f"pass rate in {store.get('verdicts').ref}"
    first, second, third = view.bands
    assert (first.first, first.last, first.problems, first.drawn) == (2, 2, 9, 1)
    assert (first.responses, first.pass_rate) == (2, 1.0)
    assert (second.first, second.last, second.drawn, second.pass_rate) == (3, 4, 2, 0.75)
    assert (third.first, third.drawn, third.pass_rate) == (None, 0, None)


@pytest.mark.parametrize("pool", [[{"from_step": 0}], "x", [1], [{"from_step": 0, "band": [0]}]])
def test_a_pool_that_cannot_be_read_is_left_out(store, pool, caplog):
    run_, tables = trained(store, pool, [[("a", True)]])
    assert pool_view(run_, tables) is None
    assert "its pool's figures can't be read" in caplog.text


# --- in a browser ---


def test_browser_fits_pages_of_figures_into_a_phone_and_filters_by_a_reason(
    browser, store, scored, tmp_path
):
    pages = [(store, "selection"), (store, "judged"), (scored[0], scored[1].ref)]
    for number, (of, ref) in enumerate(pages):
        path = tmp_path / f"{number}.html"
        browser.open(report_page.run(ReportConfig(dataset=ref), of, path).as_uri())
        assert {width: browser.too_wide(width) for width in (360, 420, 1280)} == {
            360: [], 420: [], 1280: [],
        }  # fmt: skip
    browser.open((tmp_path / "0.html").as_uri())
    bar = ".bars a[data-facet=left_out][data-value=budget]"
    count = int(browser.js(f"document.querySelector('{bar} b').textContent"))
    browser.js(f"document.querySelector('{bar}').click()")
    browser.until(f"document.querySelector('{bar}').ariaCurrent === 'true'")
    assert browser.js("total") == count


def test_figures_of_a_dataset_without_parts_or_scores_are_none(scored):
    store, scores = scored
    assert overview(find_tables(scores.input("routed"), store)).distributions == []
