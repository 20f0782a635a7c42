"""Online training around the trainer: its engines, and its tables in the store.

Stage train opens one `OnlineTables` on every rank and gives its `source` to the trainer.
"""

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import OpenAIAnnotator, SamplingConfig, TrainConfig
from ...schemas.errors import InputError
from ...schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from ...trace.align import byte_table
from ...trace.clock import Phase
from ...trace.online import OnlineSource, sample_shares
from ...trace.protocols import Annotator, Sampler
from ...trace.ranks import Ranks
from ...trace.route import needs_annotations
from ...trace.schedule import kl_weight
from ...trace.trained import SamplingCopy, Trained
from ..annotators import engine_of, open_annotator
from ..annotators.rows import skipped_annotations
from ..annotators.summary import bearing, summarize
from ..paid.bill import read_bill
from ..paid.prices import find_price
from ..paid.spending import open_spending
from ..progress import show_fields
from ..samplers import sampling_engine
from ..samplers.engine import Follower, Training
from ..samplers.probe import Probe
from ..samplers.rollouts import rollouts_table
from ..samplers.weights import hands_adapters, take_part
from ..verifiers.registry import judges_bills, keep_answers, open_verifier
from .problem_pool import ProblemPool
from .validation import Validation

logger = logging.getLogger(__name__)

# Online tables: role, stage, contract, and the roles that are the dataset's inputs.
_ONLINE_TABLES = (
    ("problems", "problems", PROBLEMS, ()),
    ("rollouts", "rollout", ROLLOUTS, ("problems",)),
    ("verdicts", "verify", VERDICTS, ("rollouts",)),
    ("annotations", "annotate", ANNOTATIONS, ("verdicts", "rollouts", "problems")),
    ("routed", "convert", ROUTED, ("annotations", "verdicts", "rollouts", "problems")),
)
_PROBES = 2  # problems that the probe of an engine's weights is made of


