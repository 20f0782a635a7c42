"""Exports of Label Studio that cannot be imported: one sentence each, with file and row."""

import copy
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.labelling.import_marks import import_marks
from trace_opd.schemas.errors import InputError
from trace_opd.tests.label_studio.texts import CASES, make_store

Change = Callable[[Any], Any]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def export(store: Store) -> list[dict[str, Any]]:
    """Two tasks, each with one mark and a type."""
    tasks = []
    for index in (0, 1):
        text = CASES[index].response
        mark = {"start": 0, "end": 5, "labels": ["error"], "text": text[:5]}
        tasks.append(
            {
                "data": {
                    "verdicts": store.get("verdicts").ref,
                    "rollout_id": f"r{index}",
                    "response_sha256": sha256(text.encode()).hexdigest(),
                },
                "annotations": [
                    {
                        "completed_by": "anna",
                        "result": [
                            {"from_name": "marks", "value": mark},
                            {"from_name": "type", "value": {"choices": ["miscount"]}},
                        ],
                    }
                ],
            }
        )
    return tasks


def put(path: str, value: Any) -> Change:
    """Set what is at a path of keys and numbers; `...` removes it."""

    def change(tasks: Any) -> Any:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        held = tasks
        for key in parents:
            held = held[key]
        if value is ...:
            del held[last]
        else:
            held[last] = value
        return tasks

    return change


RESULT = "1.annotations.0.result"
MARK = f"{RESULT}.0.value"
TABLE: dict[str, tuple[Change, str]] = {
    "no data": (put("1.data", ...), "row 1: data is missing"),
    "data of another type": (put("1.data", "x"), 'row 1: data is "x", and should be of type dict'),
    "no rollout": (put("1.data.rollout_id", ...), "row 1: rollout_id is missing"),
    "no hash": (put("1.data.response_sha256", ...), "row 1: response_sha256 is missing"),
    "rollout of another type": (put("1.data.rollout_id", 3), "row 1: rollout_id is 3"),
    "unknown rollout": (put("1.data.rollout_id", "r77"), "row 1: rollout_id 'r77' is not in"),
    "unknown dataset": (
        lambda tasks: [put("data.verdicts", "verify/0")(task) for task in tasks],
        "row 0: its tasks are of a dataset that can't be read here: .*verify/0",
    ),
    "two exports": (
        put("1.data.verdicts", "verify/0123456789abcdef"),
        "row 1: data.verdicts is 'verify/0123456789abcdef', the file begins with tasks of",
    ),
    "another response": (put("1.data.response_sha256", "0"), "row 1: its text is not the response"),
    "a changed text": (put("1.data.response", "x"), "row 1: its text is not the response"),
    "a changed HTML": (put("1.data.response_html", "<p>x"), "row 1: its text is not the response"),
    "no annotations": (put("1.annotations", ...), "row 1: annotations is missing"),
    "annotations of another type": (put("1.annotations", 5), "row 1: annotations is 5"),
    "an annotation is a number": (
        put("1.annotations.0", 5),
        "row 1, annotation 0: is not an object",
    ),
    "nobody": (put("1.annotations.0.completed_by", ...), "row 1, annotation 0: names no annotator"),
    "a list as annotator": (
        put("1.annotations.0.completed_by", []),
        "row 1, annotation 0: names no annotator",
    ),
    "no result": (put(RESULT, ...), "row 1, annotation 0: result is missing"),
    "a result is a text": (put(f"{RESULT}.0", "x"), "annotation 0, result 0: is not an object"),
    "no value": (put(f"{RESULT}.0", {"from_name": "marks"}), "result 0: value is missing"),
    "no start": (put(f"{MARK}.start", ...), "row 1, annotation 0, result 0: start is missing"),
    "start is an XPath": (put(f"{MARK}.start", "/p[1]"), 'result 0: start is "/p\\[1\\]"'),
    "end is a fraction": (put(f"{MARK}.end", 1.5), "result 0: end is 1.5"),
    "no labels": (put(f"{MARK}.labels", ...), "result 0: labels is missing"),
    "two labels": (put(f"{MARK}.labels", ["key", "error"]), "labels holds 2 labels"),
    "unknown label": (put(f"{MARK}.labels", ["eror"]), "label 'eror': .*did you mean error"),
    "unknown type": (
        put(f"{RESULT}.1.value.choices", ["mis-count"]),
        "type 'mis-count': .*did you mean miscount",
    ),
    "two types": (
        put(f"{RESULT}.1.value.choices", ["miscount", "setup"]),
        "row 1, annotation 0, result 1: type holds 2 choices",
    ),
    "before the text": (put(f"{MARK}.start", -1), "mark 0: spans characters -1 to 5"),
    "behind the text": (put(f"{MARK}.end", 5000), "mark 0: spans characters 0 to 5000"),
    "an empty span": (put(f"{MARK}.end", 0), "mark 0: spans characters 0 to 0"),
    "UTF-16 offsets": (
        lambda tasks: put(MARK, {"start": 23, "end": 29, "labels": ["error"], "text": "trucks"})(
            tasks
        ),
        "mark 0: text is 'trucks', the response has",
    ),
    "nothing": (lambda tasks: [], "export.json: holds no annotation"),
    "nobody has labelled": (
        lambda tasks: [task | {"annotations": []} for task in tasks],
        "export.json: holds no annotation",
    ),
    "an object": (lambda tasks: {"detail": "Not found."}, "export.json, row 0: data is missing"),
}


@pytest.mark.parametrize("fault", TABLE)
def test_a_bad_export_is_one_sentence(store, tmp_path, fault):
    change, sentence = TABLE[fault]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(change(copy.deepcopy(export(store)))))
    with pytest.raises(InputError, match=sentence) as refused:
        import_marks(str(path), store, "human")
    assert "\n" not in str(refused.value)
    assert "human-anna" not in store.aliases()


def test_the_export_without_a_fault_is_imported(store, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(export(store)))
    assert list(import_marks(str(path), store, "human")) == ["human-anna"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "export.json, row 0: is not JSON"),
        (b"", "export.json: holds no annotation"),
        (b"\xff\xfe", "export.json: is not UTF-8"),
        (b'[{"data": ', "export.json: is not JSON"),
        (b"[1]", "export.json, row 0: is not a JSON object"),
    ],
)
def test_a_file_of_another_kind_is_one_sentence(store, tmp_path, content, sentence):
    path = tmp_path / "export.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        import_marks(str(path), store, "human")


def test_an_unknown_annotator_is_refused_with_the_known_ones(store, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(export(store)))
    with pytest.raises(InputError, match="--annotator 'ben': is none of anna"):
        import_marks(str(path), store, "human", "ben")
