"""The commands of `trace-opd` that run stages, pipelines and studies; `cli.main` calls `run`.

    trace-opd <stage> config.yaml key=value …

Commands on a store's contents are in store_commands.py.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ...schemas.aliases import require_alias
from ...schemas.config_faults import unknown_name
from ...schemas.configs import Config, PipelineConfig, ReportConfig, StudyConfig, TrainConfig
from ...schemas.environment import whole_number
from ...schemas.errors import InputError
from ...schemas.settings import load_config, override
from ...schemas.template import template
from ..stages import REGISTRY, StageEntry
from ..terminal import (
    choose_output,
    console,
    is_quiet,
    log_to_terminal,
    print_config,
    print_data,
    print_json,
    reset_output,
)
from . import removal_commands
from .contamination_command import contamination
from .demo_command import demo
from .ending import exit_code, log_thread_failures, stop_by_signals
from .export import export
from .init_command import init
from .label_command import label
from .options import QUIET, VERBOSE, App, AsJson
from .plot_command import plot
from .probe_command import probe
from .push_command import push
from .store_commands import COMMANDS, StoreRoot, open_store

if TYPE_CHECKING:
    from ...data.store import Store

app = App(no_args_is_help=True, pretty_exceptions_enable=False)

ConfigPath = Annotated[
    str | None,  # not Path: the first override may stand here, and Path turns http:// into http:/
    typer.Argument(help="YAML config of the stage, or of a pipeline with a section for it."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides.")]
Alias = Annotated[
    str | None,
    typer.Option(help="Name for the dataset; default: its table's.", callback=require_alias),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check inputs and print the config; run nothing.")
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="A method by name (trace-opd presets lists them)."),
]
KeepFailed = Annotated[
    bool,
    typer.Option("--keep-failed", help="Continue with failed rows; do not request them again."),
]
Output = Annotated[
    Path | None, typer.Option(dir_okay=False, help="HTML file; default: in the dataset's folder.")
]

SuiteName = Annotated[
    str | None,
    typer.Option("--suite", help="Benchmarks by name instead of `problems`: paper."),
]
SuiteLimit = Annotated[
    int | None,
    typer.Option("--suite-limit", min=1, help="At most this many problems of each benchmark."),
]

# Options that only the commands of some stages have.
_STAGE_OPTIONS = {
    "annotate": {"keep_failed"},
    "convert": {"preset"},
    "train": {"preset"},
    "evaluate": {"suite", "suite_limit"},
}


def _stage_command(entry: StageEntry) -> Callable[..., None]:
    """A stage's command, with the options of that stage."""

    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        preset: PresetName = None,
        suite: SuiteName = None,
        suite_limit: SuiteLimit = None,
        store: StoreRoot = "store",
        alias: Alias = None,
        keep_failed: KeepFailed = False,
        dry_run: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        kept = ["annotator.keep_failed=true"] if keep_failed else []
        changes = [*(overrides or []), *kept]
        loaded = _load(entry.config_type, config, changes, entry.name, preset)
        if suite is not None:
            from .suite import run_suite

            run_suite(suite, loaded, open_store(store), alias, suite_limit, dry_run, as_json)
            return
        if suite_limit is not None:
            raise InputError("--suite-limit is given without --suite; add --suite, or leave it out")
        _run_stage(entry.name, loaded, open_store(store), alias, dry_run, as_json)

    left_out = set[str]().union(*_STAGE_OPTIONS.values()) - _STAGE_OPTIONS.get(entry.name, set())
    full = inspect.signature(command)
    kept = [one for name, one in full.parameters.items() if name not in left_out]
    command.__signature__ = full.replace(parameters=kept)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _run_stage(
    name: str, config: Config, store: "Store", alias: str | None, dry_run: bool, as_json: bool
) -> None:
    # Imports torch, so a bad config is refused before.
    from ...data.store import Dataset
    from ..pipeline import run_stage
    from .as_json import full_dataset_data
    from .show import show_dataset

    if dry_run:
        from .stage_plan import plan_data, show_plan

        if as_json:
            print_data(plan_data(name, config, store))
        else:
            show_plan(name, config, store, console)
        return
    made = run_stage(name, config, store, alias)
    if whole_number("RANK", 0) != 0:  # only the first of torchrun's processes prints
        return
    names = [alias or REGISTRY[name].alias or name]
    if isinstance(made, Dataset) and as_json:
        print_data(full_dataset_data(made, names))
    elif isinstance(made, Dataset) and is_quiet():
        console.print(made.ref, highlight=False)
    elif isinstance(made, Dataset):
        show_dataset(made, console, names)
    else:
        console.print(made, soft_wrap=True)


def _load(
    kind: type[Any],
    path: str | None,
    overrides: list[str] | None,
    section: str | None,
    preset: str | None = None,
) -> Any:
    """The first argument may already be an override: `trace-opd verify rollouts=…`."""
    changes = list(overrides or [])
    # Path.exists raises where a text is too long for a path.
    if path is not None and "=" in path and not os.path.exists(path):  # noqa: PTH110
        changes.insert(0, path)
        path = None
    return load_config(kind, path, changes, section, preset)


def _report(
    config: ConfigPath = None,
    overrides: Overrides = None,
    output: Output = None,
    store: StoreRoot = "store",
    dry_run: DryRun = False,
) -> None:
    loaded = _load(ReportConfig, config, overrides, "report")
    if dry_run:
        print_config(loaded)
        return
    from ..viewer import report_page

    console.print(report_page.run(loaded, open_store(store), output), soft_wrap=True)


