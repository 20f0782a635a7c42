"""`trace-opd export`. commands.py adds it; slow imports are inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...schemas.errors import InputError
from ..terminal import console
from .store_commands import StoreRoot, open_store

if TYPE_CHECKING:
    from ...data.store import Store


_MODEL = "model"
_Asked = dict[str, object]


def export(
    form: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="model, or for a routed dataset trl, verl, ms-swift, prime-rl or jsonl.",
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            help="model: train run (alias, id, stage/id), or a run's or checkpoint's path; else a "
            "routed dataset (alias, id or stage/id)."
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint; default: the newest.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Type of the weights; bfloat16 is for use, not for further training."),
    ] = "float32",
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Only the adapters, for peft and vLLM.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Model under the adapters; default: the path it was trained from."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    policy: Annotated[
        str | None,
        typer.Option(help="ms-swift: policy whose tokenizer made the ids; default: the recorded."),
    ] = None,
    scores: Annotated[
        str | None, typer.Option(help="prime-rl: scores dataset, for tokens of route rkl.")
    ] = None,
    groups_per_step: Annotated[
        int | None, typer.Option(min=1, help="prime-rl: prompts of a training step; default: 16.")
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Write a checkpoint's model as a Hugging Face folder, or a routed dataset for another trainer.

    A model's adapters are merged into their base. docs/other-trainers.md says what each format
    keeps and loses.
    """
    from ...schemas.config_faults import unknown_name
    from ..exports import FORMATS

    if folder is None:
        raise InputError(
            f"export: takes a format first; `trace-opd export model {form} {source}` writes a "
            "checkpoint's model"
        )
    if form not in (_MODEL, *FORMATS):
        raise InputError(f"format {unknown_name(form, (_MODEL, *FORMATS))}")
    of_models: _Asked = {
        "--step": step,
        "--dtype": None if dtype == "float32" else dtype,
        "--adapters": adapters or None,
        "--base": base,
        "--trust-remote-code": trust_remote_code or None,
    }
    of_tables: _Asked = {
        "--policy": policy,
        "--scores": scores,
        "--groups-per-step": groups_per_step,
    }
    for flag, value in (of_tables if form == _MODEL else of_models).items():
        if value is not None:
            raise InputError(f"{flag}: format {form} does not read it; leave it out")
    if form == _MODEL:
        _export_model(source, folder, step, dtype, adapters, base, trust_remote_code, store)
        return
    from ..exports import Options, export_routed

    options = Options(policy, scores, groups_per_step)
    rows = export_routed(form, source, open_store(store), folder, options)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
    console.print(f"{folder}: {source} for {form} ({counts} rows)", soft_wrap=True)


def _export_model(
    run: str,
    folder: Path,
    step: int | None,
    dtype: str,
    adapters: bool,
    base: str | None,
    trust_remote_code: bool,
    store: str,
) -> None:
    checkpoint = _checkpoint(run, step, store)
    if adapters and (base is not None or dtype != "float32"):
        raise InputError("--adapters writes float32 adapters alone; leave --dtype and --base out")
    from ...trace.export import export_adapters, export_model

    if adapters:
        export_adapters(checkpoint, folder)
        console.print(f"{folder}: adapters of {checkpoint}", soft_wrap=True)
        return
    import torch

    from ..models import resolve_policy

    export_model(
        checkpoint,
        folder,
        getattr(torch, dtype),
        None if base is None else resolve_policy(base),
        trust_remote_code,
    )
    console.print(f"{folder}: model of {checkpoint} in {dtype}", soft_wrap=True)


def _checkpoint(run: str, step: int | None, root: str) -> Path:
    """The checkpoint that a name or a path and a step mean."""
    from ...trace.retention import NAME, checkpoints, step_of

    folder = Path(run)
    if folder.is_dir() and NAME.fullmatch(folder.resolve().name):
        if step not in (None, step_of(folder.resolve())):
            raise InputError(f"{folder}: is not of step {step}; name the run, or leave --step out")
        return folder
    if not folder.is_dir():
        folder = _run_folder(run, open_store(root))
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    found = checkpoints(folder)
    if not found and (folder / "final").is_dir():
        raise InputError(
            f"{folder}: has no checkpoint of a step, only the final model: {folder / 'final'} is "
            "such a folder already (train.keep_checkpoints=true keeps the others)"
        )
    if not found:
        raise InputError(f"{folder}: has no checkpoint; name a train run or its folder")
    if step is None:
        return found[0]
    for one in found:
        if step_of(one) == step:
            return one
    steps = ", ".join(str(step_of(one)) for one in reversed(found))
    raise InputError(f"{folder}: has no checkpoint of step {step}; there are {steps}")


def _run_folder(name: str, store: "Store") -> Path:
    """The local folder of a training, also of an unfinished one by its exact `train/<id>`."""
    from ...data.manifest import is_ref

    ref = name if is_ref(name) and store.files.names(name) else store.get(name).ref
    if not ref.startswith("train/"):
        raise InputError(f"dataset {name!r} is no train run; name one of `trace-opd ls train`")
    return store.files.local_path(ref)
