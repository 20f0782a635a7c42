"""Stage convert: annotated rollouts become routed sequences; the registry loads its `STAGE`."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.dataset import why_empty
from ...data.parts import part_name
from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import ConvertConfig
from ...schemas.errors import InputError, RowFault
from ...schemas.labels import AnnotationStatus, Route
from ...schemas.tables import ANNOTATIONS, ROUTED, SCORES
from ...trace.responses import to_numpy
from ...trace.route import (
    needs_annotations,
    require_reflections,
    require_rule,
    require_scores,
    rule_source,
)
from ...trace.routed import routed_table
from ...trace.rules import RULES, SCORED
from ...trace.vocabulary import Vocabulary, load_vocabulary
from ..models import resolve_policy
from ..samplers.trainable import require_trainable
from ..samplers.vocabulary import check_token_ids, check_vocabulary
from .base import PartMaker, Plan, Stage

logger = logging.getLogger(__name__)

# Statuses of rows whose annotator has answered.
_ANNOTATED = {AnnotationStatus.OK, AnnotationStatus.EMPTY, AnnotationStatus.ABSTAINED}


def _resolve(config: ConvertConfig, store: Store) -> Plan:
    annotations = store.get(config.annotations, ANNOTATIONS)
    if needs_annotations(config.routing):
        _check_annotator(annotations)
        require_reflections(
            config.routing,
            "reflection" in annotations.read_part(0).column_names,
            f"annotate again with annotator.reflection=true ({annotations.ref} has none)",
        )
    verdicts = annotations.input("verdicts")
    rollouts = verdicts.input("rollouts")
    for dataset in (annotations, verdicts):
        if dataset.parts != rollouts.parts:
            raise InputError(
                f"dataset {dataset.ref} has {dataset.parts} parts, its rollouts {rollouts.ref} "
                f"have {rollouts.parts}; make it again (`trace-opd import` for a table of your own)"
            )
    vocabulary = _vocabulary(config)
    makers = rollouts.read_part(0, ["policy_name", "vocab_fingerprint"])
    check_vocabulary(makers, vocabulary.fingerprint, config.policy.path)
    _check_verdicts(verdicts)
    require_trainable(rollouts)
    inputs = {
        "annotations": annotations,
        "verdicts": verdicts,
        "rollouts": rollouts,
        "problems": rollouts.input("problems"),
    }
    pieces = [piece.hex() for piece in vocabulary.pieces.pieces]
    if config.scores is None:
        require_scores(config.routing, None)
    else:
        inputs["scores"] = _scores(config, store, rollouts)
    semantic: dict[str, Any] = {
        "routing": config.routing.semantic(),
        "tokens": content_hash(pieces),  # which segment a token belongs to follows from its bytes
    }
    if (source := rule_source(config.routing.rule)) is not None:
        semantic["rule"] = content_hash(source)
    config = config.model_copy(update={"routing": config.routing.located()})
    return Plan(config, inputs, semantic, annotations.parts, work=annotations.part_rows)


def _scores(config: ConvertConfig, store: Store, rollouts: Dataset) -> Dataset:
    """The scores that the rule reads: of any routed dataset of these rollouts, whose parts are the
    rollouts' parts.

    Raises:
        InputError: scores of other rollouts, or a rule that reads none.
    """
    scores = store.get(str(config.scores), SCORES)
    rule = config.routing.rule
    if rule in RULES and rule not in SCORED:
        raise InputError(
            f"scores: routing.rule {rule} reads none; leave scores out, or use one of the rules "
            f"{', '.join(SCORED)}"
        )
    theirs = scores.input("routed").manifest["inputs"].get("rollouts")
    if theirs != rollouts.ref or scores.parts != rollouts.parts:
        raise InputError(
            f"dataset {scores.ref}: scores rollouts {theirs}, and these annotations are of "
            f"{rollouts.ref}; score a routed dataset of the same rollouts"
        )
    require_scores(config.routing, scores.read_part(0).column_names)
    return scores


def _vocabulary(config: ConvertConfig) -> Vocabulary:
    path = resolve_policy(config.policy.path, weights=False)
    state = tuple(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(path).glob("*"))
        if file.is_file()
    )
    return _load_vocabulary(path, config.policy.trust_remote_code, state)


@lru_cache(maxsize=1)
def _load_vocabulary(path: str, trust_remote_code: bool, state: Any) -> Vocabulary:
    """state: changes with the folder's files."""
    vocabulary = load_vocabulary(path, trust_remote_code)
    if vocabulary.size is None:
        raise InputError(
            f"policy {path}: its config.json names no number of token ids (vocab_size); give the "
            "folder of the model that sampled"
        )
    return vocabulary


def _check_annotator(annotations: Dataset) -> None:
    """Raises InputError if no row is annotated: the routing would leave every token to GRPO."""
    annotator = annotations.manifest["config"].get("annotator", {})
    if annotator.get("engine") == "none":
        raise InputError(
            f"dataset {annotations.ref}: annotator none marked nothing, and this routing needs "
            "annotations; annotate with another engine, or set routing.rule and teacher_context to "
            "what needs none"
        )
    found = _none_usable(
        annotations, "status", lambda status: not _ANNOTATED.isdisjoint(status.to_pylist())
    )
    if found:
        raise InputError(
            f"dataset {annotations.ref}: none of its {annotations.rows} rows is annotated "
            f"({found}), and this routing needs annotations; annotate again, or set "
            "routing.rule and teacher_context to what needs none"
        )


