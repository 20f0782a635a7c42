"""Commands that make broken datasets again, under their own ids, from their manifests.

check_store.py prints them.
"""

import json
import shlex
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ...data.dataset import find_dataset
from ...data.store import MANIFEST, Dataset, Store
from ...data.written_tables import KINDS
from ...schemas.errors import InputError
from ...trace.retention import checkpoints
from ..stages import REGISTRY
from ..stages.train import FINAL

_STAGES = list(REGISTRY)


def remake_commands(store: Store, damaged: Sequence[tuple[Dataset, Sequence[str]]]) -> list[str]:
    """Shell commands, to run in order: each removes damaged files, then its stage makes them again
    from the intact ones. Journals of paid answers stay.

    Each is one line of printable characters, whatever a manifest holds.

    damaged: broken datasets, and the names of their broken files.
    """
    commands: dict[str, str] = {}  # by the dataset whose stage makes them
    for dataset, names in damaged:
        online = dataset.manifest["config"].get("online")
        if isinstance(online, str):  # a table of a training run's steps
            run = _found(dataset, online)
            commands[online] = f"# {online}, which made {dataset.ref}, is missing"
            if run is not None:
                commands[online] = _train_again(store, run)
        elif dataset.stage == "train" and not _from_checkpoint(dataset, names):
            commands[dataset.ref] = _train_again(store, dataset)
        else:
            removed = _paths(dataset, MANIFEST, *names)
            commands.setdefault(dataset.ref, _then(store, removed, _command(store, dataset)))
    return [
        commands[ref]
        if commands[ref].isprintable()
        else f"# {ref}: its config holds characters that no command line can"
        for ref in sorted(commands, key=_order)
    ]


def _from_checkpoint(run: Dataset, names: Sequence[str]) -> bool:
    """Whether only the final model is damaged, and a checkpoint is left that it is made from."""
    folder = Path(run.files.base) / run.ref / "checkpoints"
    return bool(checkpoints(folder)) and all(name.startswith(FINAL) for name in names)


def _found(dataset: Dataset, ref: str) -> Dataset | None:
    try:
        return find_dataset(dataset.files, ref)
    except InputError:  # damaged itself, which is a finding of its own
        return None


def _order(ref: str) -> tuple[int, str]:
    """Stages in the registry's order: each may need those before it."""
    stage = ref.partition("/")[0]
    return (_STAGES.index(stage) if stage in _STAGES else len(_STAGES)), ref


def _train_again(store: Store, run: Dataset) -> str:
    """From the first step: what the steps before the last checkpoint made, only they can make."""
    tables = [store.files.url(ref) for ref in run.summary.get("tables", {}).values()]
    return _then(store, [*_paths(run, MANIFEST, "checkpoints"), *tables], _command(store, run))


def _paths(dataset: Dataset, *names: str) -> list[str]:
    return [dataset.path(n) for n in names if dataset.files.exists(f"{dataset.ref}/{n}")]


def _then(store: Store, removed: Sequence[str], command: str) -> str:
    paths = shlex.join(removed)
    return (
        f"rm -r {paths} && {command}"
        if store.files.is_local
        else f"{command}  # first remove {paths}"
    )


def _command(store: Store, dataset: Dataset) -> str:
    config = dataset.manifest["config"]
    names = [name for name, ref in store.aliases().items() if ref == dataset.ref]
    if isinstance(read := config.get("import"), dict):
        stem = names[0].rpartition("-")[0] if names else "ALIAS"
        words = ["import", read["layout"], read["file"], "--alias", stem]
        if read["layout"] in KINDS:
            of = dataset.manifest["inputs"][KINDS[read["layout"]].role]
            words[-1] = names[0] if names else dataset.id
            return shlex.join(["trace-opd", *words, "--of", of, "--store", store.root])
        words += ["--limit", str(read["limit"])] if read.get("limit") else []
        hidden = config.get("hide_verdict") or _hidden(dataset)
        words += ["--hide-verdict"] if hidden else []
        words += ["--on-bad-rows", read["on_bad_rows"]] if read.get("on_bad_rows") else []
        return shlex.join(["trace-opd", *words, "--store", store.root])
    entry = REGISTRY.get(dataset.stage)
    try:
        if entry is None:
            raise ValueError
        loaded = entry.config_type.model_validate(_with_inputs(dataset))
    except (ValueError, LookupError, TypeError, AttributeError, ValidationError):
        return f"# then make it again as before: no command of this release makes {dataset.ref}"
    words = [dataset.stage, *overrides(loaded)]
    if (entry.alias or entry.name) not in names:  # the default of a run
        words += ["--alias", names[0] if names else dataset.id]
    return shlex.join(["trace-opd", *words, "--store", store.root])


def _hidden(dataset: Dataset) -> bool:
    """Whether imported annotations belong to hidden verdicts."""
    verdicts = dataset.manifest["inputs"].get("verdicts")
    found = _found(dataset, verdicts) if verdicts else None
    return found is not None and bool(found.manifest["config"].get("hide_verdict"))


def _with_inputs(dataset: Dataset) -> dict[str, Any]:
    """The manifest's config with ids of inputs in place of aliases, which may move."""
    config, inputs = deepcopy(dataset.manifest["config"]), dataset.manifest["inputs"]
    if against := [ref for role, ref in inputs.items() if role.startswith("against_")]:
        config["against"] = against
    if rates := inputs.get("pool_rates"):
        config["online"]["pool"]["rates"] = rates
    train = dataset.stage == "train"
    for section in (config["offline"], config["online"]) if train else (config,):
        section |= {role: inputs[role] for role in inputs.keys() & section.keys()}
    source = config.get("source") or {}
    if dataset.stage == "problems" and "id" not in (columns := source.get("columns") or {"id": ""}):
        # Written before columns were recognised: null was none.
        source["columns"] = {} if source.get("preset") else {k: v or "" for k, v in columns.items()}
    return config


def overrides(config: BaseModel, prefix: str = "") -> list[str]:
    """`key=value` words that make a config from its class's defaults."""
    out = []
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), prefix + name
        if not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, BaseModel):
            out += overrides(value, f"{key}.") or [f"{key}={{}}"]
        else:
            out.append(f"{key}={_yaml(config.model_dump(mode='json', include={name})[name])}")
    return out


def _yaml(value: Any) -> str:
    """A value as one line of YAML, for an override."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
