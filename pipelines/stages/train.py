"""Stage train: offline steps over routed tables, then online steps on fresh rollouts.

The registry of stages, the flows and the study call `run`; a dry run calls `begin` alone. The
dataset's folder holds checkpoints/ (of a finished run: the final model), metrics.jsonl and
tensorboard/. The tables of online steps are datasets of their own stages, one part per step, listed
in the summary.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import OwnSampler, TrainConfig
from ...schemas.errors import InputError
from ...schemas.tables import PROBLEMS, ROUTED, SCORES
from ...trace.checkpoint import resume, save_model
from ...trace.identity import model_revision
from ...trace.other_teacher import check_teacher, load_teacher
from ...trace.policy import choose_device, load_policy, load_tokenizer, vocab_fingerprint
from ...trace.prompt import student_prompt
from ...trace.ranks import Ranks, join_ranks
from ...trace.retention import prune_checkpoints
from ...trace.route import needs_annotations, require_reflections, require_scores, rule_source
from ...trace.schedule import kl_weight
from ...trace.sharding import skeleton
from ...trace.trained import SamplingCopy, Trained
from ...trace.trainer import Trainer
from ..annotators import engine_of
from ..models import resolve_policy, teacher_files
from ..progress import progress_bar
from ..run_metrics import METRICS, read_metrics
from ..samplers import sampling_engine
from ..samplers.context_length import require_room, require_short_rows
from ..samplers.vocabulary import check_vocabulary
from ..terminal import say
from ..training.loop import train_steps
from ..training.offline import OfflineReader
from ..training.online_tables import OnlineTables
from ..training.plan_table import here, memory_line
from ..training.problem_pool import pool_inputs
from ..training.scored import check_scores_fit
from ..training.tidying import tidy
from ..training.tracking import check_tracker
from ..training.validation import FOLDER
from ..verifiers.registry import verifier_identity
from .base import SingleStage, print_waiting

FINAL = "checkpoints/final"


def begin(config: TrainConfig, store: Store) -> tuple[dict[str, Dataset], Draft | Dataset]:
    """Find and check the inputs, and open the run: finished, or a draft to continue.

    Raises:
        InputError: everything that can be found wrong before a model is loaded.
    """
    check_tracker(config.tracker)
    path = resolve_policy(config.policy.path)
    tokenizer = load_tokenizer(path, config.policy.trust_remote_code)
    student_prompt(tokenizer, config.prompt, "")
    semantic = config.semantic()
    semantic["policy"] = model_revision(path, config.policy.trust_remote_code)
    # Not the engine's addresses and settings: a stopped run may continue on other servers.
    sampler = config.sampler.semantic()
    own = isinstance(config.sampler, OwnSampler)
    semantic["sampler"] = sampler if own else {"engine": sampler["engine"]}
    if config.teacher.model is not None:
        files = teacher_files(config.teacher.model)
        trusted = config.teacher.model.trust_remote_code
        semantic["teacher"]["model"] = check_teacher(files, path, trusted)
    inputs = {}
    if config.offline.steps:
        inputs["routed"] = routed = store.get(config.offline.routed, ROUTED)
        _check_routed(config, routed, vocab_fingerprint(tokenizer))
        require_short_rows(routed, config.policy)
        del semantic["offline"]["routed"]
        if config.teacher.scores is not None:
            inputs["scores"] = scores = store.get(config.teacher.scores, SCORES)
            check_scores_fit(config, routed, scores)
            del semantic["teacher"]["scores"]
    elif config.teacher.scores is not None:
        raise InputError(
            "teacher.scores: are of a routed dataset, and offline.steps is 0; give offline steps, "
            "or leave teacher.scores out"
        )
    if config.online.steps:
        inputs["problems"] = problems = store.get(config.online.problems, PROBLEMS)
        judges = verifier_identity(config.online.verify)  # each reward is there and fits
        if config.online.verify.judges:
            semantic["online"]["verifiers"] = judges
        require_scores(config.online.routing, None)
        if needs_annotations(config.online.routing):
            annotator = config.online.annotator
            require_reflections(
                config.online.routing,
                getattr(annotator, "reflection", False),
                "set online.annotator.reflection=true",
            )
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
    tables = ("routed", "scores")
    if problems := [dataset for role, dataset in inputs.items() if role not in tables]:
        context = sampling_engine(config.sampler, config.policy).context()
        for dataset in problems:
            require_room(dataset, config.policy, context, config.prompt, limit)
    if config.online.steps and config.online.pool is not None:
        inputs |= pool_inputs(config, store, inputs["problems"])
        del semantic["online"]["pool"]["rates"]  # the dataset's id stands for it
    store.files.local_root()
    return inputs, store.begin("train", semantic, inputs, None, config.model_dump(mode="json"))


def run(
    config: TrainConfig, store: Store, announce: Callable[[str], None] = lambda line: None
) -> Dataset:
    """Train to the end, from the last checkpoint of a run that was stopped.

    Under torchrun every rank calls. The first one finds and checks the inputs, holds the run's lock
    and writes the store; the others get its result.

    announce: gets a line about the memory that the run will need, on the first rank, unless the run
    is finished.

    Raises:
        InputError: see `begin`.
        Stopped, Interrupted: SIGTERM or Ctrl-C; a checkpoint of the last finished step is on disk.
    """
    ranks = join_ranks(choose_device(config.policy.device).type, config.wait_hours)
    with ExitStack() as stack:
        opened = None
        if ranks.first:
            inputs, target = begin(config, store)
            if locked := isinstance(target, Draft):
                target = stack.enter_context(target.locked(print_waiting))
            if isinstance(target, Draft):
                announce(memory_line(config, ranks.count))
            else:
                tidy(target, config, locked)
            opened = inputs, target
        inputs, target = ranks.broadcast(opened)
        if isinstance(target, Dataset):
            return target
        return _run(config, store, ranks, inputs, target)


def _run(
    config: TrainConfig, store: Store, ranks: Ranks, inputs: dict[str, Dataset], target: Draft
) -> Dataset:
    checkpointed = config.gradient_checkpointing
    if checkpointed == "auto":
        # One number for all ranks, whatever cards they have.
        checkpointed = ranks.broadcast(here(config, ranks.count).recomputed_layers)
    policy = load_policy(
        resolve_policy(config.policy.path),
        config.policy.device,
        config.policy.precision,
        trainable=True,
        lora=config.lora,
        gradient_checkpointing=checkpointed,
        trust_remote_code=config.policy.trust_remote_code,
        ranks=ranks,
    )
    whole = None
    follows = sampling_engine(config.sampler, config.policy).follows
    if config.online.steps and not follows and ranks.shards(policy.compute_dtype):
        whole = SamplingCopy(policy, skeleton(policy.model))
    taught_by = None
    if (other := config.teacher.model) is not None and config.schedule.w0:
        taught_by = load_teacher(teacher_files(other), policy, ranks, other.trust_remote_code)
    ranks.wait()  # loading takes some longer than others
    trainer = Trainer(policy, config, ranks, taught_by)
    del taught_by
    resumed = resume(trainer, target.local_path("checkpoints"))
    if resumed is not None and ranks.first:
        prune_checkpoints(resumed, config.checkpoints_kept)
    offline = online = validation = None
    if config.offline.steps:
        known = policy.model.get_input_embeddings().num_embeddings
        offline = OfflineReader(inputs["routed"], config, known, ranks, inputs.get("scores"))
    if config.online.steps:
        trained = Trained(policy, trainer.student, config.loss.fp32_logits)
        online = OnlineTables(config, store, target, inputs, trained, ranks, whole)
        if config.validation is not None:
            names = config.validation.problems
            splits = {name: inputs[f"validation_{name}"].read() for name in names}
            validation = online.validation(splits, target.local_path())
    try:
        with progress_bar("train", trainer.total_steps, "steps") as progress:
            source = online and online.source
            train_steps(trainer, target, offline, source, validation, progress)
    finally:
        if online is not None:
            online.close()
    ranks.wait()  # the first had its annotator to close
    save_model(trainer, target.local_path(FINAL))
    finished = None
    if ranks.first:
        tables = online.finish() if online is not None else {}
        summary = _summary(target, trainer, tables)
        if online is not None and online.pool is not None:
            summary["pool"] = online.pool.figures()
        finished = target.finish(0, summary, _lasting_files(target))
        tidy(finished, config, locked=True)
    return ranks.broadcast(finished)


def _check_routed(config: TrainConfig, routed: Dataset, vocabulary: str) -> None:
    _check_signal(config, routed)
    first = routed.read_part(0, ["vocab_fingerprint", "policy_name", "policy_step"])
    check_vocabulary(first, vocabulary, config.policy.path)
    # At each offline step the student is `step` steps past its base; the table's policy is fixed.
    oldest = config.offline.steps - 1 - (pc.min(first["policy_step"]).as_py() or 0)
    if oldest > config.offline.max_staleness:
        raise InputError(
            f"dataset {routed.ref}: the last offline step would be {oldest} steps past the policy "
            f"that sampled it, offline.max_staleness is {config.offline.max_staleness}; take fewer "
            "offline steps, fresh rollouts, or raise the limit"
        )


def _check_signal(config: TrainConfig, routed: Dataset) -> None:
    """Raises InputError if no offline step could change a weight."""
    rewarded = config.loss.grpo
    taught = any(kl_weight(step, config.schedule) > 0 for step in range(config.offline.steps))
    for part in range(routed.parts):
        table = routed.read_part(part, ["advantage", "route"])
        if rewarded and np.count_nonzero(table["advantage"].to_numpy()):
            return
        if taught and np.count_nonzero(pc.list_flatten(table["route"]).to_numpy()):
            return
    raise InputError(
        f"dataset {routed.ref}: no offline step would learn from its {routed.rows} sequences: "
        "the rewards of each group are equal, and no routed token has a weight; sample harder or "
        "easier problems, larger groups, or route tokens (routing, schedule.w0)"
    )


def _lasting_files(run: Draft) -> list[str]:
    """The files of a finished run: the model, metrics and validation, without checkpoints."""
    folder = run.local_path()
    found = [path for path in folder.joinpath(FINAL).rglob("*") if path.is_file()]
    found += (folder / FOLDER).glob("*.parquet")
    return [str(path.relative_to(folder)) for path in [folder / METRICS, *sorted(found)]]


def _summary(run: Draft, trainer: Trainer, tables: dict[str, str]) -> dict[str, Any]:
    metrics = read_metrics(run.local_path() / METRICS)
    tail = max(len(metrics) // 10, 1)

    def mean(lines: list[dict[str, Any]], name: str) -> float | None:
        """None if no step has the metric: a step whose rollouts all lack a verdict has no pass
        rate.
        """
        values = [line[name] for line in lines if name in line]
        return round(float(np.mean(values)), 4) if values else None

    return {
        "steps": trainer.state.step,
        "pass_rate_first": mean(metrics[:tail], "pass_rate"),
        "pass_rate_last": mean(metrics[-tail:], "pass_rate"),
        "kl_exposure": trainer.state.kl_exposure,
        "seconds_per_step": mean(metrics, "seconds"),
        "checkpoint": FINAL,
        "tables": tables,
    }


def _run_and_print(config: TrainConfig, store: Store) -> Dataset:
    return run(config, store, say)


STAGE = SingleStage("train", TrainConfig, _run_and_print)
