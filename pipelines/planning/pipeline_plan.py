"""The plan of a pipeline: every stage's own checks before any work, all faults at once.

`trace-opd pipeline` and the flow check so before they start, `--dry-run` prints the plan. Each
stage's `begin` runs as it will, on the datasets that the stages before it will make (expected.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pyarrow as pa

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import Config, PipelineConfig
from ...schemas.errors import InputError, all_of
from ...schemas.tables import PROBLEMS
from ..paid.spending import dollars
from ..pipeline import run_pipeline
from ..samplers.trainable import untrainable
from ..stages import REGISTRY, train
from ..stages.base import Plan, Stage
from . import faults
from .cost import cost, past_seconds
from .expected import ExpectingStore, known_row
from .faults import missing_weights, vocabulary_of

_UNKNOWN = "0"  # id of a dataset that cannot be planned


@dataclass(frozen=True)
class Planned:
    """A stage of the plan.

    reads: roles of its inputs. ref: what it makes, None if that is unknown. rows: None if unknown.
    """

    role: str
    stage: str
    alias: str
    reads: list[str]
    ref: str | None = None
    state: str = "to do"
    rows: int | None = None
    takes: str = ""


@dataclass
class PipelinePlan:
    """stages in order. faults: what a run would end with. warnings: what a run says, and goes on.
    notes: what is worth knowing."""

    stages: list[Planned] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Raises InputError with all faults."""
        if self.faults:
            raise InputError(all_of(self.faults))


def plan_pipeline(config: PipelineConfig, store: Store, download: bool = True) -> PipelinePlan:
    """Check all stages; write nothing, ask no model and train nothing.

    download: fetch models that are not on this machine, as the run does. False: note them, and
    leave the checks that need them out.
    """
    planner = _Planner(config, store, download)
    run_pipeline(config, planner.step)
    plan = planner.plan
    if not config.train.offline.steps:
        plan.notes.append(
            "train.offline.steps is 0: stages rollout, verify, annotate and convert are left out; "
            "each online step does their work with the current policy"
        )
    training, held_out = (planner.problems.get(role) for role in ("problems", "eval_problems"))
    if same := faults.shared_problems(training, held_out):
        plan.faults += same
    else:
        plan.warnings += faults.shared_wording(training, held_out, config.name)
    plan.faults = list(dict.fromkeys(plan.faults))
    plan.notes = list(dict.fromkeys(plan.notes))
    return plan


