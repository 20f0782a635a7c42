"""Flows against a real Prefect server: called here, served, and started by its command line."""

import asyncio
import contextvars
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

from trace_opd import flows
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import Config, PipelineConfig, ScoreConfig, SelectConfig
from trace_opd.schemas.environment import PREFECT_DEFAULTS
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config, override

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TABLE_STAGES = ("problems", "rollout", "verify", "select", "annotate", "convert", "score")
SMALL = [
    "problems.limit=6",
    "problems.rows_per_part=2",
    "eval_problems.limit=2",
    "rollout.group_size=4",
    "train.offline.steps=1",
    "train.online.steps=1",
    "train.online.group_size=2",
    "train.groups_per_step=3",
    "evaluate.k=1",
    "evaluate.bootstrap=100",
]
CONFIG: PipelineConfig = load_config(PipelineConfig, ROOT / "configs" / "micro.yaml", SMALL)
# Stages that the pipeline does not have.
OTHERS: dict[str, Config] = {
    "select": SelectConfig(),
    "score": ScoreConfig(prompt=CONFIG.rollout.prompt, k=8),
}


@pytest.fixture(scope="module")
def made(environment, tmp_path_factory) -> Path:
    """A store filled by the flows of the table stages; tests leave it as it is."""
    root = tmp_path_factory.mktemp("flows") / "store"
    for stage in TABLE_STAGES:
        flows.STAGE_FLOWS[stage](config_of(stage), store=str(root))
    return root


