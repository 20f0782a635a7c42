"""Stage train: offline steps over routed tables, then online steps on fresh rollouts.

The dataset's folder holds checkpoints/, metrics.jsonl and tensorboard/; the tables that online
steps make are datasets of their own stages, one part per step, listed in the summary.
"""

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import TrainConfig
from ...schemas.errors import EngineEnded, InputError, Stopped
from ...schemas.tables import PROBLEMS, ROUTED
from ...trace.checkpoint import prune_checkpoints, resume, save_checkpoint, save_model
from ...trace.identity import model_revision
from ...trace.packing import PackedModel
from ...trace.policy import Policy, choose_device, load_policy, load_tokenizer, vocab_fingerprint
from ...trace.prompt import student_prompt
from ...trace.ranks import Ranks, copy_weights, join_ranks
from ...trace.route import needs_annotations, rule_source
from ...trace.trainer import Metrics, Online, Trainer
from ..annotators import engine_of
from ..models import resolve_policy
from ..progress import progress_bar
from ..samplers.context_length import require_room, require_short_rows
from ..samplers.vocabulary import check_vocabulary
from ..training.offline import OfflineReader
from ..training.online import OnlineTables
from ..training.tracking import METRICS, Tracker, check_tracker, read_metrics
from ..training.validation import FOLDER, LOOKS, Validation
from .base import SingleStage, print_waiting

FINAL = "checkpoints/final"


def begin(config: TrainConfig, store: Store) -> tuple[dict[str, Dataset], Draft | Dataset]:
    """Find and check the inputs, and open the run: finished, or a draft to go on with.

    Raises:
        InputError: whatever can be known to be wrong before the first step.
    """
    check_tracker(config.tracker)
    path = resolve_policy(config.policy.path)
    tokenizer = load_tokenizer(path, config.policy.trust_remote_code)
    student_prompt(tokenizer, config.prompt, "")
    semantic = config.semantic()
    semantic["policy"] = model_revision(path, config.policy.trust_remote_code)
    # Where an engine runs and what it is given to run with: a run may go on at other servers.
    semantic["sampler"] = {"engine": config.sampler.engine}
    inputs = {}
    if config.offline.steps:
        inputs["routed"] = routed = store.get(config.offline.routed, ROUTED)
        _check_routed(config, routed, vocab_fingerprint(tokenizer))
        require_short_rows(routed, config.policy)
        del semantic["offline"]["routed"]
    if config.online.steps:
        inputs["problems"] = problems = store.get(config.online.problems, PROBLEMS)
        if needs_annotations(config.online.routing):
            annotator = config.online.annotator
            semantic["online"]["annotator"] |= engine_of(annotator).identity(
                annotator, problems, True
            )
        else:
            del semantic["online"]["annotator"]
        del semantic["online"]["problems"]
        if (source := rule_source(config.online.routing.rule)) is not None:
            semantic["online"]["rule"] = content_hash(source)
    else:
        del semantic["online"]
    if config.validation is None:
        del semantic["validation"]
    else:
        if not config.validation.problems:
            raise InputError(
                "validation.problems: is empty; name a dataset, e.g. {test: problems/<id>}"
            )
        for split, ref in config.validation.problems.items():
            inputs[f"validation_{split}"] = store.get(ref, PROBLEMS)
        semantic["validation"]["problems"] = sorted(config.validation.problems)
    limit = config.online.sampling.max_new_tokens
    for role, asked in inputs.items():
        if role != "routed":
            require_room(asked, config.policy, config.sampler, config.prompt, limit)
    store.files.local_root()
    return inputs, store.begin("train", semantic, inputs, None, config.model_dump(mode="json"))


def run(config: TrainConfig, store: Store) -> Dataset:
    """Train to the end, from the last checkpoint of a run that was stopped.

    Under torchrun every rank calls; the first one reads and writes the store.

    Raises:
        Stopped: SIGTERM came; a checkpoint of the last finished step is on disk.
    """
    ranks = join_ranks(choose_device(config.policy.device).type)
    with ExitStack() as stack:
        # The first opens the run and holds it; the others find it there.
        opened = _hold(config, store, ranks, stack) if ranks.first else None
        ranks.broadcast(None)
        inputs, target = opened or begin(config, store)
        if isinstance(target, Dataset):
            return target
        return _run(config, store, ranks, inputs, target)


def _hold(
    config: TrainConfig, store: Store, ranks: Ranks, stack: ExitStack
) -> tuple[dict[str, Dataset], Draft | Dataset]:
    inputs, target = begin(config, store)
    # Ranks that wait for a broadcast give up after minutes; another run may take days.
    waits = print_waiting if ranks.count == 1 else _refuse
    if isinstance(target, Draft):
        target = stack.enter_context(target.locked(waits))
    return inputs, target


def _refuse(who: str) -> None:
    raise InputError(f"{who}; wait for its end and give this command again")


