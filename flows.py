"""Prefect flows and deployments: one flow per stage, and `pipeline`, which runs them all.

    trace-opd serve configs/micro.yaml
    prefect deployment run 'annotate/default' -p 'overrides=["annotator.name=again"]' --watch

`trace-opd serve` runs this file, and Prefect's workers import it. Prefect orchestrates one task per
part; the store's manifests decide what is finished, and a finished part is not made again.
TRACE_OPD_TASK_RUNNER chooses where parts run (threads, processes, ray, dask). TRACE_OPD_WORKERS
sets how many processes or cluster workers make parts at once. With threads it hardly matters,
because a process makes one part at a time (`runner_and_workers`; docs/scaling.md).
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from trace_opd.pipelines.cli.ending import (
    at_second_interrupt,
    exit_code,
    stop_by_signals,
)
from trace_opd.pipelines.runtime.signals import children_without_interrupt
from trace_opd.schemas.aliases import require_alias
from trace_opd.schemas.environment import PREFECT_DEFAULTS

os.environ.update(PREFECT_DEFAULTS | os.environ)  # Prefect reads them when it is imported

if __name__ == "__main__":
    # Imported under its own name: other processes look tasks up by module and name.
    stop_by_signals()
    sys.exit(exit_code(lambda: import_module("trace_opd.flows").main()))

from prefect import Flow, flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.automations import AutomationCore
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture, wait
from prefect.runner import Runner
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Failed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.types.entrypoint import EntrypointType

from trace_opd.data.remote import require_reachable
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.flow_runs.dead_runs import automation
from trace_opd.pipelines.flow_runs.reports import (
    lineage_list,
    log_no_traceback_of_bad_input,
    summary_rows,
)
from trace_opd.pipelines.flow_runs.requests import (
    arguments,
    default_parameters,
    default_store,
    pipeline_config,
    requested_config,
    runner_and_workers,
)
from trace_opd.pipelines.pipeline import run_pipeline
from trace_opd.pipelines.planning.pipeline_plan import plan_pipeline
from trace_opd.pipelines.runtime.serving import serve_until_stopped
from trace_opd.pipelines.stages import REGISTRY, StageEntry
from trace_opd.pipelines.stages.base import Plan, close_idle_engine, give_name
from trace_opd.pipelines.terminal import visible
from trace_opd.schemas.configs import Config, PipelineConfig
from trace_opd.schemas.errors import DamagedFile, InputError, Stopped

_IDLE_S = 60.0
_FRUITLESS_POOLS = 3

log_no_traceback_of_bad_input()


def _state_of(run: Callable[[], Any]) -> Any:
    """What a flow returns: its result, or for bad input a failed state with the sentence.

    A caller of the flow still gets the exception.
    """
    try:
        return run()
    except InputError as error:
        return Failed(message=visible(str(error)), data=error)


def task_runner() -> TaskRunner[Any]:
    """The runner that the environment names (`runner_and_workers`).

    Raises:
        InputError: an unknown runner, a bad number of workers, a package that is not installed.
    """
    kind, workers = runner_and_workers()
    if kind == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    if kind == "processes":
        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        if kind == "ray":
            from prefect_ray import RayTaskRunner  # pyright: ignore[reportMissingImports]

            address = os.environ.get("RAY_ADDRESS")
            return RayTaskRunner(address, init_kwargs={} if address else {"num_cpus": workers})
        from prefect_dask.task_runners import (  # pyright: ignore[reportMissingImports]
            DaskTaskRunner,
        )
    except ImportError:
        raise InputError(
            f"TRACE_OPD_TASK_RUNNER={kind}: is not installed; pip install 'trace-opd[{kind}]'"
        ) from None
    if address := os.environ.get("DASK_SCHEDULER_ADDRESS"):
        return DaskTaskRunner(address=address)
    return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1})


def _worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Retry everything but bad input and a stop."""
    result = state.result(raise_on_failure=False)
    return not isinstance(result, InputError | Stopped) or isinstance(result, DamagedFile)


@task(
    name="part",
    task_run_name="{stage}-part-{part}",
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
)
def make_part(stage: str, plan: Plan, draft: Draft, part: int) -> int:
    """Make one part unless it exists."""
    try:
        return REGISTRY[stage].load().make_part(plan, draft, part)
    finally:
        close_idle_engine(_IDLE_S)  # a cluster's worker outlives the stage


@task(name="train", retry_condition_fn=_worth_retrying, retries=1, cache_policy=NO_CACHE)
def train_run(config: Config, root: str) -> str:
    """Train; a retry continues from the last checkpoint."""
    return REGISTRY["train"].load().run(config, Store(root)).ref


