"""Two annotators side by side, and `view`: what is compared, served, drawn and reached by keys."""

import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trace_opd.data.store import Dataset, Store, content_hash
from trace_opd.pipelines.cli.show import show_rollout
from trace_opd.pipelines.terminal import visible
from trace_opd.pipelines.viewer import report_page
from trace_opd.pipelines.viewer.row_reader import RowReader
from trace_opd.pipelines.viewer.side_by_side import Agreement, compare_marks
from trace_opd.pipelines.viewer.span_overlap import SpanEnds, disagreement, overlap
from trace_opd.pipelines.viewer.view import HOST, Viewer, open_server
from trace_opd.schemas.configs import ReportConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.tests.pipelines.browser import Browser

PWNED = "document.title='pwned'"
HOSTILE = (
    f'</script><script>{PWNED}</script><img src=x onerror="{PWNED}">\u2028<!--<script>\x00\x1b[31m'
    "turned \u202eright to left\n"
)
# Each response has a line per segment; the lines that each annotator marks, by rank; their types.
ROLLOUTS_MADE = (
    # text, lines that A marks, lines that B marks, type of A, type of B, status of B
    ("one\ntwo\nthree\n", [1], [1], "counting", "counting", "ok"),
    ("one\ntwo\nfour\n", [0], [2], "counting", "counting", "ok"),
    ("one\ntwo\nfive\n", [0, 1], [1], "counting", "setup", "ok"),
    ("one\ntwo\nsix\n", [0], [], "counting", None, "failed"),
    (HOSTILE + "seven\n", [0], [0, 1], "other", "other", "ok"),
    ("one\ntwo\neight\n", [], [], None, None, "empty"),
)
IDS = [content_hash(["rollout", index]) for index in range(len(ROLLOUTS_MADE))]


@dataclass(frozen=True)
class Pair:
    """Two annotations datasets of the same rollouts."""

    store: Store
    a: Dataset
    b: Dataset


def lines(text: str) -> list[dict[str, int]]:
    ends = np.cumsum([len(line) for line in text.split("\n")[:-1]]) + np.arange(
        1, text.count("\n") + 1
    )
    return [{"start": int(a), "end": int(b)} for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def spans(text: str, marked: list[int]) -> list[dict[str, Any]]:
    segments = lines(text)
    return [
        {"segments": [line], "kind": "key", "rank": rank}
        | segments[line]
        | {"text": text[segments[line]["start"] : segments[line]["end"]]}
        for rank, line in enumerate(marked)
    ]


def annotation(index: int, name: str, marked: list[int], kind: str | None, status: str) -> dict:
    text = ROLLOUTS_MADE[index][0]
    return ids(index) | {
        "correct": index % 2 == 0,
        "segments": lines(text),
        "spans": spans(text, marked),
        "diagnostic_type": kind,
        "status": status,
        "annotator_name": name,
        "annotator_model": "m",
        "prompt_version": "1",
        "raw_answer": f"raw answer of {name}",
        "latency_s": 0.0,
    }


def ids(index: int) -> dict[str, str]:
    """Problem 0 has the even rollouts, problem 1 the odd ones."""
    problem = index % 2
    return {"rollout_id": IDS[index], "problem_id": f"p{problem}", "group_id": f"g{problem}"}


def rollout(index: int) -> dict[str, Any]:
    return ids(index) | {
        "sample_index": index // 2,
        "prompt_token_ids": [0],
        "token_ids": [1, 2, 3],
        "logprobs": [-0.5] * 3,
        "response": ROLLOUTS_MADE[index][0],
        "finish_reason": "stop",
        "policy_name": "p",
        "policy_revision": "r",
        "policy_step": 0,
        "vocab_fingerprint": "",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 10,
        "seed": 0,
        "on_policy": True,
    }


def verdict(index: int) -> dict[str, Any]:
    right = index % 2 == 0
    return ids(index) | {
        "reward": float(right),
        "correct": right,
        "parsed_answer": "7",
        "status": "ok",
        "verifier": "by hand",
        "seconds": 0.0,
    }


def problem(index: int) -> dict[str, Any]:
    return {
        "problem_id": f"p{index}",
        "problem": f"What is {index}+1? <b>bold</b>",
        "answer": "7",
        "answer_kind": "math",
        "source": "made up",
        "split": "train",
    }


def make_pair(root: Path) -> Pair:
    """Two parts each; B's rows stand in the reverse order of A's."""
    store = Store(root)

    def write(stage, contract, rows, inputs, settings=None) -> Dataset:
        settings = settings or {}
        draft = store.begin(stage, settings, inputs, contract, settings)
        half = (len(rows) + 1) // 2
        draft.write_part(0, contract.table(rows[:half]))
        draft.write_part(1, contract.table(rows[half:]))
        return draft.finish(2)

    every = range(len(ROLLOUTS_MADE))
    problems = write("problems", PROBLEMS, [problem(0), problem(1)], {})
    rollouts = write("rollout", ROLLOUTS, [rollout(i) for i in every], {"problems": problems})
    verdicts = write("verify", VERDICTS, [verdict(i) for i in every], {"rollouts": rollouts})
    inputs = {"verdicts": verdicts, "rollouts": rollouts, "problems": problems}
    by_a, by_b = [], []
    for index, (_, marked_a, marked_b, type_a, type_b, status_b) in enumerate(ROLLOUTS_MADE):
        by_a.append(annotation(index, "ann", marked_a, type_a, "ok" if marked_a else "empty"))
        by_b.append(annotation(index, "bob", marked_b, type_b, status_b))
    a = write("annotate", ANNOTATIONS, by_a, inputs, {"annotator": {"name": "ann"}})
    b = write("annotate", ANNOTATIONS, by_b[::-1], inputs, {"annotator": {"name": "bob"}})
    return Pair(store, a, b)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("view") / "store")


