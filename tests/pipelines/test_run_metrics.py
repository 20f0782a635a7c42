"""metrics.jsonl: its one reader, from a file and for the report."""

import json

from trace_opd.data.store import Store
from trace_opd.pipelines.run_metrics import METRICS, read_metrics
from trace_opd.pipelines.viewer.training_curves import charts, metrics_of


def test_a_torn_last_line_costs_that_step_alone(tmp_path):
    store = Store(tmp_path)
    draft = store.begin("train", {}, {}, None)
    lines = "".join(json.dumps({"step": step, "reward": 0.5}) + "\n" for step in range(3))
    file = draft.local_path() / METRICS
    file.write_text(lines[:-9])
    made = draft.finish(0, files=[METRICS])
    assert [step["step"] for step in read_metrics(file)] == [0, 1]
    (chart,) = charts(metrics_of(made, store))
    assert chart["series"] == [{"name": "reward", "values": [0.5, 0.5]}]


def test_no_file_holds_no_steps(tmp_path):
    assert read_metrics(tmp_path / METRICS) == []
