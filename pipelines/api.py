"""The Python interface: `load`, `run` and `show` of `import trace_opd as to`, docs/python.md.

The names and values are those of the command line; `trace_opd/__init__.py` imports this file when
one of them is first used.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ..data.remote import require_reachable
from ..data.store import Dataset, Store
from ..schemas.aliases import require_alias
from ..schemas.config_faults import unknown_name
from ..schemas.configs import Config, PipelineConfig
from ..schemas.errors import InputError
from ..schemas.extras import require
from ..schemas.settings import load_config, override
from .stages import REGISTRY

if TYPE_CHECKING:
    from .viewer.notebook import RolloutPicture

StageName = Literal[
    "problems", "rollout", "verify", "select", "annotate", "convert", "score", "train", "evaluate"
]
StoreLike = Store | str | Path | None
ConfigLike = Mapping[str, Any] | str | Path | Config | None


def load(dataset: str, store: StoreLike = None) -> Dataset:
    """A finished dataset by its alias, its id, the start of an id, or `stage/id`.

    store: a `Store`, or its folder or fsspec URL; None: $TRACE_OPD_STORE, else ./store.

    Raises:
        InputError: no dataset or several have that name.
    """
    return _store(store).get(dataset)


@overload
def run(
    stage: StageName,
    config: ConfigLike = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    store: StoreLike = None,
    alias: str | None = None,
) -> Dataset: ...


@overload
def run(
    stage: Literal["report"],
    config: ConfigLike = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    store: StoreLike = None,
    alias: str | None = None,
) -> Path: ...


@overload
def run(
    stage: Literal["pipeline"],
    config: ConfigLike = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    store: StoreLike = None,
    alias: str | None = None,
) -> dict[str, Dataset]: ...


@overload
def run(
    stage: str,
    config: ConfigLike = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    store: StoreLike = None,
    alias: str | None = None,
) -> Dataset | Path | dict[str, Dataset]: ...


def run(
    stage: str,
    config: ConfigLike = None,
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    store: StoreLike = None,
    alias: str | None = None,
) -> Dataset | Path | dict[str, Dataset]:
    """Run a stage, or `pipeline`, in this process, as the command of that name does.

    A request that was made before returns the finished dataset. One that was stopped goes on from
    its finished parts.

    config: the stage's config as a mapping, a YAML file, or a config object; a whole pipeline's
    mapping or file gives the stage its section. A `Dataset` in a mapping stands for its id.
    overrides: `key=value` texts. preset: the name of a method, for convert, train and pipeline.
    alias: the dataset's name, by default its table's; of a pipeline the prefix of all names.

    Returns the stage's dataset, the report's file, or a pipeline's datasets by role (problems,
    rollouts, verdicts, annotations, routed, train, eval_problems, evaluation).

    Raises:
        InputError: the stage is unknown or the config is invalid, with the command's sentence.
        TooManyFailed: the dataset is finished and named, but too many of its rows failed.
    """
    require_alias(alias)
    kinds = {name: entry.config_type for name, entry in REGISTRY.items()}
    kinds |= {"pipeline": PipelineConfig}
    if stage not in kinds:
        raise InputError(f"stage {unknown_name(stage, kinds)}")
    loaded = _config(kinds[stage], config, list(overrides), stage, preset)
    opened = _store(store)
    if isinstance(loaded, PipelineConfig):
        named = loaded.model_copy(update={"name": alias}) if alias else loaded
        return _run_pipeline(named, opened)
    from .pipeline import run_stage

    made = run_stage(stage, loaded, opened, alias)
    return made if isinstance(made, Dataset) else Path(made)


def show(
    dataset: Dataset | str, rollout: int | str = 0, store: StoreLike = None
) -> "RolloutPicture":
    """A rollout that a notebook draws, its tokens coloured by route as `trace-opd view` does.

    dataset: routed, annotations, or a train run, or its name. rollout: its row in the dataset, or
    the first characters of its id. store: as of `load`; a `Dataset` knows its own.

    Raises:
        InputError: the dataset holds no rollouts, or not exactly one has that row or id.
    """
    require("jinja2")
    from .viewer.notebook import picture

    if isinstance(dataset, Dataset):
        return picture(dataset, Store(dataset.files.root), rollout)
    opened = _store(store)
    return picture(opened.get(dataset), opened, rollout)


def _store(store: StoreLike) -> Store:
    if isinstance(store, Store):
        return store
    root = str(store) if store is not None else os.environ.get("TRACE_OPD_STORE", "store")
    require_reachable(root)
    return Store(root)


def _config(
    kind: type[Config],
    config: ConfigLike,
    overrides: list[str],
    stage: str,
    preset: str | None,
) -> Config:
    if isinstance(config, Config):
        if not isinstance(config, kind):
            raise InputError(
                f"{stage} takes {kind.__name__}, not {type(config).__name__}; give a mapping, a "
                f"YAML file or a {kind.__name__}"
            )
        if preset is not None:
            raise InputError(
                f"preset {preset}: is laid under a mapping or a file, not under a config object; "
                "give one of those"
            )
        return override(config, overrides) if overrides else config
    given = _with_refs(config) if isinstance(config, Mapping) else config
    return load_config(kind, given, overrides, stage if stage in REGISTRY else None, preset)


def _with_refs(value: Any) -> Any:
    """Nested data with each `Dataset` replaced by its `stage/id`."""
    if isinstance(value, Dataset):
        return value.ref
    if isinstance(value, Mapping):
        return {key: _with_refs(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_refs(inner) for inner in value]
    return value


def _run_pipeline(config: PipelineConfig, store: Store) -> dict[str, Dataset]:
    require("math_verify", "openai", "polars")
    from .pipeline import run_pipeline, run_stage
    from .planning.pipeline_plan import plan_pipeline

    plan_pipeline(config, store).require()

    def run_one(stage: str, stage_config: Config, alias: str) -> str:
        made = run_stage(stage, stage_config, store, alias)
        return made.ref if isinstance(made, Dataset) else made

    made = run_pipeline(config, run_one)
    return {role: store.get(ref) for role, ref in made.items() if role != "report"}