def page_data(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


# --- agreement -----------------------------------------------------------------------------------


def test_each_character_is_marked_by_both_by_one_or_by_neither():
    text = "one\ntwo\nthree\n"
    first = {"segments": lines(text), "spans": spans(text, [1, 0])}
    second = {"segments": [{"start": 0, "end": 14}], "spans": [{"start": 4, "end": 10, "rank": 0}]}
    a, b = compare_marks(text, first, second)
    assert [tuple(piece) for piece in a] == [
        ("one\n", Agreement.ONLY_A, 1, 0),
        ("two\n", Agreement.BOTH, 0, 1),
        ("th", Agreement.ONLY_B, -1, 2),
        ("ree\n", Agreement.NEITHER, -1, None),
    ]
    assert [tuple(piece) for piece in b] == [
        ("one\n", Agreement.ONLY_A, -1, 0),
        ("two\n", Agreement.BOTH, 0, None),
        ("th", Agreement.ONLY_B, 0, None),
        ("ree\n", Agreement.NEITHER, -1, None),
    ]


_SPANS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 6)).map(
        lambda drawn: (drawn[0], drawn[1], drawn[1] + drawn[2])
    ),
    max_size=8,
)


@given(_SPANS, _SPANS)
def test_overlap_counts_characters_as_sets_do(first, second):
    def characters(marks, row):
        return {at for r, start, end in marks if r == row for at in range(start, end)}

    def arrays(marks):
        columns = np.array(marks, dtype=np.int64).reshape(-1, 3).T
        return SpanEnds(*columns)

    both, either = overlap(arrays(first), arrays(second), 4)
    for row in range(4):
        a, b = characters(first, row), characters(second, row)
        assert (both[row], either[row]) == (len(a & b), len(a | b))


def test_disagreement_is_the_share_marked_by_one_plus_one_for_another_type():
    both, either = np.array([4, 0, 3, 0, 2]), np.array([4, 8, 4, 0, 2])
    differ = np.array([False, False, True, False, False])
    comparable = np.array([True, True, True, True, False])
    scores = disagreement(both, either, differ, comparable)
    assert scores[:4].tolist() == [0, 1, 1.25, 0]
    assert np.isnan(scores[4])


