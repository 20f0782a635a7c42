"""Stage train: offline steps over routed tables, then online steps on fresh rollouts.

The dataset's folder holds checkpoints/, metrics.jsonl and tensorboard/; the tables that online
steps make are datasets of their own stages, one part per step, listed in the summary.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.store import Dataset, Draft, Store, content_hash
from ..schemas.configs import SelfAnnotator, TrainConfig
from ..schemas.errors import InputError
from ..schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from ..trace.align import byte_table
from ..trace.checkpoint import latest_checkpoint, restore, save_checkpoint, save_model
from ..trace.online import OnlineSource
from ..trace.policy import Policy, load_policy, load_tokenizer, vocab_fingerprint, weights_revision
from ..trace.prompt import student_prompt
from ..trace.rules import needs_annotations, rule_source
from ..trace.trainer import Trainer
from .annotate import annotator_identity
from .annotators import open_annotator
from .annotators.rows import skipped_annotations
from .convert import check_vocabulary
from .models import resolve_policy
from .rollout import rollouts_table
from .samplers import open_sampler
from .samplers.transformers import TransformersPolicySampler
from .stage import progress_bar
from .tracking import Tracker, read_metrics
from .verify import MathVerifier

FINAL = "checkpoints/final"
# Online tables: role, stage, contract, and the roles that the dataset names as its inputs.
_ONLINE_TABLES = (
    ("problems", "problems", PROBLEMS, ()),
    ("rollouts", "rollout", ROLLOUTS, ("problems",)),
    ("verdicts", "verify", VERDICTS, ("rollouts",)),
    ("annotations", "annotate", ANNOTATIONS, ("verdicts", "rollouts", "problems")),
    ("routed", "convert", ROUTED, ("annotations", "verdicts", "rollouts", "problems")),
)


def begin(config: TrainConfig, store: Store) -> tuple[dict[str, Dataset], Draft | Dataset]:
    """Find and check the inputs, and open the run: finished, or a draft to go on with.

    Raises:
        InputError: whatever can be known to be wrong before the first step.
    """
    path = resolve_policy(config.policy.path)
    tokenizer = load_tokenizer(path)
    student_prompt(tokenizer, config.prompt, "")
    semantic = config.semantic()
    semantic["policy"] = weights_revision(path)
    inputs = {}
    if config.offline.steps:
        inputs["routed"] = routed = store.get(config.offline.routed, ROUTED)
        _check_routed(config, routed, vocab_fingerprint(tokenizer))
        del semantic["offline"]["routed"]
    if config.online.steps:
        inputs["problems"] = problems = store.get(config.online.problems, PROBLEMS)
        if needs_annotations(config.online.routing):
            semantic["online"]["annotator"] |= annotator_identity(
                config.online.annotator, problems, in_training=True
            )
        else:
            del semantic["online"]["annotator"]
        del semantic["online"]["problems"]
        if (source := rule_source(config.online.routing.rule)) is not None:
            semantic["online"]["rule"] = content_hash(source)
    else:
        del semantic["online"]
    store.local_root()
    return inputs, store.begin("train", semantic, inputs, None, config.model_dump(mode="json"))


def run(config: TrainConfig, store: Store) -> Dataset:
    """Train to the end, from the last checkpoint of a run that was stopped."""
    inputs, target = begin(config, store)
    if isinstance(target, Dataset):
        return target
    path = resolve_policy(config.policy.path)
    policy = load_policy(path, config.policy.device, config.policy.precision, trainable=True)
    trainer = Trainer(policy, config)
    checkpoints = target.local_path("checkpoints")
    if (checkpoint := latest_checkpoint(checkpoints)) is not None:
        restore(trainer, checkpoint)
    offline = OfflineReader(inputs["routed"], config) if config.offline.steps else None
    online = OnlineTables(config, store, target, inputs, policy) if config.online.steps else None
    tracker = Tracker(target.local_path(), trainer.state.step)
    try:
        with progress_bar("train", trainer.total_steps, "steps") as advance:
            advance(trainer.state.step)
            for metrics in trainer.run(offline, online.source if online else None):
                tracker.log(metrics)
                advance(
                    1, reward=f"{metrics.get('reward', 0):.2f}", kl=f"{metrics['kl_weight']:.2f}"
                )
                last = trainer.state.step == trainer.total_steps
                if last or trainer.state.step % config.checkpoint_every == 0:
                    save_checkpoint(trainer, checkpoints)
    finally:
        tracker.close()
        if online is not None:
            online.close()
    save_model(trainer, target.local_path("checkpoints") / "final")
    tables = online.finish() if online is not None else {}
    return target.finish(0, _summary(target, trainer, tables))


def _check_routed(config: TrainConfig, routed: Dataset, vocabulary: str) -> None:
    if routed.rows == 0:
        raise InputError(f"dataset {routed.ref} has no rows; make rollouts that can be scored")
    first = routed.read_part(0, ["vocab_fingerprint", "policy_name", "policy_step"])
    check_vocabulary(first, vocabulary, config.policy.path)
    # The student is `step` steps past its base at each offline step, the table stays where it is.
    oldest = config.offline.steps - 1 - (pc.min(first["policy_step"]).as_py() or 0)
    if oldest > config.offline.max_staleness:
        raise InputError(
            f"dataset {routed.ref}: the last offline step would be {oldest} steps past the policy "
            f"that sampled it, offline.max_staleness is {config.offline.max_staleness}; take fewer "
            "offline steps, fresh rollouts, or raise the limit"
        )


class OfflineReader:
    """Groups of a routed dataset by step: parts in shuffled order, groups shuffled within a part.

    Stateless in the step, so a resumed run reads what an undisturbed one would.
    """

    def __init__(self, routed: Dataset, config: TrainConfig) -> None:
        self._routed = routed
        self._per_step = config.groups_per_step
        self._seed = config.seed
        self._groups = [
            list(dict.fromkeys(routed.read_part(part, ["group_id"])["group_id"].to_pylist()))
            for part in range(routed.parts)
        ]
        self._part = lru_cache(maxsize=2)(routed.read_part)

    def __call__(self, step: int) -> pa.Table:
        size = sum(map(len, self._groups))
        wanted = range(step * self._per_step, (step + 1) * self._per_step)
        by_part: dict[int, list[str]] = {}
        for position in wanted:
            part, group = self._order(position // size)[position % size]
            by_part.setdefault(part, []).append(group)
        return pa.concat_tables(
            table.filter(pc.is_in(table["group_id"], pa.array(groups)))
            for part, groups in by_part.items()
            if (table := self._part(part)) is not None
        )

    def _order(self, epoch: int) -> list[tuple[int, str]]:
        rng = np.random.default_rng([self._seed, epoch])
        order = []
        for part in rng.permutation(len(self._groups)).tolist():
            groups = self._groups[part]
            order += [(part, groups[i]) for i in rng.permutation(len(groups)).tolist()]
        return order


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
    ) -> None:
        online = config.online
        self._config = config
        self._first = config.offline.steps
        self._problems = inputs["problems"].read()
        self._sampler = TransformersPolicySampler(policy, config.sampler.batch_tokens)
        self._tokenizer = policy.tokenizer
        self._drafts = _online_drafts(store, run, inputs["problems"])
        self._engines = self._open_engines(run)
        self.source = OnlineSource(
            problems=self._step_problems,
            sample=self._sample,
            verifier=self._engines.verifier,
            annotator=self._engines.annotator,
            bytes=byte_table(policy.tokenizer),
            routing=online.routing,
            write=self._write,
            refill_rounds=online.refill_rounds,
        )

    def _open_engines(self, run: Draft) -> _Engines:
        online = self._config.online
        if not needs_annotations(online.routing):
            return _Engines(MathVerifier(online.verify), None, None)
        sampler, tokenizer, own = self._sampler, self._tokenizer, None
        annotator = online.annotator
        if isinstance(annotator, SelfAnnotator) and annotator.policy is not None:
            sampler, tokenizer = open_sampler(annotator.sampler, annotator.policy)
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
        rest = (tables[role].slice(len(annotated)) for role in ("rollouts", "verdicts"))
        skipped = skipped_annotations(tables["problems"], *rest)
        tables = tables | {"annotations": pa.concat_tables([annotated, skipped])}
        for role, draft in self._drafts.items():
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


def _summary(run: Draft, trainer: Trainer, tables: dict[str, str]) -> dict[str, Any]:
    metrics = read_metrics(run.local_path() / "metrics.jsonl")
    tail = max(len(metrics) // 10, 1)

    def mean(lines: list[dict[str, Any]], name: str) -> float:
        return round(float(np.mean([line[name] for line in lines if name in line])), 4)

    return {
        "steps": trainer.state.step,
        "pass_rate_first": mean(metrics[:tail], "pass_rate"),
        "pass_rate_last": mean(metrics[-tail:], "pass_rate"),
        "kl_exposure": trainer.state.kl_exposure,
        "seconds_per_step": mean(metrics, "seconds"),
        "checkpoint": FINAL,
        "tables": tables,
    }
