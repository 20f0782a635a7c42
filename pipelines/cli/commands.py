"""The command line: trace-opd <stage> config.yaml key=value …, and what looks into the store."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...data.store import Dataset, Store
from ...schemas.configs import Config, PipelineConfig, ReportConfig, StudyConfig, TrainConfig
from ...schemas.environment import whole_number
from ...schemas.errors import InputError
from ...schemas.presets import PRESETS
from ...schemas.settings import load_config, override
from ..stages import REGISTRY, StageEntry
from ..terminal import console, log_to_terminal, print_config, print_json
from .ending import end_at_second_interrupt, end_threads_with_a_line, exit_code
from .store_commands import COMMANDS, StoreRoot

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Token-routed self on-policy distillation: annotate, route, train.",
)

ConfigPath = Annotated[
    str | None,  # no Path: one that begins with an override would turn http:// into http:/
    typer.Argument(help="YAML config of the stage, or of a pipeline that has a section for it."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides.")]
Alias = Annotated[str | None, typer.Option(help="Name for the dataset; default: its table's.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check inputs and print the config; run nothing.")
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="TRACE or a baseline by name (trace-opd presets lists them)."),
]

KeepFailed = Annotated[
    bool,
    typer.Option("--keep-failed", help="Go on with rows that failed; ask for none of them again."),
]


def _stage_command(entry: StageEntry) -> Callable[..., None]:
    """The command of a stage."""

    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        store: StoreRoot = "store",
        alias: Alias = None,
        dry_run: DryRun = False,
    ) -> None:
        loaded = _load(entry.config_type, config, overrides, entry.name)
        _run_stage(entry.name, loaded, Store(store), alias, dry_run)

    return command


def _preset_command(entry: StageEntry) -> Callable[..., None]:
    """The command of a stage some of whose fields a preset sets."""

    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        preset: PresetName = None,
        store: StoreRoot = "store",
        alias: Alias = None,
        dry_run: DryRun = False,
    ) -> None:
        loaded = _load(entry.config_type, config, overrides, entry.name, preset)
        _run_stage(entry.name, loaded, Store(store), alias, dry_run)

    return command


def _annotate_command(entry: StageEntry) -> Callable[..., None]:
    """The command of stage annotate."""

    def command(
        config: ConfigPath = None,
        overrides: Overrides = None,
        store: StoreRoot = "store",
        alias: Alias = None,
        keep_failed: KeepFailed = False,
        dry_run: DryRun = False,
    ) -> None:
        kept = ["annotator.keep_failed=true"] if keep_failed else []
        loaded = _load(entry.config_type, config, [*(overrides or []), *kept], entry.name)
        _run_stage(entry.name, loaded, Store(store), alias, dry_run)

    return command


def _run_stage(name: str, config: Config, store: Store, alias: str | None, dry_run: bool) -> None:
    # Imports torch: a bad config has been refused before.
    from ..pipeline import run_stage
    from .show import show_dataset, show_plan

    if dry_run:
        show_plan(name, config, store, console)
        return
    result = run_stage(name, config, store, alias)
    if whole_number("RANK", 0) != 0:  # only the first of torchrun's processes prints
        return
    if isinstance(result, Dataset):
        show_dataset(result, console)
    else:
        console.print(result, soft_wrap=True)


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


def _report_command(
    config: ConfigPath = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="HTML file; default: beside the data in the store.")
    ] = None,
    store: StoreRoot = "store",
    dry_run: DryRun = False,
) -> None:
    loaded = _load(ReportConfig, config, overrides, "report")
    if dry_run:
        print_config(loaded)
        return
    from ..viewer import report

    console.print(report.run(loaded, Store(store), output), soft_wrap=True)


# Stages whose commands have options of their own.
_STAGE_COMMANDS = {
    "annotate": _annotate_command,
    "convert": _preset_command,
    "train": _preset_command,
    "report": lambda entry: _report_command,
}
for _entry in REGISTRY.values():
    _make_command = _STAGE_COMMANDS.get(_entry.name, _stage_command)
    app.command(_entry.name, help=_entry.summary)(_make_command(_entry))
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.command()
def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    preset: PresetName = None,
    store: StoreRoot = "store",
    keep_failed: KeepFailed = False,
) -> None:
    """Every stage in order, in this process, with no server."""
    kept = ["annotate.annotator.keep_failed=true"] if keep_failed else []
    loaded = _load(PipelineConfig, config, [*(overrides or []), *kept], None, preset)
    opened = Store(store)
    from ..pipeline import run_pipeline, run_stage

    def run(stage: str, stage_config: Config, alias: str) -> str:
        result = run_stage(stage, stage_config, opened, alias)
        console.print(f"{alias}: {result if isinstance(result, str) else result.ref}")
        return result if isinstance(result, str) else result.ref

    run_pipeline(loaded, run)


@app.command()
def study(
    config: ConfigPath,
    overrides: Overrides = None,
    store: StoreRoot = "store",
    output: Annotated[Path, typer.Option(help="Folder of the studies' files.")] = Path("studies"),
    page: Annotated[Path | None, typer.Option(help="Page; default: STUDY.md there.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Apply the config's `quick`.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train every arm of a study over its seeds; tables, plots and a page of what came out."""
    loaded = _load(StudyConfig, config, None, None)
    loaded = override(loaded, [*(loaded.quick if quick else []), *(overrides or [])])
    from ..study.study import planned, run_study

    if dry_run:
        print_config(loaded)
        console.print(f"# {planned(loaded)}")
        return
    folder = output / loaded.name
    written = page or folder / "STUDY.md"
    run_study(loaded, Store(store), folder, written)
    console.print(f"{written}, results in {folder}", soft_wrap=True)