def _check_verdicts(verdicts: Dataset) -> None:
    """Raises InputError if no response has a reward."""
    if found := _none_usable(verdicts, "reward", lambda reward: reward.null_count < len(reward)):
        raise InputError(
            f"dataset {verdicts.ref}: none of its {verdicts.rows} responses has a reward "
            f"({found}), so none can be trained on; verify again with other limits, or mend "
            "the gold answers"
        )


def _none_usable(dataset: Dataset, column: str, usable: Callable[[Any], bool]) -> str:
    """The counts of its rows by status if no row is usable by a column; else an empty string.

    It reads up to the first part with a usable row, which is part 0 of most datasets: a fault of a
    later part is that part's alone, and may be mended while the others are made.
    """
    found: Counter[str | None] = Counter()
    for part in range(dataset.parts):
        table = dataset.read_part(part, sorted({"status", column}))
        if usable(table[column]):
            return ""
        found.update(table["status"].to_pylist())
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


def _left_out(plan: Plan) -> dict[str, int]:
    """Why rollouts are not in the routed table: counts by reason, without zeros."""
    counts: Counter[str] = Counter()
    verdicts, rollouts = plan.inputs["verdicts"], plan.inputs["rollouts"]
    for part in range(plan.parts):
        scored = to_numpy(pc.is_valid(verdicts.read_part(part, ["reward"])["reward"]))
        own = to_numpy(rollouts.read_part(part, ["on_policy"])["on_policy"])
        counts["unscored"] += int(np.count_nonzero(~scored))
        counts["without token ids"] += int(np.count_nonzero(scored & ~own))
    return {reason: count for reason, count in counts.items() if count}


def _check(config: ConvertConfig, dataset: Dataset) -> None:
    """Raises InputError if the dataset is empty; warns if annotations routed none of its tokens."""
    if not dataset.rows:
        raise InputError(f"{dataset.ref} is finished, but empty: {why_empty(dataset)}")
    tokens = dataset.summary["tokens"]
    plain = dataset.summary["tokens_per_route"][Route.GRPO.name.lower()]
    if needs_annotations(config.routing) and plain == tokens:
        logger.warning(
            "%s: no span or label of %s routes a token, so all its %d tokens are plain GRPO's",
            dataset.ref,
            dataset.manifest["inputs"]["annotations"],
            tokens,
        )


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    config: ConvertConfig = plan.config
    require_rule(config.routing.rule, plan.semantic.get("rule"), content_hash)
    vocabulary = _vocabulary(config)
    assert vocabulary.size is not None, "_load_vocabulary checks it"
    size, roles = vocabulary.size, ("problems", "rollouts", "verdicts", "annotations")

    def make(part: int) -> pa.Table:
        problems, rollouts, verdicts, annotations = (
            plan.inputs[role].read_part(part) for role in roles
        )
        check_token_ids(rollouts, size, f"{plan.inputs['rollouts'].ref}, part {part}")
        scores = plan.inputs.get("scores")
        scored = None if scores is None else scores.read_part(part)
        try:
            return routed_table(
                problems,
                rollouts,
                verdicts,
                annotations,
                vocabulary.pieces,
                config.routing,
                scores=scored,
            )
        except RowFault as fault:
            file = f"{plan.inputs[fault.table].ref}/{part_name(part)}"
            if not fault.rollout_id or fault.table == "scores":  # it has rows of its own
                raise InputError(f"{file}: {fault}") from None
            row = rollouts["rollout_id"].to_pylist().index(fault.rollout_id)
            raise InputError(
                f"{file}, row {row}, rollout {fault.rollout_id}: {fault.what}"
            ) from None

    yield make


@dataclass(frozen=True)
class _Digest:
    """A part: tokens by route; coverage, (rows,) float32; rows with an advantage."""

    routed: np.ndarray
    coverage: np.ndarray
    signal: int


def _digest(table: pa.Table) -> _Digest:
    routes = pc.list_flatten(table["route"]).to_numpy()
    return _Digest(
        np.array([np.count_nonzero(routes == int(route)) for route in Route], dtype=np.int64),
        table["coverage"].to_numpy(),
        int(np.count_nonzero(table["advantage"].to_numpy())),
    )


def _summarize(plan: Plan, digests: Iterator[_Digest]) -> dict:
    parts = list(digests)
    routed = sum((part.routed for part in parts), np.zeros(len(Route), dtype=np.int64))
    coverage = np.concatenate([np.empty(0, dtype=np.float32), *(part.coverage for part in parts)])
    rows = len(coverage)
    left_out = _left_out(plan)
    if beyond := plan.inputs["rollouts"].rows - rows - sum(left_out.values()):
        left_out["truncated or without tokens"] = beyond
    return {
        "sequences": rows,
        "tokens": int(routed.sum()),
        "tokens_per_route": {r.name.lower(): int(routed[r]) for r in Route},
        "mean_coverage": round(float(np.mean(coverage, dtype=np.float64)), 4) if rows else None,
        "sequences_with_advantage": sum(part.signal for part in parts),
    } | ({"left_out": left_out} if left_out else {})


STAGE = Stage(
    "convert",
    ConvertConfig,
    ROUTED,
    _resolve,
    _open,
    _summarize,
    ("route", "coverage", "advantage"),
    _digest,
    check=_check,
)