def _run(
    config: TrainConfig, store: Store, ranks: Ranks, inputs: dict[str, Dataset], target: Draft
) -> Dataset:
    policy = load_policy(
        resolve_policy(config.policy.path),
        config.policy.device,
        config.policy.precision,
        trainable=True,
        lora=config.lora,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.policy.trust_remote_code,
    )
    replica = _replica(policy) if ranks.count > 1 and config.online.steps else None
    trainer = Trainer(policy, config, ranks)
    checkpoints = target.local_path("checkpoints")
    resumed = resume(trainer, checkpoints)
    if resumed is not None and ranks.first:
        prune_checkpoints(resumed, config.checkpoints_kept)
    offline = None
    if config.offline.steps:
        known = policy.model.get_input_embeddings().num_embeddings
        offline = OfflineReader(inputs["routed"], config, known)
    online = None
    if config.online.steps:
        online = OnlineTables(config, store, target, inputs, replica or policy, ranks)
    source = online.source if online is not None else None
    validation = None
    if config.validation is not None:
        if ranks.count > 1:
            raise InputError(
                "validation: runs on one rank; take it out under torchrun and evaluate checkpoints"
            )
        assert online is not None, "the config says so"
        splits = {name: inputs[f"validation_{name}"].read() for name in config.validation.problems}
        validation = online.validation(splits, target.local_path())
    if replica is not None:
        assert source is not None
        source = _Refreshed(source, trainer, replica, PackedModel(replica.model))
    try:
        _train(trainer, target, offline, source, validation)
    finally:
        if online is not None:
            online.close()
    save_model(trainer, target.local_path(FINAL))
    if not ranks.first:
        ranks.broadcast(None)
        return store.get(target.ref)
    tables = online.finish() if online is not None else {}
    finished = target.finish(0, _summary(target, trainer, tables), _lasting_files(target))
    ranks.broadcast(None)
    return finished


def _train(
    trainer: Trainer,
    target: Draft,
    offline: OfflineReader | None,
    online: Online | None,
    validation: Validation | None = None,
) -> None:
    """All remaining steps: metrics as they come, checkpoints now and then, one when told to stop."""
    config = trainer.config
    checkpoints = target.local_path("checkpoints")
    saved = trainer.state.step

    def save() -> int:
        save_checkpoint(trainer, checkpoints, config.checkpoints_kept)
        return trainer.state.step

    with (
        _asked_to_stop(trainer) as stopping,
        _tracker(trainer, target) as log,
        progress_bar("train", trainer.total_steps, "steps") as advance,
    ):
        advance(trainer.state.step)
        try:
            if validation is not None and trainer.state.step == 0:
                base = trainer.policy.info.revision
                validation.look_at_base(base, target.files.local_path(LOOKS))
            for metrics in trainer.run(offline, online, stopping):
                done = trainer.state.step
                if validation is not None and validation.due(done, trainer.total_steps):
                    metrics |= validation.look(done)
                log(metrics)
                reward, kl = metrics.get("reward", 0), metrics["kl_weight"]
                advance(1, reward=f"{reward:.2f}", kl=f"{kl:.2f}")
                last = trainer.state.step == trainer.total_steps
                if last or trainer.state.step % config.checkpoint_every == 0:
                    saved = save()
        except (Stopped, EngineEnded) as ended:
            engine = isinstance(ended, EngineEnded)
            if engine and trainer.ranks.count > 1:
                raise  # it is one rank's, and a checkpoint takes all of them
            if saved != trainer.state.step:
                save()
            if engine and not stopping():  # a signal to all processes of a run ends its engine too
                raise
            raise Stopped(
                f"stopped after {trainer.state.step} of {trainer.total_steps} steps; the same "
                "command goes on from there"
            ) from None


@contextmanager
def _asked_to_stop(trainer: Trainer) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, to any rank. Only a main thread can listen to signals."""
    asked: list[int] = []

    def stopping() -> bool:
        if trainer.ranks.count == 1:
            return bool(asked)
        return trainer.ranks.most([float(bool(asked))], trainer.policy.device)[0] > 0

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _tracker(trainer: Trainer, target: Draft) -> Iterator[Callable[[Metrics], None]]:
    """Where the first rank's metrics go; the others' are the same."""
    if not trainer.ranks.first:
        yield lambda _: None
        return
    config = trainer.config
    tracker = Tracker(
        target.local_path(),
        trainer.state.step,
        config.tracker,
        target.ref,
        config.model_dump(mode="json"),
    )
    try:
        yield tracker.log
    finally:
        tracker.close()


def _replica(policy: Policy) -> Policy:
    """A whole copy of the policy for sampling, where the trainer's own is sharded."""
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    return replace(policy, model=model)


@dataclass(frozen=True)
class _Refreshed:
    """An online source whose sampling policy gets the student's weights before each step."""

    source: Online
    trainer: Trainer
    replica: Policy
    packed: PackedModel  # the replica's, whose parameters are named as the student's

    def collect(
        self, step: int, with_teacher: bool, phase: Callable[[str], None]
    ) -> tuple[pa.Table, dict[str, float]]:
        phase("weights")
        copy_weights(self.trainer.student, self.packed)
        self.replica.info = self.trainer.policy.info
        return self.source.collect(step, with_teacher, phase)


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


def _lasting_files(run: Draft) -> list[str]:
    """What belongs to a finished run: the model, metrics and validation, no checkpoint on the way."""
    folder = run.local_path()
    found = [path for path in folder.joinpath(FINAL).rglob("*") if path.is_file()]
    found += (folder / FOLDER).glob("*.parquet")
    return [str(path.relative_to(folder)) for path in [folder / METRICS, *sorted(found)]]


def _summary(run: Draft, trainer: Trainer, tables: dict[str, str]) -> dict[str, Any]:
    metrics = read_metrics(run.local_path() / METRICS)
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


STAGE = SingleStage("train", TrainConfig, run)
