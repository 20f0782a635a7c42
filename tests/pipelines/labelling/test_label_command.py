"""Command label: tasks out, marks back, agreement of people; what the options do."""

import json
import re
import sys
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.labelling.shown import html_text, response_html, shown
from trace_opd.schemas.configs import SegmentConfig
from trace_opd.tests.label_studio.texts import CASES, check_marks, make_store, written
from trace_opd.trace.segment import segment


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path / "store")


def run(*args: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trace-opd", *args])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def tasks(folder: str = "out") -> list[dict]:
    return json.loads((Path(folder) / "tasks.json").read_text())


def test_agreement_of_people_is_one_command(store, capsys):
    both = [
        task | {"annotations": [task["annotations"][0] | {"completed_by": who} for who in names]}
        for task, names in zip(written(store), [("anna", "ben")] * len(CASES), strict=True)
    ]
    Path("export.json").write_text(json.dumps(both))
    assert run("label", "import", "export.json", "--alias", "human") == 0
    assert f"ok {len(CASES)}" in capsys.readouterr().out
    check_marks(store.get("human-anna"))
    assert run("compare", "human-anna", "human-ben", "--output", "compared") == 0
    assert re.search(r"κ +1\.000", capsys.readouterr().out)


def test_a_task_shows_its_response_exactly(store):
    assert run("label", "export", "verdicts", "out") == 0
    for task, case in zip(tasks(), CASES, strict=True):
        data = task["data"]
        assert data["response"] == shown(case.response)
        assert html_text(data["response_html"]) == data["response"]
        assert len(data["response"]) == len(case.response)
    fields = set(re.findall(r'<Text .* value="\$(\w+)"/>', Path("out/config.xml").read_text()))
    assert fields == {"problem", "reference", "verdict"}
    assert fields <= set(tasks()[0]["data"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_text_node_holds_a_wide_character_and_another(case):
    content, nodes = response_html(case.response, segment(case.response, SegmentConfig()))
    texts = [case.response[node.start : node.end] for node in nodes]
    assert "".join(texts) == case.response
    assert all(len(text) == 1 for text in texts if any(char > "\uffff" for char in text))
    assert len({node.path for node in nodes}) == len(nodes)
    assert not any(ord(char) < 32 and char not in "\t\n" for char in content)


def test_options_choose_and_hide(store):
    assert run("label", "export", "verdicts", "out", "--only", "right") == 0
    assert {task["data"]["rollout_id"] for task in tasks()} == {
        f"r{index}" for index, case in enumerate(CASES) if case.correct
    }
    assert run("label", "export", "verdicts", "out", "--hide-verdict", "--hide-reference") == 0
    content = Path("out/tasks.json").read_text() + Path("out/config.xml").read_text()
    assert "Final answer" not in content
    assert "mark the" not in content


def test_a_larger_limit_keeps_the_rollouts_of_a_smaller(store):
    chosen = []
    for limit in ("2", "2", "4"):
        assert run("label", "export", "verdicts", "out", "--limit", limit, "--seed", "3") == 0
        chosen.append([task["data"]["rollout_id"] for task in tasks()])
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) < set(chosen[2])
    assert run("label", "export", "verdicts", "out", "--limit", "2", "--seed", "4") == 0
    assert [task["data"]["rollout_id"] for task in tasks()] != chosen[0]


def test_marks_of_an_annotator_become_predictions(store):
    Path("export.json").write_text(json.dumps(written(store)))
    assert run("label", "import", "export.json", "--alias", "human") == 0
    assert run("label", "export", "verdicts", "out", "--from", "human-rule") == 0
    for task, case in zip(tasks(), CASES, strict=True):
        (prediction,) = task["predictions"]
        marks = [one["value"] for one in prediction["result"] if one["type"] == "labels"]
        offsets = [tuple(mark["globalOffsets"].values()) for mark in marks]
        assert offsets == case.spans()
        assert prediction["model_version"] == "rule"


def test_answers_that_contradict_themselves_are_invalid(store, capsys):
    changed = written(store)
    error, key = changed[0]["annotations"][0], changed[2]["annotations"][0]
    error["result"] = error["result"][1:]  # a type without a mark
    key["result"][-1]["value"]["choices"] = ["miscount"]
    mixed = changed[1]["annotations"][0]["result"]
    mixed[0]["value"]["labels"] = ["key"]
    Path("export.json").write_text(json.dumps(changed))
    assert run("label", "import", "export.json", "--alias", "human") == 0
    rows = store.get("human-rule").read().to_pylist()
    assert [row["status"] for row in rows[:4]] == ["invalid", "invalid", "invalid", "ok"]
    assert "names a type and marks nothing" in capsys.readouterr().out
