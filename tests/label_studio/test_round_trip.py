"""Tasks go into a real Label Studio, people mark text, and its exports come back exactly.

    make test-label-studio                     installs Label Studio; the mouse needs Chromium
    … -m pytest tests/label_studio --record    replaces the recorded exports

tests/pipelines/labelling reads the recorded exports without a server.
"""

import json
from pathlib import Path

from trace_opd.data.store import Store
from trace_opd.pipelines.labelling.export_tasks import CONFIG, TASKS, Choice, export_tasks
from trace_opd.pipelines.labelling.import_marks import import_marks
from trace_opd.tests.label_studio.server import Labeller, LabelStudio
from trace_opd.tests.label_studio.texts import (
    CASES,
    check_marks,
    check_two_people,
    places,
    result,
    written,
)

RECORDED = Path(__file__).parent / "recorded"
BEN = "ben@example.org"


def exported(store: Store, folder: Path, **more) -> tuple[str, list[dict]]:
    export_tasks("verdicts", folder, store, Choice(), **more)
    return (folder / CONFIG).read_text(), json.loads((folder / TASKS).read_text())


def record(name: str, content: bytes, studio: LabelStudio, store: Store, request) -> None:
    """Keep an export if that is asked for; a dataset's id depends on the tables' contracts."""
    if request.config.getoption("--record"):
        own = store.get("verdicts").id.encode()
        (RECORDED / name).write_bytes(content.replace(own, b"RECORDED"))
        (RECORDED / "VERSION").write_text(studio.version + "\n")


def test_marks_drawn_with_the_mouse_are_exact(studio, browser, store, tmp_path, request):
    config, tasks = exported(store, tmp_path / "tasks")
    project = studio.add_project(config, tasks)
    labeller = Labeller(browser, studio)
    known = studio.tasks(project)
    for index, case in enumerate(CASES):
        labeller.open_task(project, known[f"r{index}"]["id"])
        for start, end in places(case):
            labeller.mark("key" if case.correct else "error", start, end)
        if case.type is not None:
            labeller.choose(case.type)
        labeller.submit()
    content = studio.export(project)
    record("by-mouse.json", content, studio, store, request)
    path = tmp_path / "export.json"
    path.write_bytes(content)
    (made,) = import_marks(str(path), store, "human").values()
    check_marks(made)


def test_marks_by_the_api_of_two_people_come_back(studio, store, tmp_path, request):
    """Also skipped tasks, drafts, an empty answer, and a second answer of the same person."""
    config, tasks = exported(store, tmp_path / "tasks")
    project = studio.add_project(config, tasks)
    ben = studio.add_user(BEN)
    known = studio.tasks(project)
    for index, case in enumerate(CASES):
        task = known[f"r{index}"]["id"]
        answer = result(case)
        studio.annotate(task, answer[:1], studio.owner)
        studio.annotate(task, answer, studio.owner)
        if index == 0:
            studio.annotate(task, [], ben)
        elif index == 1:
            studio.annotate(task, [], ben, was_cancelled=True)
        elif index == 2:
            draft = {"result": answer, "user": ben}
            studio.call("POST", f"/api/tasks/{task}/drafts", json=draft)
        else:
            studio.annotate(task, answer, ben)
    for kind, name in (("JSON", "by-api.json"), ("JSON_MIN", "by-api-min.json")):
        content = studio.export(project, kind)
        record(name, content, studio, store, request)
        path = tmp_path / name
        path.write_bytes(content)
        made = import_marks(str(path), store, "human", names={"1": "anna", str(ben): "ben"})
        check_two_people(made)


def test_an_annotators_marks_are_shown_and_can_be_accepted(studio, browser, store, tmp_path):
    """Pre-annotations reach the front end at their place: submitted unchanged, they come back."""
    path = tmp_path / "written.json"
    path.write_text(json.dumps(written(store)))
    import_marks(str(path), store, "human")
    config, tasks = exported(store, tmp_path / "tasks", marked_by="human-rule")
    project = studio.add_project(config, tasks)
    labeller = Labeller(browser, studio)
    known = studio.tasks(project)
    for index in range(len(CASES)):
        labeller.open_task(project, known[f"r{index}"]["id"])
        labeller.submit()
    path = tmp_path / "export.json"
    path.write_bytes(studio.export(project))
    (made,) = import_marks(str(path), store, "accepted").values()
    check_marks(made, rounded=True)