# --- the report of two annotators ----------------------------------------------------------------


def test_report_lays_two_annotators_side_by_side(pair):
    config = ReportConfig(dataset=pair.a.ref, against=pair.b.ref)
    path = report_page.run(config, pair.store)
    assert path.name == f"against-{pair.b.id}.html"
    data = page_data(path.read_text(encoding="utf-8"))
    assert data["labels"] == ["ann", "bob"]
    drawn = {rollout["id"]: rollout["sides"] for rollout in data["rollouts"]}
    first, second = drawn[IDS[1]]
    assert [piece[:3] for piece in first["pieces"]] == [
        ["one\n", Agreement.ONLY_A, 0],
        ["two\n", Agreement.NEITHER, -1],
        ["four\n", Agreement.ONLY_B, -1],
    ]
    assert [piece[2] for piece in second["pieces"]] == [-1, -1, 0]
    assert (first["raw"], second["raw"]) == ("raw answer of ann", "raw answer of bob")
    assert drawn[IDS[3]][1]["status"] == "failed"


def test_report_lists_how_far_the_annotators_are_apart(pair):
    config = ReportConfig(dataset=pair.a.ref, against=pair.b.ref)
    data = page_data(report_page.run(config, pair.store).read_text(encoding="utf-8"))
    scores = {row["id"]: row["disagreement"] for row in data["rows"]}
    hostile = 1 - len(HOSTILE) / len(HOSTILE + "seven\n")
    # Rollout 2: "one\ntwo\n" against "two\n", and another type.
    expected = [0, 1, 1.5, None, round(hostile, 4), 0]
    assert [scores[rollout_id] for rollout_id in IDS] == expected
    marks = next(facet for facet in data["facets"] if facet["name"] == "marks")
    assert dict(map(tuple, marks["values"])) == {
        "apart": 1, "not comparable": 1, "partly": 2, "same": 2,
    }  # fmt: skip


def test_annotators_of_one_name_get_their_datasets_ids(tmp_path, pair):
    same = pair.store.begin(
        "annotate", {"n": 2}, {"verdicts": pair.a.input("verdicts")}, ANNOTATIONS
    )
    for part in range(pair.a.parts):
        same.write_part(part, pair.a.read_part(part))
    same.header["config"] = pair.a.manifest["config"]
    again = same.finish(pair.a.parts)
    config = ReportConfig(dataset=pair.a.ref, against=again.ref)
    data = page_data(report_page.run(config, pair.store).read_text(encoding="utf-8"))
    assert data["labels"] == [f"ann {pair.a.id[:8]}", f"ann {again.id[:8]}"]


def test_annotators_of_other_rollouts_are_refused(pair, tmp_path):
    problems = pair.a.input("problems")
    others = pair.store.begin("rollout", {"n": 2}, {"problems": problems}, ROLLOUTS)
    others.write_part(0, pair.a.input("rollouts").read_part(0))
    rollouts = others.finish(1)
    judged = pair.store.begin("verify", {"n": 2}, {"rollouts": rollouts}, VERDICTS)
    judged.write_part(0, pair.a.input("verdicts").read_part(0))
    draft = pair.store.begin("annotate", {}, {"verdicts": judged.finish(1)}, ANNOTATIONS)
    draft.write_part(0, pair.b.read_part(0))
    stranger = draft.finish(1)
    with pytest.raises(InputError, match="annotate different rollouts"):
        report_page.run(ReportConfig(dataset=pair.a.ref, against=stranger.ref), pair.store)
    with pytest.raises(InputError, match="holds rollouts, this stage needs table annotations"):
        report_page.run(ReportConfig(dataset=pair.a.ref, against=rollouts.ref), pair.store)


# --- rows by number ------------------------------------------------------------------------------