class OnlineTables:
    """Makes each online step's tables from the current weights and keeps them in the store.

    source: the trainer's (`trace.online.OnlineSource`).
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        run: Draft,
        inputs: dict[str, Dataset],
        trained: Trained,
        ranks: Ranks | None = None,
        whole: SamplingCopy | None = None,
    ) -> None:
        """whole: samples, if the engine samples with the trained weights and they are sharded.

        Raises:
            InputError: an engine that can't be opened or can't follow the weights.
        """
        ranks = ranks or Ranks()
        online = config.online
        self._config, self._run, self._trained, self._whole = config, run, trained, whole
        self._policy = policy = trained.policy if whole is None else whole.policy
        self._ranks = ranks
        self._first = config.offline.steps
        self._problems = inputs["problems"].read()
        self.pool: ProblemPool | None = None
        if online.pool is not None:
            self.pool = ProblemPool(config, self._problems, inputs, inputs["problems"].ref)
        if ranks.first and len(self._problems) < config.groups_per_step:
            logger.warning(
                "groups_per_step is %d, dataset %s has %d problems: each step samples all of them",
                config.groups_per_step,
                inputs["problems"].ref,
                len(self._problems),
            )
        engine = sampling_engine(config.sampler, config.policy)
        self._share = not engine.served
        ahead = online.max_staleness > 0
        if ahead and ranks.count > 1 and not engine.served:
            raise InputError(
                "online.max_staleness: is 1 under several ranks, which sample together; take "
                "sampler.engine=openai (vLLM servers), or max_staleness=0"
            )
        # Before the student's: of several vLLM engines, the one in this process must be the last.
        annotating = self._open_annotating_policy() if ranks.first else None
        self._sampler: Sampler | None = None
        self._follower: Follower | None = None
        if ranks.first or not engine.served:
            training = Training(
                policy,
                online.sampling,
                run.local_path(),
                ahead,
                ranks.count,
                config.loss.fp32_logits,
            )
            self._sampler = engine.open_in_training(training)
        self._probe: Probe | None = None
        if engine.follows:
            self._follower = cast(Follower | None, self._sampler)
            self._adapters = hands_adapters(config.sampler, policy.model)
            texts = [str(text) for text in self._problems["problem"].slice(0, _PROBES).to_pylist()]
            self._probe = Probe(policy.tokenizer, config.prompt, texts)
        self._verifier = open_verifier(online.verify, keep_answers(online.verify, run))
        self._annotator: Any = None
        self._journal = run.local_path("journal")
        self._resumed = False
        if ranks.first:
            self._drafts = _online_drafts(store, run, inputs["problems"])
            self._annotator = self._open_annotator(annotating)
        last = self._first + online.steps
        coming = range(self._first, last) if ahead else ()
        self.source = OnlineSource(
            problems=self._step_problems,
            sample=self._sample,
            verifier=self._verifier,
            annotator=self._annotator,
            bytes=byte_table(policy.tokenizer),
            routing=online.routing,
            write=self._write,
            refill_rounds=online.refill_rounds,
            follow=self._follow if whole or engine.follows else None,
            rest=self._rest if whole or engine.follows else None,
            ranks=ranks,
            share=self._share,
            ahead={step: kl_weight(step, config.schedule) > 0 for step in coming},
        )
        self._open: list[Any] = [self.source, self._sampler, self._verifier, self._annotator]
        self._open += [annotating[0]] if annotating else []

    def _open_annotating_policy(self) -> tuple[Sampler, Any] | None:
        """Sampler and tokenizer of the policy that annotates, if it is not the student."""
        online = self._config.online
        if not needs_annotations(online.routing):
            return None
        return engine_of(online.annotator).open_sampler(online.annotator, self._config.policy)

    def _open_annotator(self, annotating: tuple[Any, Any] | None) -> Annotator | None:
        online = self._config.online
        if not needs_annotations(online.routing):
            return None
        sampler, tokenizer = annotating or (self._sampler, self._policy.tokenizer)
        paid: dict[str, Any] = {}
        if engine_of(online.annotator).asks_endpoint:
            annotator = cast(OpenAIAnnotator, online.annotator)
            paid["spending"] = open_spending(annotator, self._journal, tell=_show_cost)
        return open_annotator(
            online.annotator,
            online.segment,
            journal=self._journal,
            sampler=sampler,
            tokenizer=tokenizer,
            **paid,
        )

    def _follow(self, phase: Phase = lambda _: None) -> None:
        """Give the sampler the current weights; every rank calls, since they may be sharded."""
        phase("hand_over")
        self._ranks.wait()  # the first may come late, from a step made ahead or from verifying
        if self._whole is not None:
            self._whole.gather(self._trained.packed)
        if self._probe is None:
            return
        phase("probe")
        self._probe.ask(self._trained)
        if self._follower is not None:
            self._follower.follow(self._trained, self._probe, phase)
        else:  # this rank has no engine
            phase("hand_over")
            take_part(self._trained, self._adapters)

    def _rest(self, phase: Phase = lambda _: None) -> None:
        """The sampler is idle until the next `_follow`."""
        if self._whole is not None:
            self._whole.free()
        if self._follower is not None:
            self._follower.rest(phase)

    def _step_problems(self, step: int, refill: int) -> pa.Table:
        """Round 0: the next `groups_per_step` problems of a shuffled pass, which never splits a
        step. Later rounds: as many others, drawn for this step alone.

        Stateless in step and round, so a resumed run asks the same problems.
        """
        self._recall(step)
        if self.pool is not None:
            return self._problems.take(self.pool.draw(step, refill))
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

    def _recall(self, step: int) -> None:
        """Before a run's first step: the answers that the steps before it have counted."""
        if self._resumed:
            return
        self._resumed = True
        if self._annotator is None or not engine_of(self._config.online.annotator).asks_endpoint:
            return
        for part in range(step - self._first):
            tables = {role: draft.read_part(part) for role, draft in self._drafts.items()}
            rollouts, verdicts = (
                bearing(tables["annotations"], tables[role]) for role in ("rollouts", "verdicts")
            )
            self._annotator.recall(tables["problems"], rollouts, verdicts)

    def _sample(self, problems: pa.Table, step: int) -> pa.Table:
        online = self._config.online
        seed = int(content_hash([self._config.seed, step], 8), 16)
        return self._rollouts(problems, online.sampling, online.group_size, seed)

    def _rollouts(
        self, problems: pa.Table, sampling: SamplingConfig, k: int, seed: int
    ) -> pa.Table:
        assert self._sampler is not None, "this rank samples"
        tokenizer, prompt = self._policy.tokenizer, self._config.prompt
        return rollouts_table(problems, self._sampler, tokenizer, prompt, sampling, k, seed)

    def validation(self, splits: dict[str, pa.Table], run: Path) -> Validation:
        """Evaluations on held-out problems with the engines of the online steps."""
        sample = self._sample_held_out
        return Validation(self._config, splits, sample, self._verifier, run, self._ranks)

    def _sample_held_out(
        self, problems: pa.Table, sampling: SamplingConfig, k: int, seed: int
    ) -> pa.Table | None:
        def sample(own: pa.Table) -> pa.Table:
            return self._rollouts(own, sampling, k, seed)

        self._follow()
        made = None
        if self._share:
            made = sample_shares(self._ranks, problems, sample)
        elif self._ranks.first:
            made = sample(problems)
        self._rest()
        return made

    def _write(self, step: int, tables: dict[str, pa.Table]) -> None:
        # Rollouts that are not annotated come last; each table has a row for every rollout.
        annotated = tables.get("annotations", ANNOTATIONS.empty())
        rollouts, verdicts = (
            tables[role].slice(len(annotated)) for role in ("rollouts", "verdicts")
        )
        skipped = skipped_annotations(
            tables["problems"], rollouts, verdicts, self._config.online.segment
        )
        tables = tables | {
            "annotations": pa.concat_tables([annotated, skipped], promote_options="default")
        }
        for role, draft in self._drafts.items():
            # Finished if the same run was made before and its own folder was removed.
            if isinstance(draft, Draft):
                # A resumed run makes the steps after its checkpoint again.
                draft.write_part(step - self._first, tables[role], replace=True)

    def finish(self) -> dict[str, str]:
        """Make the drafts datasets; their refs by table."""
        steps = self._config.online.steps
        refs = {}
        for role, draft in self._drafts.items():
            # A run killed between here and its own manifest finds some of them finished.
            if isinstance(draft, Draft):
                draft = draft.finish(steps, self._summary(role, draft))
            refs[role] = draft.ref
        return refs

    def _summary(self, role: str, draft: Draft) -> dict[str, Any]:
        if role == "verdicts":
            return judges_bills(self._config.online.verify, self._run)
        return self._annotated(draft) if role == "annotations" else {}

    def _annotated(self, annotations: Draft) -> dict[str, Any]:
        annotator = self._config.online.annotator
        summary = summarize(
            annotations.read_part(part) for part in range(self._config.online.steps)
        )
        if self._annotator is None or not engine_of(annotator).asks_endpoint:
            return summary
        return summary | read_bill(self._journal, find_price(cast(Any, annotator))).figures()

    def close(self) -> None:
        for opened in self._open:
            if opened is not None:
                opened.close()


def _show_cost(cost: object = None, **_: object) -> None:
    """What the annotator has cost so far, on the training's line."""
    show_fields(cost=cost)


def _online_drafts(store: Store, run: Draft, problems: Dataset) -> dict[str, Any]:
    """A draft per table with the tables before it as inputs, the same lineage as the stages'."""
    drafts: dict[str, Any] = {}
    for role, stage, contract, roles in _ONLINE_TABLES:
        inputs = {r: drafts[r] for r in roles} or {"problems": problems}
        drafts[role] = store.begin(stage, {"online": run.ref}, inputs, contract)
    return drafts
