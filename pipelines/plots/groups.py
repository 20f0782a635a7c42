"""Train runs by name, those that differ in their seed alone as one group.

training.py and types_over_steps.py draw a line or a panel for each group.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...data.dataset import find_dataset
from ...data.manifest import is_ref
from ...data.store import Dataset, Store
from ...schemas.configs import TrainConfig
from ...schemas.errors import InputError
from ..run_metrics import METRICS, parse_metrics
from ..training.collapse import method_name

_SHORT = 8  # characters of an id
_SEED = re.compile(r"([-_. ]+(seed|s))?[-_. /]*$")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order in which they were named."""

    label: str
    runs: tuple[Dataset, ...]

    @property
    def metrics(self) -> list[list[dict[str, Any]]]:
        """The steps of metrics.jsonl of each run."""
        return [_metrics(run) for run in self.runs]

    @property
    def validated(self) -> bool:
        return all(run.manifest["config"].get("validation") for run in self.runs)


def find_groups(names: Sequence[str], store: Store) -> list[Group]:
    """The train runs of these names, grouped.

    Raises:
        InputError: a name names no train run, or the same run as another one.
    """
    runs: dict[str, Dataset] = {}
    for name in names:
        run = store.get(name)
        if run.stage != "train":
            raise InputError(
                f"dataset {name!r} is no train run; name one of `trace-opd ls train`, or give "
                "--what agreement for annotations"
            )
        if any(run.ref == other.ref for other in runs.values()):
            raise InputError(f"dataset {name!r}: is named twice ({run.ref}); name each run once")
        runs[name] = run
    by_request: dict[str, list[str]] = {}
    for name, run in runs.items():
        by_request.setdefault(_but_for_the_seed(run), []).append(name)
    aliases = {ref: alias for alias, ref in reversed(store.aliases().items())}
    shown = {name: _shown(name, run, aliases) for name, run in runs.items()}
    members = list(by_request.values())
    return [
        Group(label, tuple(runs[name] for name in own))
        for label, own in zip(_labels(members, shown, runs), members, strict=True)
    ]


def _metrics(run: Dataset) -> list[dict[str, Any]]:
    with run.files.open(f"{run.ref}/{METRICS}") as file:
        return parse_metrics(file.read())


# --- which runs are one group --------------------------------------------------------------------


def _but_for_the_seed(run: Dataset) -> str:
    """What two runs share if only their seeds differ.

    The held-out problems are the same ones. What was trained on may be made with other seeds.
    """
    config = run.manifest["config"]
    try:
        known = TrainConfig.model_validate(config).semantic()
    except ValidationError:  # of another release
        known = dict(config)
    inputs = run.manifest["inputs"]
    known.pop("seed", None)
    for section in (known.get(name) or {} for name in ("offline", "online", "teacher")):
        for role in inputs.keys() & section.keys():
            del section[role]
    if known.get("validation"):
        known["validation"] = known["validation"] | {"problems": None}
    held_out = {role: ref for role, ref in inputs.items() if role.startswith("validation_")}
    trained_on = {role: _made_alike(run, ref) for role, ref in inputs.items() - held_out.items()}
    return json.dumps([known, sorted(held_out.items()), sorted(trained_on.items())], sort_keys=True)


def _made_alike(dataset: Dataset, ref: str) -> str:
    """A dataset's stage, config and inputs, without seeds; its ref where it is gone."""
    found = find_dataset(dataset.files, ref)
    if found is None:
        return ref
    inputs = found.manifest["inputs"]
    left_out = {"seed", *inputs}
    config = {name: v for name, v in found.manifest["config"].items() if name not in left_out}
    made = {role: _made_alike(found, one) for role, one in inputs.items()}
    return json.dumps([found.stage, config, sorted(made.items())], sort_keys=True)


# --- labels --------------------------------------------------------------------------------------


def _shown(name: str, run: Dataset, aliases: dict[str, str]) -> str:
    """A run's name; if it was given by its id, its alias or a short id."""
    if not is_ref(name) and not run.id.startswith(name):
        return name
    return aliases.get(run.ref, f"{run.stage}/{run.id[:_SHORT]}")


def _labels(
    members: Sequence[Sequence[str]], shown: dict[str, str], runs: dict[str, Dataset]
) -> list[str]:
    """A label for each group: what its names have in common, else its method."""
    first = [own[0] for own in members]
    common = [_common([shown[name] for name in own]) for own in members]
    if not all(common) or len(set(common)) < len(common):
        methods = [_method(runs[name]) for name in first]
        common = [part or method for part, method in zip(common, methods, strict=True)]
        if len(set(common)) < len(common):
            common = methods
        if len(set(common)) < len(common):
            common = [shown[name] for name in first]
    return [
        label if len(own) == 1 else f"{label} ({len(own)} seeds)"
        for label, own in zip(common, members, strict=True)
    ]


def _common(names: Sequence[str]) -> str:
    """What names begin or end with, without the seed's part; "" if that is nothing."""
    if len(names) == 1:
        return names[0]
    start = _shared_start(names)
    if any(name[len(start) : len(start) + 1].isdigit() for name in names):
        start = start.rstrip("0123456789")  # seeds 10 and 11 share a digit
    start = _SEED.sub("", start)
    end = _shared_start([name[::-1] for name in names])[::-1].lstrip("-_. /")
    return max(start, end, key=len) if max(len(start), len(end)) > 1 else ""


def _shared_start(names: Sequence[str]) -> str:
    columns = enumerate(zip(*names, strict=False))
    length = next((n for n, letters in columns if len(set(letters)) > 1), min(map(len, names)))
    return names[0][:length]


def _method(run: Dataset) -> str:
    try:
        return method_name(TrainConfig.model_validate(run.manifest["config"]))
    except ValidationError:
        return f"{run.stage}/{run.id[:_SHORT]}"