def test_rows_come_from_their_row_groups_in_the_order_asked_for(tmp_path):
    store = Store(tmp_path)
    draft = store.begin("verify", {}, {}, VERDICTS)
    table = VERDICTS.table([verdict(i) for i in range(6)])
    for part in range(2):
        draft.write_part(part, table.slice(3 * part, 3))
    dataset = draft.finish(2)
    # A row group for each row: the reader must find its way within a part too.
    pq.write_table(table.slice(3, 3), dataset.path("part-00001.parquet"), row_group_size=1)
    reader = RowReader(dataset, ["rollout_id"], keep_bytes=0)
    rows = reader.rows([5, 0, -1, 3, 4])
    assert [row and row["rollout_id"] for row in rows] == [IDS[5], IDS[0], None, IDS[3], IDS[4]]


def test_an_optional_column_is_read_from_the_parts_that_have_it(tmp_path):
    store = Store(tmp_path)
    draft = store.begin("verify", {}, {}, VERDICTS)
    rows = [verdict(i) for i in range(4)]
    draft.write_part(0, VERDICTS.table(rows[:2]))
    draft.write_part(1, VERDICTS.table(row | {"feedback": "near"} for row in rows[2:]))
    reader = RowReader(draft.finish(2), ["rollout_id", "feedback"])
    assert reader.rows([0, 3]) == [
        {"rollout_id": IDS[0]},
        {"rollout_id": IDS[3], "feedback": "near"},
    ]


def test_feedback_and_grades_of_a_rollout_are_shown_and_their_markup_is_not_run(tmp_path):
    pair = make_pair(tmp_path)
    rollouts = pair.a.input("rollouts")
    grade = {"name": "judge", "repeat": 0, "order": "reference_first", "status": "ok"}
    told = {
        "feedback": "near <script>it</script>\u202e",
        "grades": [
            grade | {"grade": 7, "reason": "a <b>gap</b>"},
            grade | {"repeat": 1, "grade": None, "status": "refused", "reason": None},
        ],
    }
    verdicts = pair.store.begin("verify", {"judge": 1}, {"rollouts": rollouts}, VERDICTS)
    for part in range(2):
        rows = pair.a.input("verdicts").read_part(part).to_pylist()
        verdicts.write_part(part, VERDICTS.table(row | told for row in rows))
    inputs = {"verdicts": verdicts.finish(2), "rollouts": rollouts}
    inputs["problems"] = rollouts.input("problems")
    draft = pair.store.begin("annotate", {"judge": 1}, inputs, ANNOTATIONS)
    for part in range(pair.a.parts):
        draft.write_part(part, pair.a.read_part(part))
    dataset = draft.finish(pair.a.parts)
    page = report_page.run(ReportConfig(dataset=dataset.ref), pair.store).read_text("utf-8")
    (row,) = (row for row in page_data(page)["rollouts"] if row["id"] == IDS[1])
    assert row["feedback"] == "near <script>it</script>⟨U+202E⟩"
    lines = ["judge, reference first, repeat 0: 7: a <b>gap</b>"]
    assert row["grades"].splitlines() == [*lines, "judge, reference first, repeat 1: refused"]
    assert "<script>it" not in page
    out = io.StringIO()
    show_rollout(IDS[1], pair.store, Console(file=out, width=100))
    assert "judge, reference first, repeat 1: refused" in out.getvalue()


