"""`--dry-run` of a stage: its config, and which dataset a run with it would make."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import Config, TrainConfig, VerifyConfig
from ..planning.estimate import Estimate, estimate, estimate_view
from ..planning.judge_estimate import judge_estimates, judge_view
from ..stages import REGISTRY
from ..stages.base import Plan, Stage
from ..terminal import print_config
from .show import figures_table


@dataclass(frozen=True)
class _Planned:
    """target: the dataset, finished or to be made; None: the stage makes none. plan: None for a
    stage that is not made of parts. judges: by label, what each will be asked."""

    target: Dataset | Draft | None
    plan: Plan | None = None
    parts_there: int | None = None
    estimate: Estimate | None = None
    judges: dict[str, Estimate] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return isinstance(self.target, Dataset)


def _planned(name: str, config: Config, store: Store) -> _Planned:
    """Raises InputError if the stage would refuse the request before its work."""
    stage = REGISTRY[name].load()
    if isinstance(config, TrainConfig):
        from ..stages import train

        return _Planned(train.begin(config, store)[1])
    if not isinstance(stage, Stage):
        return _Planned(None)
    plan, target = stage.begin(config, store)
    if isinstance(target, Dataset):
        return _Planned(target, plan)
    there = sum(map(target.has_part, range(plan.parts)))
    found = estimate(plan, target) if name == "annotate" else None
    judges = judge_estimates(plan, target) if isinstance(config, VerifyConfig) else {}
    return _Planned(target, plan, there, found, judges)


def show_plan(name: str, config: Config, store: Store, console: Console) -> None:
    """Print a stage's config, and which dataset a run with it would make.

    Raises:
        InputError: the stage would refuse the request before its work.
    """
    print_config(config)
    found = _planned(name, config, store)
    if found.target is None:
        return
    parts = ""
    if found.plan is not None:
        count = found.plan.parts
        parts = f", {count} part{'s' if count != 1 else ''}"
        parts += "" if found.finished else f", {found.parts_there} of them there"
    state = "finished" if found.finished else "to be made"
    console.print(f"# {found.target.ref}: {state}{parts}")
    if name == "problems" and found.plan is not None and found.plan.figures:
        console.print(figures_table(found.plan.figures))
    if found.estimate is not None and found.plan and isinstance(found.target, Draft):
        console.print(estimate_view(found.estimate, found.plan, found.target))
    if isinstance(config, VerifyConfig):
        for label, grades in found.judges.items():
            console.print(f"# {label}")
            console.print(judge_view(grades, config.judges[label]))


def plan_data(name: str, config: Config, store: Store) -> dict[str, Any]:
    """The same for --json.

    Raises:
        InputError: see `show_plan`.
    """
    found = _planned(name, config, store)
    plan, target = found.plan, found.target
    return {
        "stage": name,
        "config": config.model_dump(mode="json"),
        "dataset": None if target is None else target.ref,
        "finished": found.finished,
        "parts": None if plan is None else plan.parts,
        "parts_there": found.parts_there,
        "figures": {} if plan is None else plan.figures,
        "estimate": None if found.estimate is None else _estimate_data(found.estimate),
        "judges": {label: _estimate_data(grades) for label, grades in found.judges.items()},
    }


def _estimate_data(found: Estimate) -> dict[str, Any]:
    """Requests and tokens of the parts that are not made yet."""
    expected = found.expected
    return {
        "rows": found.rows,
        "asked": found.asked,
        "shared": found.shared,
        "answered": found.answered,
        "expected_tokens": None if expected is None else asdict(expected),
        "full_tokens": asdict(found.full),
        "most_tokens": asdict(found.most),
    }