@contextmanager
def _server_for_workers() -> Iterator[None]:
    """Make tasks report to this run's server; worker processes would start temporary ones."""
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def run_table_stage(entry: StageEntry, config: Config, root: str, alias: str) -> str:
    """Run one task per missing part, then write the manifest and the artifacts."""
    store, log, stage = Store(root), get_run_logger(), entry.load()

    def make_parts(plan: Plan, draft: Draft) -> None:
        """This process holds the dataset's lock; tasks make its parts, on any worker."""
        parts = [part for part in range(plan.parts) if not draft.has_sound_part(part)]
        log.info("%s: %d of %d parts to make", draft.ref, len(parts), plan.parts)
        # At an endpoint, one process keeps journal, budget, batches and pace under any runner.
        here = stage.one_process(plan.config)
        context = FlowRunContext.get()
        threads = context is not None and isinstance(context.task_runner, ThreadPoolTaskRunner)
        with stage.progress(plan, parts, lines=True) if here or threads else nullcontext():
            if not here:
                _make_on_workers(entry.name, plan, draft, parts)
            for part in parts if here else ():
                make_part(entry.name, plan, draft, part)

    dataset = stage.make(
        config, store, make_parts, lambda holder: log.warning("%s; waiting for its end", holder)
    )
    ref = _published(store, dataset, alias)
    stage.check(config, dataset)
    return ref


def _run_train(entry: StageEntry, config: Config, root: str, alias: str) -> str:
    store = Store(root)
    return _published(store, store.get(train_run(config, root)), alias)


def _run_report(entry: StageEntry, config: Config, root: str, alias: str) -> str:
    path = entry.load().run(config, Store(root))
    create_link_artifact(Path(path).resolve().as_uri(), link_text="report", key="report")
    return str(path)


def _make_on_workers(stage: str, plan: Plan, draft: Draft, parts: list[int]) -> None:
    """Run a task per part on the flow's task runner.

    If a process dies, all tasks of its pool end, and a new pool makes the missing parts. Ray and
    Dask replace a worker themselves.

    Raises:
        InputError: the processes of several pools died before any finished a part.
    """
    context = FlowRunContext.get()
    assert context is not None
    pool, fruitless, lost = nullcontext(context.task_runner), 0, []
    while True:
        with pool as runner, _server_for_workers():
            given = {"stage": stage, "plan": plan, "draft": draft}
            futures = [runner.submit(make_part, given | {"part": part}) for part in parts]
            try:
                wait(futures)
                for future in futures:
                    future.result()
                break
            except BrokenProcessPool:
                lost += futures
        missing = [part for part in parts if not draft.has_part(part)]
        fruitless = fruitless + 1 if missing == parts else 0
        if fruitless == _FRUITLESS_POOLS:
            _mark_crashed(lost)
            raise InputError(
                f"{draft.ref}: worker processes died {fruitless} times before one finished a part "
                "(killed, or out of memory); use fewer TRACE_OPD_WORKERS or fewer rows_per_part, "
                "and start the run again: it continues from the finished parts"
            )
        sentence = "%s: a worker process died (killed, or out of memory); a new pool makes %d parts"
        get_run_logger().warning(sentence, draft.ref, len(missing))
        parts, pool = missing, context.task_runner.duplicate()
    _mark_crashed(lost)


def _mark_crashed(futures: Sequence[PrefectFuture[Any]]) -> None:
    """Set the state of task runs that died with their process, which could not report it.

    Called after the parts are made: reports from before a process's death may still arrive.
    """
    state = Crashed(message="The process of this task run, or another one of its pool, died.")
    with get_client(sync_client=True) as client:
        for future in futures:
            with suppress(ObjectNotFound):  # not registered
                found = client.read_task_run(future.task_run_id).state
                if found is None or not found.is_final():
                    client.set_task_run_state(future.task_run_id, state, force=True)


def _published(store: Store, dataset: Dataset, alias: str) -> str:
    give_name(store, alias, dataset, get_run_logger().info)
    key, where = f"{dataset.stage}-{dataset.id}", f"{alias}: {dataset.path()}"
    create_table_artifact(summary_rows(dataset), key=key, description=where)
    create_markdown_artifact(lineage_list(dataset), key=f"{key}-lineage", description="Lineage")
    get_run_logger().info("%s is %s (%d rows)", alias, dataset.ref, dataset.rows)
    return dataset.ref


_SINGLE_STAGES = {"train": _run_train, "report": _run_report}


