"""The schedule of the soak's rounds: a pure function of the seed. Used by run.py and trial.py.

A round is a pipeline (`Variant`) and the steps that disturb it. Positions in files and moments in
runs are shares in [0, 1): the runner converts them with the counts of an undisturbed run.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

STAGES = ("problems", "rollout", "verify", "select", "annotate", "convert", "train", "evaluate")

What = Literal["run", "twins", "rivals", "damage", "stale", "link"]

# Faults of a run and their weights in the draw.
FAULTS = {
    "none": 2,
    "sigkill": 5,
    "sigterm": 3,
    "sigint": 2,
    "full": 2,  # disk full from a moment on
    "io": 2,  # one change fails with EIO
    "readonly": 1,  # the file system turns read-only
    "short": 1,  # each write takes half of its bytes
    "unreadable": 1,  # one read fails with EIO
}
DAMAGES = ("flip", "cut", "zeros")
# Paths in a store for a link; {id} is the stage's dataset.
LINKS = (
    ".locks",
    ".locks/aliases.json",
    ".locks/{stage}.{id}",
    "aliases.json",
    "{stage}",
    "{stage}/{id}",
    "{stage}/{id}/part-00000.parquet",
    "{stage}/{id}/manifest.json",
)
LINKS_OF = {
    "annotate": ("annotate/{id}/journal",),
    "train": (
        "train/{id}/checkpoints",
        "train/{id}/checkpoints/step-00000001",
        "train/{id}/checkpoints/.tmp-final",
        "train/{id}/metrics.jsonl",
        "train/{id}/tensorboard",
    ),
}
STALE = (
    "part-00000.parquet.tmp-1-1",
    "manifest.json.tmp-99999-7",
    "checkpoints/.tmp-step-00000001/x",
)


@dataclass(frozen=True)
class Variant:
    """A pipeline. Rounds with equal variants share one undisturbed run.

    lies: the endpoint reports invalid usage, and content as a list of parts.
    """

    engine: Literal["rule", "openai"]
    limit: int
    rows_per_part: int
    group_size: int
    concurrency: int
    max_attempts: int
    lies: bool
    tracker: Literal["none", "tensorboard"]


@dataclass(frozen=True)
class Step:
    """One disturbance.

    what: one of
    - run: a stage's command with a fault;
    - twins: the same command twice at once, the fault in the first;
    - rivals: two annotations of the same rollouts under different names at once;
    - damage: a damaged file between runs;
    - stale: a killed writer's temporary file;
    - link: a link out of the store, and the stage's command while the link exists.

    name: the fault, the damage or the link's path. at, where: shares. endpoint: endpoint faults on.
    """

    what: What
    stage: str
    name: str
    at: float
    where: float
    endpoint: bool


@dataclass(frozen=True)
class Round:
    """budget: annotator.budget_usd as a multiple of the undisturbed run's bill; None: no limit."""

    seed: str
    variant: Variant
    budget: float | None
    steps: tuple[Step, ...]


def make_round(seed: int, number: int, engine: str | None = None) -> Round:
    """The `number`-th round of a seed. engine: replaces the drawn engine."""
    name = f"{seed}/{number}"
    chance = random.Random(name)
    variant = _variant(chance, engine)
    budget = chance.choice((None, None, 0.6, 1.5, 4.0)) if variant.engine == "openai" else None
    steps = tuple(step for stage in STAGES for step in _steps(chance, stage, variant))
    return Round(name, variant, budget, steps)


def _variant(chance: random.Random, engine: str | None) -> Variant:
    drawn = chance.choice(("rule", "openai", "openai"))
    variant = Variant(
        engine="rule" if (engine or drawn) == "rule" else "openai",
        limit=chance.choice((4, 6)),
        rows_per_part=chance.choice((2, 3)),
        group_size=2,
        concurrency=chance.choice((1, 1, 4)),
        max_attempts=chance.choice((2, 6)),
        lies=chance.random() < 0.25,
        tracker=chance.choice(("none", "none", "tensorboard")),
    )
    if variant.engine == "rule":
        # Equal except for unused fields, so one undisturbed run serves all.
        return replace(variant, concurrency=1, max_attempts=2, lies=False)
    return variant


def _steps(chance: random.Random, stage: str, variant: Variant) -> list[Step]:
    """A stage's disturbances; more for stages that are long or cost money."""
    most = {"train": 3, "annotate": 4 if variant.engine == "openai" else 2}.get(stage, 2)
    steps = [_step(chance, stage, variant) for _ in range(chance.randint(0, most))]
    if chance.random() < 0.93:  # so that the next stage finds its input
        steps.append(Step("run", stage, "none", 0.0, 0.0, chance.random() < 0.4))
    return steps


def _step(chance: random.Random, stage: str, variant: Variant) -> Step:
    whats: dict[What, int] = {"run": 10, "twins": 2, "damage": 3, "stale": 2, "link": 2}
    if stage == "annotate" and variant.engine == "openai":
        whats["rivals"] = 1
    (what,) = chance.choices(list(whats), list(whats.values()))
    names = {
        "run": chance.choices(list(FAULTS), list(FAULTS.values()))[0],
        "twins": chance.choice(("none", "sigkill")),
        "rivals": "none",
        "damage": chance.choice(DAMAGES),
        "stale": chance.choice(STALE if stage == "train" else STALE[:2]),
        "link": chance.choice(LINKS + LINKS_OF.get(stage, ())),
    }
    return Step(what, stage, names[what], chance.random(), chance.random(), chance.random() < 0.6)