def test_a_corrective_idea_is_shown_beside_its_response_and_its_markup_is_not_run(tmp_path):
    pair = make_pair(tmp_path)
    inputs = {"verdicts": pair.a.input("verdicts")}
    draft = pair.store.begin("annotate", {"n": 3}, inputs, ANNOTATIONS)
    idea = "Count <script>the</script> boxes.\u202e"
    for part in range(pair.a.parts):
        rows = pair.a.read_part(part).to_pylist()
        for row in rows:
            row["reflection"] = None if row["correct"] else idea
        draft.write_part(part, ANNOTATIONS.table(rows))
    dataset = draft.finish(pair.a.parts)
    page = report_page.run(ReportConfig(dataset=dataset.ref), pair.store).read_text("utf-8")
    ideas = {row["id"]: row["reflection"] for row in page_data(page)["rollouts"]}
    assert ideas[IDS[0]] is None
    assert ideas[IDS[1]] == "Count <script>the</script> boxes.⟨U+202E⟩"
    assert "<script>the" not in page
    both = ReportConfig(dataset=pair.a.ref, against=dataset.ref)
    data = page_data(report_page.run(both, pair.store).read_text("utf-8"))
    sides = {row["id"]: row["sides"] for row in data["rollouts"]}[IDS[1]]
    assert [side["reflection"] for side in sides] == [None, ideas[IDS[1]]]
    out = io.StringIO()
    show_rollout(IDS[1], pair.store, Console(file=out, width=100))
    assert "Count <script>the</script> boxes." in out.getvalue()


# --- over HTTP -----------------------------------------------------------------------------------


@contextmanager
def serving(viewer: Viewer) -> Iterator[str]:
    with open_server(viewer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def address(pair) -> Iterator[str]:
    with serving(Viewer(pair.store, pair.a.ref, pair.b.ref)) as address:
        yield address


def get(address: str, path: str, **parameters: Any) -> Any:
    answer = httpx.get(address + path, params=parameters)
    answer.raise_for_status()
    return answer.json()


def found(address: str, **parameters: Any) -> list[int]:
    """Which rollouts a query lists, by their number in ROLLOUTS_MADE."""
    return [IDS.index(row["id"]) for row in get(address, "/rows", **parameters)["rows"]]


def test_list_is_ordered_by_group_or_by_disagreement(address):
    assert found(address) == [0, 2, 4, 1, 3, 5]
    assert found(address, sort="disagreement") == [2, 1, 4, 0, 5, 3]


def test_list_comes_in_pieces(address):
    answer = get(address, "/rows", **{"from": 2, "count": 3})
    assert answer["total"] == 6
    assert [IDS.index(row["id"]) for row in answer["rows"]] == [4, 1, 3]
    assert get(address, "/rows", **{"from": 99})["rows"] == []


@pytest.mark.parametrize(
    ("query", "rollouts"),
    [
        ({"correct": "no"}, [1, 3, 5]),
        ({"status_b": "failed"}, [3]),
        ({"type": "counting", "type_b": "setup"}, [2]),
        ({"marks": "same"}, [0, 5]),
        ({"types": "differ"}, [2]),
        ({"type": "there is none of this"}, []),
        ({"q": "FOUR"}, [1]),
        ({"q": "what is 1+1"}, [1, 3, 5]),
        ({"q": IDS[4][:12]}, [4]),
        ({"q": "one", "marks": "apart"}, [1]),
        ({"q": ".*"}, []),
    ],
)
def test_list_is_filtered_and_searched(address, query, rollouts):
    assert found(address, **query) == rollouts


def test_next_disagreement_and_the_place_of_a_rollout_are_found(address):
    # By dataset order 0, 2, 4, 1, 3, 5: rollouts 2, 4 and 1 disagree.
    assert get(address, "/place")["place"] == 1
    assert get(address, "/place", after=2)["place"] == 3
    assert get(address, "/place", after=3)["place"] is None
    assert get(address, "/place", id=IDS[4])["place"] == 2
    assert get(address, "/place", id=IDS[4], correct="no")["place"] is None


def test_rollout_is_served_as_the_report_draws_it(address, pair):
    served = get(address, "/rollout", id=IDS[4])
    config = ReportConfig(dataset=pair.a.ref, against=pair.b.ref)
    written = page_data(report_page.run(config, pair.store).read_text(encoding="utf-8"))
    (drawn,) = [rollout for rollout in written["rollouts"] if rollout["id"] == IDS[4]]
    assert served.pop("members") == [{"id": IDS[i], "correct": "yes"} for i in (0, 2, 4)]
    assert served.pop("problem") == written["problems"]["p0"]
    assert served == drawn
    text = "".join(piece[0] for piece in served["sides"][1]["pieces"])
    assert text == visible(HOSTILE) + "seven\n"


def test_one_annotator_is_served_without_a_second(pair):
    with serving(Viewer(pair.store, pair.a.ref)) as address:
        assert found(address, sort="disagreement") == [0, 2, 4, 1, 3, 5]
        assert get(address, "/rollout", id=IDS[0])["sides"] == []
        assert get(address, "/place")["place"] is None
        assert page_data(httpx.get(address).text)["labels"] is None


@pytest.mark.parametrize("path", ["/", "/rows", "/rollout?id=0", "/nowhere"])
def test_every_answer_forbids_what_it_does_not_need(address, path):
    headers = httpx.get(address + path).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; script-src ")
    assert policy.endswith("; connect-src 'self'; frame-ancestors 'none'")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]