def _stage_flow(entry: StageEntry) -> Flow[Any, Any]:
    """The flow of a stage: parameters config, overrides, store and alias."""
    run = _SINGLE_STAGES.get(entry.name, run_table_stage)

    def stage_flow(
        config: entry.config_type,  # pyright: ignore[reportInvalidTypeForm]
        overrides: list[str] | None = None,
        store: str = "",
        alias: str = "",
    ) -> str:
        logging.getLogger("trace_opd").setLevel(logging.INFO)

        def made() -> str:
            checked = requested_config(entry.config_type, config, overrides)
            require_alias(alias or None)
            return run(entry, checked, store or default_store(), alias or entry.alias or "")

        return _state_of(made)

    # Prefect describes parameters by the annotations, and finds a deployment's flow by its name.
    stage_flow.__name__ = stage_flow.__qualname__ = entry.name
    stage_flow.__doc__ = entry.summary
    if entry.name in _SINGLE_STAGES:
        return flow(name=entry.name, validate_parameters=False)(stage_flow)
    return flow(name=entry.name, task_runner=task_runner(), validate_parameters=False)(stage_flow)


STAGE_FLOWS = {name: _stage_flow(entry) for name, entry in REGISTRY.items()}
globals().update(STAGE_FLOWS)  # entrypoints name them: `trace_opd.flows.annotate`


@flow(name="pipeline", validate_parameters=False)
def pipeline(
    config: PipelineConfig, overrides: list[str] | None = None, store: str = ""
) -> dict[str, str]:
    """Check all stages, then run them in order, each as a subflow."""
    root = store or default_store()

    def run(stage: str, stage_config: Config, alias: str) -> str:
        ref: Any = STAGE_FLOWS[stage](stage_config, store=root, alias=alias)
        return ref

    def made() -> dict[str, str]:
        checked = requested_config(PipelineConfig, config, overrides)
        plan = plan_pipeline(checked, Store(root))
        plan.require()
        for warning in plan.warnings:
            get_run_logger().warning("%s", warning)
        return run_pipeline(checked, run)

    return _state_of(made)


_FLOWS = (*STAGE_FLOWS.values(), pipeline)


def crash_dead_runs(after_s: float = 300) -> None:
    """Create the automation that sets runs of these flows to Crashed when their heartbeats stop.

    If a run's process and runner die together, nothing else reports it. An existing automation is
    kept, with a person's changes, unless another release made it.
    """
    with get_client(sync_client=True) as client:
        flow_ids = [client.create_flow(one) for one in _FLOWS]
        wanted = AutomationCore.model_validate(automation(flow_ids, after_s))
        found = client.read_automations_by_name(wanted.name)
        if not found:
            client.create_automation(wanted)
        elif found[0].description != wanted.description:
            client.update_automation(found[0].id, wanted)


def deployments(config: str | None, store: str) -> list[Any]:
    """One deployment per stage and `pipeline`, all named `default`.

    config: a pipeline's YAML whose sections become the stages' default parameters.
    """
    defaults = default_parameters(config)
    return [
        one.to_deployment(
            "default",
            parameters=defaults[one.name] | {"store": store},
            entrypoint_type=EntrypointType.MODULE_PATH,  # FILE_PATH would rename the module
        )
        for one in _FLOWS
    ]


def serve_deployments(served: Sequence[Any]) -> None:
    """Serve until SIGTERM or Ctrl-C, which cancel the active runs; a second signal ends at once.

    `prefect.serve` would kill their processes and leave the runs Running (Prefect 3.7.5).
    """
    runner = Runner()
    for one in served:
        runner.add_deployment(one)
    names = ", ".join(f"{one.flow_name}/{one.name}" for one in served)
    print(f"Serving {names}; Ctrl-C stops.\nRun one: prefect deployment run 'annotate/default'")
    sentence = "Stopping: active runs are cancelled; finished parts are kept"
    asyncio.run(serve_until_stopped(runner.start, lambda: runner.started, runner.astop, sentence))


def _start_temporary_server() -> None:
    """Start the server of this run, which a terminal's Ctrl-C must not end before the run."""

    def start() -> None:
        with children_without_interrupt(), get_client(sync_client=True):
            pass

    thread = threading.Thread(target=start)  # this one waits for signals meanwhile
    thread.start()
    thread.join()
    at_second_interrupt.append(SubprocessASGIServer().stop)


def main() -> None:
    """Serve all deployments in this process, or run a pipeline once."""
    args = arguments(main.__doc__)
    if not args.crash_dead_runs:
        require_reachable(args.store)
    if args.crash_dead_runs or PREFECT_API_URL.value():  # a temporary server ends with its runs
        crash_dead_runs()
    if args.crash_dead_runs:
        return
    if args.run:
        if not PREFECT_API_URL.value():
            _start_temporary_server()
        pipeline(pipeline_config(args.config), store=args.store)
    else:
        serve_deployments(deployments(args.config, args.store))
