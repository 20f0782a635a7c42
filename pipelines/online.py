"""What online training needs around the trainer: engines, and tables kept in the store."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.store import Dataset, Draft, Store, content_hash
from ..schemas.configs import SelfAnnotator, TrainConfig
from ..schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from ..trace.align import byte_table
from ..trace.online import OnlineSource
from ..trace.policy import Policy
from ..trace.ranks import Ranks
from ..trace.rules import needs_annotations
from ..trace.shared_online import SharedOnline
from .annotators import open_annotator
from .annotators.policy import annotating_policy
from .annotators.rows import skipped_annotations
from .rollout import rollouts_table
from .samplers import open_sampler
from .samplers.transformers import TransformersPolicySampler
from .verify import MathVerifier

# Online tables: role, stage, contract, and the roles that the dataset names as its inputs.
_ONLINE_TABLES = (
    ("problems", "problems", PROBLEMS, ()),
    ("rollouts", "rollout", ROLLOUTS, ("problems",)),
    ("verdicts", "verify", VERDICTS, ("rollouts",)),
    ("annotations", "annotate", ANNOTATIONS, ("verdicts", "rollouts", "problems")),
    ("routed", "convert", ROUTED, ("annotations", "verdicts", "rollouts", "problems")),
)


@dataclass(frozen=True)
class _Engines:
    """What an online phase holds open; no annotator where the routing looks at no annotation."""

    verifier: MathVerifier
    annotator: Any
    annotator_sampler: Any


class OnlineTables:
    """Makes each online step's tables from the live policy and keeps them in the store."""

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        run: Draft,
        inputs: dict[str, Dataset],
        policy: Policy,
        ranks: Ranks | None = None,
    ) -> None:
        """policy: samples; under several ranks each has its own, and the first does the rest."""
        online = config.online
        self._ranks = ranks or Ranks()
        self._config = config
        self._first = config.offline.steps
        self._problems = inputs["problems"].read()
        self._sampler = TransformersPolicySampler(policy, config.sampler.batch_tokens)
        self._tokenizer = policy.tokenizer
        self._engines = None
        source = None
        if self._ranks.first:
            self._drafts = _online_drafts(store, run, inputs["problems"])
            self._engines = self._open_engines(run)
            source = OnlineSource(
                problems=self._step_problems,
                sample=self._sample,
                verifier=self._engines.verifier,
                annotator=self._engines.annotator,
                bytes=byte_table(policy.tokenizer),
                routing=online.routing,
                write=self._write,
                refill_rounds=online.refill_rounds,
            )
        if self._ranks.count > 1:
            source = SharedOnline(source, self._sample, self._ranks)
        assert source is not None, "one rank is the first"
        self.source = source

    def _open_engines(self, run: Draft) -> _Engines:
        online = self._config.online
        if not needs_annotations(online.routing):
            return _Engines(MathVerifier(online.verify), None, None)
        sampler, tokenizer, own = self._sampler, self._tokenizer, None
        annotator = online.annotator
        if isinstance(annotator, SelfAnnotator):
            # Beside the student, unless the student itself annotates.
            beside = annotating_policy(annotator, self._config.policy)
            if beside is not None:
                sampler, tokenizer = open_sampler(annotator.sampler, beside)
                own = sampler
        return _Engines(
            MathVerifier(online.verify),
            open_annotator(
                annotator,
                online.segment,
                journal=run.local_path("journal"),
                sampler=sampler,
                tokenizer=tokenizer,
            ),
            own,
        )

    def _step_problems(self, step: int, refill: int) -> pa.Table:
        """Round 0: the next `groups_per_step` problems of a shuffled pass, which never splits a
        step. Later rounds: as many others, drawn for this step alone.

        Stateless in step and round, so a resumed run asks what an undisturbed one would.
        """
        count = min(self._config.groups_per_step, len(self._problems))
        steps_per_epoch = len(self._problems) // count
        epoch, at = divmod(step - self._first, steps_per_epoch)
        order = np.random.default_rng([self._config.seed, 1, epoch]).permutation(
            len(self._problems)
        )
        chosen = order[at * count : (at + 1) * count]
        if refill:
            others = np.setdiff1d(order, chosen)
            shuffled = np.random.default_rng([self._config.seed, 2, step]).permutation(others)
            chosen = shuffled[(refill - 1) * count : refill * count]
        return self._problems.take(chosen)

    def _sample(self, problems: pa.Table, step: int) -> pa.Table:
        online = self._config.online
        return rollouts_table(
            problems,
            self._sampler,
            self._tokenizer,
            self._config.prompt,
            online.sampling,
            online.group_size,
            int(content_hash([self._config.seed, step], 8), 16),
        )

    def _write(self, step: int, tables: dict[str, pa.Table]) -> None:
        # Rollouts that nobody was asked about come last; each table has a row for every rollout.
        annotated = tables.get("annotations", ANNOTATIONS.empty())
        rollouts, verdicts = (
            tables[role].slice(len(annotated)) for role in ("rollouts", "verdicts")
        )
        skipped = skipped_annotations(
            tables["problems"], rollouts, verdicts, self._config.online.segment
        )
        tables = tables | {"annotations": pa.concat_tables([annotated, skipped])}
        for role, draft in self._drafts.items():
            # Finished where the same run was made before and its own folder is gone.
            if isinstance(draft, Draft):
                draft.write_part(step - self._first, tables[role])

    def finish(self) -> dict[str, str]:
        """Make the drafts datasets; their refs by table."""
        steps = self._config.online.steps
        return {
            # A run killed between here and its own manifest finds some of them finished.
            role: (draft if isinstance(draft, Dataset) else draft.finish(steps)).ref
            for role, draft in self._drafts.items()
        }

    def close(self) -> None:
        if self._engines is None:
            return
        self._engines.verifier.close()
        for engine in (self._engines.annotator, self._engines.annotator_sampler):
            if engine is not None:
                engine.close()


def _online_drafts(store: Store, run: Draft, problems: Dataset) -> dict[str, Any]:
    """A draft per table, each the next one's input, so that lineage reads as in the stages."""
    drafts: dict[str, Any] = {}
    for role, stage, contract, roles in _ONLINE_TABLES:
        inputs = {r: drafts[r] for r in roles} or {"problems": problems}
        drafts[role] = store.begin(stage, {"online": run.ref}, inputs, contract)
    return drafts