@pytest.fixture
def own(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def config_of(stage: str, *overrides: str) -> Config:
    return override(getattr(CONFIG, stage) or OTHERS[stage], list(overrides))


def written(root: Path, stage: str = "*") -> dict[str, int]:
    """Files of a stage's datasets and when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in root.glob(f"{stage}/*/*")}


def tasks_of(flow_run_id: Any) -> list[Any]:
    """The task runs of a finished flow run."""
    runs = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=runs)


def artifact(key: str) -> Any:
    with get_client(sync_client=True) as client:
        # The newest: other tests on this server may have made the same dataset.
        return client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])),
            sort=ArtifactSort.CREATED_DESC,
        )[0]


def test_flows_make_what_the_command_line_makes(made, tmp_path):
    for stage in TABLE_STAGES:
        plain = run_stage(stage, config_of(stage), Store(tmp_path))
        assert isinstance(plain, Dataset)
        assert Store(made).get(plain.ref).rows == plain.rows
    assert Store(made).aliases() == Store(tmp_path).aliases()


def test_flows_that_python_imports_have_the_settings_of_the_command_line():
    assert PREFECT_DEFAULTS.keys() <= os.environ.keys()


def test_artifacts_sum_up_each_dataset(made):
    for dataset in Store(made).datasets():
        table = artifact(f"{dataset.stage}-{dataset.id}")
        assert table.type == "table"
        for figure in dataset.summary:
            assert f'"{figure}"' in table.data
        lineage = artifact(f"{dataset.stage}-{dataset.id}-lineage")
        assert lineage.type == "markdown"
        for _, _, node in dataset.lineage():
            assert f"`{node.ref}` ({node.rows} rows)" in lineage.data


def test_a_flow_runs_within_a_running_event_loop(own):
    async def cell() -> str:
        config = config_of("verify", "truncated=mask")
        return flows.STAGE_FLOWS["verify"](config, store=str(own))

    assert Store(own).get(asyncio.run(cell())).rows == 24


def test_a_finished_dataset_is_found_without_a_task(own):
    before = written(own)
    state = flows.rollout(config_of("rollout"), store=str(own), alias="again", return_state=True)
    assert tasks_of(state.state_details.flow_run_id) == []
    assert written(own) == before
    assert Store(own).get("again").ref == Store(own).get("rollouts").ref


def test_after_a_failed_part_only_the_missing_one_is_made(own, tmp_path):
    other = config_of("convert", "routing.alpha=0.5")
    part = Path(Store(own).get("annotations").path("part-00001.parquet"))
    part.rename(tmp_path / "aside")
    failed = flows.convert(other, store=str(own), return_state=True)
    assert failed.is_failed()
    assert sorted(run.run_count for run in tasks_of(failed.state_details.flow_run_id)) == [
        1,
        1,
        1,
    ]  # bad input: no retry
    kept = {name: at for name, at in written(own, "convert").items() if "part-0000" in name}
    assert len(kept) == 3 + 2

    (tmp_path / "aside").rename(part)
    mended = flows.convert(other, store=str(own), return_state=True)
    assert [run.name for run in tasks_of(mended.state_details.flow_run_id)] == ["convert-part-1"]
    after = written(own, "convert")
    assert {name: after[name] for name in kept} == kept
    assert Store(own).get(mended.result()).rows == Store(own).get("rollouts").rows


@pytest.mark.parametrize(
    ("flow", "config", "overrides", "sentence"),
    [
        (
            "convert",
            config_of("convert"),
            ["routing.alfa=1"],
            "config: routing.alfa: unknown key; did you mean routing.alpha? known in routing: rule",
        ),
        (
            "convert",
            {"routing": {"alpha": "x" * 100_000}},
            [],
            "config: routing.alpha: Input should be a valid number, unable to parse "
            f"string as a number (got '{'x' * 79}…)",
        ),
        ("verify", {}, ["rollouts=nothing"], "dataset 'nothing' is not in store"),
        ("train", {}, [], "config: offline.steps and online.steps are both 0"),
        (
            "pipeline",
            CONFIG,
            ["rollout.policy.path=./nothing"],
            "rollouts: policy ./nothing: is not",
        ),
    ],
)
def test_bad_input_is_the_sentence_of_the_state_without_a_traceback(
    made, tmp_path, flow, config, overrides, sentence
):
    state = getattr(flows, flow)(config, overrides, store=str(tmp_path), return_state=True)
    assert state.is_failed()
    assert state.message.startswith(sentence)
    assert len(state.message) < 2000
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        state.result()
    with get_client(sync_client=True) as client:
        logs = client.read_logs()
    assert not any("Traceback" in log.message for log in logs)


def test_a_flow_waits_for_another_run_of_its_dataset_and_takes_what_that_made(own):
    config, stage = config_of("convert", "routing.alpha=0.6"), flows.REGISTRY["convert"].load()
    plan, draft = stage.begin(config, Store(own))
    states: list[Any] = []

    def second() -> None:
        states.append(flows.convert(config, store=str(own), return_state=True))

    with draft.locked(lambda who: pytest.fail(f"no other run is active, but {who}")):
        waiter = threading.Thread(target=contextvars.copy_context().run, args=[second])
        waiter.start()
        deadline = time.monotonic() + 60
        with get_client(sync_client=True) as client:
            while not any("waiting for its end" in log.message for log in client.read_logs()):
                assert time.monotonic() < deadline
                time.sleep(0.2)
        for part in range(plan.parts):
            stage.make_part(plan, draft, part)
        made = stage.finish(plan, draft)
        assert waiter.is_alive()
    waiter.join()
    assert states[0].is_completed()
    assert tasks_of(states[0].state_details.flow_run_id) == []
    assert Store(own).get("routed").ref == made.ref


def test_a_part_that_fails_for_now_is_retried_on_its_own(own):
    part = Path(Store(own).get("annotations").path("part-00001.parquet"))
    content = part.read_bytes()
    part.write_bytes(b"half a file")

    def mend_at_the_first_retry() -> None:
        with get_client(sync_client=True) as client:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if any(run.state_name == "AwaitingRetry" for run in client.read_task_runs()):
                    break
                time.sleep(0.1)
        part.write_bytes(content)

    mender = threading.Thread(target=contextvars.copy_context().run, args=[mend_at_the_first_retry])
    mender.start()
    state = flows.convert(
        config_of("convert", "routing.alpha=0.5"), store=str(own), return_state=True
    )
    mender.join()
    assert state.is_completed()
    attempts = {run.name: run.run_count for run in tasks_of(state.state_details.flow_run_id)}
    assert attempts.keys() == {f"convert-part-{part}" for part in range(3)}
    assert attempts["convert-part-1"] > 1
    assert attempts["convert-part-0"] == attempts["convert-part-2"] == 1


# For a process of its own: to kill it, or so that its process pool gets the server's address.
CONVERT = """
import sys
from trace_opd import flows
from trace_opd.schemas.configs import ConvertConfig
from trace_opd.schemas.settings import load_config

state = flows.convert(
    load_config(ConvertConfig, None), sys.argv[2:], store=sys.argv[1], return_state=True
)
print(state.name, state.state_details.flow_run_id)
"""
RULE = """
import os
import signal
from pathlib import Path

import numpy as np

def kills_its_process(response):
    deaths = Path(__file__).with_name("deaths")
    if left := deaths.stat().st_size:
        os.truncate(deaths, left - 1)
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full(response.tokens, -1)
"""


def test_the_parts_of_a_killed_worker_process_are_made_again(environment, own, tmp_path):
    (tmp_path / "deadly.py").write_text(RULE)
    (tmp_path / "deaths").write_text("x")
    done = subprocess.run(
        [*(sys.executable, "-P", "-c", CONVERT, own), "routing.rule=deadly:kills_its_process"],
        env=environment
        | {"TRACE_OPD_TASK_RUNNER": "processes", "TRACE_OPD_WORKERS": "1"}
        | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    name, run_id = done.stdout.split()
    assert name == "Completed"
    assert Store(own).get("routed").rows == Store(own).get("rollouts").rows
    states = [(run.name, run.state_name) for run in tasks_of(run_id)]
    # A task run that crashes early has not got its own name yet.
    assert {state for state in states if state[1] != "Crashed"} == {
        (f"convert-part-{part}", "Completed") for part in range(3)
    }


def test_a_run_whose_process_was_killed_is_crashed_and_another_run_continues(environment, own):
    flows.crash_dead_runs(after_s=10)
    flows.crash_dead_runs(after_s=10)
    config, stage = config_of("convert", "routing.alpha=0.7"), flows.REGISTRY["convert"].load()
    plan, draft = stage.begin(config, Store(own))
    assert isinstance(draft, Draft)
    with get_client(sync_client=True) as client:
        (automation,) = client.read_automations()
        with draft.locked(lambda who: pytest.fail(f"no other run is active, but {who}")):
            stage.make_part(plan, draft, 1)
            run = subprocess.Popen(
                [*(sys.executable, "-P", "-c", CONVERT, own), "routing.alpha=0.7"],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert run.stderr is not None
            said = iter(run.stderr.readline, "")
            assert any("waiting for its end" in line for line in said)
            run.kill()
            run.communicate()
        (dead,) = (one for one in client.read_flow_runs() if one.state_name == "Running")
        deadline = time.monotonic() + 60
        while (state := client.read_flow_run(dead.id).state) is None or not state.is_crashed():
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        client.delete_automation(automation.id)
    assert state.message is not None
    assert state.message.startswith("No heartbeat for 10 s")
    again = flows.convert(config, store=str(own), return_state=True)
    assert again.is_completed()
    names = {run.name for run in tasks_of(again.state_details.flow_run_id)}
    assert names == {"convert-part-0", "convert-part-2"}


def test_every_deployment_of_the_work_pool_is_a_flow_with_valid_parameters():
    project = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    names = set()
    for deployment in project["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert module == flows.__name__
        assert deployment["work_pool"]["name"] == "trace-opd"
        getattr(flows, name).validate_parameters(deployment["parameters"])
        names.add(name)
    assert names == {*flows.STAGE_FLOWS, "pipeline"}


def test_the_deployments_follow_from_the_registry_of_stages():
    spec = importlib.util.spec_from_file_location("deployments", ROOT / ".ci" / "deployments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file in module.FILES:
        assert file.read_text() == module.generated(file), f"{file}: run `make deployments`"
        deployed = {one["entrypoint"] for one in yaml.safe_load(file.read_text())["deployments"]}
        made = {name for name, entry in module.REGISTRY.items() if entry.alias is not None}
        assert {f"trace_opd.flows.{name}" for name in made} <= deployed


def prefect(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "prefect", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def serving(environment, made, stop, tmp_path_factory) -> Iterator[tuple[Path, Any]]:
    """`trace-opd serve` on a copy of the store: the store's root, and the process."""
    folder = tmp_path_factory.mktemp("served")
    root = shutil.copytree(made, folder / "store")
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(CONFIG.model_dump(mode="json")))
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [BIN / "trace-opd", "serve", str(file), "--store", str(root)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    expected = {*flows.STAGE_FLOWS, "pipeline"}
    try:
        deadline = time.monotonic() + 90
        with get_client(sync_client=True) as client:
            while len(client.read_deployments()) < len(expected):
                assert server.poll() is None, (folder / "serve.log").read_text()
                assert time.monotonic() < deadline, "the deployments did not come up"
                time.sleep(0.5)
        yield Path(root), server
    finally:
        stop(server)


@pytest.fixture
def served(serving) -> Path:
    """The root of the store that is served."""
    return serving[0]


@pytest.mark.slow
def test_a_deployment_run_annotates_again_and_makes_nothing_upstream(environment, served):
    before, first = written(served), Store(served).get("annotations")
    change = 'overrides=["annotator.name=again"]'
    done = prefect(environment, "deployment", "run", "annotate/default", "-p", change, "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Completed" in done.stdout

    second = Store(served).get("annotations")
    assert second.ref != first.ref
    assert second.manifest["inputs"] == first.manifest["inputs"]
    assert set(second.read()["annotator_name"].to_pylist()) == {"again"}
    assert Store(served).get(first.ref).rows == second.rows
    after = written(served)
    assert {name: after[name] for name in before} == before
    assert all(second.id in name for name in after.keys() - before.keys())
    assert "`" + second.ref in artifact(f"annotate-{second.id}-lineage").data


PROMPT = 'prompt={student: "{problem}", teacher: "{problem}\\nhint: {diagnostic_type}"}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("select", ["budget=3"]),
        ("score", [PROMPT, "k=3"]),
    ],
)
def test_a_deployment_run_makes_the_table(environment, served, stage, changes):
    alias = flows.REGISTRY[stage].alias
    assert alias is not None
    first = Store(served).get(alias)
    change = f"overrides={json.dumps(changes)}"
    done = prefect(environment, "deployment", "run", f"{stage}/default", "-p", change, "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    made = Store(served).get(alias)
    assert made.ref != first.ref
    assert made.rows == first.rows
    assert artifact(f"{stage}-{made.id}").type == "table"
    Store(served).set_alias(alias, first)


@pytest.mark.slow
def test_a_deployment_refuses_parameters_that_no_config_has(environment, served):
    before = written(served)
    wrong = 'config={"annotator": {"engine": "rule"}, "mood": 1}'
    done = prefect(environment, "deployment", "run", "annotate/default", "-p", wrong, "--watch")
    assert done.returncode == 1
    assert "mood" in done.stdout + done.stderr
    wrong = 'overrides=["annotator.mood=1"]'
    done = prefect(environment, "deployment", "run", "annotate/default", "-p", wrong, "--watch")
    assert done.returncode == 1
    assert written(served) == before
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.state is not None
    assert str(run.state.message).startswith("config: annotator.mood: unknown key; known in")
    assert "Traceback" not in (served.parent / "serve.log").read_text()


@pytest.mark.slow
def test_sigterm_of_serve_cancels_the_active_run(environment, serving):
    """The last test of the deployments: the process that serves them ends here."""
    root, server = serving
    config = config_of("annotate", "annotator.name=waiting")
    _, draft = flows.REGISTRY["annotate"].load().begin(config, Store(root))
    assert isinstance(draft, Draft)
    change = 'overrides=["annotator.name=waiting"]'
    with (
        draft.locked(lambda who: pytest.fail(f"no other run is active, but {who}")),
        get_client(sync_client=True) as client,
    ):
        begun = prefect(environment, "deployment", "run", "annotate/default", "-p", change)
        assert begun.returncode == 0, begun.stdout + begun.stderr
        deadline = time.monotonic() + 60
        while not (logs := [log for log in client.read_logs() if draft.ref in log.message]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert client.read_automations()  # `crash_dead_runs`
        server.terminate()
        assert server.wait(60) == 0
        run_id = logs[0].flow_run_id
        assert run_id is not None
        state = client.read_flow_run(run_id).state
    assert state is not None
    assert state.name == "Cancelled"


@pytest.mark.slow
def test_the_pipeline_flow_goes_from_problems_to_a_report(environment, tmp_path):
    refs = flows.pipeline(CONFIG, store=str(tmp_path))
    store = Store(tmp_path)
    assert set(refs) == {
        *("problems", "rollouts", "verdicts", "annotations", "routed", "train"),
        *("eval_problems", "evaluation", "report"),
    }
    report = Path(refs.pop("report"))
    assert report.read_text().lstrip().startswith("<!")
    for role, ref in refs.items():
        assert store.get(f"{CONFIG.name}-{role}").ref == ref
    roots = {node.ref for _, _, node in store.get(refs["evaluation"]).lineage()}
    assert set(refs.values()) <= roots