class _Planner:
    """Plans one stage after the other, as `run_pipeline` calls `step`."""

    def __init__(self, config: PipelineConfig, store: Store, download: bool) -> None:
        self._config, self._store, self._download = config, ExpectingStore(store), download
        self.plan = PipelinePlan()
        self.problems: dict[str, pa.Table] = {}  # by role, what could be read
        self._refs: dict[str, str] = {}  # by role, what `step` returned
        self._unknown_roles: set[str] = set()  # what they make cannot be known yet

    def step(self, stage: str, config: Config, alias: str) -> str:
        role = alias.removeprefix(f"{self._config.name}-")
        given = config.model_dump(mode="json")
        linked = set(_texts(given))
        reads = [name for name, ref in self._refs.items() if ref in linked]
        planned = Planned(role, stage, alias, reads)
        found: list[str] = []
        target = None
        if stage != "report":
            try:
                target, planned = self._begun(planned, config)
            except InputError as error:
                found.append(str(error))
            if target is None:
                target = self._unknown(planned)
            if planned.state != "done":
                found += faults.of_stage(stage, config, self._store)
        if planned.ref is None or not self._unknown_roles.isdisjoint(reads):
            # The id and the rows stand for those of a dataset that cannot be planned.
            self._unknown_roles.add(role)
            planned = replace(planned, ref=None, rows=None, takes="")
        self.plan.faults += [f"{role}: {text}" for text in dict.fromkeys(found)]
        self.plan.stages.append(planned)
        ref = target.ref if target is not None else alias
        self._refs[role] = ref
        return ref

    def _begun(self, planned: Planned, config: Any) -> tuple[Dataset | None, Planned]:
        """The dataset that a stage has made or will make; None if a model must be fetched first."""
        if not self._download and (missing := missing_weights(config)):
            self.plan.notes.append(
                f"{planned.role}: not checked further, the weights of {missing} are not on this "
                "machine; the run fetches them"
            )
            return None, planned
        if planned.stage == "train":
            inputs, target = train.begin(config, self._store)
            plan = Plan(config, inputs, {}, 0)
        else:
            plan, target = REGISTRY[planned.stage].load().begin(config, self._store)
        planned = replace(planned, ref=target.ref)
        if isinstance(target, Dataset):
            if planned.stage == "problems":
                self.problems[planned.role] = target.read()
            rows = target.rows if target.parts else None
            taken = [f"{target.manifest['seconds']:.0f} s"]
            if target.summary.get("cost_usd"):
                taken.append(dollars(target.summary["cost_usd"]))
            done = replace(planned, state="done", rows=rows, takes=", ".join(taken))
            return target, done
        made = sum(map(target.has_part, range(plan.parts)))
        state = f"{made} of {plan.parts} parts done" if made else "to do"
        rows, tables = self._expected(planned, plan, target)
        dataset = self._store.expect(target, rows, tables)
        total = sum(rows) if rows else None
        takes, found, notes = cost(planned.stage, config, plan, target)
        self.plan.faults += [f"{planned.role}: {text}" for text in found]
        self.plan.notes += [f"{planned.role}: {text}" for text in notes]
        if takes == "" and self._store.files.is_local:
            takes = past_seconds(planned.stage, config, self._store, total)
        return dataset, replace(planned, state=state, rows=total, takes=takes)

    def _expected(
        self, planned: Planned, plan: Plan, target: Draft
    ) -> tuple[list[int], Sequence[pa.Table]]:
        """Rows of each part, and what is known of them."""
        if planned.stage == "problems":
            with REGISTRY["problems"].load().open(plan, target) as make:
                tables = [make(part) for part in range(plan.parts)]
            self.problems[planned.role] = pa.concat_tables(tables)
            return [len(table) for table in tables], tables
        if planned.stage == "train":
            return [], []
        config, inputs = plan.config, plan.inputs
        source = inputs.get("problems") or inputs.get("rollouts") or inputs["routed"]
        rows = [part["rows"] for part in source.manifest["parts"]]
        known = pa.table({})
        if planned.stage == "rollout":
            rows = [config.group_size * count for count in rows]
            fingerprint = vocabulary_of(config.sampler, config.policy)
            known = known_row(config.policy.path, fingerprint, untrainable(config) is None)
        elif planned.stage == "evaluate":
            rows = rows * (2 if "trained" in inputs else 1)
        elif planned.stage != "score":
            rollouts = inputs["rollouts"]
            rows = [part["rows"] for part in rollouts.manifest["parts"]]
            if rows:
                first = rollouts.read_part(0, ["policy_name", "vocab_fingerprint"]).slice(0, 1)
                name, fingerprint = (str(column[0].as_py()) for column in first.columns)
                known = known_row(name, fingerprint)
        return rows, [known] * len(rows)

    def _unknown(self, planned: Planned) -> Dataset:
        """Stands for a dataset that cannot be planned, so that later stages are still checked."""
        stage = REGISTRY[planned.stage].load()
        table = stage.contract if isinstance(stage, Stage) else None
        inputs = {role: self._refs[role] for role in _INPUTS.get(planned.stage, ())}
        header = {
            "stage": planned.stage, "inputs": inputs, "config": {},
            "table": table.name if table else None,
            "schema_version": table.version if table else None,
        }  # fmt: skip
        id_ = "1" if planned.role == "eval_problems" else _UNKNOWN
        draft = Draft(self._store.files, planned.stage, id_, header | {"id": id_}, table)
        empty = PROBLEMS.empty() if planned.stage == "problems" else known_row("", "")
        parts = max([self._store.get(ref).parts for ref in inputs.values()], default=1)
        return self._store.expect(draft, [1] * parts, [empty] * parts)


# Roles of a stage's inputs, for a dataset that cannot be planned.
_INPUTS = {
    "rollout": ("problems",),
    "verify": ("rollouts",),
    "select": ("verdicts", "rollouts", "problems"),
    "annotate": ("verdicts", "rollouts", "problems"),
    "convert": ("annotations", "verdicts", "rollouts", "problems"),
    "score": ("routed",),
}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a config's data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        yield from chain.from_iterable(map(_texts, inner))