for _entry in REGISTRY.values():
    _command = _report if _entry.name == "report" else _stage_command(_entry)
    app.command(_entry.name, help=_entry.summary)(_command)
_OTHERS = {
    "export": export, "contamination": contamination, "push": push, "plot": plot, "init": init,
    "demo": demo, "probe": probe,
}  # fmt: skip
for _name, _command in (COMMANDS | removal_commands.COMMANDS | _OTHERS).items():
    app.command(_name)(_command)
app.add_typer(label, name="label")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"trace-opd {version('trace-opd')}")
        raise typer.Exit


@app.callback()
def _app(
    asked: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help=f"{QUIET} Also after the command.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help=f"{VERBOSE} Also after the command.")
    ] = False,
) -> None:
    """Token-routed self on-policy distillation: annotate, route, train."""
    choose_output(quiet, verbose)


@app.command()
def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    preset: PresetName = None,
    store: StoreRoot = "store",
    alias: Annotated[
        str | None, typer.Option(help="Prefix of all datasets' names; default: the config's name.")
    ] = None,
    keep_failed: KeepFailed = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all stages and print the plan; run nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check all stages, then run them in order, in this process, without a server."""
    kept = ["annotate.annotator.keep_failed=true"] if keep_failed else []
    named = [f"name={json.dumps(alias)}"] if alias is not None else []
    loaded = _load(PipelineConfig, config, [*(overrides or []), *kept, *named], None, preset)
    from .run_pipeline import plan_and_run

    plan_and_run(loaded, open_store(store), dry_run, as_json)


@app.command()
def study(
    config: ConfigPath,
    overrides: Overrides = None,
    store: StoreRoot = "store",
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of the studies' files.")
    ] = Path("studies"),
    page: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Page; default: study.md there.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Apply the config's `quick`.")] = False,
    only: Annotated[
        str | None, typer.Option(help="One claim alone, in a folder of its own.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train every arm of a study with every seed; write tables, plots and a page of results."""
    loaded = _load(StudyConfig, config, None, None)
    loaded = override(loaded, [*(loaded.quick if quick else []), *(overrides or [])])
    from ..study.study import planned, run_study, study_of

    if only is not None:
        loaded = study_of(loaded, only)
    if dry_run:
        print_config(loaded)
        console.print(f"# {planned(loaded)}")
        return
    folder = output / loaded.name
    written = page or folder / "study.md"
    run_study(loaded, open_store(store), folder, written)
    console.print(f"{written}, results in {folder}", soft_wrap=True)


@app.command()
def config(
    stage: Annotated[str, typer.Argument(help="Stage, pipeline or study.")],
    path: ConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="JSON schema with descriptions.")
    ] = False,
) -> None:
    """Print a commented template of a stage's config to fill in and run.

    With a file or overrides: the complete config that they make. With --schema: the JSON schema.
    """
    kinds = {name: entry.config_type for name, entry in REGISTRY.items()}
    kinds |= {"pipeline": PipelineConfig, "study": StudyConfig}
    if stage not in kinds:
        raise InputError(f"stage {unknown_name(stage, kinds)}")
    if schema:
        print_json(kinds[stage].model_json_schema(), console)
    elif path is None and not overrides:
        print(template(kinds[stage]), end="")
    else:
        print_config(_load(kinds[stage], path, overrides, stage if stage in REGISTRY else None))


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Preset to show with its settings and notes.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the presets (TRACE and the other methods): tokens, teacher, action, gate, schedule."""
    from .presets import print_preset, print_presets

    if name is None:
        print_presets(console, as_json)
    else:
        print_preset(name, console, as_json)


@app.command()
def plan(
    config: ConfigPath = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs; default: this machine's.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0, help="TFLOP/s per GPU; default: measured here.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0, help="Memory GB/s per GPU; default: measured here.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean response length; default: the limit.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="Memory of a GPU, GB; default: this machine's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a training run's memory and seconds per step, and what makes it fit a GPU."""
    from ..training.plan_table import plan_data, plan_table

    loaded = _load(TrainConfig, config, overrides, "train")
    lengths = {"response_tokens": response_tokens, "memory_gb": memory}
    if as_json:
        print_data(plan_data(loaded, gpus, tflops, bandwidth, **lengths))
    else:
        console.print(plan_table(loaded, gpus, tflops, bandwidth, **lengths))


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Pipeline YAML: default parameters.")
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Serve a Prefect deployment per stage (`prefect deployment run 'annotate/default' …`)."""
    arguments = [str(config)] if config is not None else []
    # Only flows.py imports Prefect, and it runs as a module of its own.
    command = [sys.executable, "-P", "-m", "trace_opd.flows", *arguments, "--store", store]
    os.execv(sys.executable, command)


def run() -> NoReturn:
    """Run the command of sys.argv; bad input is one sentence and exit code 2, no traceback."""
    stop_by_signals()
    log_thread_failures()
    # Read when transformers and datasets are first imported: no progress bars besides ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an encoding may lack a response's characters
            stream.reconfigure(errors="backslashreplace")

    def main() -> None:
        log_to_terminal()
        try:
            app()
        except SystemExit as ended:
            # Typer turns a KeyboardInterrupt into an exit code, without its sentence.
            interrupt = ended.__context__ and ended.__context__.__cause__
            raise interrupt if isinstance(interrupt, KeyboardInterrupt) else ended from None
        finally:
            reset_output()

    sys.exit(exit_code(main))
