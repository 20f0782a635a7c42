"""`inspect eval trace_opd/problems`: Inspect finds the tasks by their entry point."""

import os
import subprocess
import sys

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config
from trace_opd.tests.pipelines.harness.served import serving_micro

pytest.importorskip("inspect_ai")

CONFIG = """
k: 2
sampling: {temperature: 1.0, top_p: 1.0, top_k: 0, max_new_tokens: 48}
bootstrap: 100
verify: {workers: 1}
"""


@pytest.mark.parametrize(
    ("options", "requests", "temperature"),
    [([], 6, 1.0), (["-T", "set=k=1,seed=3", "--temperature", "0.0"], 3, 0.0)],
)
def test_inspects_command_runs_a_task_by_name_and_its_log_opens(
    options, requests, temperature, tmp_path
):
    from inspect_ai.log import read_eval_log

    config = load_config(ProblemsConfig, None, ["source={kind: word-problems}", "limit=3"])
    run_stage("problems", config, Store(tmp_path / "store"), "held-out")
    (tmp_path / "evaluate.yaml").write_text(CONFIG)
    with serving_micro() as (url, asked):
        done = subprocess.run(
            [sys.executable, "-m", "inspect_ai", "eval", "trace_opd/problems",
             "--model", "openai-api/local/micro", "--model-base-url", url,
             "-T", "problems=held-out", "-T", "config=evaluate.yaml", "--display", "plain",
             *options],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env=os.environ | {"LOCAL_API_KEY": "none"},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [body["temperature"] for body in asked] == [temperature] * requests
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert (log.status, log.eval.task) == ("success", "trace_opd/problems")
    assert len(log.samples or []) == requests
    k = 1 if "set=k=1,seed=3" in options else 2
    reducers = {score.reducer for score in log.results.scores} if log.results else set()
    assert reducers == {f"{name}_at_{k}" for name in ("avg", "pass", "maj")}