@app.command()
def config(
    stage: Annotated[str, typer.Argument(help="Stage, or pipeline.")],
    path: ConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="JSON schema with descriptions.")
    ] = False,
) -> None:
    """Print a stage's whole config as YAML, defaults included, or its JSON schema."""
    kinds = {name: entry.config_type for name, entry in REGISTRY.items()}
    kinds |= {"pipeline": PipelineConfig, "study": StudyConfig}
    if stage not in kinds:
        raise InputError(f"stage {stage!r}: is none of {', '.join(kinds)}")
    if schema:
        print_json(kinds[stage].model_json_schema(), console)
        return
    section = stage if stage in REGISTRY else None
    print_config(_load(kinds[stage], path, overrides, section))


@app.command()
def presets() -> None:
    """List TRACE and the baselines that --preset names, with what each sets."""
    for name, preset in PRESETS.items():
        console.print(f"{name}: {preset.summary} ({preset.source})", soft_wrap=True)
        console.print(f"    {' '.join(preset.overrides)}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many GPUs; default: this machine.")
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
) -> None:
    """Predict a training run's memory and seconds per step; load no weights."""
    from ..training.plan import plan_table

    loaded = _load(TrainConfig, config, overrides, "train")
    console.print(plan_table(loaded, gpus, tflops, bandwidth, response_tokens=response_tokens))


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Pipeline YAML: default parameters.")
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Serve a Prefect deployment per stage (`prefect deployment run 'annotate/default' …`)."""
    root = store if "://" in store else str(Path(store).resolve())
    arguments = [str(config)] if config is not None else []
    # flows.py is the only file that imports Prefect, so it is a process of its own.
    command = [sys.executable, "-P", "-m", "trace_opd.flows", *arguments, "--store", root]
    os.execv(sys.executable, command)


def run() -> NoReturn:
    """Run the command of sys.argv: bad input is one sentence and exit code 2, without a traceback."""
    end_at_second_interrupt()
    end_threads_with_a_line()
    # Read when transformers and datasets are first imported; their bars would tear ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an encoding may lack the characters of a response
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_code(_run))


def _run() -> None:
    log_to_terminal()
    app()
