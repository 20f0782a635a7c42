"""What online training needs around the trainer: engines, and tables kept in the store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import (
    OpenAISampler,
    SamplingConfig,
    TrainConfig,
    TransformersSampler,
)
from ...schemas.errors import InputError
from ...schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from ...trace.align import byte_table
from ...trace.online import Ahead, Following, OnlineSource, SharedOnline
from ...trace.policy import Policy
from ...trace.ranks import Ranks
from ...trace.route import needs_annotations
from ...trace.schedule import kl_weight
from ...trace.trainer import Online
from ..annotators import engine_of, open_annotator
from ..annotators.rows import skipped_annotations
from ..samplers import Follower, open_follower
from ..samplers.probe import Probe
from ..samplers.rollouts import rollouts_table
from ..samplers.transformers import TransformersPolicySampler
from ..verifiers.verdicts import MathVerifier
from .validation import Validation

# Online tables: role, stage, contract, and the roles that the dataset names as its inputs.
_ONLINE_TABLES = (
    ("problems", "problems", PROBLEMS, ()),
    ("rollouts", "rollout", ROLLOUTS, ("problems",)),
    ("verdicts", "verify", VERDICTS, ("rollouts",)),
    ("annotations", "annotate", ANNOTATIONS, ("verdicts", "rollouts", "problems")),
    ("routed", "convert", ROUTED, ("annotations", "verdicts", "rollouts", "problems")),
)
_PROBES = 2  # problems whose tokens prove that an engine follows


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
        self._tokenizer = policy.tokenizer
        self._engines: _Engines | None = None
        self._follower: Follower | None = None
        self._follow: Callable[[], None] | None = None
        self._ahead: Ahead | None = None
        beside = self._open_beside() if self._ranks.first else None
        # Of servers the first rank alone asks.
        served = isinstance(config.sampler, OpenAISampler)
        if self._ranks.first or not served:
            self._sampler = self._open_sampler(policy, run)
        source = None
        if self._ranks.first:
            self._drafts = _online_drafts(store, run, inputs["problems"])
            self._engines = self._open_engines(run, beside)
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
        self.source = self._shared(source, served, policy)

    def _shared(self, source: OnlineSource | None, served: bool, policy: Policy) -> Online:
        """The source as the trainer calls it: the sampler follows the weights, ranks share.

        Servers follow the first rank's; engines of the ranks' own follow on each.
        """
        own: Online | None = source
        if served and source is not None:
            own = self._following(source, policy)
        if self._ranks.count > 1:
            own = SharedOnline(own, None if served else self._sample, self._ranks)
        assert own is not None, "one rank is the first"
        return own if served else self._following(own, policy)

    def _following(self, source: Online, policy: Policy) -> Online:
        follower = self._follower
        if follower is None:
            return source
        texts = [str(text) for text in self._problems["problem"].slice(0, _PROBES).to_pylist()]
        probe = Probe(policy.tokenizer, self._config.prompt, texts)

        def follow() -> None:
            probe.ask(policy)
            follower.follow(policy, probe)

        self._follow = follow

        if not self._config.online.max_staleness:
            return Following(source, follow, follower.rest)
        schedule = self._config.schedule
        last = self._config.offline.steps + self._config.online.steps
        self._ahead = Ahead(source, follow, lambda step: kl_weight(step, schedule) > 0, last)
        return self._ahead

    def _open_sampler(self, policy: Policy, run: Draft) -> Any:
        """The engine of the rollouts; kept as the follower too where it has weights of its own."""
        config = self._config.sampler
        if isinstance(config, TransformersSampler):
            return TransformersPolicySampler(policy, config.batch_tokens)
        ahead = self._config.online.max_staleness > 0
        if ahead and self._ranks.count > 1 and not isinstance(config, OpenAISampler):
            raise InputError(
                "online.max_staleness: is 1 under several ranks, which sample together; take "
                "sampler.engine=openai (vLLM servers), or max_staleness=0"
            )
        elsewhere = config.weights_folder if isinstance(config, OpenAISampler) else None
        folder = Path(elsewhere) / run.id if elsewhere else run.local_path() / "weights"
        alone = self._ranks.count == 1 and not ahead
        self._follower = open_follower(
            config,
            self._config.policy,
            self._config.online.sampling,
            self._tokenizer,
            folder,
            alone,
        )
        return self._follower

    def _open_beside(self) -> tuple[Any, Any] | None:
        """Sampler and tokenizer of the policy that annotates beside the student, if one does.

        Before the student's: of vLLM's engines the one in this process has to be the last.
        """
        online = self._config.online
        if not needs_annotations(online.routing):
            return None
        return engine_of(online.annotator).open_sampler(online.annotator, self._config.policy)

    def _open_engines(self, run: Draft, beside: tuple[Any, Any] | None) -> _Engines:
        online = self._config.online
        if not needs_annotations(online.routing):
            return _Engines(MathVerifier(online.verify), None, None)
        sampler, tokenizer = beside or (self._sampler, self._tokenizer)
        return _Engines(
            MathVerifier(online.verify),
            open_annotator(
                online.annotator,
                online.segment,
                journal=run.local_path("journal"),
                sampler=sampler,
                tokenizer=tokenizer,
            ),
            None if beside is None else sampler,
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

    def validation(self, splits: dict[str, pa.Table], run: Path) -> Validation:
        """Looks at held-out problems through the engines of the online steps; one rank's work."""
        assert self._engines is not None, "validation runs on one rank"
        verifier = self._engines.verifier
        return Validation(self._config, splits, self._sample_held_out, verifier, run)

    def _sample_held_out(
        self, problems: pa.Table, sampling: SamplingConfig, k: int, seed: int
    ) -> pa.Table:
        if self._follow is not None:
            self._follow()
        prompt = self._config.prompt
        made = rollouts_table(problems, self._sampler, self._tokenizer, prompt, sampling, k, seed)
        if self._follower is not None:
            self._follower.rest()
        return made

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
                # A run that goes on from a checkpoint makes the steps after it again.
                draft.write_part(step - self._first, tables[role], replace=True)

    def finish(self) -> dict[str, str]:
        """Make the drafts datasets; their refs by table."""
        steps = self._config.online.steps
        return {
            # A run killed between here and its own manifest finds some of them finished.
            role: (draft if isinstance(draft, Dataset) else draft.finish(steps)).ref
            for role, draft in self._drafts.items()
        }

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        engines: list[Any] = [self._follower]
        if self._engines is not None:
            engines += [self._engines.verifier, self._engines.annotator]
            engines += [self._engines.annotator_sampler]
        for engine in engines:
            if engine is not None:
                engine.close()


def _online_drafts(store: Store, run: Draft, problems: Dataset) -> dict[str, Any]:
    """A draft per table, each the next one's input, so that lineage reads as in the stages."""
    drafts: dict[str, Any] = {}
    for role, stage, contract, roles in _ONLINE_TABLES:
        inputs = {r: drafts[r] for r in roles} or {"problems": problems}
        drafts[role] = store.begin(stage, {"online": run.ref}, inputs, contract)
    return drafts
