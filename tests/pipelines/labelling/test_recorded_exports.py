"""Exports that a real Label Studio made become the annotations that people gave.

`make test-label-studio` records them: tests/label_studio/recorded, whose VERSION names the server.
"""

from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.labelling.import_marks import import_marks
from trace_opd.tests.label_studio.texts import check_marks, check_two_people, make_store

RECORDED = Path(__file__).parents[2] / "label_studio" / "recorded"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def recorded(name: str, store: Store, folder: Path) -> str:
    """A recorded export as one of this store, whose dataset ids follow the tables' contracts."""
    text = (RECORDED / name).read_text()
    path = folder / name
    path.write_text(text.replace("RECORDED", store.get("verdicts").id))
    return str(path)


def test_marks_drawn_with_the_mouse_are_exact(store, tmp_path):
    made = import_marks(recorded("by-mouse.json", store, tmp_path), store, "human")
    assert list(made) == ["human-annotator-1"]
    check_marks(made["human-annotator-1"])


@pytest.mark.parametrize("name", ["by-api.json", "by-api-min.json"])
def test_two_people_become_two_datasets(store, tmp_path, name):
    names = {"1": "anna", "2": "ben"}
    path = recorded(name, store, tmp_path)
    check_two_people(import_marks(path, store, "human", names=names))