def test_page_holds_no_rollout_and_loads_nothing(address):
    page = httpx.get(address).text
    assert "rollouts" not in page_data(page)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert "url(" not in page


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_name_is_refused(address, host):
    answer = httpx.get(address, headers={"Host": host})
    assert answer.status_code == 421
    assert "<" not in answer.text


def test_localhost_is_another_name_of_the_server(address):
    port = address.rsplit(":", 1)[1]
    assert httpx.get(address, headers={"Host": f"localhost:{port}"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get_is_answered(address, method):
    answer = httpx.request(method, address + "/rows")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nowhere", 404),
        ("/../../etc/passwd", 404),
        ("/rollout?id=unknown", 404),
        ("/rollout", 404),
        ("/rows?from=-1", 400),
        ("/rows?from=<script>", 400),
        ("/rows?count=1e9", 400),
        ("/rows?q=" + "x" * 20_000, 414),
        ("/rows?" + "a=1&" * 1000, 400),
        ("/rows?q=%ff%fe", 400),
        ("/rows?q=%ed%a0%80", 400),
        ("/%00%ff", 404),
        ("/rollout?id=%00", 404),
        *[
            (f"/{page}?{name}={number}", 400)
            for page, name in (("rows", "from"), ("rows", "count"), ("place", "after"))
            for number in (
                "9" * 5000,
                "-" + "9" * 5000,
                "1" * 16,
                "-2",
                "--1",
                "%D9%A3",
                "1.5",
                "+",
                "%00",
            )
        ],
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests_get_plain_text(address, path, status):
    answer = httpx.get(address + path)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "<" not in answer.text


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET http://[ HTTP/1.1\r\nHost: %s\r\n\r\n",
        b"GET /rows?from=\xff\x00 HTTP/1.1\r\nHost: %s\r\n\r\n",
        b"GET /%s HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /%s HTTP/1.1\r\na: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b"%s HTTP/1.1\r\n\r\n",
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_malformed_request_gets_a_4xx_or_5xx_in_plain_text(address, request_text, capfd):
    host = address.removeprefix("http://")
    with socket.create_connection((HOST, int(host.rsplit(":", 1)[1])), timeout=20) as connection:
        connection.sendall(request_text % host.encode())
        connection.shutdown(socket.SHUT_WR)
        status, *_ = connection.makefile("rb").readline().split(b" ", 2)[1:]
    assert status[:1] in (b"4", b"5")
    assert httpx.get(address).status_code == 200
    assert capfd.readouterr().err == ""


def test_a_missing_part_is_one_sentence(tmp_path):
    pair = make_pair(tmp_path / "store")
    with serving(Viewer(pair.store, pair.a.ref)) as address:
        rollouts = pair.a.input("verdicts").input("rollouts")
        Path(rollouts.path("part-00000.parquet")).unlink()
        answer = httpx.get(f"{address}/rollout?id={IDS[0]}")
    assert answer.status_code == 500
    assert "file is gone" in answer.text


@pytest.mark.parametrize("damage", ["a bit", "rows"])
def test_a_damaged_part_is_a_sentence(tmp_path, damage):
    pair = make_pair(tmp_path / "store")
    with serving(Viewer(pair.store, pair.a.ref)) as address:
        part = Path(pair.a.input("verdicts").input("rollouts").path("part-00000.parquet"))
        if damage == "rows":
            pq.write_table(pq.read_table(part).slice(0, 1), part)
        else:
            group = pq.read_metadata(part).row_group(0)
            columns = [group.column(index) for index in range(group.num_columns)]
            (column,) = [c for c in columns if c.path_in_schema == "response"]
            content = bytearray(part.read_bytes())
            content[column.data_page_offset + 40] ^= 1
            part.write_bytes(content)
        answer = httpx.get(f"{address}/rollout?id={IDS[0]}")
    assert answer.status_code == 500
    assert answer.text.count("\n") == 1
    assert re.search("does not hold what was written|part 0 holds 1 rows", answer.text)
    assert "verify-store" in answer.text


def test_requests_that_the_standard_library_refuses_get_plain_text(address):
    with socket.create_connection((HOST, int(address.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"<script> / HTTP/1.1\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"text/plain" in answer
    assert b"nosniff" in answer


def test_a_taken_port_is_a_sentence(pair):
    viewer = Viewer(pair.store, pair.a.ref)
    with open_server(viewer) as server:
        port = server.server_address[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1: .* --port"):
            open_server(viewer, port)


def test_command_prints_its_address_and_ends_by_interrupt(pair):
    command = [sys.executable, "-m", "trace_opd.pipelines.cli", "view", pair.a.ref]
    command += ["--against", pair.b.ref, "--store", pair.store.root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert httpx.get(address).status_code == 200
        process.send_signal(2)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()


# --- in a browser --------------------------------------------------------------------------------


def shown(browser: Browser) -> int:
    """Which rollout is shown, by its number in ROLLOUTS_MADE."""
    return IDS.index(browser.js("document.querySelector('#detail > .id').textContent"))


def becomes(browser: Browser, rollout: int) -> None:
    browser.until(f"document.querySelector('#detail > .id')?.textContent === '{IDS[rollout]}'")


@pytest.fixture(params=["file", "served"])
def page(request, pair, address) -> str:
    if request.param == "served":
        return address + "/"
    return report_page.run(
        ReportConfig(dataset=pair.a.ref, against=pair.b.ref), pair.store
    ).as_uri()


def test_browser_draws_two_columns_of_one_text(browser, page):
    browser.open(f"{page}#id={IDS[1]}")
    texts = browser.js(
        "[...document.querySelectorAll('.sides .response')].map((column) =>"
        " [...column.querySelectorAll('span')].map((span) => [span.className, span.textContent]))"
    )
    expected = [["p-only_a", "one\n"], ["", "two\n"], ["p-only_b", "four\n"]]
    assert texts == [expected, expected]
    lines = browser.js(
        "[...document.querySelectorAll('.sides .p-only_a')].map((span) =>"
        " getComputedStyle(span).borderBottomStyle)"
    )
    assert lines == ["solid", "dotted"]  # marked here, and marked by the other one


def test_browser_shows_a_hostile_response_as_text(browser, page, pair):
    browser.open(f"{page}#id={IDS[4]}")
    columns = browser.js(
        "[...document.querySelectorAll('.sides .response')].map((column) =>"
        " [...column.querySelectorAll('span')].map((span) => span.textContent).join(''))"
    )
    assert columns == [visible(HOSTILE) + "seven\n"] * 2
    assert not set("".join(columns)) & set("\x00\x1b\u202e\u2028")
    assert browser.js("document.title") == f"{pair.a.ref} · trace-opd"
    assert browser.js("document.querySelectorAll('#detail img, #detail script').length") == 0


def test_browser_is_worked_by_keys(browser, page):
    browser.open(page)
    assert shown(browser) == 2  # the largest disagreement
    browser.press("j")
    becomes(browser, 1)
    browser.press("k")
    becomes(browser, 2)
    browser.press("n")
    becomes(browser, 1)
    browser.js("document.getElementById('list').focus()")
    browser.press("End")
    becomes(browser, 3)
    browser.press("ArrowUp")
    becomes(browser, 5)
    current = "document.getElementById(list.getAttribute('aria-activedescendant'))"
    browser.until(f"{current}.getAttribute('aria-selected') === 'true'")
    browser.press("/")
    assert browser.js("document.activeElement.id") == "q"
    for letter in "four":
        browser.press(letter)
    becomes(browser, 1)
    assert browser.js("document.getElementById('count').textContent") == "1 of 6"
    browser.press("Escape")
    browser.press("?")
    assert browser.js("document.getElementById('help').open")
    browser.press("Escape")
    browser.until("!document.getElementById('help').open")


def test_browser_filters_by_the_address_and_by_the_controls(browser, page):
    browser.open(f"{page}#correct=no&marks=apart")
    assert shown(browser) == 1
    browser.js(
        "const box = document.querySelector('select[name=marks]'); box.value = 'same';"
        " box.dispatchEvent(new Event('change', { bubbles: true }))"
    )
    becomes(browser, 5)
    assert browser.js("location.hash") == "#correct=no&marks=same"


def test_browser_turns_dark_by_system_and_by_key(browser, page):
    background = "getComputedStyle(document.body).backgroundColor"
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", features=scheme)
    browser.open(page)
    dark = browser.js(background)
    browser.press("t")
    light = browser.js(background)
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert (light, dark) == ("rgb(246, 245, 241)", "rgb(18, 20, 24)")


def test_browser_prints_the_rollout_without_controls(browser, page):
    browser.open(page)
    browser.call("Emulation.setEmulatedMedia", media="print")
    hidden = (
        "['.finder', '.toolbar'].map((name) =>"
        " getComputedStyle(document.querySelector(name)).display)"
    )
    seen = "document.querySelector('.sides').getBoundingClientRect().height > 0"
    assert browser.js(hidden) == ["none", "none"]
    assert browser.js(seen)
    browser.call("Emulation.setEmulatedMedia", media="")


def test_browser_holds_only_the_rows_in_sight(browser, tmp_path):
    many = make_many(tmp_path, 3000)
    with serving(Viewer(Store(many.files.root), many.ref)) as address:
        browser.open(address)
        browser.until("document.querySelectorAll('.row .what').length > 10")
        browser.js("document.getElementById('list').focus()")
        browser.press("End")
        browser.until("document.getElementById('place').textContent === '3,000 of 3,000'")
        assert browser.js("document.querySelectorAll('.row').length") < 60
        last = browser.js("document.querySelector('[aria-selected=true]').ariaPosInSet")
        assert last == "3000"


def make_many(root: Path, count: int) -> Dataset:
    """An annotations dataset of `count` rollouts of one problem, nothing marked."""
    store = Store(root)

    def write(stage, contract, rows, inputs) -> Dataset:
        draft = store.begin(stage, {}, inputs, contract)
        draft.write_part(0, contract.table(rows))
        return draft.finish(1)

    names = [{"rollout_id": f"r{index:05d}", "sample_index": index} for index in range(count)]
    of_sample = [{"rollout_id": name["rollout_id"]} for name in names]
    problems = write("problems", PROBLEMS, [problem(0)], {})
    rollouts = write(
        "rollout", ROLLOUTS, [rollout(0) | name for name in names], {"problems": problems}
    )
    verdicts = write(
        "verify", VERDICTS, [verdict(0) | name for name in of_sample], {"rollouts": rollouts}
    )
    unmarked = annotation(0, "ann", [], None, "empty")
    inputs = {"verdicts": verdicts}
    return write("annotate", ANNOTATIONS, [unmarked | name for name in of_sample], inputs)
