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
from trace_opd.tests.label_studio.texts import CASES, check_marks, places

RECORDED = Path(__file__).parent / "recorded"
BEN = "ben@example.org"


def exported(store: Store, folder: Path, **more) -> tuple[str, list[dict]]:
    export_tasks("verdicts", folder, store, Choice(), **more)
    return (folder / CONFIG).read_text(), json.loads((folder / TASKS).read_text())


def record(name: str, content: bytes, studio: LabelStudio, request) -> None:
    if request.config.getoption("--record"):
        (RECORDED / name).write_bytes(content)
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
    record("by-mouse.json", content, studio, request)
    path = tmp_path / "export.json"
    path.write_bytes(content)
    (made,) = import_marks(str(path), store, "human").values()
    check_marks(made)
